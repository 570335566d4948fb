"""One arm among a robot's numbers, and its actions in other representations (`actions.representations`).

An arm's pose is float64[n, 12]: xyz in metres and a rotation matrix, row by row; an arm that is sent Euler angles keeps
these instead, float64[n, 6], because their differences are what its motions are.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from robovlms_jax.actions import frames, rotations
from robovlms_jax.control import robot as robots

FORMS = ("euler_xyz", "quaternion_xyzw", "axis_angle", "rotation_6d")
"""How a rotation may be declared (`control.robot.Quantity`)."""

ABSOLUTE = {
    "absolute": "euler_xyz",
    "absolute_6d": "rotation_6d",
    "absolute_quaternion": "quaternion_xyzw",
    "absolute_axis_angle": "axis_angle",
}
"""Representations that are poses to go to -> how they are turned."""


def to_matrix(values: np.ndarray, form: str) -> np.ndarray:
    """Numbers of one rotation float[n, 3, 4 or 6] -> matrices [n, 3, 3]."""
    make = {
        "euler_xyz": rotations.from_euler,
        "quaternion_xyzw": rotations.from_quaternion,
        "axis_angle": rotations.from_axis_angle,
        "rotation_6d": rotations.from_6d,
    }
    return make[form](values)


def from_matrix(matrices: np.ndarray, form: str) -> np.ndarray:
    """Inverse of `to_matrix`; of the two quaternions of a rotation the one with w >= 0."""
    if form == "quaternion_xyzw":
        quaternions = rotations.to_quaternion(matrices)
        return np.where(quaternions[:, 3:] < 0, -quaternions, quaternions)
    make = {"euler_xyz": rotations.to_euler, "axis_angle": rotations.to_axis_angle, "rotation_6d": rotations.to_6d}
    return make[form](matrices)


@dataclasses.dataclass(frozen=True)
class Part:
    """Columns of an arm among the numbers of an action or a state.

    scale: metres per unit of xyz, radians per unit of angles and axis-angle vectors (others: 1).
    """

    position: tuple[int, ...]
    rotation: tuple[int, ...]
    form: str
    scale: tuple[float, float]

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float[n, any] -> xyz in metres float64[n, 3] and the rotation's numbers, angles in radians."""
        numbers = np.asarray(numbers, np.float64)
        return numbers[:, self.position] * self.scale[0], numbers[:, self.rotation] * self.scale[1]


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm in the representation `name`. action: its part of the robot's own actions. state: of its state.

    Motions of an arm that is sent Euler angles are their differences, as CALVIN's are. All other arms turn by a
    rotation about axes of the world, R' = D R, whose axis-angle vector is what `relative`, `velocity` and `tcp` (about
    the tool's own axes, R' = R D) say.
    """

    name: str
    own: robots.RobotSpec
    action: Part
    state: Part

    @property
    def is_delta(self) -> bool:
        """Whether the robot is sent motions, not poses."""
        return self.own.action[self.action.position[0]].kind == "delta"

    @property
    def _euler(self) -> bool:
        return self.action.form == "euler_xyz"

    @property
    def form(self) -> str:
        """How rotations of the representation are written."""
        return ABSOLUTE.get(self.name, "euler_xyz" if self._euler else "axis_angle")

    def pose(self, states: np.ndarray) -> np.ndarray:
        """Robot's states float[n, P] -> poses."""
        xyz, turn = self.state.read(states)
        if self._euler and self.state.form == "euler_xyz":
            return np.concatenate([xyz, turn], axis=1)
        return self._pack(xyz, to_matrix(turn, self.state.form))

    def target(self, actions: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Poses that own actions float[n, A] lead to."""
        xyz, turn = self.action.read(actions)
        if self._euler:
            if not self.is_delta:
                return np.concatenate([xyz, turn], axis=1)
            return np.concatenate([pose[:, :3] + xyz, rotations.wrap(pose[:, 3:] + turn)], axis=1)
        matrix = to_matrix(turn, self.action.form)
        return self._pack(pose[:, :3] + xyz, matrix @ self._matrix(pose)) if self.is_delta else self._pack(xyz, matrix)

    def write_own(self, actions: np.ndarray, target: np.ndarray, pose: np.ndarray) -> None:
        """Put the own action that leads to target poses, as far as its bounds allow, into float64[n, A]."""
        xyz, turn = target[:, :3], target[:, 3:]
        if not self._euler:
            matrix = self._matrix(target)
            turn = from_matrix(
                matrix @ self._matrix(pose).swapaxes(1, 2) if self.is_delta else matrix, self.action.form
            )
        elif self.is_delta:
            turn = rotations.wrap(turn - pose[:, 3:])
        xyz = xyz - pose[:, :3] if self.is_delta else xyz
        columns = (self.action.position, self.action.rotation)
        for values, places, scale in zip((xyz, turn), columns, self.action.scale, strict=True):
            low, high = ([getattr(self.own.action[c], end) for c in places] for end in ("low", "high"))
            actions[:, places] = np.clip(values / scale, low, high)

    def from_target(self, target: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Target poses -> the representation's numbers, xyz and rotation, float64[n, 6, 7 or 9]."""
        if self.name in ABSOLUTE:
            same = self._euler and self.form == "euler_xyz"
            return (
                target
                if same
                else np.concatenate([target[:, :3], from_matrix(self._matrix(target), self.form)], axis=1)
            )
        move = target[:, :3] - pose[:, :3]
        if self._euler:
            move = np.concatenate([move, rotations.wrap(target[:, 3:] - pose[:, 3:])], axis=1)
            if self.name == "velocity":
                return move * self.own.rate_hz
            return move / self._units if self._tool is None else self._tool.from_world(move / self._units, pose)
        rotation, goal = self._matrix(pose), self._matrix(target)
        back = rotation.swapaxes(1, 2)
        if self.name == "tcp":
            move, turn = (back @ move[..., None])[..., 0], back @ goal
        else:
            turn = goal @ back
        move = np.concatenate([move, from_matrix(turn, "axis_angle")], axis=1)
        return move * self.own.rate_hz if self.name == "velocity" else move / self._units

    def to_target(self, values: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Inverse of `from_target`."""
        if self.name in ABSOLUTE:
            same = self._euler and self.form == "euler_xyz"
            return values if same else self._pack(values[:, :3], to_matrix(values[:, 3:], self.form))
        if self.name == "velocity":
            move = values / self.own.rate_hz
        elif self._euler and self._tool is not None:
            move = self._tool.to_world(values, pose) * self._units
        else:
            move = values * self._units
        if self._euler:
            return np.concatenate([pose[:, :3] + move[:, :3], rotations.wrap(pose[:, 3:] + move[:, 3:])], axis=1)
        rotation, turn, step = self._matrix(pose), to_matrix(move[:, 3:], "axis_angle"), move[:, :3]
        if self.name == "tcp":
            return self._pack(pose[:, :3] + (rotation @ step[..., None])[..., 0], rotation @ turn)
        return self._pack(pose[:, :3] + step, turn @ rotation)

    def dimensions(self) -> tuple[tuple[robots.Dimension, ...], tuple[robots.Dimension, ...]]:
        """What xyz and the rotation are in the representation."""
        position = tuple(self._dimension(self.own.action[column]) for column in self.action.position)
        turn = [self.own.action[column] for column in self.action.rotation]
        if self.form == self.action.form:
            return position, tuple(map(self._dimension, turn))
        size, side = robots.GROUP_SIZES[self.form], side_of(turn[0].name)
        names = [f"{side}_rotation_{i}" if side else f"rotation_{i}" for i in range(size)]
        if self.form in ("rotation_6d", "quaternion_xyzw"):
            made = [robots.Dimension(name, "1", "absolute", self.form, "", -1, 1) for name in names]
        else:
            angle = dataclasses.replace(turn[0], unit="rad", quantity=self.form)
            made = [self._dimension(dataclasses.replace(angle, name=name)) for name in names]
        return position, tuple(made)

    def _dimension(self, dimension: robots.Dimension) -> robots.Dimension:
        unit, frame = dimension.measure[1], dimension.frame
        kind = "absolute" if self.name in ABSOLUTE else "velocity" if self.name == "velocity" else "delta"
        if kind == "velocity":
            unit = f"{unit}/s"
        elif kind == "delta":
            unit = dimension.unit if self.is_delta else unit
            frame = "tcp" if self.name.startswith("tcp") else frame
        return dataclasses.replace(dimension, unit=unit, kind=kind, low=-math.inf, high=math.inf, frame=frame)

    @property
    def _units(self) -> np.ndarray:
        """Metres and radians that one unit of a relative representation is: the robot's own, or one."""
        position, rotation = self.action.scale if self.is_delta else (1.0, 1.0)
        return np.array([position] * 3 + [rotation] * 3)

    @property
    def _tool(self) -> frames.ToolFrame | None:
        if self.name == "tcp":
            return frames.ToolFrame(unit=float(self._units[3]))
        return frames.UPSTREAM_TOOL if self.name == "tcp_upstream" else None

    def _pack(self, xyz: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        turn = rotations.to_euler(matrix) if self._euler else matrix.reshape(-1, 9)
        return np.concatenate([xyz, turn], axis=1)

    def _matrix(self, pose: np.ndarray) -> np.ndarray:
        return rotations.from_euler(pose[:, 3:]) if self._euler else pose[:, 3:].reshape(-1, 3, 3)


def side_of(name: str) -> str:
    """The first word of a dimension's name where it has several: "left" of left_x; "" of x."""
    first, _, rest = name.replace(".", "_").partition("_")
    return first if rest and first not in ("rotation", "quat", "quaternion", "rot") else ""
