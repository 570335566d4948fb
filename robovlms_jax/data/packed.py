"""Packed layout: encoded frames in a few large files, numbers in memory-mapped arrays. Written by `packing.py`.

<split>/
  meta.json             codec, image sizes, size and crc32 of every shard; its presence marks a complete directory
  annotations.json      [{start, end, instruction, task}, ...]
  shard_00000.bin ...   images of up to 4096 frames each; the cameras of a frame lie side by side
  index/*.npy           a row per frame, sorted by frame id: frame_id, file_id, offset and length per camera (0: the
                        frame has no picture), and the numeric fields as float32, those of further sensors included
                        (meta.json: sensors)
and the source's small files about sessions and scenes, copied as they are.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.data import base, frame_index, kept, statistics

VERSIONS = 1, 2
"""Of the layout: all frames have pictures, or some (those of length 0) have none."""
META, PARTIAL_META = "meta.json", "meta.partial.json"
"""The second stands for the first while a directory is being packed."""


class PackedDataset(base.Dataset):
    """A packed split, opened in milliseconds. Raises ValueError when the directory is not a complete packed split.

    `selected` replaces the annotated episodes, all of them by default; decoded_bytes: see `keep_decoded`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        selected: tuple[base.Episode, ...] | None = None,
        decoded_bytes: int = 0,
    ):
        self.directory = pathlib.Path(directory)
        self.name = str(self.directory)
        self.meta = self._json(META)
        if self.meta.get("version") not in VERSIONS:
            raise ValueError(
                f"{self.directory / META} has version {self.meta.get('version')}, this code reads 1 and 2; pack again."
            )
        self.image_sizes = {camera: tuple(size) for camera, size in self.meta["image_sizes"].items()}
        self.action_units = tuple(self.meta.get("action_units", base.CALVIN_UNITS))
        self.names_tasks = "statistics" not in self.meta  # CALVIN's layout has tasks; of others the name is kept
        if "robot" in self.meta:
            self.robot = robots.from_json(self.meta["robot"], str(self.directory / META))
        if "statistics" in self.meta:
            self.statistics = statistics.from_json(self.meta["statistics"], str(self.directory / META))
        self.episodes = selected
        if selected is None:
            self.episodes = tuple(
                base.Episode(**{**fields, "rewordings": tuple(fields.get("rewordings", ()))})
                for fields in self._json("annotations.json")
            )
        for shard in self.meta["shards"]:
            path = self.directory / shard["file"]
            size = path.stat().st_size if path.exists() else None
            if size != shard["size"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"{path} {found}, expected {shard['size']} bytes; copy the packed dataset again.")
        self.frame_ids = self._load("frame_id", ())
        self._arrays = {name: self._load(name, self._form(name)) for name in self.meta["arrays"]}
        lengths = self._load("length", (len(self.cameras),))
        self._index = frame_index.FrameIndex(
            [self.directory / shard["file"] for shard in self.meta["shards"]],
            self.cameras,
            self._load("file_id", ()),
            self._load("offset", (len(self.cameras),)),
            lengths,
        )
        self._shown = None if self.meta["version"] == VERSIONS[0] else (lengths > 0).all(axis=1)
        self.keep_decoded(decoded_bytes)

    def images(
        self, frame_ids: Sequence[int], cameras: Sequence[str], out: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Mapping[str, Sequence[np.ndarray]]:
        out = self.allocate(len(frame_ids), cameras) if out is None else out
        rows, wanted = self._rows(frame_ids), {camera: out[camera] for camera in cameras}
        if self._kept is None:
            self._index.decode(rows, wanted)
        else:
            self._kept.fill(rows, wanted, self._index.decode)
        return out

    def has_images(self, frame_ids: Sequence[int], camera: str) -> np.ndarray:
        return self.shown(frame_ids) & (camera in self.cameras)

    def shown(self, frame_ids: Sequence[int]) -> np.ndarray:
        rows = self._rows(frame_ids)
        return np.ones(len(rows), bool) if self._shown is None else self._shown[rows]

    @property
    def shows_all(self) -> bool:
        return self._shown is None

    def keep_decoded(self, limit: int) -> None:
        """Keep pictures in memory once they are decoded, `limit` bytes of them at most, in each process that reads."""
        self._limit = limit
        self._kept = kept.Pictures(len(self.frame_ids), self.image_sizes, limit, self._shown) if limit else None

    def array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        if name not in self._arrays:
            raise ValueError(f"{self.name} stores no {name!r}; it has {sorted(self._arrays)}.")
        values = self._arrays[name][self._rows(frame_ids)]
        if name in self.meta.get("sensors", ()):  # NaN and infinity have a meaning there
            return values
        return base.require_finite(values, frame_ids, name, self.name)

    def encoded(self, frame_ids: Sequence[int], camera: str) -> list[bytes]:
        """The images as they are stored, JPEG or PNG; empty where there is none. Raises as `images` does."""
        return [bytes(data) for data in self._index.read(self._rows(frame_ids), [camera])[camera]]

    def close(self) -> None:
        """Close the shard files; the next read opens them again."""
        self._index.close()

    def _rows(self, frame_ids: Sequence[int]) -> np.ndarray:
        return base.rows_of(self.frame_ids, frame_ids, self.name)

    def _json(self, name: str) -> Any:
        path = self.directory / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} is missing: not a packed split, or packing has not finished; run the packing again."
            ) from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}; copy the packed dataset again.") from error

    def _form(self, name: str) -> tuple[int, ...] | None:
        """Shape of a numeric field of one frame, as far as it is known: what the robot is told, and CALVIN's fields."""
        if name == "rel_actions":
            return (len(self.robot.action),)
        is_calvins = "robot" not in self.meta and name in base.CALVIN_SIZES
        return (base.CALVIN_SIZES[name],) if is_calvins else None

    def _load(self, name: str, form: tuple[int, ...] | None) -> np.ndarray:
        """A row of the shape `form` per frame; None: of any shape."""
        path = self.directory / "index" / f"{name}.npy"
        try:
            # Still mapped, but a plain array: the indexing of np.memmap is several times slower.
            array = np.asarray(np.load(path, mmap_mode="r"))
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read: {error}; copy the packed dataset again.") from error
        rows = self.meta["num_frames"]
        if array.ndim == 0 or len(array) != rows:
            raise ValueError(
                f"{path} has {len(array) if array.ndim else 'no'} rows, expected {rows}; copy the packed dataset again."
            )
        wanted = (rows, *(array.shape[1:] if form is None else form))
        if array.shape != wanted or array.dtype.kind not in "fiub":
            raise ValueError(
                f"{path}: {name} is {array.dtype}{list(array.shape)}, expected numbers {list(wanted)}, a row per "
                "frame; pack or copy the dataset again."
            )
        return array

    def __reduce__(self):
        return PackedDataset, (self.directory, self.episodes, self._limit)
