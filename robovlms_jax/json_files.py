"""JSON files as people and their editors leave them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com"
"""How the small text file begins that git leaves in place of a large one until Git LFS fetches it."""


def read(path: str | pathlib.Path) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte-order mark (Windows editors write one).

    Raises:
      OSError: no such file, or it may not be read.
      ValueError: not UTF-8 or not JSON; names the file, and the line where reading failed.
    """
    path = pathlib.Path(path)
    raw = path.read_bytes()
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are
        raise ValueError(f"{path} is not JSON: {error} ({len(raw)} bytes).{pointer_hint(path)}") from error


def is_pointer(path: str | pathlib.Path) -> bool:
    """Whether a file, JSON or not, is what git leaves of a large one until Git LFS fetches it. False where it cannot be
    opened."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def pointer_hint(path: str | pathlib.Path) -> str:
    """A sentence to add to a message about a file that cannot be read; "" where it is no pointer of Git LFS."""
    if not is_pointer(path):
        return ""
    return " It is a pointer of Git LFS, not the file itself; run `git lfs pull` where it lies."


def read_object(path: str | pathlib.Path, expected: str) -> dict[str, Any]:
    """`read` of a file that holds an object; `expected` says of what, for the message.

    Raises ValueError, besides what `read` raises, where it holds something else.
    """
    values = read(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected an object of {expected}.")
    return values


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], keys: Iterable[str] | None = None) -> str:
    """What differs between the settings that stored results were made with and those of this call, for a message.

    keys: what to compare; None: everything in either.
    Returns "name: 3 there, 4 here; ...", empty where nothing differs.
    """
    compared = keys if keys is not None else {**theirs, **ours}
    return "; ".join(
        f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in compared
        if theirs.get(key) != ours.get(key)
    )
