"""What a robot is to a policy: cameras, action and state dimensions with names, units, kinds, frames and bounds.

A `RobotSpec` is read from a dataset or given, kept with the checkpoint, and compared wherever a policy meets a dataset,
a simulator or a robot. NumPy only, so that it runs on the robot's computer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

Kind = Literal["absolute", "delta", "velocity", "binary", "continuous"]
"""absolute: a target. delta: a change within one step. velocity: a rate. binary, continuous: a gripper that is open or
closed, or any width between."""

Quantity = Literal[
    "position", "euler_xyz", "quaternion_xyzw", "axis_angle", "rotation_6d", "joint", "gripper", "base", "other"
]
"""What the number measures. Neighbouring dimensions of one quantity belong together (three of `euler_xyz` are one
rotation)."""

GROUP_SIZES = {"position": 3, "euler_xyz": 3, "quaternion_xyzw": 4, "axis_angle": 3, "rotation_6d": 6}
"""How many neighbouring dimensions make one quantity; the others are numbers by themselves."""


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One number of an action or a state.

    name: such as "x", "left_wrist_roll", "gripper".
    unit: "m", "rad", "deg", "m/s", "rad/s", "N", "N m", "%"; "1" where it has none; "" = unknown.
    frame: whose axes it is given in: "world", "base", "tcp"; "" where it has none (joints, grippers) or is unknown.
    low, high: what it may be, in `unit`; infinite where unbounded or unknown.
    open_at: of a gripper, which bound is open: "high", "low", or "" = unknown.
    """

    name: str
    unit: str = ""
    kind: Kind = "absolute"
    quantity: Quantity = "other"
    frame: str = ""
    low: float = -math.inf
    high: float = math.inf
    open_at: Literal["high", "low", ""] = ""

    def __post_init__(self):
        _require_text("dimension", self, "name", "unit", "frame")
        for field, values in (("kind", get_args(Kind)), ("quantity", get_args(Quantity))):
            if getattr(self, field) not in values:
                raise ValueError(
                    f"dimension {self.name!r}: {field}={getattr(self, field)!r}; expected one of {values}."
                )
        if self.open_at not in ("high", "low", ""):
            raise ValueError(f"dimension {self.name!r}: open_at={self.open_at!r}; expected 'high', 'low' or ''.")
        for field in ("low", "high"):
            if not _is_number(getattr(self, field)):
                raise ValueError(f"dimension {self.name!r}: {field}={getattr(self, field)!r}; expected a number.")
        if not self.low < self.high:  # NaN is refused, too
            raise ValueError(f"dimension {self.name!r}: low={self.low} must be below high={self.high}.")
        scale, _ = self.measure
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(
                f"dimension {self.name!r}: unit={self.unit!r} must be a name, or a number above 0 and one."
            )
        if (self.kind in ("binary", "continuous")) != (self.quantity == "gripper"):
            raise ValueError(
                f"dimension {self.name!r}: kind={self.kind!r} does not go with quantity={self.quantity!r}; a gripper, "
                "and nothing else, is binary or continuous."
            )

    @property
    def measure(self) -> tuple[float, str]:
        """What 1.0 is: ("0.02 m") -> (0.02, "m"); a unit without a number is (1.0, unit)."""
        number, _, name = self.unit.partition(" ")
        try:
            return float(number), name or "1"
        except ValueError:
            return 1.0, self.unit


@dataclasses.dataclass(frozen=True)
class Camera:
    """name: such as "static", "wrist", "left_wrist". height, width: in pixels; 0 = any."""

    name: str
    height: int = 0
    width: int = 0

    def __post_init__(self):
        _require_text("camera", self, "name")
        for field in ("height", "width"):
            size = getattr(self, field)
            if not _is_number(size) or not math.isfinite(size) or size < 0 or size != int(size):
                raise ValueError(f"camera {self.name!r}: {field}={size!r}; expected pixels, a whole number; 0: any.")


