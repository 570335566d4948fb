"""Upstream's JSON files: each is merged over its `parent`."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from robovlms_jax import json_files

_OVERRIDE = "__override__"


def read(path: str | pathlib.Path) -> dict[str, Any]:
    """The file merged over its `parent`s, as upstream merges them: dictionaries deeply, all else by replacement.

    A dictionary with `"__override__": true` replaces its parent's instead of being merged.
    """
    return _read(pathlib.Path(path), ())


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no dictionary, or an empty one."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _read(path: pathlib.Path, children: tuple[pathlib.Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        named = f", the parent of {children[-1]}" if children else ""
        raise FileNotFoundError(f"no file {path}{named}; expected an upstream JSON configuration.")
    if path.resolve() in children:
        raise ValueError(f"{path} is its own parent: {' -> '.join(str(child) for child in children)}.")
    values = json_files.read_object(path, "settings")
    parent = values.get("parent")
    if not parent:
        return _merge({}, values)
    beside = path.parent / parent
    merged = _read(beside if beside.is_file() else pathlib.Path(parent), (*children, path.resolve()))
    return _merge(merged, values)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` over `base`, in a new dictionary without override marks."""
    merged = {} if over.get(_OVERRIDE) else dict(base)
    for key, value in over.items():
        if key == _OVERRIDE:
            continue
        if isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = _merge(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged
