"""Programs compiled before they are needed, beside work that does not keep all cores busy.

A compiler works outside Python's lock. A jitted function that was lowered and compiled for the shapes and shardings of
a later call is not compiled again by that call: JAX keeps what it made by jaxpr and shardings. So what is calculated is
the same, only sooner; and where JAX does not recognise a call, it compiles as it would have without this.

On CPUs, in runs of one process. Compilers for accelerators try kernels on the device, in whose memory and time the run
is meanwhile, and those of several processes may wait for each other.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from robovlms_jax.parallel import mesh as meshes

logger = logging.getLogger(__name__)

Wait = Callable[[], None]
"""Returns when the work is over that it was given for, however it ended."""


def nothing() -> None:
    """The `Wait` of what was not begun."""


class Beside:
    """A thread that does one thing after another. pool: None: nothing is done ahead."""

    def __init__(self, pool: concurrent.futures.Executor | None):
        self._pool = pool
        self._begun: list[concurrent.futures.Future[None]] = []

    def start(self, what: str, work: Callable[[], Any]) -> Wait:
        """Do the work in the thread, after what was started before. An error in it is only noted: whatever needs its
        programs makes them again, and meets the error where it belongs."""
        if self._pool is None:
            return nothing

        def attempt() -> None:
            try:
                work()
            except Exception:
                logger.debug("%s was not made ahead", what, exc_info=True)

        future = self._pool.submit(attempt)
        self._begun.append(future)
        return lambda: _settle(future)

    def busy(self) -> bool:
        """Whether something is being done."""
        return any(future.running() for future in self._begun)


def _settle(future: concurrent.futures.Future[None]) -> None:
    with contextlib.suppress(concurrent.futures.CancelledError):
        future.result()


@contextlib.contextmanager
def beside(mesh: Mesh) -> Iterator[Beside]:
    """For a run on the mesh. What has not begun when the context is left is dropped. What has is waited for, which is
    said; after an error only when the process ends, so that the error is told first."""
    if meshes.platform(mesh) != "cpu" or jax.process_count() > 1:
        yield Beside(None)
        return
    pool = concurrent.futures.ThreadPoolExecutor(1, "ahead")
    thread = Beside(pool)
    wait = True
    try:
        yield thread
    except Exception:
        wait = False
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if wait and thread.busy():
            logger.warning("a compiler is still at work and cannot be stopped; this waits until it has ended")
        pool.shutdown(wait=wait)


def placed(shapes: Any, sharding: Any) -> Any:
    """Shapes (jax.ShapeDtypeStruct, or arrays) as of arrays that lie there."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
