"""Parts of a Hugging Face config.json and the configurations they fill."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of a config.json and the configuration dataclass it fills."""

    name: str
    """Key of the part, such as "vision_config"; empty: the top level."""
    fields: Mapping[str, tuple[str, ...]]
    """Field of the dataclass -> its names in the file, "a.b" for one inside another; the first is written, any is read
    (legacy and new spellings)."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the file that the model can only have with this value."""

    def read(self, values: Mapping[str, Any], default: Any) -> Any:
        """`default` with what the file says. Raises ValueError where it asks for a variant the model does not have."""
        part = self.part(values)
        for key, supported in self.fixed.items():
            found = _lookup(part, key, supported)
            if found != supported:
                raise ValueError(f"{self.prefix}{key}={found!r} is not supported; this model has {supported!r}.")
        found = {}
        for field, keys in self.fields.items():
            value, key = next(((_lookup(part, key), key) for key in keys if _lookup(part, key) is not None), (None, ""))
            if value is not None:
                found[field] = self._number(key, value)
                if isinstance(found[field], str) != isinstance(getattr(default, field), str):
                    raise ValueError(f"{self.prefix}{key}={value!r}; expected such as {getattr(default, field)!r}.")
        return dataclasses.replace(default, **found)

    def write(self, config: Any) -> dict[str, Any]:
        """The part of a config.json that `read` turns into `config`."""
        found = {keys[0]: getattr(config, _EXPLICIT.get(field, field)) for field, keys in self.fields.items()}
        out: dict[str, Any] = {}
        for key, value in (found | dict(self.fixed)).items():
            *path, last = key.split(".")
            where = out
            for step in path:
                where = where.setdefault(step, {})
            if value is not None:
                where[last] = list(value) if isinstance(value, tuple) else value
        return out

    @property
    def prefix(self) -> str:
        """What stands before a key in messages."""
        return f"{self.name}." if self.name else ""

    def part(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """This part of a file."""
        return (values.get(self.name) or {}) if self.name else values

    def _number(self, key: str, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        if key.endswith(("_section", "_indexes")):
            return tuple(value)
        if len(set(value)) != 1:
            raise ValueError(f"{self.prefix}{key}={value} is not supported; expected one number, or equal ones.")
        return value[0]


_EXPLICIT = {"own_head_dim": "head_dim", "num_kv_heads": "kv_heads"}
"""Fields that None stands for -> what to write; families differ in what a missing entry means."""


def _lookup(part: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """part["a"]["b"] for the key "a.b"; `default` where that, or anything on the way, is missing or null."""
    value: Any = part
    for step in key.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return default if value is None else value
