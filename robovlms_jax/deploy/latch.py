"""The latched stop: once stopped, a robot stays stopped until a person says otherwise, twice."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import threading
import time
from typing import Literal

log = logging.getLogger(__name__)

State = Literal["run", "stopping", "hold", "ready"]
"""run: requests are followed. stopping: the robot is being braked. hold: it stands, latched. ready: a person has reset
it, and it waits for `start`."""


class Latch:
    """State machine of a software protective stop.

    run -> (trip) stopping -> (at rest) hold -> (reset) ready -> (start) run. Neither a new instruction nor a new policy
    or connection lifts it. With a file it outlives the process: a robot that was stopped comes up stopped.
    """

    def __init__(self, file: str | pathlib.Path | None = None):
        self._file = None if file is None else pathlib.Path(file)
        self._lock = threading.RLock()
        self.state: State = "run"
        self.reason = ""
        self.since_s = 0.0
        """Wall clock of the trip, seconds since 1970."""
        if self._file is not None and self._file.exists():
            self.state, self.reason = "hold", self._stored_reason()

    def _stored_reason(self) -> str:
        try:
            return str(json.loads(self._file.read_text())["reason"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            return f"the stop's file {self._file.name} cannot be read ({type(error).__name__}), so it counts as a stop"

    def trip(self, reason: str) -> None:
        """Stop. The first reason stays; a stop while `ready` latches again. A file that cannot be written is logged."""
        with self._lock:
            if self.state in ("stopping", "hold"):
                return
            self.state, self.reason, self.since_s = "stopping", reason, time.time()
            try:
                self._store()
            except OSError as error:  # a full disk must not keep the robot from being braked
                log.error("the stop is not kept over a restart: %s cannot be written (%s)", self._file, error)

    def _store(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_name(self._file.name + ".partial")
            partial.write_text(json.dumps({"reason": self.reason, "time": self.since_s}))
            os.replace(partial, self._file)

    def at_rest(self) -> None:
        with self._lock:
            if self.state == "stopping":
                self.state = "hold"

    def reset(self, operator: str, cause: str = "") -> None:
        """A person lifts the stop; the robot stays where it is until `start`.

        Args:
          operator: who, for the record.
          cause: what would trip it again at once; "" if nothing.
        Raises:
          RuntimeError: there is no stop, the robot still moves, or the cause is still there.
          ValueError: operator is empty.
        """
        with self._lock:
            _require_operator(operator)
            if self.state != "hold":
                raise RuntimeError(f"reset by {operator}: the state is {self.state!r}; only a robot on hold is reset.")
            if cause:
                raise RuntimeError(
                    f"reset by {operator} is refused, for the cause is still there: {cause}. What was measured last "
                    "counts: once it is gone, measure again (SafetyLayer.brake)."
                )
            self.state = "ready"

    def start(self, operator: str) -> None:
        """A person lets the robot move again. Raises RuntimeError without a reset before, ValueError as `reset`,
        OSError where the stop's file cannot be removed."""
        with self._lock:
            _require_operator(operator)
            if self.state != "ready":
                raise RuntimeError(f"start by {operator}: the state is {self.state!r}; reset the stop first.")
            if self._file is not None:
                self._file.unlink(missing_ok=True)
            self.state, self.reason = "run", ""


def _require_operator(operator: object) -> None:
    if not isinstance(operator, str) or not operator.strip():
        raise ValueError(f"operator={operator!r}: expected the name of the person who does this.")
