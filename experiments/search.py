"""Search for settings: runs of one experiment with other values of some of its fields, ranked.

    python -m experiments.search --start sample --space optimizer.learning_rate=1e-3,3e-4 --seeds 3
    python -m experiments.search --preset grid --start kosmos_lstm       # the grid of the design documents
    python -m experiments.search --start sample --sampler tpe --trials 30 --space optimizer.learning_rate=1e-5:1e-2:log

Start the same command several times, here or on machines that share the folder, to work on it in parallel: as tasks of
a SLURM job array (`sbatch launch/search.sbatch FLAGS`), or on a Ray cluster (--ray.workers 8 --ray.gpus 1). A process
that is killed leaves its trial to the others; start the command again to go on where all stopped. A trial that fails is
recorded with its last words, and the search goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
import signal
import sys

from experiments import protocols
from robovlms_jax import cli
from robovlms_jax.parallel import ray_workers
from robovlms_jax.parallel.config import RayConfig
from robovlms_jax.runs import logs
from robovlms_jax.search import queue, report, space, workers
from robovlms_jax.search.config import SearchConfig
from robovlms_jax.training import stopping

CHECKED = 100
"""Settings of a grid that are read one by one before anything runs: each takes milliseconds."""
PRESETS = {
    "default": SearchConfig(),
    "grid": SearchConfig(
        start="kosmos_lstm",
        space=(
            "optimizer.learning_rate=1e-4,2e-5,1e-5",
            "optimizer.weight_decay=0,0.1",
            "train.batch_size=128,256,512",
            "optimizer.warmup_epochs=0.25,0.5",
        ),
        out="searches/grid",
    ),
}
"""grid: learning rate, weight decay, batch size and warm-up as the project's design documents list them."""


def main(argv: list[str] | None = None) -> pathlib.Path:
    """Works on the search and writes its report; returns the report's path. A search that a signal stopped ends the
    process with `stopping.STATUS`, as any program here does."""
    logs.to_stderr()
    _, config = cli.parse(PRESETS, "default", description=__doc__, argv=argv)
    _require_settings(config)
    if config.report:
        queue.finished(pathlib.Path(config.out))
    stopped = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end: the run saves, the trial stays open
    try:
        if config.ray.workers and not config.report:
            ray_workers.everywhere(config.ray, functools.partial(_work, dataclasses.replace(config, ray=RayConfig())))
        elif not config.report:
            workers.work(config)
    except KeyboardInterrupt:
        stopped = True
        print("stopped; the same command goes on where it was", file=sys.stderr)
    path = report.write(config)
    print(f"report: {path}")
    if stopped:
        sys.exit(stopping.STATUS)
    return path


def _work(config: SearchConfig) -> None:
    """On a worker of a Ray cluster."""
    logs.to_stderr()
    workers.work(config)


def _require_settings(config: SearchConfig) -> None:
    """Every value is one of a configuration, or it is said which field is wrong, before anything runs; of a grid of up
    to `CHECKED` settings every combination is."""
    start = protocols.preset(config.experiment, config.start, (), "search")
    fixed = space.fixed(config.fixed)
    fields = space.read(config.space)
    names = {field.name for field in fields}
    if names & set(fixed):
        raise ValueError(f"search.fixed and search.space both set {sorted(names & set(fixed))}; a field does one.")
    own = {"train.output", "train.seed", "train.resume"} & (names | set(fixed))
    if own:
        raise ValueError(
            f"{sorted(own)} are set by the search for every trial (search.out, search.seeds); leave them out."
        )
    values = [field.values if isinstance(field, space.Values) else _ends(field) for field in fields]
    if math.prod(map(len, values)) <= CHECKED:
        rows = itertools.product(*values)
    else:  # every value once, whatever stands beside it
        rows = ([some[min(row, len(some) - 1)] for some in values] for row in range(max(map(len, values))))
    for row in rows:
        setting = dict(zip((field.name for field in fields), row))
        cli.read(start, argv=space.flags(fixed | setting))


def _ends(field: space.Range) -> tuple[str, str]:
    return tuple(str(int(x)) if field.whole else repr(x) for x in (field.low, field.high))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
