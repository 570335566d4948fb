"""Instructions as datasets store them: one text, several, bytes, padded lists, nothing. Every reader asks here."""

from __future__ import annotations

import ast
import functools
import json
import logging
import math
import re
from typing import Any

import numpy as np

from robovlms_jax.data import notices

logger = logging.getLogger(__name__)

NOTHING = frozenset({"none", "nan", "nat", "null", "n/a", "<na>", "{}"})
"""What programs print for a cell that says nothing, in lower case."""

_PROGRAM_VALUE = re.compile(r"n/?a|todo|unknown|undefined|default|task|test|[\d.]+|[\[({].*|b?['\"].*")


def wordings(cell: Any) -> tuple[str, ...]:
    """The sentences a stored cell holds, in order, each once; blank ones are left out.

    Args:
      cell: str, bytes (UTF-8), None, NaN (pandas' missing text), or a list, tuple or array of these, nested or not.
        Text that a program printed is read as what it printed: 'None' says nothing, "['open it']" says "open it"; the
        log says so once, and once of other text that is no sentence, which stays.
    Returns:
      Sentences with runs of white space made single spaces; () where the cell says nothing.
    Raises:
      ValueError: the cell, or an element of it, is a number, a dict or another thing that is no text.
    """
    return tuple(dict.fromkeys(_texts(cell)))


def _texts(cell: Any) -> list[str]:
    if cell is None or (isinstance(cell, float | np.floating) and math.isnan(cell)):
        return []
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", errors="replace")
    if isinstance(cell, str):
        return _read(" ".join(cell.replace("\0", " ").split()))
    if isinstance(cell, np.ndarray):
        return _texts(cell.tolist())
    if isinstance(cell, list | tuple):
        return [text for part in cell for text in _texts(part)]
    raise ValueError(f"an instruction must be text or a list of texts, found {type(cell).__name__} {cell!r:.80}.")


def is_program_value(text: str) -> bool:
    """Whether a sentence looks like what a program prints, a name or a number, rather than like a language."""
    folded = text.strip().casefold()
    return folded in NOTHING or bool(_PROGRAM_VALUE.fullmatch(folded))


def _read(text: str) -> list[str]:
    """A clean text as sentences."""
    if not text:
        return []
    if text.casefold() in NOTHING:
        notices.once(logger, f"the stored instruction {text!r} says nothing and counts as blank.", key="nothing")
        return []
    if not is_program_value(text):
        return [text]
    printed = _printed(text)
    if printed is None:
        message = (
            f"the stored instruction {text!r} looks like a program's value, not like a sentence; it stays as it is."
        )
        notices.once(logger, message, key="no sentence")
        return [text]
    found = _texts(printed)
    notices.once(logger, f"the stored instruction {text!r} was printed by a program; read as {found}.", key="printed")
    return found


def _printed(text: str) -> Any:
    """The text or list of texts that Python or JSON prints as `text`; None where it is not exactly one."""
    for parse, *printers in (
        (ast.literal_eval, repr),
        (json.loads, json.dumps, functools.partial(json.dumps, ensure_ascii=False)),
    ):
        try:
            value = parse(text)
            # NumPy prints two texts as ['a' 'b'], which Python reads as one: so it must print the same again.
            if isinstance(value, str | bytes | list | tuple) and text in [show(value) for show in printers]:
                _texts(value)
                return value
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None
