"""Files of one JSON value per line, which grow while a program runs: results, metrics, journals.

A line counts once its newline is there. A process that is killed leaves at most one line without: `read` leaves it out,
and the next `append` cuts it off.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import IO, Any, TypeVar

from robovlms_jax import atomic

logger = logging.getLogger(__name__)

T = TypeVar("T")


def read(
    path: pathlib.Path,
    convert: Callable[[int, Any], T],
    *,
    expected: str,
    remedy: str = "",
    skip_damaged: bool = False,
) -> list[T]:
    """`convert(number, value)` of every line, counted from 1; nothing where there is no file.

    Args:
      convert: may raise ValueError, KeyError, TypeError or AttributeError for a line that is not what it should be.
      expected: what a line is, for the message. remedy: what to do about one that is not; a sentence.
      skip_damaged: leave damaged lines out, with a warning, instead of raising.
    Raises:
      ValueError: a line that is not JSON or that `convert` refused; names file and line.
    """
    found: list[T] = []
    *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if torn:
        logger.warning("%s ends in an unfinished line, which is ignored", path)
    for number, line in enumerate(lines, start=1):
        try:
            found.append(convert(number, json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            shown = line[:80].decode(errors="replace")
            message = f"{path}, line {number} is not {expected} ({type(error).__name__}: {error}): {shown!r}."
            if not skip_damaged:
                raise ValueError(f"{message} {remedy}".rstrip()) from error
            logger.warning("%s It is left out.", message)
    return found


def append(path: pathlib.Path, value: Any, *, durable: bool = False) -> None:
    """Add a line; when this returns it is in the file, and if `durable` safe from a power failure, which takes some
    milliseconds.

    Raises OSError (a full disk); what was written of the line by then is removed again.
    """
    new = durable and not path.exists()
    data = json.dumps(value).encode() + b"\n"
    with path.open("ab+", buffering=0) as file:
        end = _end_of_lines(file)
        file.truncate(end)
        try:
            while data:
                data = data[file.write(data) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise
    if new:
        atomic.settle(path.parent)


def _end_of_lines(file: IO[bytes]) -> int:
    """Position behind the last newline, searched for backwards: it nearly always is the last byte."""
    end, block = file.seek(0, os.SEEK_END), 1
    while end > 0:
        begin = max(end - block, 0)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end, block = begin, 65536
    return 0
