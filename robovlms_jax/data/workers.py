"""Long work over files, here, in processes or elsewhere, with progress that is counted while it is done."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Advance = Callable[[int], Any]
"""Adds to what is done, in whatever unit the progress has: frames, bytes."""

WorkThrough = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], Advance], Iterator[tuple[int, Any]]]
"""(work, jobs, advance) -> what `completed` yields."""

_elsewhere: contextvars.ContextVar[WorkThrough | None] = contextvars.ContextVar("elsewhere", default=None)


@contextlib.contextmanager
def elsewhere(work_through: WorkThrough) -> Iterator[None]:
    """In this block `completed` lets `work_through` do the jobs, such as machines of a cluster that see the same files;
    its `workers` then count for nothing."""
    token = _elsewhere.set(work_through)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def completed(
    work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], *, workers: int, advance: Advance
) -> Iterator[tuple[int, Any]]:
    """Call `work(*job, advance)` for each job; yield (position of the job, what `work` returned) as each ends.

    In processes, `advance` of this one is called twice a second with what all have done since. An error of `work` is
    raised when its job's turn comes, and no further job is begun. Processes end with this one, even if it is killed.

    Args:
      work, jobs: picklable if there is more than one of both workers and jobs; `work` is sent once per process.
    """
    work_through = _elsewhere.get()
    if work_through is not None:
        yield from work_through(work, jobs, advance)
        return
    if workers == 1 or len(jobs) < 2:
        for position, job in enumerate(jobs):
            yield position, work(*job, advance)
        return
    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may deadlock
    counter = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_start, initargs=(work, counter)
    )
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)  # after an error no further job is begun
        waiting = {pool.submit(_work, *job): position for position, job in enumerate(jobs)}
        counted = 0
        while waiting:
            finished, _ = concurrent.futures.wait(waiting, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED)
            done = counter.value
            advance(done - counted)
            counted = done
            for future in finished:
                yield waiting.pop(future), future.result()


_process: dict[str, Any] = {}
"""What all jobs of a process share; set once when it starts."""


def _start(work: Callable[..., Any], counter: Any) -> None:
    _process.update(work=work, counter=counter)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a terminal sends Ctrl-C to all; one of them tells it

    def exit_with_parent() -> None:  # a killed parent cannot stop its workers, and they would wait for work forever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _work(*job: Any) -> Any:
    def advance(count: int) -> None:
        with _process["counter"].get_lock():
            _process["counter"].value += count

    return _process["work"](*job, advance)
