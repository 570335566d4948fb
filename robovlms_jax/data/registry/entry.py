"""What a dataset calls its fields and what they mean, as data: `Entry`; one from common names: `infer`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from robovlms_jax.data import features
from robovlms_jax.data.registry import expressions

STATE_SIZE = 8

StateEncoding = Literal["POS_EULER", "POS_QUAT", "JOINT", "NONE"]
"""POS_EULER: xyz, roll pitch yaw, 0, gripper. POS_QUAT: xyz, quaternion, gripper. JOINT: seven joints, gripper. A joint
or gripper a robot lacks is 0."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One dataset. Fields are named below `steps`, cameras below `steps/observation`; see `expressions` for the rest.

    arm: expressions that make six numbers side by side: metres and radians (roll, pitch, yaw) to move by in one step.
    gripper: expression for one number, 1 open, 0 closed.
    static, secondary, wrist: image of the camera that looks at the scene, of a second one, and of the one on the
      gripper; "" where there is none.
    state: expressions that make `STATE_SIZE` numbers, or none.
    instruction: text, or a vector of code points that ends at the first 0; more_instructions: other wordings of it.
    control_hz: steps per second; 0 = unknown.
    shapes: sizes the fields must have beyond what the expressions need.
    skip_first: steps to leave out at the start of every episode.
    drop_still: leave out steps whose arm does not move at all.
    success: per-episode flag, a field beside `steps`; "" = all count as successful.
    directories: other names of its directory.
    """

    name: str
    arm: tuple[str, ...] = ("action[:6]",)
    gripper: str = "action[6]"
    static: str = "image"
    secondary: str = ""
    wrist: str = ""
    state: tuple[str, ...] = ()
    state_encoding: StateEncoding = "NONE"
    instruction: str = "language_instruction"
    more_instructions: tuple[str, ...] = ()
    control_hz: float = 0.0
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    skip_first: int = 0
    drop_still: bool = False
    success: str = ""
    directories: tuple[str, ...] = ()

    def __post_init__(self):
        if (self.state_encoding == "NONE") != (len(self.state) == 0):
            raise ValueError(f"dataset {self.name!r}: state and state_encoding must both be given or both be left out.")
        if self.skip_first < 0 or self.control_hz < 0:
            raise ValueError(f"dataset {self.name!r}: skip_first and control_hz must not be negative.")

    @functools.cached_property
    def _expressions(self) -> dict[str, tuple[expressions.Expression, ...]]:
        texts = {"arm": self.arm, "gripper": (self.gripper,), "state": self.state}
        return {part: tuple(map(expressions.Expression, listed)) for part, listed in texts.items()}

    @property
    def cameras(self) -> dict[str, str]:
        """Camera -> path of its images in a record, of those there are."""
        named = {"static": self.static, "secondary": self.secondary, "wrist": self.wrist}
        return {camera: f"steps/observation/{key}" for camera, key in named.items() if key}

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
                problems.append(f"{path}: found {field}, expected {expected}")

        for camera, path in self.cameras.items():
            require(path, f"image[height, width, 3], the {camera} camera", _is_rgb)
        for name in (self.instruction, *self.more_instructions):
            if name:
                require(f"steps/{name}", "text, or code points", _is_language)
        for name, shape in self.shapes.items():
            expected = features.Field("", "tensor", "float32", tuple(shape))
            shown = str(expected).replace("float32", "numbers")
            require(f"steps/{name}", shown, lambda field, s=tuple(shape): field.is_numeric and field.shape == s)
        if self.success:
            require(self.success, "a flag of the episode", _is_flag)
        sizes = {}
        for name in self.numeric_fields:
            path = f"steps/{name}"
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


def _is_rgb(field: features.Field) -> bool:
    return field.kind == "image" and field.per_step and (field.shape == () or field.shape[-1] in (3, None))


def _is_flag(field: features.Field) -> bool:
    return field.is_numeric and field.size == 1 and not field.per_step


def _is_language(field: features.Field) -> bool:
    codes = field.is_numeric and len(field.shape) == 1 and np.dtype(field.dtype).kind in "iu"
    return field.per_step and (field.kind == "text" or codes)


COMMON_STATIC = ("image", "static_image", "image_0", "rgb", "rgb_static", "front_rgb", "image_primary", "agentview_rgb")
COMMON_WRIST = ("wrist_image", "image_wrist", "hand_image", "rgb_gripper", "eye_in_hand_rgb", "wrist_rgb")
COMMON_LANGUAGE = ("language_instruction", "observation/natural_language_instruction")


def infer(name: str, fields: Mapping[str, features.Field], given: Mapping[str, Any] | None = None) -> Entry:
    """An entry from the common field names: `action` of seven numbers (metres, radians, gripper 1 open),
    `observation/state` of seven or eight, cameras and language by the names above; `given` replaces any of it.

    Raises ValueError listing what there is when the names are not common ones.
    """
    given = dict(given or {})

    def find(candidates: tuple[str, ...], prefix: str, fits: Any) -> str:
        names = (c for c in candidates if f"{prefix}{c}" in fields and fits(fields[f"{prefix}{c}"]))
        return next(names, "")

    guess: dict[str, Any] = {
        "static": find(COMMON_STATIC, "steps/observation/", _is_rgb),
        "wrist": find(COMMON_WRIST, "steps/observation/", _is_rgb),
        "instruction": find(COMMON_LANGUAGE, "steps/", _is_language),
    }
    state = fields.get("steps/observation/state")
    if "state" not in given and state is not None and state.is_numeric and state.size in (7, 8):
        seven = ("observation/state[:6]", "zeros(1)", "observation/state[6]")
        guess["state"] = seven if state.size == 7 else ("observation/state",)
        guess["state_encoding"] = "POS_EULER"
    known = {field.name for field in dataclasses.fields(Entry)}
    for key in given:
        if key not in known - {"name"}:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f"dataset {name!r} has {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; known: {sorted(known)}.")
            )
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    entry = Entry(name, **{**guess, **given})
    if not entry.cameras:
        raise ValueError(
            f"dataset {name!r} is not in the registry and no camera has a common name; its fields are "
            f"{ {path: str(field) for path, field in fields.items()} }. Describe it in a file (data/README.md)."
        )
    return entry
