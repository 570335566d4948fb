"""What a policy predicts, and what its robot is sent: actions change their representation here, at the border of data
and control, and nowhere else.

`make` finds the arm among a robot's dimensions. `encode` turns recorded actions into the representation, each at the
pose where it was recorded; `decode` turns a predicted chunk back into the robot's own, each action at the pose that the
ones before it lead to. Grippers, joints and all else pass untouched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from robovlms_jax.actions import frames, rotations
from robovlms_jax.control import robot as robots

Name = Literal["robot", "relative", "absolute", "absolute_6d", "velocity", "tcp", "tcp_upstream"]
"""robot: as recorded. relative: motions from the pose before. absolute, absolute_6d: poses to go to, turned by Euler
angles or by two columns of the rotation matrix, which have no jumps. velocity: motions per second. tcp: motions along
and about the tool's own axes. tcp_upstream: RoboVLMs' `tcp_rel` (`frames.UPSTREAM_TOOL`)."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """Where an arm is among a robot's numbers: columns of xyz and of Euler angles, of the action and of the state.

    scale: metres per unit of xyz, radians per unit of the angles, of the action.
    """

    position: tuple[int, ...]
    rotation: tuple[int, ...]
    state: tuple[int, ...]
    scale: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Representation:
    """Actions of `own`, a robot, as `name` has them; `robot` says what they are then."""

    name: Name
    own: robots.RobotSpec
    arm: Arm

    @property
    def robot(self) -> robots.RobotSpec:
        """The robot with the representation's action dimensions."""
        return dataclasses.replace(self.own, action=self._dimensions())

    def encode(self, actions: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Own actions float[n, A] at states float[n, P] -> float32[n, A'] in the representation."""
        pose = np.asarray(states, np.float64)[:, self.arm.state]
        return self._write(actions, self._from_target(self._target(np.asarray(actions, np.float64), pose), pose))

    def decode(self, chunk: np.ndarray, state: np.ndarray) -> np.ndarray:
        """A predicted chunk float[C, A'] at the state float[P] -> own actions float32[C, A]. Motions are clipped to the
        robot's bounds, and the next action begins where the clipped one leads to."""
        pose = np.asarray(state, np.float64)[None, self.arm.state]
        own = []
        for action in np.asarray(chunk, np.float64)[:, None]:
            row = self._read(action, pose)
            target = self._target(row, pose)
            own.append(row[0])
            pose = target
        return np.stack(own).astype(np.float32)

    # Between the robot's own actions and target poses float[n, 6].

    @property
    def _is_delta(self) -> bool:
        return self.own.action[self.arm.position[0]].kind == "delta"

    def _target(self, own: np.ndarray, pose: np.ndarray) -> np.ndarray:
        xyz, angles = (own[:, columns] * scale for columns, scale in zip(self._columns, self.arm.scale, strict=True))
        if not self._is_delta:
            return np.concatenate([xyz, angles], axis=1)
        return np.concatenate([pose[:, :3] + xyz, rotations.wrap(pose[:, 3:] + angles)], axis=1)

    def _from_own(self, target: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Target poses -> the own action's xyz and angles, float[n, 3] each, within its bounds."""
        xyz, angles = target[:, :3], target[:, 3:]
        if self._is_delta:
            xyz, angles = xyz - pose[:, :3], rotations.wrap(angles - pose[:, 3:])
        parts = []
        for values, columns, scale in zip((xyz, angles), self._columns, self.arm.scale, strict=True):
            low, high = ([getattr(self.own.action[c], end) for c in columns] for end in ("low", "high"))
            parts.append(np.clip(values / scale, low, high))
        return tuple(parts)

    @property
    def _columns(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.arm.position, self.arm.rotation

    # Between target poses and the representation's numbers float[n, 6 or 9].

    def _from_target(self, target: np.ndarray, pose: np.ndarray) -> np.ndarray:
        if self.name == "absolute":
            return target
        if self.name == "absolute_6d":
            return np.concatenate([target[:, :3], rotations.to_6d(rotations.from_euler(target[:, 3:]))], axis=1)
        move = np.concatenate([target[:, :3] - pose[:, :3], rotations.wrap(target[:, 3:] - pose[:, 3:])], axis=1)
        if self.name == "velocity":
            return move * self.own.rate_hz
        units = self._units
        return move / units if self._tool is None else self._tool.from_world(move / units, pose)

    def _to_target(self, values: np.ndarray, pose: np.ndarray) -> np.ndarray:
        if self.name == "absolute":
            return values
        if self.name == "absolute_6d":
            return np.concatenate([values[:, :3], rotations.to_euler(rotations.from_6d(values[:, 3:]))], axis=1)
        if self.name == "velocity":
            move = values / self.own.rate_hz
        elif self._tool is None:
            move = values * self._units
        else:
            move = self._tool.to_world(values, pose) * self._units
        return np.concatenate([pose[:, :3] + move[:, :3], rotations.wrap(pose[:, 3:] + move[:, 3:])], axis=1)

    @property
    def _units(self) -> np.ndarray:
        """Metres and radians that one unit of a relative representation is: the robot's own, or one."""
        position, rotation = self.arm.scale if self._is_delta else (1.0, 1.0)
        return np.array([position] * 3 + [rotation] * 3)

    @property
    def _tool(self) -> frames.ToolFrame | None:
        if self.name == "tcp":
            return frames.ToolFrame(unit=float(self._units[3]))
        return frames.UPSTREAM_TOOL if self.name == "tcp_upstream" else None

    # Whole actions.

    def _write(self, own: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Own actions with the arm's numbers replaced, those of the rotation in its place."""
        own = np.asarray(own, np.float64)
        parts, arm = [], {**dict(zip(self.arm.position, values[:, :3].T, strict=True))}
        for column in range(own.shape[1]):
            if column == self.arm.rotation[0]:
                parts.append(values[:, 3:])
            elif column not in self.arm.rotation:
                parts.append(arm.get(column, own[:, column])[:, None])
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _read(self, action: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """One action float[1, A'] -> own float64[1, A]."""
        size = 6 if self.name == "absolute_6d" else 3
        first, shift = self.arm.rotation[0], size - 3
        place = [column + (shift if column > first else 0) for column in range(len(self.own.action))]
        turn = action[:, first : first + size]
        position = action[:, [place[column] for column in self.arm.position]]
        own = action[:, [min(p, action.shape[1] - 1) for p in place]].copy()
        target = self._to_target(np.concatenate([position, turn], axis=1), pose)
        own[:, self.arm.position], own[:, self.arm.rotation] = self._from_own(target, pose)
        return own

    def _dimensions(self) -> tuple[robots.Dimension, ...]:
        made: list[robots.Dimension] = []
        for column, dimension in enumerate(self.own.action):
            if column in self.arm.rotation and self.name == "absolute_6d":
                if column == self.arm.rotation[0]:
                    made += [
                        robots.Dimension(f"rotation_{i}", "1", "absolute", "rotation_6d", "", -1, 1) for i in range(6)
                    ]
            elif column in (*self.arm.position, *self.arm.rotation):
                made.append(self._arm_dimension(dimension))
            else:
                made.append(dimension)
        return tuple(made)

    def _arm_dimension(self, dimension: robots.Dimension) -> robots.Dimension:
        unit = dimension.measure[1]
        if self.name in ("absolute", "absolute_6d"):
            return dataclasses.replace(
                dimension, unit=unit, kind="absolute", low=-math.inf, high=math.inf, frame=dimension.frame
            )
        if self.name == "velocity":
            return dataclasses.replace(dimension, unit=f"{unit}/s", kind="velocity", low=-math.inf, high=math.inf)
        frame = "tcp" if self._tool else dimension.frame
        unit = dimension.unit if self._is_delta else unit
        return dataclasses.replace(dimension, unit=unit, kind="delta", low=-math.inf, high=math.inf, frame=frame)


def make(name: Name, own: robots.RobotSpec) -> Representation:
    """The representation of a robot's actions. Raises ValueError that says what the robot lacks."""

    def columns(dimensions: Sequence[robots.Dimension], quantity: str) -> tuple[int, ...]:
        return tuple(i for i, dimension in enumerate(dimensions) if dimension.quantity == quantity)

    position, rotation = (columns(own.action, quantity) for quantity in ("position", "euler_xyz"))
    pose = columns(own.state, "position") + columns(own.state, "euler_xyz")
    if (len(position), len(rotation), len(pose)) != (3, 3, 6):
        raise ValueError(
            f"policy.representation={name!r} needs one arm: xyz and three Euler angles in the action, and its pose in "
            f"the state; robot {own.name!r} has {len(position)} and {len(rotation)}, and {len(pose)} of 6 in the state."
        )
    kinds = {own.action[column].kind for column in (*position, *rotation)}
    measures = [own.action[column].measure for column in (*position, *rotation)]
    wanted = [(measures[0][0], "m")] * 3 + [(measures[3][0], "rad")] * 3
    if kinds not in ({"delta"}, {"absolute"}) or measures != wanted:
        raise ValueError(
            f"policy.representation={name!r} needs the arm's motions, or its poses, in m and rad; robot {own.name!r} "
            f"has {sorted(kinds)} in {[own.action[column].unit for column in (*position, *rotation)]}."
        )
    if name == "velocity" and not own.rate_hz:
        raise ValueError(f"policy.representation='velocity' needs the robot's rate; {own.name!r} has rate_hz=0.")
    return Representation(name, own, Arm(position, rotation, pose, (measures[0][0], measures[3][0])))
