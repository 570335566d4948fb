"""The eleven configurations upstream published, as files."""

from __future__ import annotations

import json
import pathlib
from typing import Any

_FILE = json.loads((pathlib.Path(__file__).parent / "published.json").read_text())

NAMES = tuple(_FILE["files"])


def read(name: str) -> dict[str, Any]:
    """One configuration, nested as upstream has it."""
    nested: dict[str, Any] = {}
    for key, value in (_FILE["common"] | _FILE["files"][name]).items():
        *parents, leaf = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return nested
