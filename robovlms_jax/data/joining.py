"""Several CALVIN splits as one to pack: their frames follow each other, under new numbers."""

from __future__ import annotations

import bisect
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from robovlms_jax.data import base, packed, packing


class Split(packing.FrameSource, Protocol):
    """What is joined: a split that knows its frames; `calvin.NpzDataset` and `PackedSplit` are such."""

    frame_ids: np.ndarray


class PackedSplit:
    """A packed split as a source to pack from; its pictures are copied as they are where codec and quality agree."""

    def __init__(self, directory: pathlib.Path):
        self._dataset = dataset = packed.PackedDataset(directory)
        self.name, self.episodes = dataset.name, dataset.episodes
        self.image_sizes, self.arrays = dataset.image_sizes, tuple(dataset.meta["arrays"])
        self.robot, self.action_units, self.statistics = dataset.robot, dataset.action_units, dataset.statistics
        self.sensors = tuple(dataset.meta.get("sensors", ()))
        self.shows_all = dataset.shows_all
        self.frame_ids, self.encoded_as = dataset.frame_ids, (dataset.meta["codec"], dataset.meta["quality"])

    def frame(self, frame_id: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        images = self._dataset.images([frame_id], self._dataset.cameras)
        return {camera: found[0] for camera, found in images.items()}, self._numbers(frame_id)

    def encoded(self, frame_id: int) -> tuple[list[bytes], Mapping[str, np.ndarray]]:
        cameras = self._dataset.cameras
        return [self._dataset.encoded([frame_id], camera)[0] for camera in cameras], self._numbers(frame_id)

    def _numbers(self, frame_id: int) -> dict[str, np.ndarray]:
        return {name: self._dataset.array(name, [frame_id])[0] for name in self.arrays}


class Joined:
    """Splits, one behind the other. A `packing.FrameSource`; numeric fields are those that all have.

    Raises ValueError where pictures, robots or further sensors differ.
    """

    sensors: tuple[str, ...]

    def __init__(self, splits: Sequence[Split]):
        first = splits[0]
        for name in ("image_sizes", "robot", "action_units", "statistics"):
            for split in splits[1:]:
                mine, others = getattr(first, name), getattr(split, name)
                if mine != others:
                    raise ValueError(
                        f"{split.name} has {name}={others}, {first.name} has {mine}; only recordings that are alike "
                        "are packed as one."
                    )
        self._splits = tuple(splits)
        self.name, self.image_sizes = " + ".join(split.name for split in splits), first.image_sizes
        self.robot, self.action_units, self.statistics = first.robot, first.action_units, first.statistics
        self.arrays = tuple(name for name in first.arrays if all(name in split.arrays for split in splits))
        self.sensors = tuple(name for name in getattr(first, "sensors", ()) if name in self.arrays)
        spans = [int(split.frame_ids[-1]) - int(split.frame_ids[0]) + 1 for split in splits]
        self._begin = np.concatenate([[0], np.cumsum(spans)]).tolist()
        self._shift = [begin - int(split.frame_ids[0]) for begin, split in zip(self._begin[:-1], splits, strict=True)]
        self.frame_ids = np.concatenate(
            [split.frame_ids.astype(np.int64) + shift for split, shift in zip(splits, self._shift, strict=True)]
        )
        self.episodes: tuple[base.Episode, ...] = tuple(
            dataclasses.replace(episode, start=episode.start + shift, end=episode.end + shift)
            for split, shift in zip(splits, self._shift, strict=True)
            for episode in split.episodes
        )
        self.shows_all = all(split.shows_all for split in splits)
        kinds = {getattr(split, "encoded_as", None) for split in splits}
        self.encoded_as = kinds.pop() if len(kinds) == 1 else None

    def frame(self, frame_id: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        split, old = self._find(frame_id)
        images, numbers = split.frame(old)
        return images, {name: numbers[name] for name in self.arrays}

    def encoded(self, frame_id: int) -> tuple[list[bytes], Mapping[str, np.ndarray]]:
        split, old = self._find(frame_id)
        images, numbers = split.encoded(old)
        return images, {name: numbers[name] for name in self.arrays}

    def _find(self, frame_id: int) -> tuple[Any, int]:
        number = bisect.bisect_right(self._begin, frame_id) - 1
        return self._splits[number], frame_id - self._shift[number]
