"""Rows of a table that turns one configuration into another, and what reads a file by them.

A row says what a key decides and does it: `Take` sets a field, `Must` refuses what is not built here, `Shared` keys
decide fields together with others, in a function.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

NEEDED = object()
"""As a default: upstream needs the key, too."""
UNSET = object()
"""As a default: without the key, or with null, its field keeps our own default."""

Condition = tuple[str, Any]
"""(key, value): a row matters only where the key has this value; True: any that counts as true."""


@dataclasses.dataclass(frozen=True)
class Take:
    """`target`, a dotted field of ExperimentConfig, is the key's value.

    convert: a function of the value, or a table of all values that are known.
    default: what upstream takes where the key is absent. says: more for the page.
    """

    key: str
    target: str
    convert: Callable[[Any], Any] | Mapping[Any, Any] = lambda value: value
    default: Any = NEEDED
    says: str = ""
    when: Condition | None = None

    @property
    def text(self) -> str:
        return "; ".join(filter(None, (self.target, self.says)))


@dataclasses.dataclass(frozen=True)
class Must:
    """The key, where it is there, has one of the values that mean what is built here; the first is the usual one."""

    key: str
    values: tuple[Any, ...]
    says: str = ""
    when: Condition | None = None

    @property
    def text(self) -> str:
        value = self.values[0] if isinstance(self.values[0], str) else json.dumps(self.values[0])
        return f"must be {value}{self.says}"


@dataclasses.dataclass(frozen=True)
class Shared:
    """The key decides with others; `says` what."""

    key: str
    says: str

    @property
    def text(self) -> str:
        return self.says


Row = Take | Must | Shared


def when(condition: Condition, *rows: Take | Must) -> tuple[Row, ...]:
    """Rows that matter only under a condition."""
    return tuple(dataclasses.replace(row, when=condition) for row in rows)


def shared(says: str, *keys: str) -> tuple[Row, ...]:
    """Keys of which the same is to be said."""
    return tuple(Shared(key, says) for key in keys)


class Keys:
    """The values of a file, read by key; absent ones are what upstream takes instead.

    Args:
      flat: dotted key -> value. rows: every key that may be read.
    """

    def __init__(self, flat: Mapping[str, Any], rows: Iterable[Row]):
        self._flat = flat
        self._rows = {row.key: row for row in rows}

    def get(self, key: str, default: Any) -> Any:
        assert key in self._rows, f"{key} decides something and must have a row"
        return self._flat.get(key, default)

    def need(self, key: str) -> Any:
        """Raises ValueError where the key is absent."""
        value = self.get(key, None)
        if value is None:
            raise ValueError(f"it has no {key}, which upstream needs as well; it decides {self._rows[key].text}.")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Raise where `key` is there with a value of which nothing is built here."""
        value = self.get(key, allowed[0])
        if value not in allowed:
            known = " or ".join(json.dumps(x) for x in allowed)
            raise ValueError(f"{key}={json.dumps(value)} is not built here; expected {known} ({self._rows[key].text}).")

    def choose(self, key: str, default: Any, table: Mapping[Any, Any]) -> Any:
        """What the table has for the key's value. Raises ValueError where it has nothing."""
        value = self.get(key, default)
        if value not in table:
            raise ValueError(f"{key}={value!r} is unknown; known: {list(table)}.")
        return table[value]

    def fields(self) -> dict[str, Any]:
        """Target -> value of all `Take` rows. Raises ValueError, of `Must` rows as well."""
        found = {}
        for row in self._rows.values():
            if isinstance(row, Shared) or not self._applies(row):
                continue
            if isinstance(row, Must):
                self.only(row.key, *row.values)
            elif isinstance(row.convert, Mapping):
                found[row.target] = self.choose(row.key, None if row.default is NEEDED else row.default, row.convert)
            elif row.default is NEEDED:
                found[row.target] = row.convert(self.need(row.key))
            else:
                value = self.get(row.key, row.default)
                if row.default is not UNSET or value not in (UNSET, None):
                    found[row.target] = row.convert(value)
        return found

    def _applies(self, row: Take | Must) -> bool:
        if row.when is None:
            return True
        key, expected = row.when
        value = self.get(key, False)
        return bool(value) if expected is True else value == expected


def replaced(config: Any, fields: Mapping[str, Any]) -> Any:
    """A dataclass with dotted fields replaced; every part is made once, with all of its fields."""
    parts: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    for path, value in fields.items():
        name, _, below = path.partition(".")
        if below:
            parts.setdefault(name, {})[below] = value
        else:
            values[name] = value
    nested = {name: replaced(getattr(config, name), below) for name, below in parts.items()}
    return dataclasses.replace(config, **values, **nested)
