"""Play trials in the host's loop whenever asked to: what `benchmarks.rollouts` starts as processes of their own.

It keeps to what revisions of before there were rollouts on the device have, too, so that they can be measured by it:
`PYTHONPATH=<their checkout> python -P benchmarks/host_loop.py '{"checkpoint": ..., "tables": 16, ...}'`. A line on
standard input asks for all trials once; the answer is a line of JSON: decisions, and seconds of processor time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from robovlms_jax import schema
from robovlms_jax.control.execution import ExecutedBatch, Execution
from robovlms_jax.evaluation import chains, rollout
from robovlms_jax.parallel import cpu
from robovlms_jax.playtable.env import PlayTables
from robovlms_jax.policies.serving import BatchedVLAPolicy
from robovlms_jax.runs import load, saved


def main(settings: Mapping[str, Any]) -> None:
    """settings: `checkpoint`, `tables`, `image_size` (static, wrist), `horizon` and `max_steps`."""
    cpu.keep_freed_memory()
    schema.from_dict = saved.from_dict = _lenient(schema.from_dict)
    count, horizon = settings["tables"], settings["horizon"]
    model, params, encode = load.open_model(settings["checkpoint"])
    envs = PlayTables("D", count, image_sizes=dict(zip(("static", "wrist"), settings["image_size"], strict=True)))
    policy = ExecutedBatch(BatchedVLAPolicy(model, params, encode, slots=count), Execution("receding", horizon=horizon))
    criterion = rollout.SuccessCriterion(settings["max_steps"])
    trials = chains.chain_trials(chains.single_tasks(("lift_red_block_table",), count))
    for _ in sys.stdin:
        begin = time.process_time()
        decisions = sum(-(-result.steps[0] // horizon) for result in rollout.run(policy, envs, trials, criterion))
        print(json.dumps({"decisions": decisions, "computing": time.process_time() - begin}), flush=True)


def _lenient(from_dict: Any) -> Any:
    """`schema.from_dict` without the fields that this revision does not know: what came later is off by default."""

    def known_alone(cls: type, values: Mapping[str, Any], path: str = "config") -> Any:
        fields = schema.hints(cls.config_of(values["kind"]) if issubclass(cls, schema.Tagged) else cls)
        unknown = [name for name in values if name not in fields and name != "kind"]
        if unknown:
            print(f"{path}: without {', '.join(unknown)}, which this revision does not know", file=sys.stderr)
        return from_dict(cls, {name: value for name, value in values.items() if name not in unknown}, path)

    return known_alone


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
