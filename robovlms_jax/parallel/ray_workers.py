"""Work in parts that need nothing of each other, done by workers of a Ray cluster: trials in simulators, parts of a
dataset, runs of a search.

Ray (docs.ray.io; Moritz et al. 2018, arXiv:1712.05889) is an extra and is imported when a cluster is asked for. Every
machine of the cluster needs this package and sees the same files under the same paths.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from robovlms_jax import extras
from robovlms_jax.parallel.config import RayConfig

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often a job is tried whose worker dies, before the work ends with an error."""

Advance = Callable[[int], Any]


def require() -> Any:
    """The package ray. Raises ImportError that says what to install."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            f"ray.workers of 1 or more needs the package ray ({error}): {extras.install('ray')} on every machine, or "
            "leave the option out."
        ) from error
    return ray


@contextlib.contextmanager
def joined(config: RayConfig) -> Iterator[Any]:
    """The package ray, in touch with a cluster for the time of the block.

    Raises ImportError as `require`; ConnectionError: there is no cluster at `config.address`.
    """
    ray = require()
    if config.address == "local":  # where nobody else counts them, more workers may share a processor than it has cores
        size = {"num_cpus": math.ceil(config.workers * config.cpus), "include_dashboard": False}
    else:
        size = {}
    ray.init(address=config.address or None, **size)
    there = ray.cluster_resources()
    logger.info("%d workers of a Ray cluster of %d processors", config.workers, there.get("CPU", 0))
    for name, asked, kind in (("cpus", config.cpus, "CPU"), ("gpus", config.gpus, "GPU")):
        if asked > there.get(kind, 0):
            logger.warning(
                "ray.%s=%g for each worker, and the whole cluster has %g so far: workers wait until a machine with so "
                "many joins it. Ask for fewer, or end the program.",
                *(name, asked, there.get(kind, 0)),
            )
    try:
        yield ray
    finally:
        ray.shutdown()


class _Worker:
    """In a process of its own, on whatever machine: what `make` makes, kept between jobs."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], folder: str):
        _enter(folder)
        self._make, self._work = make, None

    def do(self, job: Any) -> Any:
        if self._work is None:  # here and not at its birth, where an error would only tell that the worker died
            self._work = self._make()
        return self._work(job)


def _enter(folder: str) -> None:
    """Relative paths mean what they mean where the work was asked for."""
    if os.path.isdir(folder):
        os.chdir(folder)


class Pool:
    """Workers that do jobs, each with what `make` makes there (a policy, simulators), once."""

    def __init__(self, ray: Any, config: RayConfig, make: Callable[[], Callable[[Any], Any]]):
        self._ray, self._config, self._make = ray, config, make
        self._kind = ray.remote(num_cpus=config.cpus, num_gpus=config.gpus)(_Worker)
        self._idle: list[Any] = []

    def results(self, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(position, result) of each job as it ends. An error of a job is raised as it was there.

        A job whose worker dies (its machine was taken away, or its memory was full) is done by another one.

        Raises:
          RuntimeError: a job's worker died `ATTEMPTS` times.
        """
        waiting = collections.deque(range(len(jobs)))
        died: collections.Counter[int] = collections.Counter()
        busy: dict[Any, tuple[Any, int]] = {}
        while waiting or busy:
            while waiting and len(busy) < self._config.workers:
                worker = self._idle.pop() if self._idle else self._kind.remote(self._make, os.getcwd())
                position = waiting.popleft()
                busy[worker.do.remote(jobs[position])] = (worker, position)
            (done,), _ = self._ray.wait(list(busy), num_returns=1)
            worker, position = busy.pop(done)
            try:
                result = self._ray.get(done)
            except self._ray.exceptions.RayTaskError as error:
                raise _original(error) from error
            except self._ray.exceptions.RayActorError as error:
                died[position] += 1
                if died[position] == ATTEMPTS:
                    raise RuntimeError(
                        f"job {position} of {len(jobs)} ended its worker {ATTEMPTS} times, last so: {error}. Results "
                        "so far are kept; where memory was full, ask for more with ray.cpus, or use fewer ray.workers."
                    ) from error
                logger.warning("a worker died and its job goes to another: %s", error)
                waiting.appendleft(position)
                continue
            self._idle.append(worker)
            yield position, result


def _original(error: Any) -> BaseException:
    """What the job raised, there."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def completed(config: RayConfig, ray: Any) -> Callable[..., Iterator[tuple[int, Any]]]:
    """What does the work of `data.workers.completed` on the cluster: for `data.workers.elsewhere`.

    What a job has advanced is told when it ends.
    """

    def work_through(
        work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], advance: Advance
    ) -> Iterator[tuple[int, Any]]:
        pool = Pool(ray, config, functools.partial(functools.partial, _counted, work))
        for position, (count, result) in pool.results(jobs):
            advance(count)
            yield position, result

    return work_through


def _counted(work: Callable[..., Any], job: tuple[Any, ...]) -> tuple[int, Any]:
    counts: list[int] = []
    result = work(*job, counts.append)
    return sum(counts), result


def everywhere(config: RayConfig, work: Callable[[], None]) -> None:
    """Call `work` on all workers at once, until all have ended: for work that is shared out by other means.

    KeyboardInterrupt, and the first worker's error, reach all of them as KeyboardInterrupt; they are waited for.
    """
    with joined(config) as ray:
        task = ray.remote(num_cpus=config.cpus, num_gpus=config.gpus)(_in_folder)
        running = [task.remote(os.getcwd(), work) for _ in range(config.workers)]
        try:
            ray.get(running)
        except BaseException as error:
            for one in running:
                ray.cancel(one)
            with contextlib.suppress(ray.exceptions.RayError, KeyboardInterrupt):
                ray.wait(running, num_returns=len(running))
            if isinstance(error, ray.exceptions.RayTaskError):
                raise _original(error) from error
            raise


def _in_folder(folder: str, work: Callable[[], None]) -> None:
    _enter(folder)
    work()