@dataclasses.dataclass(frozen=True)
class RobotSpec:
    """A robot.

    name: of the robot or the dataset it was read from, for messages.
    rate_hz: control steps per second; 0 = unknown.
    """

    name: str
    rate_hz: float = 0.0
    cameras: tuple[Camera, ...] = ()
    action: tuple[Dimension, ...] = ()
    state: tuple[Dimension, ...] = ()

    @staticmethod
    def from_json(content: Mapping[str, Any], where: str = "robot") -> RobotSpec:
        """See `from_json` of the module."""
        return from_json(content, where)

    def __post_init__(self):
        _require_text("robot", self, "name")
        if not (_is_number(self.rate_hz) and math.isfinite(self.rate_hz) and self.rate_hz >= 0):
            raise ValueError(f"robot {self.name!r}: rate_hz={self.rate_hz!r} must be a number of 0 or more.")
        for what, parts in (("camera", self.cameras), ("action", self.action), ("state", self.state)):
            names = [part.name for part in parts]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"robot {self.name!r} has {what} names twice: {twice}.")
        for dimensions in (self.action, self.state):
            for quantity, group in itertools.groupby(dimensions, lambda dimension: dimension.quantity):
                size, length = GROUP_SIZES.get(quantity, 1), len(list(group))
                if length % size:
                    raise ValueError(
                        f"robot {self.name!r} has {length} neighbouring dimensions of {quantity}; it takes {size} each."
                    )

    @property
    def camera_names(self) -> tuple[str, ...]:
        return tuple(camera.name for camera in self.cameras)

    @property
    def grippers(self) -> tuple[int, ...]:
        """Columns of the action that are grippers."""
        return tuple(i for i, dimension in enumerate(self.action) if dimension.quantity == "gripper")

    @property
    def binary(self) -> tuple[int, ...]:
        """Columns of the action that are decisions, exactly +1 (open) or -1 (closed) wherever actions are handled."""
        return tuple(i for i, dimension in enumerate(self.action) if dimension.kind == "binary")

    @property
    def scaled(self) -> tuple[int, ...]:
        """Columns of the action that are numbers: all that `binary` leaves."""
        return tuple(i for i, dimension in enumerate(self.action) if dimension.kind != "binary")

    @property
    def action_names(self) -> tuple[str, ...]:
        return tuple(dimension.name for dimension in self.action)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; infinite bounds are null."""
        content = dataclasses.asdict(self)
        for part in ("action", "state"):
            for dimension in content[part]:
                for bound in ("low", "high"):
                    if math.isinf(dimension[bound]):
                        dimension[bound] = None
        return content


def groups(dimensions: Sequence[Dimension]) -> list[tuple[int, ...]]:
    """Columns that measure the same in the same unit, which compare with each other: translation, rotation, joints.

    Dimensions of unknown unit are compared within their quantity; binary grippers are in no group."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for column, dimension in enumerate(dimensions):
        if dimension.kind != "binary":
            found.setdefault((dimension.quantity, dimension.kind, dimension.unit), []).append(column)
    return [tuple(columns) for columns in found.values()]


_UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001, "rad": 1.0, "deg": math.pi / 180}


def unit_scale(dimension: Dimension) -> float:
    """How many m or rad (per second, for velocities) 1.0 of a dimension is. Raises ValueError for a unit it does not
    know: metres mean nothing for it."""
    match = re.fullmatch(r"(?:([0-9.eE+-]+) )?([a-z]+)(/s)?", dimension.unit)
    rate = dimension.kind == "velocity"
    if match is None or match[2] not in _UNITS or bool(match[3]) != rate:
        expected = "m/s, rad/s or deg/s" if rate else "m, rad, deg or such as '0.02 m'"
        raise ValueError(
            f"dimension {dimension.name!r} has unit {dimension.unit!r}; expected {expected}. Give the robot's "
            "description its units."
        )
    return float(match[1] or 1) * _UNITS[match[2]]


def rest(dimensions: Sequence[Dimension], action: np.ndarray) -> np.ndarray:
    """The action float[A] that changes nothing after `action`: no motion; places and grippers as asked for."""
    moves = np.array([dimension.kind in ("delta", "velocity") for dimension in dimensions])
    return np.where(moves, 0, action).astype(action.dtype)


def from_json(content: Mapping[str, Any], where: str = "robot") -> RobotSpec:
    """Inverse of `RobotSpec.to_json`. Raises ValueError naming `where` and the field."""
    content = _object(content, RobotSpec, where)
    parts = {"camera": ("cameras", Camera), "action": ("action", Dimension), "state": ("state", Dimension)}
    values = {"name": content["name"], "rate_hz": content.get("rate_hz", 0.0)}
    for what, (field, kind) in parts.items():
        listed = content.get(field, ())
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            raise ValueError(f"{where} describes no robot: {field}={listed!r}; expected a list of objects.")
        parsed = []
        for index, part in enumerate(listed):
            place = f"{where}: {field}[{index}]"
            described = _object(part, kind, place)
            try:
                parsed.append(kind(**described))
            except ValueError as error:
                raise ValueError(f"{place} describes no {what}: {error}") from error
        values[field] = tuple(parsed)
    try:
        return RobotSpec(**values)
    except ValueError as error:
        raise ValueError(f"{where} describes no robot: {error}") from error


