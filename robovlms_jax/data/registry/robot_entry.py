"""A dataset of any robot as data: actions and state are the dimensions of a `RobotSpec`, number by number.

`entry.Entry` describes an end effector that moves by metres and radians, and one gripper; this describes the rest:
joint positions, two arms, velocities of a base.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.data.registry import expressions
from robovlms_jax.data.registry.entry import Entry


@dataclasses.dataclass(frozen=True)
class RobotEntry(Entry):
    """One dataset; fields that `Entry` has mean the same, but for arm, gripper, static, wrist and state, which it does
    without.

    described: the robot, its numbers as they are stored. A binary gripper needs low, high and open_at: whoever reads
      gets -1 (closed) or 1 (open), decided in the middle.
    actions, states: expressions that make the numbers of `described.action` and `described.state`, side by side.
    pictures: camera -> its images.
    """

    arm: tuple[str, ...] = ()
    gripper: str = ""
    static: str = ""
    described: robots.RobotSpec = robots.RobotSpec("robot")
    actions: tuple[str, ...] = ("action",)
    states: tuple[str, ...] = ()
    pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if not self.described.action:
            raise ValueError(f"dataset {self.name!r}: its robot has no action dimension; list them under robot.action.")
        if bool(self.states) != bool(self.described.state):
            raise ValueError(
                f"dataset {self.name!r}: robot.state and the expressions of its numbers must both be given or both be "
                "left out."
            )
        for part in ("action", "state"):
            for dimension in getattr(self.described, part):
                if dimension.kind == "binary":
                    _threshold(dimension, f"dataset {self.name!r}: robot.{part}")

    @functools.cached_property
    def _expressions(self) -> dict[str, tuple[expressions.Expression, ...]]:
        texts = {"action": self.actions, "state": self.states}
        return {part: tuple(map(expressions.Expression, listed)) for part, listed in texts.items()}

    @property
    def _named_cameras(self) -> dict[str, str]:
        return dict(self.pictures)

    @property
    def measures_opening(self) -> bool:
        return False

    @property
    def robot(self) -> robots.RobotSpec:
        """With binary grippers as they are handed out."""
        parts = {part: tuple(map(_decided, getattr(self.described, part))) for part in ("action", "state")}
        cameras = self.described.cameras or tuple(map(robots.Camera, self.pictures))
        rate = self.described.rate_hz or self.control_hz
        return dataclasses.replace(self.described, cameras=cameras, rate_hz=rate, **parts)

    def widths(self, sizes: Mapping[str, int]) -> str:
        for part, listed in self._expressions.items():
            names = [dimension.name for dimension in getattr(self.described, part)]
            try:
                total = sum(expression.width(sizes.get(expression.field, 0)) for expression in listed)
            except ValueError as error:
                return f"{part}: {error}"
            if total != len(names):
                texts = [expression.text for expression in listed]
                return f"{part}: {texts} give {total} numbers, the robot has {len(names)}: {names}"
        return ""

    def standardize(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Entry.standardize`; actions float32[L, A], state float32[L, P]."""
        total = len(next(iter(columns.values())))
        kept = {name: values[self.skip_first :] for name, values in columns.items()}
        num_steps = max(total - self.skip_first, 0)
        parts = {
            part: [np.zeros((num_steps, 0), np.float32), *(e(kept, num_steps) for e in listed if num_steps)]
            for part, listed in self._expressions.items()
        }
        length = min(len(x) for listed in parts.values() for x in listed)
        if num_steps == 0:
            actions, states = (np.zeros((0, len(d)), np.float32) for d in (self.described.action, self.described.state))
            return actions, states, np.zeros(0, np.int64)
        actions, states = (np.concatenate([x[:length] for x in parts[part]], axis=1) for part in ("action", "state"))
        actions, states = decide(actions, self.described.action), decide(states, self.described.state)
        rows = self.skip_first + np.arange(length)
        if self.drop_still:
            moves = [i for i, d in enumerate(self.described.action) if d.kind in ("delta", "velocity")]
            moving = np.any(actions[:, moves] != 0, axis=1)
            actions, states, rows = actions[moving], states[moving], rows[moving]
        return actions.astype(np.float32), states.astype(np.float32), rows


def of_json(name: str, content: Mapping[str, Any], where: str) -> RobotEntry:
    """An entry from a description's fields, "robot" among them. Raises ValueError naming `where` and the field."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    robot = fields.pop("robot")
    for ours, theirs in (("actions", "action"), ("states", "state"), ("pictures", "cameras")):
        if theirs in fields:
            fields[ours] = fields.pop(theirs)
    known = {field.name for field in dataclasses.fields(RobotEntry)} - {"name", "described"}
    unknown = sorted(set(fields) - known)
    if not isinstance(robot, Mapping) or unknown:
        raise ValueError(
            f"{where}: {name!r} has {f'unknown fields {unknown}' if unknown else f'robot={robot!r}'}; expected robot: "
            "{action: [{name, kind, unit, ...}, ...], state: [...]} with action, state (expressions) and cameras."
        )
    spec = robots.from_json({"name": name, **robot}, f"{where}: {name!r}: robot")
    return RobotEntry(name, described=spec, **fields)


def decide(values: np.ndarray, dimensions: Sequence[robots.Dimension]) -> np.ndarray:
    """Numbers float[L, n] as stored -> with every binary gripper exactly -1 (closed) or 1 (open); NaN stays."""
    values = np.array(values)
    for column, dimension in enumerate(dimensions):
        if dimension.kind == "binary":
            middle, sign = _threshold(dimension, "robot")
            x = values[:, column]
            values[:, column] = np.where(np.isnan(x), x, np.where(x > middle, sign, -sign))
    return values


def _threshold(dimension: robots.Dimension, where: str) -> tuple[float, float]:
    """(middle, what is above it: 1 open or -1 closed)."""
    if not (math.isfinite(dimension.low) and math.isfinite(dimension.high) and dimension.open_at):
        raise ValueError(
            f"{where}: the binary gripper {dimension.name!r} needs low, high and open_at (which of them is open); got "
            f"{dimension.low}, {dimension.high} and {dimension.open_at!r}. Or call it continuous."
        )
    return (dimension.low + dimension.high) / 2, 1.0 if dimension.open_at == "high" else -1.0


def _decided(dimension: robots.Dimension) -> robots.Dimension:
    if dimension.kind != "binary":
        return dimension
    return dataclasses.replace(dimension, unit="1", low=-1.0, high=1.0, open_at="high")
