"""Ctrl-C in a training run: the first ends it as SIGTERM does, with its state saved; the second at once."""

from __future__ import annotations

import logging
import os
import pathlib
import signal
import sys
import threading
from typing import Any

from robovlms_jax.training import checkpoints

logger = logging.getLogger(__name__)

STATUS = 128 + signal.SIGINT
"""Exit status of a process that Ctrl-C ended."""


class Interrupts:
    """Context in which SIGINT is handled. `asked`: whether it came.

    While a training loop runs, it gets SIGTERM, which it handles; at any other time KeyboardInterrupt is raised.
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
        if callable(signal.getsignal(signal.SIGTERM)):
            logger.warning("Ctrl-C: the run is saved after this step and then ends; Ctrl-C once more ends it at once.")
            signal.raise_signal(signal.SIGTERM)
        else:
            raise KeyboardInterrupt


def _at_once(*_: Any) -> None:
    print("stopped at once by a second Ctrl-C; steps since the last checkpoint are lost.", file=sys.stderr, flush=True)
    os._exit(STATUS)  # no cleaning up: it could wait for what is being written, or for other processes


def words(run: pathlib.Path) -> str:
    """What a run that Ctrl-C has ended leaves, for its user."""
    try:
        point = checkpoints.resume_point(run)
    except OSError:
        return "stopped by Ctrl-C; nothing was saved, for no step was made yet."
    return f"stopped by Ctrl-C; {point} is saved, go on with --train.resume."
