"""An opened split: random access to its frames by id."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from robovlms_jax.control import interface
from robovlms_jax.control import robot as robots
from robovlms_jax.data import base, frame_index, statistics
from robovlms_jax.data.registry import expressions
from robovlms_jax.data.rlds import files, prepared
from robovlms_jax.data.rlds.options import Options


class RldsDataset(base.Dataset):
    """One split of a dataset, as `open_dataset` opens it.

    statistics: of all its steps.
    action_units: metres and radians per unit of the arm's dimensions.
    robot: what its pictures and numbers are.
    control_hz: steps per second, 0 = unknown.
    """

    names_tasks = False

    def __init__(self, opened: files.Prepared, name: str, selection: tuple[base.Episode, ...], options: Options):
        self.name, self.episodes, self._prepared, self._options = name, selection, opened, options
        self._meta, arrays = opened.meta, opened.arrays
        self._actions, self._states = arrays["actions"], arrays["states"]
        self._starts = arrays["start"]
        stored = self._meta["image_sizes"]
        self._any_robot = bool(self._meta.get("any_robot"))
        named = stored if self._any_robot else interface.CAMERAS
        sizes = {camera: tuple(stored[camera][0]) for camera in named if camera in stored}
        self.image_sizes = dict.fromkeys(sizes, options.image_size) if options.image_size else sizes
        self.statistics = statistics.from_json(self._meta["statistics"], str(opened.directory))
        self.action_units = tuple(self._meta["action_units"])
        described = robots.from_json(self._meta["robot"], name)
        cameras = tuple(robots.Camera(camera, *size) for camera, size in self.image_sizes.items())
        self.robot = dataclasses.replace(described, cameras=cameras)
        self.control_hz = described.rate_hz
        columns = [self._meta["cameras"].index(camera) for camera in sizes]
        self.may_lack_images = bool((arrays["length"][:, columns] == 0).any())
        self._index = frame_index.FrameIndex(
            prepared.storage_of(self._meta),
            tuple(self._meta["cameras"]),
            arrays["file_id"],
            arrays["offset"],
            arrays["length"],
            arrays["checksum"],
            resize=options.image_size is not None,
        )

    def images(
        self, frame_ids: Sequence[int], cameras: Sequence[str], out: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Mapping[str, Sequence[np.ndarray]]:
        out = self.allocate(len(frame_ids), cameras) if out is None else out
        self._index.decode(self._rows(frame_ids), {camera: out[camera] for camera in cameras})
        return out

    def array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        further = self._prepared.arrays.get(files.SENSOR + name)
        if further is not None:
            return further[self._rows(frame_ids)]
        stored = {"rel_actions": self._actions, "state": self._states}
        if name not in stored or stored[name].shape[1] == 0:
            listed = [x.removeprefix(files.SENSOR) for x in self._prepared.arrays if x.startswith(files.SENSOR)]
            raise ValueError(
                f"{self.name} stores no {name!r}; it has rel_actions, where recorded state, and the fields that its "
                f"description lists under sensors: {listed} (data/README.md)."
            )
        return base.require_finite(stored[name][self._rows(frame_ids)], frame_ids, name, self.name)

    def has_images(self, frame_ids: Sequence[int], camera: str) -> np.ndarray:
        """bool[n]: whether a frame has an image of this camera; where not, `images` gives black."""
        return self._index.is_stored(self._rows(frame_ids), camera)

    @property
    def num_transitions(self) -> int:
        """Steps of the chosen episodes that are learned from."""
        return sum(episode.end - episode.start for episode in self.episodes)

    @property
    def num_frame_ids(self) -> int:
        """Frame ids run from 0 to below this."""
        return len(self._actions)

    def proprio(self, frame_ids: Sequence[int]) -> np.ndarray:
        rows, encoding = self._rows(frame_ids), self._meta["state_encoding"]
        if self._any_robot and self.robot.state:
            return self.array("state", frame_ids)
        if encoding not in ("POS_EULER", "POS_QUAT"):
            raise ValueError(
                f"{self.name} has {'joints' if encoding == 'JOINT' else 'no described state'}, not the gripper's pose "
                "that policy.proprio needs; describe it with state and state_encoding (data/README.md), or train with "
                "--no-policy.proprio.enabled."
            )
        state = self.array("state", frame_ids)
        angles = state[:, 3:6] if encoding == "POS_EULER" else expressions.euler(state[:, 3:7])
        # The command given last, as at control time; before any, the first.
        first = self._starts[np.searchsorted(self._starts, rows, side="right") - 1]
        command = self._actions[np.maximum(rows - 1, first), 6:]
        return base.require_finite(np.concatenate([state[:, :3], angles, command], 1), frame_ids, "proprio", self.name)

    def gripper_opening(self, frame_ids: Sequence[int]) -> np.ndarray | None:
        meaning = self._meta["state_gripper"]
        if not meaning:
            return None
        measured = self.array("state", frame_ids)[:, -1]
        return measured if meaning == "opens" else 1 - measured

    def close(self) -> None:
        """Release the shards; the next read opens them again."""
        self._index.close()

    def _rows(self, frame_ids: Sequence[int]) -> np.ndarray:
        rows = np.asarray(frame_ids, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self._actions)):
            raise ValueError(f"{self.name} has frames 0 to {len(self._actions) - 1}; asked for {rows.tolist()[:8]}.")
        return rows

    def __reduce__(self):
        place = (self._prepared.directory, self._prepared.stamps)
        return _restore, (*place, self.name, self.episodes, self._options), {"statistics": self.statistics}


def _restore(
    directory: pathlib.Path,
    stamps: files.Stamps,
    name: str,
    selection: tuple[base.Episode, ...],
    options: Options,
) -> RldsDataset:
    """A dataset in another process, which need not read again what the first one compared with its checksums."""
    return RldsDataset(files.load(directory, stamps), name, selection, options)
