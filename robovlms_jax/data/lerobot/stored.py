"""A LeRobotDataset as it is in the files, whatever its numbers mean: to be looked at, not to be trained on.

`dataset.py` refuses what it cannot tell (fourteen joints, a gripper in per cent); here such a dataset opens with all
its cameras, its action and state column by column, under the names info.json gives them.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from robovlms_jax.control import robot
from robovlms_jax.data import base
from robovlms_jax.data.lerobot import any_robot, cameras, meta, names, pairing, spans, splits, tables, video


class StoredDataset(base.Dataset):
    """Episodes of one split; a frame's id is its row in the sorted table. An episode's last row is its end.

    robot: names of the numbers, cameras as `cameras` calls them.
    """

    def __init__(self, root: str | os.PathLike[str], split: Literal["training", "validation"]):
        self.name = str(root)
        notes = meta.Notes(pathlib.Path(root), split)
        info = meta.read_info(pathlib.Path(root))
        tasks = meta.read_tasks(info.root)
        self._keys = cameras.by_name(info)
        self._images = {c for c, key in self._keys.items() if info.features[key]["dtype"] == "image"}
        videos = [key for camera, key in self._keys.items() if camera not in self._images]
        action, state = (any_robot.field_of(info, known) for known in (any_robot.ACTIONS, any_robot.STATES))
        if not action:
            raise ValueError(
                f"{info.path} has no feature {' or '.join(any_robot.ACTIONS)}; it has {sorted(info.features)}."
            )
        rows = tables.read_rows(info, [field for field in (action, state) if field])
        rows, paired = pairing.pair(info, rows, meta.read_episodes(info, videos), tasks, 1.0, notes)
        chosen, _ = splits.choose(info, [episode.number for episode in paired], split, notes)
        self._rows = rows
        self._numbers = {"rel_actions": rows.numbers[action]} | ({"state": rows.numbers[state]} if state else {})
        self.episodes = tuple(
            base.Episode(e.first, e.last - 1, next(iter(tasks[int(rows.task[e.first])]), ""), "lerobot")
            for e in paired
            if e.number in chosen
        )
        self.image_sizes = {camera: spans.image_size(info, key) for camera, key in self._keys.items()}
        self.robot = robot.RobotSpec(
            info.robot_type or info.root.name or "robot",
            info.fps,
            tuple(robot.Camera(camera, *size) for camera, size in self.image_sizes.items()),
            *(
                names.dimensions(field, names.of(info.features[field]), info.width(field)) if field else ()
                for field in (action, state)
            ),
        )
        self._table, self._video = tables.ImageTable(info.root, rows.paths), video.VideoReader()
        self._paired, self._firsts = paired, np.array([episode.first for episode in paired])

    def images(
        self, frame_ids: Sequence[int], cameras: Sequence[str], out: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Mapping[str, Sequence[np.ndarray]]:
        out = self.allocate(len(frame_ids), cameras) if out is None else out
        ids = np.asarray(frame_ids, np.int64)
        for camera in cameras:
            key = self._keys[camera]
            if camera in self._images:
                self._table.read(key, self._rows.file[ids], self._rows.row[ids], out[camera], scale=False)
                continue
            owners = np.searchsorted(self._firsts, ids, side="right") - 1
            for owner in np.unique(owners).tolist():
                episode, places = self._paired[owner], np.flatnonzero(owners == owner)
                path, begin = episode.videos[key]
                numbers = (begin + ids[places] - episode.first).tolist()
                self._video.read(path, numbers, out[camera], places.tolist(), scale=False)
        return out

    def array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        if name not in self._numbers:
            raise ValueError(f"{self.name} stores no {name!r}; it has {list(self._numbers)}.")
        return base.require_finite(self._numbers[name][np.asarray(frame_ids)], frame_ids, name, self.name)
