"""The arrays of a prepared split on disk: written once, compared with their checksums once per process, then mapped."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np

from robovlms_jax import atomic

VERSION = 3
"""Of the arrays; others are made again."""

ARRAYS = (
    "actions",
    "states",
    "file_id",
    "offset",
    "length",
    "checksum",
    "start",
    "end",
    "number",
    "instruction",
    "success",
)

SENSOR = "sensor_"
"""Begins the names of further arrays: the fields that the entry lists under `sensors`."""

Stamps = tuple[tuple[str, int, int], ...]
"""Name, size and time of change (ns) of each file."""

_verified: dict[str, Stamps] = {}
"""Directory -> its files as this process compared them with their checksums."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An opened directory.

    meta: what `save` was given. arrays: memory-mapped, by name in `ARRAYS`, and sensors'.
    stamps: of the files when they were compared with their checksums.
    """

    directory: pathlib.Path
    meta: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    stamps: Stamps


def save(directory: pathlib.Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write arrays, then the file that marks completeness and knows their checksums."""
    directory.mkdir(parents=True, exist_ok=True)
    checksums = {}
    for name in (*ARRAYS, *sorted(name for name in arrays if name.startswith(SENSOR))):
        path = directory / f"{name}.npy"
        with atomic.replacing(path) as file:
            np.save(file, arrays[name])
        checksums[name] = google_crc32c.value(path.read_bytes())
    text = json.dumps({**meta, "checksums": checksums})
    atomic.write_json(directory / "meta.json", {"checksum": google_crc32c.value(text.encode()), "content": text})
    atomic.write_json(directory / "dataset_statistics.json", meta["statistics"])


def load(directory: pathlib.Path, stamps: Stamps = ()) -> Prepared:
    """Open what `save` wrote.

    Args:
      stamps: of files that another process has compared with their checksums; those are not read again.
    Raises:
      FileNotFoundError: it was never finished. ValueError: it is damaged.
    """
    path = directory / "meta.json"
    try:
        current = _stamps(directory)
        is_verified = current in (stamps, _verified.get(str(directory)))
        envelope = json.loads(path.read_text())
        if google_crc32c.value(envelope["content"].encode()) != envelope["checksum"]:
            raise ValueError("its checksum is wrong")
        meta = json.loads(envelope["content"])
        arrays = {}
        for name in meta["checksums"]:
            file = directory / f"{name}.npy"
            arrays[name] = np.asarray(np.load(file, mmap_mode="r"))
            if not is_verified and google_crc32c.value(file.read_bytes()) != meta["checksums"][name]:
                raise ValueError(f"{file} is damaged")
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged JSON and npy files raise almost anything
        raise ValueError(f"{path} is damaged: {error!r}") from error
    _verified[str(directory)] = current
    return Prepared(directory, meta, arrays, current)


def _stamps(directory: pathlib.Path) -> Stamps:
    further = sorted(path.name for path in directory.glob(f"{SENSOR}*.npy"))
    names = ("meta.json", *(f"{name}.npy" for name in ARRAYS), *further)
    stats = {name: (directory / name).stat() for name in names}
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())
