"""The watchdog: a thread that owns the robot's actuators and sends one checked action a tick, whatever else hangs."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from robovlms_jax.deploy.safety import Decision, Measured, SafetyLayer

log = logging.getLogger(__name__)


class Guard:
    """Executes chunks through a safety layer, at the layer's rate.

    A chunk belongs to the tick whose observation it was predicted from: its row i is for the i-th tick after that one.
    So rows that came too late are never executed, and a newer chunk takes the place of an older one. Without a row for
    a tick the robot is braked, and after `Limits.missing_ticks` of them the stop is latched.

    Args:
      measure, send: of the robot; called in the guard's thread only, and an exception in either latches the stop.
      on_decision: told of every decision, in the guard's thread.
    """

    def __init__(
        self,
        layer: SafetyLayer,
        measure: Callable[[], Measured],
        send: Callable[[np.ndarray], None],
        *,
        on_decision: Callable[[Decision], None] = lambda decision: None,
    ):
        self._layer, self._measure, self._send, self._on_decision = layer, measure, send, on_decision
        self._lock = threading.Condition()
        self._rows: dict[int, np.ndarray] = {}
        self._from = -1
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
        self.now = 0
        """The tick that comes next."""
        self.state = "run"
        self.counts: collections.Counter[str] = collections.Counter()
        """Ticks, and stages of the layer's events."""

    def __enter__(self) -> Guard:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Brakes the robot to rest, then ends the thread."""
        with self._lock:
            self._stopping = True
            self._rows = {}
        self._thread.join()

    @property
    def remaining(self) -> int:
        """Ticks from now on that have a row."""
        with self._lock:
            return len(self._rows)

    def offer(self, actions: Any, observed: int) -> bool:
        """A chunk float[C, A], predicted from the observation at tick `observed`; it is copied. False: nothing of it is
        used, for it is older than the present one, wholly late, or from the future."""
        rows = np.array(actions)
        with self._lock:
            if observed <= self._from or observed > self.now or observed + len(rows) <= self.now:
                self.counts["chunks refused"] += 1
                return False
            self._from = observed
            self._rows = {observed + i: row for i, row in enumerate(rows) if observed + i >= self.now}
            return True

    def clear(self) -> None:
        """Forget the present chunk: the robot is braked."""
        with self._lock:
            self._rows = {}

    def wait(self) -> None:
        """Until the next tick is over."""
        with self._lock:
            self._lock.wait(timeout=1.0)

    def tick(self) -> Decision:
        """One tick; the thread calls it."""
        with self._lock:
            row, tick = self._rows.pop(self.now, None), self.now
            age_s = (tick - self._from) * self._layer.period_s
            self.now += 1
        try:
            measured = self._measure()
        except Exception as error:
            log.exception("the robot could not be measured")
            measured = Measured(np.full(1, np.nan))
            self._layer.stop(f"measuring failed: {type(error).__name__}: {error}")
        if row is not None:
            decision = self._layer.check(row, measured, age_s)
        else:
            decision = self._layer.brake(measured) if self._stopping else self._layer.missing(measured)
        try:
            self._send(decision.action)
        except Exception as error:
            log.exception("the action could not be sent")
            self._layer.stop(f"sending failed: {type(error).__name__}: {error}")
        with self._lock:
            self.counts["ticks"] += 1
            self.counts.update({event.stage for event in decision.events})
            self.state = decision.state
            self._lock.notify_all()
        self._on_decision(decision)
        return decision

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            self.tick()
            if self._stopping and self._layer.at_rest:
                break
            due += self._layer.period_s
            pause = due - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            else:  # late: ticks are not made up for
                due = time.monotonic()
                with self._lock:
                    self.counts["late ticks"] += 1
