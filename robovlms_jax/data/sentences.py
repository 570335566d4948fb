"""Instructions as datasets store them: one text, several, bytes, padded lists, nothing. Every reader asks here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def wordings(cell: Any) -> tuple[str, ...]:
    """The sentences a stored cell holds, in order, each once; blank ones are left out.

    Args:
      cell: str, bytes (UTF-8), None, NaN (pandas' missing text), or a list, tuple or array of these, nested or not.
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
        text = " ".join(cell.replace("\0", " ").split())
        return [text] if text else []
    if isinstance(cell, np.ndarray):
        return _texts(cell.tolist())
    if isinstance(cell, list | tuple):
        return [text for part in cell for text in _texts(part)]
    raise ValueError(f"an instruction must be text or a list of texts, found {type(cell).__name__} {cell!r:.80}.")
