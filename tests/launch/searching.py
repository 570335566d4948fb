"""A process of a search as `experiments.search` is one, with trials that are scripts of a few lines.

    python -m tests.launch.searching --out OUT

The trial with rate 0.2 saves a checkpoint and waits, when it is started for the first time.
"""

from __future__ import annotations

import sys

from robovlms_jax import ending
from robovlms_jax.search import queue, space, trials, workers
from robovlms_jax.search.config import SearchConfig

TRIAL = """
import json, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run, rate = pathlib.Path(flags["--train.output"]), float(flags["--rate"])
saved = run / "checkpoints/1"
begin = 2 if saved.exists() else 1
saved.mkdir(parents=True, exist_ok=True)
for step in range(begin, 4):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "validation/loss": rate / step}) + "\\n")
    (run / "waiting").touch()
    if rate == 0.2 and begin == 1:
        time.sleep(60)
(run / "report.md").write_text("done")
"""


def main(arguments: list[str]) -> int:
    config = SearchConfig(out=arguments[arguments.index("--out") + 1], space=("rate=0.1,0.2,0.3,0.4",))
    trials.command = lambda config, trial, run: [
        *(sys.executable, "-c", TRIAL),
        *space.flags(trial.setting | {"train.output": str(run)}),
    ]
    trials.POLL, queue.BEAT = 0.02, 0.05
    ending.on_sigterm()
    try:
        workers.work(config)
    except KeyboardInterrupt:
        return ending.STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
