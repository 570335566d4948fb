"""An evaluation and a shared queue by Ray's own cluster of this machine. Needs `pip install -e '.[ray]'`."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import pathlib

import pytest

from robovlms_jax.evaluation import chains
from robovlms_jax.parallel import ray_workers
from robovlms_jax.parallel.config import RayConfig
from tests.processes import run_python

TWO = RayConfig(workers=2, address="local")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'"),
]


def test_an_evaluation_on_two_workers_has_the_results_of_one_process(tmp_path):
    # Parts of two trials each, on two workers with two tables each: everything but the order of the lines is the same.
    def asked(name: str, *flags: str) -> chains.Evaluation:
        run_python(
            *("-m", "experiments.evaluate", "--checkpoint", "robovlms_jax/demo/twin", "--out", tmp_path / name),
            *("--chains", "7", "--max_steps", "20", "--films", "2", "--processes", "2", *flags),
            # Each program is compiled once for all processes.
            JAX_COMPILATION_CACHE_DIR=str(tmp_path / "programs"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_DISABLE_MOST_OPTIMIZATIONS="1",
            RAY_worker_niceness="0",  # 15 otherwise: on a busy machine its workers hardly run
        )
        return chains.load(tmp_path / name)

    cluster = ("--ray.workers", "2", "--ray.address", "local")
    alone, shared = asked("alone"), asked("shared", *cluster)
    assert shared == alone and [result.index for result in shared.results] == list(range(7))
    films = [sorted(path.name for path in (tmp_path / name).glob("film_*")) for name in ("shared", "alone")]
    assert films[0] == films[1] and len(films[0]) == 2
    # The same command again, with trials missing, runs these alone; results of both starts add up.
    stored = tmp_path / "shared" / "results-000.jsonl"
    lines = stored.read_text().splitlines(keepends=True)
    stored.write_text("".join(lines[:4]))
    assert asked("shared", *cluster) == alone
    assert len(stored.read_text().splitlines()) == len(lines)


def fail(folder: str) -> None:
    raise ValueError(f"nothing in {folder}")


def note(folder: str) -> None:
    logging.getLogger(__name__).info("here")
    pathlib.Path(folder, str(os.getpid())).touch()


def test_every_worker_works_on_a_shared_queue_and_a_mistake_there_is_told_here(tmp_path):
    ray_workers.everywhere(TWO, functools.partial(note, str(tmp_path)))
    noted = os.listdir(tmp_path)  # a worker that is quick may be handed both calls
    assert noted and str(os.getpid()) not in noted
    with pytest.raises(ValueError, match="nothing in"):
        ray_workers.everywhere(TWO, functools.partial(fail, str(tmp_path)))
