"""An RLDS dataset as it is in the files, whatever its numbers mean: to be looked at, not to be trained on.

`opening.py` refuses what no description fits; here such a dataset opens with all its pictures, and with the numbers of
`steps/action` and `steps/observation` column by column, under the names features.json gives them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from robovlms_jax.control import robot
from robovlms_jax.data import base, features, frame_index, shard_index, splits
from robovlms_jax.data import storage as storages
from robovlms_jax.data.rlds import instructions
from robovlms_jax.data.rlds.options import Options

WIDEST = 64
"""Numbers per step; fields with more are embeddings, clouds of points or pictures."""
_SPOKEN = re.compile(r"instruction|language|task|prompt|goal|command")


class StoredDataset(base.Dataset):
    """Episodes of one split; a frame's id counts the steps of all records. An episode's last step is its end."""

    def __init__(self, directory: storages.Directory, use: splits.Use, options: Options):
        self.name = str(directory)
        fields = shard_index.read_fields(directory)
        choice = splits.choose(splits.read(directory), {}, use, self.name)
        indexes = shard_index.build(
            directory,
            choice.split,
            fields,
            shard_index.place(directory, choice.split, options.index_dir),
            workers=options.workers,
            max_damaged_share=1.0,
        )
        parts = {
            "rel_actions": [field for field in _numeric(fields) if re.match(r"steps/actions?(/|$)", field.path)],
            "state": [field for field in _numeric(fields) if field.path.startswith("steps/observation/")],
        }
        if not parts["rel_actions"]:
            raise ValueError(f"{self.name}/features.json has no numbers below steps/action; it has {list(fields)}.")
        self._numbers = {name: _joined(indexes, listed) for name, listed in parts.items() if listed}
        self.episodes = _episodes(indexes, fields, choice, use)
        pictures = _short({path: field for path, field in fields.items() if field.is_picture})
        self._open_pictures(directory, choice.split, indexes, pictures)
        self.robot = robot.RobotSpec(
            choice.split.dataset,
            0.0,
            tuple(robot.Camera(camera, *size) for camera, size in self.image_sizes.items()),
            _dimensions(parts["rel_actions"]),
            _dimensions(parts["state"]),
        )

    def _open_pictures(
        self,
        directory: storages.Directory,
        split: splits.Split,
        indexes: Sequence[shard_index.ShardIndex],
        pictures: Mapping[str, str],
    ) -> None:
        """pictures: camera -> path. Cameras without a picture that says its size are left out."""
        headers = [index.header for index in indexes]
        storage = shard_index.storage_of(
            directory, split.file_format, [h["shard"]["file"] for h in headers], [h["record_lengths"] for h in headers]
        )
        file = np.concatenate([np.full(int(i.num_steps.sum()), place) for place, i in enumerate(indexes)])
        offset, length, checksum = (
            np.stack(
                [np.concatenate([i.arrays[f"{path}:{part}"] for i in indexes]) for path in pictures.values()], axis=1
            )
            if pictures
            else np.zeros((len(file), 0), np.int64)
            for part in ("offset", "length", "checksum")
        )
        self.image_sizes = {}
        for column, camera in enumerate(pictures):
            for row in np.flatnonzero(length[:, column])[:16].tolist():
                try:
                    data = storage.read(int(file[row]), int(offset[row, column]), int(length[row, column]))
                    self.image_sizes[camera] = frame_index.image_size(data)
                    break
                except (OSError, ValueError, SyntaxError):
                    continue  # the next may be readable; pictures that are not are counted when they are asked for
        self.may_lack_images = bool((length == 0).any())
        self._index = frame_index.FrameIndex(storage, tuple(pictures), file, offset, length, checksum, resize=True)

    def images(
        self, frame_ids: Sequence[int], cameras: Sequence[str], out: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Mapping[str, Sequence[np.ndarray]]:
        out = self.allocate(len(frame_ids), cameras) if out is None else out
        self._index.decode(np.asarray(frame_ids, np.int64), {camera: out[camera] for camera in cameras})
        return out

    def has_images(self, frame_ids: Sequence[int], camera: str) -> np.ndarray:
        return self._index.is_stored(np.asarray(frame_ids, np.int64), camera)

    def array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        if name not in self._numbers:
            raise ValueError(f"{self.name} stores no {name!r}; it has {list(self._numbers)}.")
        return base.require_finite(self._numbers[name][np.asarray(frame_ids)], frame_ids, name, self.name)


def _numeric(fields: Mapping[str, features.Field]) -> list[features.Field]:
    return [f for f in fields.values() if f.is_numeric and f.per_step and 0 < f.size <= WIDEST]


def _joined(indexes: Sequence[shard_index.ShardIndex], listed: Sequence[features.Field]) -> np.ndarray:
    """float32[steps, d] of several fields side by side."""
    columns = [np.concatenate([i.numbers(f.path).reshape(-1, f.size) for i in indexes]) for f in listed]
    return np.concatenate([column.astype(np.float32) for column in columns], axis=1)


def _dimensions(listed: Sequence[features.Field]) -> tuple[robot.Dimension, ...]:
    names = _short({field.path: field for field in listed})
    sizes = {field.path: field.size for field in listed}
    return tuple(
        robot.Dimension(name if sizes[path] == 1 else f"{name}[{column}]")
        for name, path in names.items()
        for column in range(sizes[path])
    )


def _short(fields: Mapping[str, features.Field]) -> dict[str, str]:
    """Last part of the path -> path; the whole path where two end alike."""
    ends = [path.rpartition("/")[2] for path in fields]
    return {end if ends.count(end) == 1 else path: path for end, path in zip(ends, fields, strict=True)}


def _episodes(
    indexes: Sequence[shard_index.ShardIndex],
    fields: Mapping[str, features.Field],
    choice: splits.Choice,
    use: splits.Use,
) -> tuple[base.Episode, ...]:
    """One per record of the chosen part, with the first sentence said in it."""
    spoken = [path for path, field in fields.items() if field.kind == "text" and _SPOKEN.search(path)]
    table = instructions.Table()
    said = np.concatenate([instructions.per_step(index, fields, spoken[:1], table) for index in indexes])
    bounds = np.cumsum([0, *np.concatenate([index.num_steps for index in indexes]).tolist()]).tolist()
    spans = [(a, b - 1) for a, b in itertools.pairwise(bounds)][choice.first : choice.last]
    spans = [(start, end) for start, end in spans if end > start]
    if choice.is_shared and len(spans) > 1:
        border = min(round(len(spans) * (1 - splits.HELD_OUT_SHARE)), len(spans) - 1)
        spans = spans[border:] if use == "validation" else spans[:border]
    return tuple(base.Episode(start, end, next(iter(table.entries[said[start]]), ""), "rlds") for start, end in spans)
