"""Which datasets are trained on together, with which weights.

Entries of Open X-Embodiment are in `oxe.py`, those of LIBERO in `libero.py`, mixtures in `mixtures.json`; a YAML or
JSON file adds one's own:

    datasets:                      # only what differs from the common names, see `infer`
      my_robot: {arm: ["action[:6]"], gripper: "invert(action[6])", control_hz: 10}
    mixture: {my_robot: 2.0, bridge_orig: 1.0}
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from robovlms_jax import json_files, schema
from robovlms_jax.data.registry import libero, oxe, robot_entry
from robovlms_jax.data.registry.entry import Entry

ENTRIES: Mapping[str, Entry] = {**oxe.ENTRIES, **libero.ENTRIES}
"""All that are described, by name."""
OTHERS = ("calvin", "lerobot", "libero_hdf5")
"""What data.dataset may be besides, see `opening`."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Datasets and their weights.

    datasets: what is known of each beforehand: an entry, or fields to replace in an inferred one.
    balance: weights are multiplied by the number of transitions, as upstream does.
    """

    name: str
    weights: Mapping[str, float]
    datasets: Mapping[str, Entry | Mapping[str, Any]]
    balance: bool = True


def resolve(name: str) -> Mixture:
    """A mixture by its name, a dataset's name, or a YAML or JSON file's path. Raises ValueError with near names."""
    if pathlib.Path(name).suffix in (".json", ".yaml", ".yml"):
        return _read_mixture(pathlib.Path(name), ENTRIES)
    mixtures = published_mixtures()
    if name in mixtures:
        weights = mixtures[name]
        return Mixture(name, weights, {dataset: oxe.ENTRIES[dataset] for dataset in weights})
    for entry in ENTRIES.values():
        if name in (entry.name, *entry.directories):
            return Mixture(name, {entry.name: 1.0}, {entry.name: entry})
    hint = schema.nearest(name, [*mixtures, *ENTRIES, *OTHERS])
    raise ValueError(
        f"data.dataset={name!r} is neither a mixture nor a dataset of the registry{hint} Mixtures: "
        f"{', '.join(mixtures)}; datasets: {', '.join(ENTRIES)}; other kinds: {', '.join(OTHERS)}; or pass a YAML or "
        "JSON file (data/README.md)."
    )


def published_mixtures() -> dict[str, dict[str, float]]:
    """Name -> dataset -> weight, with "extends" written out."""
    table = json.loads((pathlib.Path(__file__).parent / "mixtures.json").read_text(encoding="utf-8"))

    def expand(name: str) -> dict[str, float]:
        listed = dict(table[name])
        base = expand(listed.pop("extends")) if "extends" in listed else {}
        return {key: weight for key, weight in {**base, **listed}.items() if weight}

    return {name: expand(name) for name in table}


def _read_mixture(path: pathlib.Path, entries: Mapping[str, Entry]) -> Mixture:
    content = _read_file(path)
    own, given = content.get("datasets") or {}, content.get("mixture")
    if unknown := sorted(set(map(str, content)) - {"datasets", "mixture", "balance"}):
        raise ValueError(f"{path} has {unknown}; known: datasets, mixture, balance.")
    for field, value in (("datasets", own), ("mixture", given)):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {field} is {value!r:.80}; {_EXPECTED}.")
    for name, fields in own.items():
        if not isinstance(fields, dict | None):
            raise ValueError(f"{path}: datasets.{name} is {fields!r:.80}; {_EXPECTED}.")
    try:
        weights = {str(name): float(weight) for name, weight in given.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the mixture's weights must be numbers: {error}; got {given}.") from error
    if not weights or not min(weights.values()) > 0:
        raise ValueError(f"{path}: the mixture needs at least one dataset, and weights above 0; got {weights}.")
    datasets: dict[str, Entry | Mapping[str, Any]] = {}
    for name in weights:
        if name in own:
            # What the file says of a registered dataset replaces fields of its entry.
            if "robot" in (own[name] or {}):
                datasets[name] = robot_entry.of_json(name, own[name], str(path))
                continue
            listed = {key: tuple(v) if isinstance(v, list) else v for key, v in (own[name] or {}).items()}
            datasets[name] = _replaced(entries[name], listed, path) if name in entries else listed
        else:
            datasets[name] = entries.get(name, {})
    return Mixture(path.stem, weights, datasets, bool(content.get("balance", True)))


_EXPECTED = "expected datasets: {name: {field: value}} and mixture: {name: weight} (data/README.md)"


def _read_file(path: pathlib.Path) -> dict[Any, Any]:
    """Raises ValueError: no such file, not of its format, or no mapping."""
    try:
        if path.suffix == ".json":
            return json_files.read_object(path, "a mixture")
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.dataset: {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path} cannot be parsed: {error}\nWithin braces and brackets expressions need quotes: {{gripper: "
            '"invert(action[6])"}.'
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.80}; {_EXPECTED}.")
    return content


def _replaced(entry: Entry, fields: Mapping[str, Any], path: pathlib.Path) -> Entry:
    try:
        return dataclasses.replace(entry, **fields)
    except TypeError as error:
        raise ValueError(f"{path}: dataset {entry.name!r}: {error}") from error
