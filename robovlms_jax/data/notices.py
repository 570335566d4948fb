"""What is worth saying once: guesses and their consequences, although a dataset is opened several times in a run."""

from __future__ import annotations

import logging

_said: set[str] = set()


def once(logger: logging.Logger, message: str, level: int = logging.WARNING) -> None:
    """Log `message` unless this process has logged the same before."""
    if message not in _said:
        _said.add(message)
        logger.log(level, "%s", message)
