"""The log of a program, on standard error."""

from __future__ import annotations

import logging
import sys

LIBRARIES = ("absl", "orbax", "grain", "jax._src", "httpx")
"""Whose own progress says nothing to whoever started the program."""


def to_stderr(level: int = logging.INFO, *, absl: int = logging.WARNING, libraries: int = logging.WARNING) -> None:
    """Messages of at least `level` with the time of day, and of other libraries what is at least of the levels given
    for them."""
    # force: a library that was imported may have given the root logger a handler, and basicConfig then does nothing
    logging.basicConfig(
        level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True
    )
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(libraries)
    logging.getLogger("absl").setLevel(max(absl, libraries))
    # Orbax logs every error that it raises, too, several times and with all frames.
    logging.getLogger("absl").addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None
