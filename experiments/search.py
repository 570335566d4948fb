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
import pathlib
import sys

from experiments import search_settings
from robovlms_jax import cli, ending
from robovlms_jax.parallel import ray_workers
from robovlms_jax.parallel.config import RayConfig
from robovlms_jax.runs import logs
from robovlms_jax.search import queue, report, workers
from robovlms_jax.search.config import SearchConfig

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
    process with `ending.STATUS`, as any program here does."""
    logs.to_stderr()
    _, config = cli.parse(PRESETS, "default", description=__doc__, argv=argv)
    if config.report:
        queue.finished(pathlib.Path(config.out))
    else:
        search_settings.require(config, _unknown if _elsewhere(config) else search_settings.devices)
    stopped = False
    ending.on_sigterm()  # a scheduler's end: the run saves, the trial stays open
    try:
        if config.ray.workers and not config.report:
            ray_workers.everywhere(config.ray, functools.partial(_work, dataclasses.replace(config, ray=RayConfig())))
        elif not config.report:
            workers.work(config)
    except KeyboardInterrupt:
        stopped = True
        ending.say("finished trials are kept, and the same command goes on.")
    path = report.write(config)
    ending.show(f"report: {path}")
    if stopped:
        sys.exit(ending.STATUS)
    return path


def _work(config: SearchConfig) -> None:
    """On a worker of a Ray cluster."""
    logs.to_stderr()
    search_settings.require(config, search_settings.devices)
    workers.work(config)


def _unknown() -> None:
    """Devices of trials that run elsewhere."""


def _elsewhere(config: SearchConfig) -> bool:
    """Whether trials have other devices than this process would have."""
    return config.ray.workers > 0 or any(text.startswith("distributed.") for text in config.fixed)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
