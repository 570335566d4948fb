"""Which episodes are trained on and which are validated on, as info.json's `splits` say."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from robovlms_jax.data import splits as tfds_splits
from robovlms_jax.data.lerobot import meta

_BOUND = r"(-?\d+(?:\.\d+)?\s*%|-?\d+)?"
_RANGE = re.compile(rf"{_BOUND}\s*:\s*{_BOUND}")
_SLICED = re.compile(r"\w+\[(.*)\]")  # "train[:80%]", as Hugging Face's datasets write it


def choose(
    info: meta.Info, episodes: Sequence[int], split: Literal["training", "validation"], notes: meta.Notes
) -> tuple[set[int], set[int]]:
    """(episodes of `split`, episodes whose numbers statistics may be taken from).

    Validation is a split called val, validation, valid, dev or eval, else the last 5 % of the training episodes. Any
    other split (test, ...) is left alone; nothing that validation or such a split has is trained on.

    Args:
      episodes: numbers of the episodes there are.
    Raises:
      ValueError: a split that cannot be read, by name; none to train on.
    """
    listed = info.splits or {}
    if not isinstance(listed, dict):
        raise ValueError(f"{info.path}: splits is {listed!r:.80}, expected an object such as {{'train': '0:80'}}.")
    total = max([info.total_episodes or 0, *(number + 1 for number in episodes)])
    parsed = {name: _numbers(value, total, f"{info.path}: splits[{name!r}]") for name, value in listed.items()}
    there = set(episodes)
    by_role: dict[str, set[int]] = {"training": set(), "validation": set(), "": set()}
    for name, chosen in parsed.items():
        role = next((role for role, names in tfds_splits.NAMES.items() if str(name).lower() in names), "")
        by_role[role] |= chosen & there
    named = any(str(name).lower() in tfds_splits.NAMES["training"] for name in parsed)
    if parsed and not named and not by_role["validation"] and not by_role[""]:
        raise ValueError(f"{info.path}: splits has {sorted(parsed)}; expected 'train' among them.")
    train = by_role["training"] if named else set(there)
    shared = train & (by_role["validation"] | by_role[""])
    if shared:
        notes.warn(
            f"{len(shared)} episodes of info.json's training split are in another split, too ({min(shared)} is the "
            "first); they are not trained on."
        )
        train -= shared
    if by_role[""]:
        others = sorted(
            name for name in parsed if not any(str(name).lower() in names for names in tfds_splits.NAMES.values())
        )
        notes.guess(f"{len(by_role[''])} episodes of the splits {others} are neither trained nor validated on.")
    if not train:
        raise ValueError(
            f"{info.path}: splits {dict(listed)} leave no episode to train on; the dataset has {len(there)} episodes, "
            f"{min(there)} to {max(there)}."
        )
    if by_role["validation"]:
        return (by_role["validation"] if split == "validation" else train), train
    ordered = sorted(train)
    border = min(round(len(ordered) * (1 - tfds_splits.HELD_OUT_SHARE)), len(ordered) - 1)
    if len(ordered) == 1:  # a single episode is both
        return train, train
    return set(ordered[border:] if split == "validation" else ordered[:border]), train


def _numbers(value: Any, total: int, where: str) -> set[int]:
    """Episodes that a split's value names: a range of numbers or percentages, open or not, or a list of any of them."""
    if value is None or value == "":
        return set()
    if isinstance(value, dict) and "episodes" in value:
        value = value["episodes"]
    if isinstance(value, list | tuple):
        return set().union(*(_numbers(part, total, where) for part in value))
    if isinstance(value, int) and not isinstance(value, bool):
        return {value}
    if isinstance(value, str):
        text = value.strip()
        if sliced := _SLICED.fullmatch(text):
            text = sliced[1].strip()
        if "," in text:
            return set().union(*(_numbers(part, total, where) for part in text.split(",")))
        if text.isdigit():
            return {int(text)}
        if match := _RANGE.fullmatch(text):
            first, last = _bound(match[1], total, 0), _bound(match[2], total, total)
            if first <= last:
                return set(range(max(first, 0), min(last, total)))
    raise ValueError(
        f"{where} is {value!r}; expected a range such as '0:80', ':80', '80:', '0%:80%', or a list of episode numbers."
    )


def _bound(text: str | None, total: int, default: int) -> int:
    """One end of a range: a number, or a percentage of `total`; from the end where it is negative."""
    if text is None:
        return default
    number = float(text.rstrip("%")) * total / 100 if text.endswith("%") else float(text)
    return math.floor((number + total if number < 0 else number) + 0.5)