def _object(content: Any, kind: type, where: str) -> dict[str, Any]:
    """The fields of a JSON object that are not null; refuses what is none, fields that `kind` has not, no name."""
    fields = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} holds a {type(content).__name__}, {content!r:.60}; expected an object of {fields}.")
    unknown = sorted(set(content) - set(fields))
    if unknown:
        raise ValueError(f"{where} has unknown fields {unknown}; known: {fields}.")
    known = {key: value for key, value in content.items() if value is not None}
    if "name" not in known:
        raise ValueError(f"{where}: 'name' is missing.")
    return known


def _require_text(what: str, part: Any, *fields: str) -> None:
    if part.name == "":
        raise ValueError(f"{what}: name is empty; it is what messages, flags and files call it by.")
    for field in fields:
        value = getattr(part, field)
        if not isinstance(value, str):
            raise ValueError(f"{what} {part.name!r}: {field}={value!r} is a {type(value).__name__}; expected text.")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def differences(expected: RobotSpec, found: RobotSpec) -> list[str]:
    """What differs in a way that changes what numbers or pictures mean, a sentence each; [] when nothing does.

    Unknown units, frames and rates and unbounded dimensions agree with everything; names of the robots may differ.
    Units are compared by what they measure ("1 m" is "m"), bounds where these are the same.
    """
    listed = []
    missing = [name for name in expected.camera_names if name not in found.camera_names]
    if missing:
        listed.append(f"cameras {missing} are missing; {found.name} has {list(found.camera_names)}")
    if expected.rate_hz and found.rate_hz and not math.isclose(expected.rate_hz, found.rate_hz, rel_tol=0.02):
        listed.append(f"the rate is {found.rate_hz:g} Hz, expected {expected.rate_hz:g} Hz")
    for part in ("action", "state"):
        listed += _dimension_differences(part, getattr(expected, part), getattr(found, part))
    return listed


def _dimension_differences(part: str, expected: Sequence[Dimension], found: Sequence[Dimension]) -> list[str]:
    if len(expected) != len(found):
        names = [dimension.name for dimension in found]
        return [f"{part} has {len(found)} dimensions {names}, expected {len(expected)}: {[d.name for d in expected]}"]
    listed = []
    for column, (left, right) in enumerate(zip(expected, found, strict=True)):
        where = f"{part}[{column}] {left.name!r}"
        for field in ("name", "unit", "kind", "quantity", "frame", "open_at"):
            want, got = getattr(left, field), getattr(right, field)
            same = left.measure == right.measure if field == "unit" else want == got
            if not same and want not in ("", "other") and got not in ("", "other"):
                listed.append(f"{where}: {field} is {got!r}, expected {want!r}")
        if left.measure != right.measure:
            continue  # numbers of another unit are not to be compared, and the unit is said
        for bound in ("low", "high"):
            want, got = getattr(left, bound), getattr(right, bound)
            if math.isfinite(want) and math.isfinite(got) and not math.isclose(want, got, rel_tol=1e-3, abs_tol=1e-9):
                listed.append(f"{where}: {bound} is {got:g}, expected {want:g}")
    return listed


def end_effector(
    name: str,
    position_unit: str = "m",
    rotation_unit: str = "rad",
    *,
    rate_hz: float = 0.0,
    cameras: tuple[str, ...] = (),
    state: tuple[Dimension, ...] = (),
) -> RobotSpec:
    """An arm that is sent motions of its hand, xyz and Euler xyz in axes that nobody names, and a binary gripper."""
    motion = _pose("delta", "", position_unit, rotation_unit, math.inf)
    return RobotSpec(name, rate_hz, tuple(map(Camera, cameras)), (*motion, GRIPPER), state)


def _pose(kind: Kind, frame: str, position_unit: str, rotation_unit: str, bound: float) -> tuple[Dimension, ...]:
    """xyz and Euler xyz, bounded by +-`bound`."""
    xyz = tuple(Dimension(n, position_unit, kind, "position", frame, -bound, bound) for n in ("x", "y", "z"))
    turn = tuple(Dimension(n, rotation_unit, kind, "euler_xyz", frame, -bound, bound) for n in ("roll", "pitch", "yaw"))
    return xyz + turn


GRIPPER = Dimension("gripper", "1", "binary", "gripper", "", -1.0, 1.0, "high")
"""-1 closed, +1 open."""

CALVIN = RobotSpec(
    "calvin",
    30.0,
    (Camera("static", 200, 200), Camera("wrist", 84, 84)),
    (*_pose("delta", "world", "0.02 m", "0.05 rad", 1.0), GRIPPER),
    (*_pose("absolute", "world", "m", "rad", math.inf), GRIPPER),
)
"""CALVIN's Panda: 1.0 of a relative action is 0.02 m or 0.05 rad."""
