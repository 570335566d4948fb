"""LIBERO's own demonstrations (Liu et al. 2023, arXiv:2306.03310): one HDF5 file per task, robosuite's layout.

<root>/[<suite>/]<task>_demo.hdf5
  data                  attribute problem_info: JSON with language_instruction
  data/demo_<n>/
    actions             float[T, 7]: what OSC_POSE takes (see `registry.libero`), gripper -1 to open, +1 to close
    obs/agentview_rgb   uint8[T, height, width, 3], obs/eye_in_hand_rgb alike: as OpenGL draws them, upside down
    obs/ee_states       float[T, 6], xyz in m and a rotation vector; obs/gripper_states float[T, 2], two fingers in m

Pictures are turned by half a turn, as OpenVLA's RLDS copies have them, so that a policy of the one reads the other.
Steps that neither move the arm nor change the gripper are left out, as there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from robovlms_jax import extras
from robovlms_jax.control import robot as robots
from robovlms_jax.data import base, notices, statistics
from robovlms_jax.data.registry import libero

logger = logging.getLogger(__name__)

Split = Literal["training", "validation"]

CAMERAS = {"static": "agentview_rgb", "wrist": "eye_in_hand_rgb"}
_NUMBERS = {"actions": ("actions", 7), "ee_states": ("obs/ee_states", 6), "gripper_states": ("obs/gripper_states", 2)}
_STILL = 1e-4
"""Length of the arm's six numbers below which a step does not move it (OpenVLA's threshold)."""
_VALIDATION_SHARE = 0.1
PATTERNS = ("*.hdf5", "*/*.hdf5")
"""Where files lie below a root: the first pattern that finds any."""


class _Demo(NamedTuple):
    """file, name: where it lies. rows: steps that are kept. first: id of its first frame; it has one frame more than
    steps. actions float32[L + 1, 7], states float32[L + 1, 8], the last of which repeats the place, at rest."""

    file: int
    name: str
    rows: np.ndarray
    first: int
    actions: np.ndarray
    states: np.ndarray


class LiberoDataset(base.Dataset):
    """Demonstrations of one split: of each file, validation has the last tenth, at least one where there are two.

    Raises:
      ImportError: h5py is missing. ValueError: no files, or one of another layout; names file, group and field.
    """

    arrays = ("rel_actions", "robot_obs", "gripper_opening")

    def __init__(self, root: str | os.PathLike[str], split: Split):
        self.root = pathlib.Path(root)
        self.name = str(self.root)
        _h5py()
        self._paths = next(filter(None, (sorted(self.root.glob(pattern)) for pattern in PATTERNS)), [])
        if not self._paths:
            raise ValueError(f"{self.root} has no *.hdf5, nor has a folder of it; expected LIBERO's <task>_demo.hdf5.")
        self._local = threading.local()
        self._demos: list[_Demo] = []
        episodes, learned, left_out = [], [], 0
        sizes: dict[str, tuple[int, int]] = {}
        for number, path in enumerate(self._paths):
            with _open(path) as file:
                names, instruction = _names(file, path), _instruction(file, path)
                held = max(round(len(names) * _VALIDATION_SHARE), 1) if len(names) > 1 else 0
                for place, name in enumerate(names):
                    demo, dropped = self._read(file, path, number, name, sizes)
                    left_out += dropped
                    validates = place >= len(names) - held
                    if not validates:
                        learned.append(demo)
                    if (split == "validation") == validates and len(demo.rows):
                        last = demo.first + len(demo.rows)
                        episodes.append(base.Episode(demo.first, last, instruction, path.stem.removesuffix("_demo")))
        if not episodes:
            raise ValueError(
                f"{self.root} has no demonstration for {split}; its {len(self._paths)} files have one each."
            )
        if left_out:
            notices.once(logger, f"{self.root}: {left_out} steps that move nothing are left out", logging.INFO)
        self.episodes, self.image_sizes = tuple(episodes), sizes
        cameras = tuple(robots.Camera(camera, *size) for camera, size in sizes.items())
        self.robot = dataclasses.replace(libero.HDF5.robot, cameras=cameras)
        self.action_units = tuple(self.robot.action[column].measure[0] for column in self.robot.scaled)
        self._starts = np.array([demo.first for demo in self._demos])
        self._actions = np.concatenate([demo.actions for demo in self._demos])
        self._states = np.concatenate([demo.states for demo in self._demos])
        steps = [np.arange(demo.first, demo.first + len(demo.rows)) for demo in learned]
        chosen = np.concatenate(steps)
        self.statistics = statistics.compute(
            self._actions[chosen], self._states[chosen], len(learned), statistics.mask_of(self.robot)
        )

    def _read(
        self, file: Any, path: pathlib.Path, number: int, name: str, sizes: dict[str, tuple[int, int]]
    ) -> tuple[_Demo, int]:
        """Numbers of a demonstration, and how many of its steps are left out; its pictures are measured only."""
        columns = {column: _numbers(file, path, name, *place) for column, place in _NUMBERS.items()}
        length = len(columns["actions"])
        for camera, key in CAMERAS.items():
            stored = _field(file, path, f"data/{name}/obs/{key}")
            if stored.dtype != np.uint8 or stored.ndim != 4 or stored.shape[3] != 3 or len(stored) != length:
                raise ValueError(
                    f"{path}: data/{name}/obs/{key} is {stored.dtype}{list(stored.shape)}, expected "
                    f"uint8[{length}, height, width, 3]."
                )
            if sizes.setdefault(camera, stored.shape[1:3]) != stored.shape[1:3]:
                raise ValueError(
                    f"{path}: data/{name}/obs/{key} has pictures of {stored.shape[1:3]}, others before it have "
                    f"{sizes[camera]}. Keep files of one size in a folder."
                )
        actions, states, rows = libero.HDF5.standardize(columns)
        kept = _moves(columns["actions"][rows])
        actions, states, rows = actions[kept], states[kept], rows[kept]
        if len(rows):
            still = robots.rest(libero.HDF5.robot.action, actions[-1])
            actions, states = np.concatenate([actions, still[None]]), np.concatenate([states, states[-1:]])
        first = self._demos[-1].first + len(self._demos[-1].actions) if self._demos else 0
        demo = _Demo(number, name, rows, first, actions, states)
        self._demos.append(demo)
        return demo, length - len(rows)

    def images(
        self, frame_ids: Sequence[int], cameras: Sequence[str], out: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Mapping[str, Sequence[np.ndarray]]:
        out = self.allocate(len(frame_ids), cameras) if out is None else out
        ids = self._checked(frame_ids)
        for place, (frame_id, at) in enumerate(zip(ids, np.searchsorted(self._starts, ids, side="right") - 1)):
            demo = self._demos[at]
            row = int(demo.rows[min(frame_id - demo.first, len(demo.rows) - 1)])
            file = self._file(demo.file)
            for camera in cameras:
                where = f"data/{demo.name}/obs/{CAMERAS[camera]}"
                try:
                    out[camera][place][:] = file[where][row][::-1, ::-1]
                except OSError as error:
                    raise base.CorruptFrameError(
                        f"{self._paths[demo.file]}: {where}[{row}] cannot be read: {error}."
                    ) from error
        return out

    def array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        ids = self._checked(frame_ids)
        if name not in self.arrays:
            raise ValueError(f"{self.name} stores no {name!r}; it has {list(self.arrays)}.")
        if name == "rel_actions":
            values = self._actions[ids]
        elif name == "gripper_opening":
            values = self._states[ids, 7:8]
        else:  # the last of seven numbers is the gripper's last command
            first = self._starts[np.searchsorted(self._starts, ids, side="right") - 1]
            commands = self._actions[np.maximum(ids - 1, first), 6:]
            values = np.concatenate([self._states[ids, :6], commands], axis=1)
        return base.require_finite(values, frame_ids, name, self.name)

    def frame(self, frame_id: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        """All of one frame, as `packing.pack` reads it. Raises CorruptFrameError."""
        images = {camera: values[0] for camera, values in self.images([frame_id], self.cameras).items()}
        return images, {name: self.array(name, [frame_id])[0] for name in self.arrays}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}  # open files stay behind

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    def _file(self, number: int) -> Any:
        """Open in this thread."""
        opened = self._local.__dict__.setdefault("files", {})
        if number not in opened:
            opened[number] = _open(self._paths[number])
        return opened[number]

    def _checked(self, frame_ids: Sequence[int]) -> np.ndarray:
        ids = np.asarray(frame_ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self._actions)):
            raise ValueError(f"{self.name} has frames 0 to {len(self._actions) - 1}; asked for {ids.tolist()[:8]}.")
        return ids


def _moves(actions: np.ndarray) -> np.ndarray:
    """bool[T]: steps that move the arm, or ask for another gripper than the step before."""
    changed = np.diff(actions[:, 6], prepend=actions[:1, 6]) != 0
    return (np.linalg.norm(actions[:, :6], axis=1) >= _STILL) | changed


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f"LIBERO's HDF5 files need h5py: {extras.install('libero')}. The RLDS and LeRobot copies do not."
        ) from error
    return h5py


def _open(path: pathlib.Path) -> Any:
    try:
        return _h5py().File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is no readable HDF5 file ({error}); copy it again.") from error


def _names(file: Any, path: pathlib.Path) -> list[str]:
    names = [name for name in file.get("data", ()) if name.startswith("demo_")]
    if not names:
        raise ValueError(f"{path} has no data/demo_0, ...; it has {sorted(file)}. Is it a file of LIBERO?")
    return sorted(names, key=lambda name: (len(name), name))


def _instruction(file: Any, path: pathlib.Path) -> str:
    try:
        said = json.loads(file["data"].attrs["problem_info"])["language_instruction"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: the attribute problem_info of data has no language_instruction ({error!r}); its attributes are "
            f"{sorted(file['data'].attrs)}."
        ) from error
    text = "".join(said).strip().strip('"') if isinstance(said, list) else str(said).strip().strip('"')
    if not text:
        raise ValueError(f"{path}: language_instruction in data's problem_info is empty.")
    return text


def _field(file: Any, path: pathlib.Path, name: str) -> Any:
    if name not in file:
        parent = name.rpartition("/")[0]
        there = sorted(file[parent]) if parent in file else []
        raise ValueError(f"{path} has no {name}; {parent} has {there}.")
    return file[name]


def _numbers(file: Any, path: pathlib.Path, demo: str, name: str, width: int) -> np.ndarray:
    values = np.asarray(_field(file, path, f"data/{demo}/{name}"), np.float64)
    if values.ndim != 2 or values.shape[1] != width or not np.isfinite(values).all():
        found = f"{list(values.shape)}{'' if np.isfinite(values).all() else ' with values that are not finite'}"
        raise ValueError(f"{path}: data/{demo}/{name} is {found}, expected [steps, {width}] finite numbers.")
    return values
