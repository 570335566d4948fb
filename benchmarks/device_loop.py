"""Play trials in one program on one core whenever asked to: what `benchmarks.rollouts --processes` starts.

Its argument is JSON, what `main` takes; a line on standard input asks for all trials once, the answer is a line of
JSON: decisions, and seconds of processor time.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from benchmarks import rollouts
from robovlms_jax import schema
from robovlms_jax.parallel import cpu
from robovlms_jax.runs import load


def main(core: int, tables: int, args: dict[str, Any]) -> None:
    """core: the number of this process's own among those that it may use, and of its part of the trials, as many as
    `tables`; args: of `rollouts.Args`."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core]})  # before JAX starts as many threads as there are cores
    cpu.keep_freed_memory()
    config = schema.from_dict(rollouts.Args, args)
    play = rollouts.device(*load.open_model(config.checkpoint), tables, config, core)
    for _ in sys.stdin:
        turn = play()
        print(json.dumps({"decisions": turn.decisions, "computing": turn.computing}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
