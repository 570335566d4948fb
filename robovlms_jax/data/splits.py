"""The splits of a TFDS directory: which files each has, and which one training and validation take."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Literal

from robovlms_jax import json_files
from robovlms_jax.data import storage as storages

NAMES: Mapping[str, tuple[str, ...]] = {
    "training": ("train", "training"),
    "validation": ("val", "validation", "valid", "dev", "eval"),
}
"""What splits are called, the first that is there and has episodes counts. A split `test` is used only where a
description asks for it."""

HELD_OUT_SHARE = 0.05
"""Of the usable training episodes, the last ones, where a dataset has no split to validate on (as upstream)."""

Use = Literal["training", "validation"]


@dataclasses.dataclass(frozen=True)
class Split:
    """The files of one split as dataset_info.json lists them.

    files: names, in order.
    shard_lengths: episodes per file.
    """

    dataset: str
    version: str
    name: str
    file_format: str
    files: tuple[str, ...]
    shard_lengths: tuple[int, ...]

    @property
    def num_episodes(self) -> int:
        return sum(self.shard_lengths)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Records [first, last) of a split; is_shared: training and validation are still to be told apart in there."""

    split: Split
    first: int
    last: int
    is_shared: bool


def choose(found: Mapping[str, Split], given: Mapping[str, str], use: Use, where: str) -> Choice:
    """The part of a dataset that training or validation takes.

    Args:
      found: as `read` gives them.
      given: "training", "validation" -> a split or a slice of one as TFDS writes it ("train[:90%]", "all[100:]"); a
        use that is not named takes the split called by one of `NAMES`, and validation, where there is none, shares the
        split of training.
    Raises:
      ValueError: there is no such split, or the two overlap.
    """
    training = _named(found, given, "training", where)
    if training is None:
        raise ValueError(
            f"{where} has no split {' or '.join(map(repr, NAMES['training']))}; dataset_info.json lists "
            f"{sorted(found)}. Say which to take in a description (data/README.md): "
            'splits: {training: "NAME[:95%]", validation: "NAME[95%:]"}.'
        )
    validation = _named(found, given, "validation", where)
    if validation is None:
        return dataclasses.replace(training, is_shared=True)
    first, last = max(training.first, validation.first), min(training.last, validation.last)
    if training.split.name == validation.split.name and first < last:
        raise ValueError(
            f"{where}: training and validation share episodes {first} to {last - 1} of split {training.split.name!r}; "
            "their slices must not overlap."
        )
    return training if use == "training" else validation


def _named(found: Mapping[str, Split], given: Mapping[str, str], use: Use, where: str) -> Choice | None:
    text = given.get(use, "")
    if not text:
        candidates = [found[name] for name in NAMES[use] if name in found]
        # An empty split is no split, but where there is nothing else it is named in the error.
        filled = [split for split in candidates if split.num_episodes] or candidates * (use == "training")
        return Choice(filled[0], 0, filled[0].num_episodes, False) if filled else None
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+(?:\.\d+)?%|-?\d+)?:(-?\d+(?:\.\d+)?%|-?\d+)?\])?", text.strip())
    if not match or match[1] not in found:
        raise ValueError(
            f"{where}: splits says {use}: {text!r}; expected a split or a slice of one such as 'train[:90%]'; there "
            f"are {sorted(found)}."
        )
    split = found[match[1]]
    total = split.num_episodes
    first, last = _bound(match[2], total, 0), _bound(match[3], total, total)
    if first >= last:
        raise ValueError(f"{where}: splits says {use}: {text!r}, which has none of the {total} episodes.")
    return Choice(split, first, last, False)


def _bound(text: str | None, total: int, default: int) -> int:
    if not text:
        return default
    value = round(float(text[:-1]) * total / 100) if text.endswith("%") else int(text)
    return min(max(value + total if value < 0 else value, 0), total)


def read(directory: storages.Directory) -> dict[str, Split]:
    """Name -> split of a dataset_info.json. Raises ValueError naming the file and what is wrong."""
    path = directory / "dataset_info.json"
    try:
        info = json.loads(path.read_text())
        name, file_format = info["name"], info.get("fileFormat") or "tfrecord"
        splits = {}
        for split in info["splits"]:
            lengths = tuple(int(length) for length in split.get("shardLengths", ()))
            template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
            files = tuple(
                template.format(
                    DATASET=name,
                    SPLIT=split["name"],
                    FILEFORMAT=file_format,
                    SHARD_X_OF_Y=f"{number:05d}-of-{len(lengths):05d}",
                    SHARD_INDEX=f"{number:05d}",
                    NUM_SHARDS=f"{len(lengths):05d}",
                )
                for number in range(len(lengths))
            )
            splits[split["name"]] = Split(name, info.get("version", ""), split["name"], file_format, files, lengths)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; copy the dataset's directory as a whole.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        hint = json_files.pointer_hint(str(path))
        raise ValueError(f"{path} is not what TFDS writes: {error!r}; copy it again.{hint}") from error
    for split in splits.values():
        if split.file_format not in ("tfrecord", "array_record"):
            raise ValueError(f"{path} says fileFormat {split.file_format!r}; tfrecord and array_record can be read.")
    return splits
