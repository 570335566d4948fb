"""Two threads: one that controls, in time, and one that draws what the first one leaves behind.

Control never waits for a picture, an encoder or a socket. What is to be drawn lies in one place, and the newest takes
the place of what was not fetched; nothing is drawn while nobody is ready to see it.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from robovlms_jax.demo.stage import Snapshot
from robovlms_jax.demo.world import Painter, World
from robovlms_jax.web.messages import jpeg, pack

log = logging.getLogger(__name__)

SPEEDS = (1.0, 0.5, 0.25, 0.1)
"""How fast the demonstration's time may go."""
_FEWEST = 8
"""Ticks from which their rate is said."""


class Steps(Protocol):
    """What happens in time, such as a `stage.Stage`."""

    def tick(self) -> Snapshot:
        """One control step."""

    def failed(self, error: Exception) -> None:
        """A command raised this; people are told."""


Command = Callable[[Any], Any]
"""Given the `Steps`."""


class Message(NamedTuple):
    """A snapshot as it is sent. number: of its pictures. whole: see `web.messages`; bare: without the pictures, for
    who has them already."""

    number: int
    whole: bytes
    bare: bytes


class ControlLoop:
    """Calls `Steps.tick` 30 times a second, times the speed of slow motion, in a thread of its own.

    Args:
      seen: given every snapshot; must return at once.
    """

    def __init__(self, stage: Steps, seen: Callable[[Snapshot], None]):
        self._stage, self._seen = stage, seen
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._wake, self._stopping, self._speed = threading.Event(), False, 1.0
        self._begun: collections.deque[float] = collections.deque(maxlen=61)
        self._late: collections.deque[float] = collections.deque(maxlen=300)
        self._work: collections.deque[float] = collections.deque(maxlen=300)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)

    def do(self, command: Command) -> None:
        """Between two ticks, soon."""
        self._commands.put(command)
        self._wake.set()

    def set_speed(self, speed: float) -> None:
        """Raises ValueError for one that is none of SPEEDS."""
        if speed not in SPEEDS:
            raise ValueError(f"speed {speed!r} is none of {list(SPEEDS)}.")
        self._speed = speed
        self._begun.clear()  # what was measured at another speed says nothing about this one
        self._wake.set()

    @property
    def numbers(self) -> dict[str, float | None]:
        """speed: as set. ticks_per_s: over the last 60 ticks at this speed; None: too few. late_ms, work_ms: 99th
        percentiles of the last 300, how late they began and how long they took."""
        begun = list(self._begun)
        rate = round((len(begun) - 1) / (begun[-1] - begun[0]), 1) if len(begun) > _FEWEST else None
        found: dict[str, float | None] = {"speed": self._speed, "ticks_per_s": rate}
        for name, times in (("late_ms", self._late), ("work_ms", self._work)):
            known = list(times)
            found[name] = round(1000 * float(np.percentile(known, 99)), 1) if known else 0.0
        return found

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopping:
            self._obey()
            now = time.monotonic()
            if now < due:
                self._wake.wait(due - now)
                self._wake.clear()
                continue
            self._late.append(now - due)
            self._begun.append(now)
            self._seen(self._stage.tick())
            period = 1 / (World.rate_hz * self._speed)
            self._work.append(time.monotonic() - now)
            # A tick that came too late is not made up for: time then goes slower, and the page says so.
            due = max(due + period, time.monotonic() - period)

    def _obey(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            try:
                command(self._stage)
            except Exception as error:  # one bad command must not end control
                log.exception("a command failed")
                self._stage.failed(error)


class Camera:
    """Draws the newest snapshot for everybody, in a thread of its own.

    Args:
      sizes: camera -> px.
      deliver: given each finished message; called in this thread.
      numbers: what else the facts say, asked for at each message.
    """

    def __init__(
        self, sizes: Mapping[str, int], deliver: Callable[[Message], None], numbers: Callable[[], Mapping[str, Any]]
    ):
        self._painter, self._deliver, self._numbers = Painter(sizes, "people"), deliver, numbers
        self._newest: Snapshot | None = None
        self._changed, self._wanted, self._stopping = threading.Event(), threading.Event(), False
        self._drawn: tuple[Any, dict[str, bytes]] = (None, {})
        self._number, self._draw_s, self._undrawn = 0, 0.0, ""
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        self._stopping = True
        self._changed.set()
        self._wanted.set()
        self._thread.join(timeout_s)

    def see(self, snapshot: Snapshot) -> None:
        """The newest one; called by the control loop, returns at once."""
        self._newest = snapshot
        self._changed.set()

    def want(self) -> None:
        """Somebody is ready for a picture."""
        self._wanted.set()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._changed.wait()
            if self._stopping:
                return
            self._wanted.clear()
            self._changed.clear()
            try:
                self._deliver(self._message(self._newest))
            except Exception:  # control goes on without pictures
                log.exception("a snapshot could not be delivered")

    def _message(self, snapshot: Snapshot) -> Message:
        started, undrawn = time.monotonic(), ""
        if self._drawn[0] is not snapshot.moment.state:
            try:
                pictures = {name: jpeg(self._painter.draw(snapshot.moment, name)) for name in self._painter.sizes}
            except Exception as error:  # the page must say so, and go on showing what is true
                undrawn = f"{type(error).__name__}: {error}"
                if undrawn != self._undrawn:  # not thirty times a second
                    log.exception("a picture could not be drawn")
            else:
                self._drawn, self._number = (snapshot.moment.state, pictures), self._number + 1
                self._draw_s = time.monotonic() - started
            self._undrawn = undrawn
        facts = {**snapshot.facts, **self._numbers(), "draw_ms": round(1000 * self._draw_s, 1), "undrawn": undrawn}
        return Message(self._number, pack(facts, self._drawn[1]), pack(facts, {}))
