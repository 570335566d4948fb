"""How things are said about data: guesses and their consequences once, although a dataset is opened several times in a
run, and errors with the source in which they happened."""

from __future__ import annotations

import json
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


def about(where: str, error: Exception) -> Exception:
    """The error with `where` before its words, for whoever catches errors of its kind. A ValueError stands for those
    that are made of more than words (what UTF-8 and JSON decoders raise)."""
    kind = ValueError if isinstance(error, UnicodeError | json.JSONDecodeError) else type(error)
    return kind(f"{where}: {error}")
