"""The settings of a search from their text: "optimizer.learning_rate=1e-4,2e-5"."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

Setting = dict[str, str]
"""Dotted field -> value as it is written on a command line."""


@dataclasses.dataclass(frozen=True)
class Values:
    """A field that takes one of some values."""

    name: str
    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Range:
    """A field that takes any number from low to high, evenly or evenly in its logarithm; whole ones only, if asked."""

    name: str
    low: float
    high: float
    log: bool = False
    whole: bool = False


def read(texts: Sequence[str]) -> list[Values | Range]:
    """Raises ValueError that names the text and what was expected, and so of no text at all."""
    if not texts:
        raise ValueError(
            "search.space is empty: name at least one field that varies, such as --space "
            "optimizer.learning_rate=1e-3,3e-4."
        )
    found = [_read(text) for text in texts]
    names = [field.name for field in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"search.space names {twice} more than once; write all values of a field in one.")
    return found


def _read(text: str) -> Values | Range:
    name, equals, right = text.partition("=")
    name = _spelt(name)
    if not equals or not name or not right:
        raise ValueError(f"search.space has {text!r}; expected FIELD=VALUE,VALUE or FIELD=LOW:HIGH[:log|:int].")
    parts = [right] if "://" in right else right.split(":")  # hf://OWNER/NAME is a value
    if len(parts) == 1:
        values = tuple(" ".join(value.split()) for value in right.split(","))
        if len(set(map(_meant, values))) < len(values) or "" in values:
            raise ValueError(f"search.space has {text!r}, with an empty value or one that is there twice.")
        return Values(name, values)
    kind = parts[2] if len(parts) == 3 else ""
    try:
        low, high = float(parts[0]), float(parts[1])
    except ValueError:
        low, high = 1.0, 0.0
    whole = kind == "int" and low.is_integer() and high.is_integer()
    finite = math.isfinite(low) and math.isfinite(high)
    if len(parts) > 3 or kind not in ("", "log", "int") or not (finite and low < high) or (kind == "int") != whole:
        raise ValueError(
            f"search.space has {text!r}; expected FIELD=LOW:HIGH, FIELD=LOW:HIGH:log or :int, LOW below HIGH."
        )
    if kind == "log" and low <= 0:
        raise ValueError(f"search.space has {text!r}; a logarithmic range begins above 0.")
    return Range(name, low, high, log=kind == "log", whole=whole)


def _meant(value: str) -> object:
    """What compares equal where two texts mean one number."""
    try:
        return tuple(map(float, value.split()))
    except ValueError:
        return value


def grid(fields: Sequence[Values | Range]) -> list[Setting]:
    """All combinations, the last field changing fastest. Raises ValueError for a range, which has no end of values."""
    ranges = [field.name for field in fields if isinstance(field, Range)]
    if ranges:
        raise ValueError(
            f"search.space gives ranges of {ranges}; a grid needs values. Choose --sampler tpe, or list some."
        )
    names = [field.name for field in fields]
    return [dict(zip(names, values)) for values in itertools.product(*(field.values for field in fields))]


def fixed(texts: Sequence[str], owner: str = "search") -> Setting:
    """ "FIELD=VALUE" texts as a setting. Raises ValueError that names `owner`, whose field `fixed` they are."""
    out = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"{owner}.fixed has {text!r}; expected FIELD=VALUE.")
        out[_spelt(name)] = value
    return out


def _spelt(name: str) -> str:
    """A field's own name: a command line takes "weight-decay", too, and one field must not seem to be two."""
    return name.strip().lstrip("-").replace("-", "_")


def flags(setting: Setting) -> list[str]:
    """The setting on a command line; a value of several words is several values."""
    return [word for name, value in setting.items() for word in (f"--{name}", *value.split())]
