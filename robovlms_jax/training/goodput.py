"""Where the time of a training loop goes: steps, waiting for data, compiling, checkpoints, evaluation."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import jax

PHASES = ("step", "data", "compile", "checkpoint", "evaluation")
_COMPILING = ("/jax/core/compile/", "/jax/compilation_cache/cache_retrieval_time_sec")
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Goodput:
    """A clock that always runs for exactly one phase: the one entered last, or "step" outside all of them.

    Compilation is taken out of the phase it happens in, as JAX reports it (tracing, lowering, compiling, reading from
    the cache). Use as a context: time counts, and compilations are noticed, inside it, those of the thread that entered
    it: what others compile meanwhile (`runs.ahead`) holds up nobody.

    compilations: programs compiled, those read from the persistent cache included.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._mark, self._open = "step", clock(), False
        self._counted: list[tuple[float, float]] = []  # begin and length of what was compiled
        self._thread = threading.get_ident()
        self.compilations = 0

    def __enter__(self) -> Goodput:
        self._thread = threading.get_ident()
        self._mark, self._open = self._clock(), True
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *exception: object) -> None:
        self._turn(self._phase)
        self._open = False
        with contextlib.suppress(AttributeError):  # older JAX only adds listeners; from here on this one does nothing
            jax.monitoring.unregister_event_duration_listener(self._heard)

    @contextlib.contextmanager
    def spent_on(self, phase: str) -> Iterator[None]:
        """Time in here belongs to `phase`, one of PHASES."""
        before = self._phase
        self._turn(phase)
        try:
            yield
        finally:
            self._turn(before)

    @property
    def phase(self) -> str:
        """The phase whose time it is now."""
        return self._phase

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds so far."""
        if self._open:
            self._turn(self._phase)
        return dict(self._seconds)

    def shares(self) -> dict[str, float]:
        """Phase -> share of all time so far; they add up to one."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        return {phase: value / total for phase, value in seconds.items()}

    def __str__(self) -> str:
        return ", ".join(f"{phase} {100 * share:.1f} %" for phase, share in self.shares().items())

    def _turn(self, phase: str) -> None:
        now = self._clock()
        self._seconds[self._phase] += now - self._mark
        self._phase, self._mark = phase, now

    def _heard(self, event: str, duration: float, **_: object) -> None:
        if not self._open or threading.get_ident() != self._thread or not event.startswith(_COMPILING):
            return
        self.compilations += event == _COMPILED
        self._turn(self._phase)
        begin = self._mark - duration
        moved = duration
        while self._counted and self._counted[-1][0] >= begin:  # tracing that was part of this one
            moved -= self._counted.pop()[1]
        self._counted.append((begin, duration))
        moved = min(max(moved, 0.0), self._seconds[self._phase])  # JAX's clock is not ours to the microsecond
        self._seconds[self._phase] -= moved
        self._seconds["compile"] += moved
