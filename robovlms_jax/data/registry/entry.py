"""What a dataset calls its fields and what they mean, as data; `infer.py` makes one from common names."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.data import features, notices
from robovlms_jax.data.registry import expressions

logger = logging.getLogger(__name__)

STATE_SIZE = 8
DEFAULT_ARM = ("action[:6]",)

StateEncoding = Literal["POS_EULER", "POS_QUAT", "JOINT", "NONE"]
"""POS_EULER: xyz, roll pitch yaw, 0, gripper. POS_QUAT: xyz, quaternion, gripper. JOINT: seven joints, gripper. A joint
or gripper a robot lacks is 0."""

StateGripper = Literal["opens", "closes", ""]
"""What grows with the state's last number: the opening, or how far it is closed; "" = unknown."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One dataset. Fields are named below `steps`, cameras below `steps/observation`, "../" leads out of there, whole
    paths work, too ("episode_metadata/language_instruction"); see `expressions` for the rest.

    arm: expressions that make six numbers side by side: metres and radians (roll, pitch, yaw) to move by in one step.
    gripper: expression for one number, 1 open, 0 closed.
    units: metres (three) and radians (three) that 1.0 of the arm's numbers means.
    rotation: what the arm's last three numbers are; frame: whose axes the arm moves along; "" = unknown.
    static, secondary, wrist: image of the camera that looks at the scene, of a second one, and of the one on the
      gripper; "" where there is none. A text field stands for encoded pictures (JPEG, PNG, WebP, BMP).
    state: expressions that make `STATE_SIZE` numbers, or none.
    instruction: text, several texts, or a vector of code points that ends at the first 0, per step or per episode;
      more_instructions: other wordings of it. The first wording that is filled is the instruction.
    control_hz: steps per second; 0 = unknown.
    shapes: sizes the fields must have beyond what the expressions need.
    skip_first: steps to leave out at the start of every episode.
    drop_still: leave out steps whose arm does not move at all.
    success: flag of an episode, or of steps (true at any), or a text; "" = all count as successful.
    failure_pattern: regular expression that is found in the text `success` where an episode failed.
    optional_cameras: those of the three that copies of the dataset may lack.
    sensors: name -> numeric field of every step that `Dataset.array` gives under this name, for `policy.sensors`.
    splits: "training", "validation" -> split or slice of one, where it is not the usual (see `splits.choose`).
    directories: other names of its directory.
    """

    name: str
    arm: tuple[str, ...] = DEFAULT_ARM
    gripper: str = "action[6]"
    units: tuple[float, ...] = (1.0,) * 6
    rotation: Literal["euler_xyz", "axis_angle"] = "euler_xyz"
    frame: Literal["", "world", "base", "tcp"] = ""
    static: str = "image"
    secondary: str = ""
    wrist: str = ""
    state: tuple[str, ...] = ()
    state_encoding: StateEncoding = "NONE"
    state_gripper: StateGripper = "opens"
    instruction: str = "language_instruction"
    more_instructions: tuple[str, ...] = ()
    control_hz: float = 0.0
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    skip_first: int = 0
    drop_still: bool = False
    success: str = ""
    failure_pattern: str = ""
    optional_cameras: tuple[str, ...] = ()
    sensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    directories: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("arm", "state", "more_instructions", "directories", "optional_cameras"):
            if isinstance(getattr(self, field), str):  # its letters would be taken for expressions
                raise ValueError(f"dataset {self.name!r}: {field} must be a list, found {getattr(self, field)!r}.")
        if (self.state_encoding == "NONE") != (len(self.state) == 0):
            raise ValueError(f"dataset {self.name!r}: state and state_encoding must both be given or both be left out.")
        if self.skip_first < 0 or self.control_hz < 0:
            raise ValueError(f"dataset {self.name!r}: skip_first and control_hz must not be negative.")
        if len(self.units) != 6 or not all(unit > 0 for unit in self.units):
            raise ValueError(f"dataset {self.name!r}: units={self.units}; expected six numbers above 0.")
        for field, values in (("state_encoding", StateEncoding), ("state_gripper", StateGripper)):
            if getattr(self, field) not in get_args(values):
                raise ValueError(
                    f"dataset {self.name!r}: {field}={getattr(self, field)!r}; expected one of {get_args(values)}."
                )
        if not isinstance(self.splits, Mapping) or not set(self.splits) <= {"training", "validation"}:
            raise ValueError(
                f"dataset {self.name!r}: splits is {self.splits!r}; expected training and validation, such as "
                '{training: "train[:90%]", validation: "train[90%:]"}.'
            )
        try:
            re.compile(self.failure_pattern)
        except re.error as error:
            raise ValueError(
                f"dataset {self.name!r}: failure_pattern={self.failure_pattern!r} is no regular expression: {error}."
            ) from error

    @functools.cached_property
    def _expressions(self) -> dict[str, tuple[expressions.Expression, ...]]:
        texts = {"arm": self.arm, "gripper": (self.gripper,), "state": self.state}
        return {part: tuple(map(expressions.Expression, listed)) for part, listed in texts.items()}

    @property
    def cameras(self) -> dict[str, str]:
        """Camera -> path of its images in a record, of those there are."""
        return {camera: f"steps/observation/{key}" for camera, key in self._named_cameras.items()}

    @property
    def _named_cameras(self) -> dict[str, str]:
        named = {"static": self.static, "secondary": self.secondary, "wrist": self.wrist}
        return {camera: key for camera, key in named.items() if key}

    def camera_paths(self, fields: Mapping[str, features.Field]) -> dict[str, str]:
        """`cameras`, looked for among the fields there are."""
        return {
            camera: features.locate(fields, key, "steps/observation") for camera, key in self._named_cameras.items()
        }

    def with_pictures(self, fields: Mapping[str, features.Field]) -> dict[str, features.Field]:
        """`fields`, where text that the entry takes for a camera is an image."""
        chosen = {path: fields[path] for path in self.camera_paths(fields).values() if path in fields}
        pictures = {
            path: dataclasses.replace(field, kind="image", dtype="uint8", shape=())
            for path, field in chosen.items()
            if _is_single_text(field)
        }
        return {**fields, **pictures}

    def without_missing_cameras(self, fields: Mapping[str, features.Field], where: str) -> Entry:
        """The entry, less the optional cameras that are not among `fields`; says so once."""
        paths = self.camera_paths(fields)
        missing = {camera: "" for camera in self.optional_cameras if camera in paths and paths[camera] not in fields}
        if not missing:
            return self
        listed = ", ".join(f"{camera} ({paths[camera]})" for camera in missing)
        notices.once(logger, f"{where}: no {listed} camera, which the entry {self.name!r} can do without", logging.INFO)
        return dataclasses.replace(self, **missing)

    def success_path(self, fields: Mapping[str, features.Field]) -> str:
        """The path of `success`; "" where there is none."""
        return self.success if self.success in fields or not self.success else features.locate(fields, self.success)

    @property
    def gripper_source(self) -> str:
        """The gripper's field and column, without functions: "action[6]"; "" for constants."""
        return self._expressions["gripper"][0].source

    @property
    def gripper_functions(self) -> tuple[str, ...]:
        """The functions of the gripper's expression, outermost first."""
        return self._expressions["gripper"][0].functions

    @property
    def measures_opening(self) -> bool:
        """Whether the state's last number tells how far the gripper is open or closed."""
        return bool(self.state and self.state_gripper and self._expressions["state"][-1].field)

    @property
    def robot(self) -> robots.RobotSpec:
        """What the numbers mean to a policy; pictures may have any size."""
        lengths, angles = (_unit(value, unit) for value, unit in zip(self.units[::3], ("m", "rad"), strict=True))
        turn = ("roll", "pitch", "yaw") if self.rotation == "euler_xyz" else ("rx", "ry", "rz")
        arm = [robots.Dimension(axis, lengths, "delta", "position", self.frame) for axis in ("x", "y", "z")]
        arm += [robots.Dimension(axis, angles, "delta", self.rotation, self.frame) for axis in turn]
        pose = [robots.Dimension(axis, "m", "absolute", "position") for axis in ("x", "y", "z")]
        pose += [robots.Dimension(axis, "rad", "absolute", "euler_xyz") for axis in ("roll", "pitch", "yaw")]
        joints = [robots.Dimension(f"joint_{i}", "rad", "absolute", "joint") for i in range(STATE_SIZE - 1)]
        open_at = {"opens": "high", "closes": "low", "": ""}[self.state_gripper]
        width = robots.Dimension("gripper", "", "continuous", "gripper", open_at=open_at)
        state = {"NONE": (), "JOINT": (*joints, width)}.get(self.state_encoding, (*pose, robots.GRIPPER))
        cameras = tuple(map(robots.Camera, self._named_cameras))
        return robots.RobotSpec(self.name, self.control_hz, cameras, (*arm, robots.GRIPPER), state)

    @property
    def numeric_fields(self) -> tuple[str, ...]:
        """The fields of `steps` that actions and state are made of, each once."""
        listed = [e.field for part in self._expressions.values() for e in part if e.field]
        return tuple(dict.fromkeys(listed))

    def widths(self, sizes: Mapping[str, int]) -> str:
        """What is wrong when fields have so many numbers per step; "" when arm, gripper and state come out right."""
        expected = {"arm": 6, "gripper": 1, "state": STATE_SIZE if self.state else 0}
        for part, listed in self._expressions.items():
            try:
                total = sum(expression.width(sizes.get(expression.field, 0)) for expression in listed)
            except ValueError as error:
                return f"{part}: {error}"
            if total != expected[part]:
                texts = [expression.text for expression in listed]
                return f"{part}: {texts} give {total} numbers, expected {expected[part]}"
        return ""

    def check(self, fields: Mapping[str, features.Field], where: str) -> None:
        """Compare with a directory's features.json. Raises ValueError naming every field, what was found and what is
        expected."""
        problems = []

        def require(path: str, expected: str, fits: Any) -> None:
            field = fields.get(path)
            if field is None:
                near = difflib.get_close_matches(path, fields, n=1)
                problems.append(f"{path}: not found, expected {expected}" + (f"; {near[0]} is there" if near else ""))
            elif not fits(field):
                problems.append(f"{path}: found {field}{why_not_picture(field)}, expected {expected}")

        for camera, path in self.camera_paths(fields).items():
            require(path, f"image[height, width, 3], the {camera} camera", is_camera)
        for name in (self.instruction, *self.more_instructions):
            if name:
                require(features.locate(fields, name), "text, or code points", is_language)
        for name, shape in self.shapes.items():
            expected = features.Field("", "tensor", "float32", tuple(shape))
            shown = str(expected).replace("float32", "numbers")
            path = features.locate(fields, name)
            require(path, shown, lambda field, s=tuple(shape): field.is_numeric and field.shape == s)
        if self.success and self.failure_pattern:
            require(self.success_path(fields), "text that tells failures", _is_single_text)
        elif self.success:
            expected = "a flag of the episode (or text, with failure_pattern)"
            require(self.success_path(fields), expected, is_flag)
        if self.arm == DEFAULT_ARM and "action" not in self.shapes:
            require("steps/action", "seven numbers; for others say arm and gripper", lambda field: field.size == 7)
        for field in self.sensors.values():
            path = features.locate(fields, field)
            require(path, "numbers of every step", lambda field: field.is_numeric and field.per_step and field.size > 0)
        sizes = {}
        for name in self.numeric_fields:
            path = features.locate(fields, name)
            require(path, "numbers", lambda field: field.is_numeric and field.per_step and field.size > 0)
            if path in fields and fields[path].is_numeric:
                sizes[name] = fields[path].size
        if len(sizes) == len(self.numeric_fields) and (problem := self.widths(sizes)):
            problems.append(problem)
        if problems:
            listed = "\n  ".join(dict.fromkeys(problems))
            raise ValueError(
                f"{where}/features.json does not fit the registry's entry {self.name!r}:\n  {listed}\n"
                "Another version of the dataset? Describe this one in a file of your own (data/README.md) and pass it "
                "as --data.dataset."
            )

    def standardize(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One episode as recorded -> (actions, state, rows).

        Args:
          columns: field -> [T, ...] for `numeric_fields`.
        Returns:
          actions: float32[L, 7]: metres and radians, then the gripper from -1 (closed) to 1 (open).
          state: float32[L, 8], or float32[L, 0] where there is none.
          rows: int64[L], the steps that are kept, increasing.
        """
        total = len(next(iter(columns.values())))
        kept = {name: values[self.skip_first :] for name, values in columns.items()}
        num_steps = max(total - self.skip_first, 0)
        if num_steps == 0:
            return (
                np.zeros((0, 7), np.float32),
                np.zeros((0, STATE_SIZE if self.state else 0), np.float32),
                np.zeros(0, np.int64),
            )
        arm = [expression(kept, num_steps) for expression in self._expressions["arm"]]
        (gripper,) = (expression(kept, num_steps) for expression in self._expressions["gripper"])
        state = [expression(kept, num_steps) for expression in self._expressions["state"]]
        length = min(len(x) for x in (*arm, gripper))
        actions = np.concatenate([*(x[:length] for x in arm), 2 * gripper[:length] - 1], axis=1)
        states = np.concatenate([np.zeros((length, 0), np.float32), *(x[:length] for x in state)], axis=1)
        rows = self.skip_first + np.arange(length)
        if self.drop_still:
            moves = np.any(actions[:, :6] != 0, axis=1)
            actions, states, rows = actions[moves], states[moves], rows[moves]
        return actions.astype(np.float32), states.astype(np.float32), rows


def is_camera(field: features.Field) -> bool:
    """Whether a field that is named as a camera can be one."""
    return field.is_picture or (field.per_step and _is_single_text(field))


def is_flag(field: features.Field) -> bool:
    """One number per episode or step."""
    return field.is_numeric and field.size == 1


def is_language(field: features.Field) -> bool:
    """Text, or code points."""
    codes = field.is_numeric and len(field.shape) == 1 and np.dtype(field.dtype).kind in "iu"
    return field.kind == "text" or codes


def why_not_picture(field: features.Field) -> str:
    """What an image-like field is, in words, where it is no picture; "" otherwise."""
    if field.kind == "image" and field.is_depth:
        return ", a depth image"
    if field.is_numeric and field.dtype == "uint8" and len(field.shape) in (2, 3):
        return ", pixels that are not encoded (declare the field as tfds.features.Image and write it again)"
    return ""


def _is_single_text(field: features.Field) -> bool:
    return field.kind == "text" and field.size == 1


def _unit(value: float, name: str) -> str:
    return name if value == 1 else f"{value:g} {name}"
