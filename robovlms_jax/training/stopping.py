"""Signals in a training run: SIGTERM, SIGHUP (its terminal has gone) and the first Ctrl-C end it with its state saved;
the second Ctrl-C at once."""

from __future__ import annotations

import logging
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from robovlms_jax import ending
from robovlms_jax.parallel import distributed
from robovlms_jax.training import checkpoints
from robovlms_jax.training.loop import Hook, Step

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CutShort(BaseException):
    """A signal came while `StopSignal.unless_it_came` does something."""


class StopSignal(Hook):
    """Ends the loop after the step in which SIGTERM or SIGHUP came, or Ctrl-C inside `Interrupts`; all hosts at the
    same step."""

    def __init__(self) -> None:
        self._came = 0  # number of the signal
        self._cutting = False

    def __enter__(self) -> StopSignal:
        # Signals can only be handled in the main thread; elsewhere (tests, notebooks) nothing ends a loop early.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {number: signal.signal(number, self._note) for number in ending.stopping_signals()}
        return self

    def __exit__(self, *exception: object) -> None:
        if self._main:
            for number, before in self._before.items():
                if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is that came: it comes twice
                    signal.signal(number, before)

    def _note(self, number: int, *_: Any) -> None:
        if number == signal.SIGHUP:
            ending.ignore_hangups()
        self._came = number
        if self._cutting:
            self._cutting = False
            raise CutShort

    def unless_it_came(self, step: Step, what: str, do: Callable[[], T]) -> T | None:
        """What `do` returns, which is done between two steps and may take minutes, for which whoever sends a signal
        does not wait: it ends where it is (None), and the loop with it. Of several processes each would leave the
        others waiting: there it is done to its end."""
        alone, found = self._main and jax.process_count() == 1, None
        try:
            try:
                self._cutting = alone
                if alone and self._came:
                    raise CutShort
                found = do()
            finally:
                self._cutting = False  # until here it may come
        except CutShort:
            found = None
        except Exception as error:
            if not (alone and self._came):
                raise
            logger.warning("%s of step %d failed on the way out: %s", what, step.number, error)
        if alone and self._came:
            step.stop = True
            if found is None:
                logger.warning("%s of step %d are left out, and not made up for: the run ends.", what, step.number)
        return found

    def after(self, step: Step, metrics: Mapping[str, jax.Array]) -> None:
        if jax.process_count() > 1 and not step.log:
            return  # asking the others takes them all to the same step
        came = int(distributed.of_all(self._came).max())
        if came:  # one that comes while the others are asked stays noted, and is told at the next step
            self._came, step.stop = came, True

    def finish(self, step: int, stopped: bool) -> None:
        if stopped and self._came:
            name = "Ctrl-C" if self._came == signal.SIGINT else signal.Signals(self._came).name
            logger.warning("stopped by %s after step %d; saved. Go on with --train.resume.", name, step)


class Interrupts:
    """Context in which SIGINT is handled. `asked`: whether it came.

    While a training loop runs, its handler of signals is told (`StopSignal`); at any other time KeyboardInterrupt is
    raised.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupts:
        self._main = threading.current_thread() is threading.main_thread()  # signals can only be handled there
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._first)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _first(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, _at_once)
        stop = signal.getsignal(signal.SIGTERM)
        if callable(stop):
            logger.warning("Ctrl-C: the run is saved after this step and then ends; Ctrl-C once more ends it at once.")
            stop(signal.SIGINT, None)
        else:
            raise KeyboardInterrupt


def _at_once(*_: Any) -> None:
    print("stopped at once by a second Ctrl-C; steps since the last checkpoint are lost.", file=sys.stderr, flush=True)
    os._exit(ending.STATUS)  # no cleaning up: it could wait for what is being written, or for other processes


def words(run: pathlib.Path) -> str:
    """What a run that Ctrl-C has ended leaves, and how to go on (`ending.stop`)."""
    try:
        point = checkpoints.resume_point(run)
    except OSError:
        return "no step is saved; the same command begins anew, and takes what was recorded and compiled for it."
    return f"{point} is saved, go on with --train.resume."
