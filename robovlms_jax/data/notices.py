"""What is worth saying once: guesses and their consequences, although a dataset is opened several times in a run."""

from __future__ import annotations

import logging

_said: set[str] = set()


def once(logger: logging.Logger, message: str, level: int = logging.WARNING, *, key: str = "") -> None:
    """Log `message` unless this process has logged the same before.

    Args:
      key: what `message` is an example of, where one of a logger's is enough; "" = every message of its own.
    """
    said = f"{logger.name}: {key}" if key else message
    if said not in _said:
        _said.add(said)
        logger.log(level, "%s", message)
