"""Frames in the order in which a program makes them, kept in one file until they are packed."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping

import numpy as np

from robovlms_jax.data import base


class Spool:
    """A `packing.FrameSource` that a program fills.

    Frame ids count from 0. `add` all frames, set `episodes`, then `packing.pack` it; `delete` removes the file. A file
    that is there already is continued.

    Args:
      path: file to make.
      image_sizes: camera -> (height, width). arrays: field -> number of values.
    """

    robot, action_units = base.Dataset.robot, base.Dataset.action_units
    statistics = None

    def __init__(self, path: pathlib.Path, image_sizes: Mapping[str, tuple[int, int]], arrays: Mapping[str, int]):
        self.name, self.image_sizes, self.arrays = str(path), dict(image_sizes), tuple(arrays)
        self.episodes: tuple[base.Episode, ...] = ()
        images = [(camera, np.uint8, (*size, 3)) for camera, size in image_sizes.items()]
        self._record = np.dtype([*images, *((name, np.float32, (size,)) for name, size in arrays.items())])
        path.touch()
        self.num_frames = path.stat().st_size // self._record.itemsize

    def truncate(self, num_frames: int) -> None:
        """Keep the first `num_frames` frames. Raises ValueError when there are fewer."""
        if num_frames > self.num_frames:
            raise ValueError(f"{self.name} has {self.num_frames} frames, expected {num_frames}; record anew.")
        os.truncate(self.name, num_frames * self._record.itemsize)
        self.num_frames = num_frames

    def add(self, images: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> None:
        """Append T frames: camera -> uint8[T, height, width, 3], field -> float[T, d]."""
        values = {**images, **arrays}
        records = np.empty(len(next(iter(values.values()))), self._record)
        for name in self._record.names:
            records[name] = values[name]
        with open(self.name, "ab") as file:
            records.tofile(file)
        self.num_frames += len(records)

    def frame(self, frame_id: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        offset = frame_id * self._record.itemsize
        row = np.fromfile(self.name, self._record, count=1, offset=offset)[0]
        return {camera: row[camera] for camera in self.image_sizes}, {name: row[name] for name in self.arrays}

    def delete(self) -> None:
        pathlib.Path(self.name).unlink(missing_ok=True)
