"""The watchdog: a thread that owns the robot's actuators and sends one checked action a tick, whatever else hangs."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from robovlms_jax.control.asynchronous import ActionQueue, AsyncConfig
from robovlms_jax.deploy.safety import Decision, Measured, SafetyLayer

log = logging.getLogger(__name__)


class Guard:
    """Executes chunks through a safety layer, at the layer's rate.

    A chunk belongs to the tick whose observation it was predicted from: its row i is for the i-th tick after that one.
    So rows that came too late are never executed, and a newer chunk takes the place of an older one. Without a row for
    a tick the robot is braked, and after `Limits.missing_ticks` of them the stop is latched; before the first row
    nothing is missing yet. Whatever fails in a tick latches the stop, and the robot is braked all the same.

    Args:
      queue: which row is for which tick; None: the newest chunk's. It is of the layer's robot.
      measure, send: of the robot; called in the guard's thread only, and an exception in either latches the stop.
      on_decision: told of every decision, in the guard's thread; the one way by which stop categories 0 and 1 ask for
        power to be removed (`Decision.remove_power`).
    Raises:
      ValueError: one of these categories without it.
    """

    def __init__(
        self,
        layer: SafetyLayer,
        measure: Callable[[], Measured],
        send: Callable[[np.ndarray], None],
        *,
        queue: ActionQueue | None = None,
        on_decision: Callable[[Decision], None] | None = None,
    ):
        if on_decision is None and layer.limits.category < 2:
            raise ValueError(
                f"limits: category={layer.limits.category} asks for power to be removed, and nobody hears it: give "
                "on_decision, which acts on decision.remove_power, or choose category 2."
            )
        self._layer, self._measure, self._send, self._on_decision = layer, measure, send, on_decision
        self._lock = threading.Condition()
        self.queue = ActionQueue(AsyncConfig("switch"), layer.spec) if queue is None else queue
        self._stopping = self._begun = False
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
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
            self.queue.clear()
        self._thread.join()

    @property
    def now(self) -> int:
        """The tick that comes next."""
        return self.queue.now

    @property
    def remaining(self) -> int:
        """Ticks from now on that have a row."""
        return self.queue.remaining

    def offer(self, actions: Any, observed: int) -> bool:
        """A chunk float[C, A], predicted from the observation at tick `observed`; it is copied. False: nothing of it is
        used, for it is older than the present one, wholly late, or from the future."""
        return self.took(self.queue.offer(actions, observed))

    def took(self, used: bool) -> bool:
        """Count a chunk of which nothing is `used`."""
        if not used:
            with self._lock:
                self.counts["chunks refused"] += 1
        return used

    def clear(self) -> None:
        """Forget the present chunk: the robot is braked."""
        self.queue.clear()

    def wait(self) -> None:
        """Until the next tick is over."""
        with self._lock:
            self._lock.wait(timeout=1.0)

    def tick(self) -> Decision:
        """One tick; the thread calls it. BaseException is caught: a driver's sys.exit() would end the thread unseen."""
        tick, row = self.queue.now, self.queue.take()
        try:
            measured = self._measure()
        except BaseException as error:
            log.exception("the robot could not be measured")
            measured = Measured(np.full(1, np.nan))
            self._layer.stop(f"measuring failed: {type(error).__name__}: {error}")
        try:
            decision = self._decide(tick, row, measured)
        except BaseException as error:
            log.exception("the tick could not be checked")
            self._layer.stop(f"checking failed: {type(error).__name__}: {error}")
            decision = self._layer.brake_blind()
        try:
            if np.isfinite(decision.action).all():  # else a gripper was never told anything: the robot is left alone
                self._send(decision.action)
        except BaseException as error:
            log.exception("the action could not be sent")
            self._layer.stop(f"sending failed: {type(error).__name__}: {error}")
        with self._lock:
            self.counts["ticks"] += 1
            self.counts.update({event.stage for event in decision.events})
            self.state = decision.state
            self._lock.notify_all()
        try:
            if self._on_decision is not None:
                self._on_decision(decision)
        except BaseException:  # whoever only looks on must not stop the ticks
            log.exception("on_decision failed")
        return decision

    def _decide(self, tick: int, row: Any, measured: Measured) -> Decision:
        if row is not None:
            self._begun = True
            return self._layer.check(row.action, measured, (tick - row.observed) * self._layer.period_s)
        waits = self._stopping or not self._begun
        return self._layer.brake(measured) if waits else self._layer.missing(measured)

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
