"""What a policy predicts, and what its robot is sent: actions change their representation here, at the border of data
and control, and nowhere else.

`make` finds the arms among a robot's dimensions, one or several, whose rotations may be declared as Euler angles,
quaternions, axis-angle vectors or two columns of a matrix. `encode` turns recorded actions into the representation,
each at the pose where it was recorded; `decode` turns a predicted chunk back into the robot's own, each action at the
pose that the ones before it lead to. Grippers, joints and all else pass untouched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from robovlms_jax.actions import arms
from robovlms_jax.control import robot as robots

Name = Literal[
    "robot",
    "relative",
    "absolute",
    "absolute_6d",
    "absolute_quaternion",
    "absolute_axis_angle",
    "velocity",
    "tcp",
    "tcp_upstream",
]
"""robot: as recorded. relative: motions from the pose before. absolute: poses to go to, turned by Euler angles;
absolute_6d, which has no jumps: by two columns of the rotation matrix; absolute_quaternion and absolute_axis_angle: by
these. velocity: motions per second. tcp: motions along and about the tool's own axes. tcp_upstream: RoboVLMs'
`tcp_rel` (`frames.UPSTREAM_TOOL`). Motions turn by differences of Euler angles where the robot is sent such, else by an
axis-angle vector."""


@dataclasses.dataclass(frozen=True)
class Representation:
    """Actions of `own`, a robot, as `name` has them; `robot` says what they are then."""

    name: Name
    own: robots.RobotSpec
    arms: tuple[arms.Arm, ...]

    @property
    def robot(self) -> robots.RobotSpec:
        """The robot with the representation's action dimensions."""
        parts = {}
        for arm in self.arms:
            position, rotation = arm.dimensions()
            parts |= {column: (d,) for column, d in zip(arm.action.position, position, strict=True)}
            parts |= dict.fromkeys(arm.action.rotation, ()) | {arm.action.rotation[0]: rotation}
        made = (parts.get(column, (dimension,)) for column, dimension in enumerate(self.own.action))
        return dataclasses.replace(self.own, action=tuple(d for part in made for d in part))

    def encode(self, actions: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Own actions float[n, A] at states float[n, P] -> float32[n, A'] in the representation; NaN where a rotation
        is none, such as a quaternion of zeros."""
        actions = np.asarray(actions, np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):  # what is no rotation becomes NaN
            return self._encode(actions, states)

    def _encode(self, actions: np.ndarray, states: np.ndarray) -> np.ndarray:
        parts = {column: actions[:, column : column + 1] for column in range(actions.shape[1])}
        for arm in self.arms:
            pose = arm.pose(states)
            values = arm.from_target(arm.target(actions, pose), pose)
            parts |= {column: values[:, i : i + 1] for i, column in enumerate(arm.action.position)}
            parts |= dict.fromkeys(arm.action.rotation, values[:, :0]) | {arm.action.rotation[0]: values[:, 3:]}
        return np.concatenate([parts[column] for column in range(actions.shape[1])], axis=1).astype(np.float32)

    def decode(self, chunk: np.ndarray, state: np.ndarray) -> np.ndarray:
        """A predicted chunk float[C, A'] at the state float[P] -> own actions float32[C, A]. Motions are clipped to the
        robot's bounds, and the next action begins where the clipped one leads to. NaN as in `encode`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._decode(np.asarray(chunk, np.float64), state)

    def _decode(self, chunk: np.ndarray, state: np.ndarray) -> np.ndarray:
        places = self._places()
        poses = [arm.pose(np.asarray(state)[None]) for arm in self.arms]
        own = np.zeros((len(chunk), len(self.own.action)))
        for step, action in enumerate(chunk):
            row = own[step : step + 1]
            for column, place in places.items():
                row[:, column] = action[place]
            for index, arm in enumerate(self.arms):
                first, size = places[arm.action.rotation[0]], robots.GROUP_SIZES[arm.form]
                xyz = action[[places[column] for column in arm.action.position]]
                values = np.concatenate([xyz, action[first : first + size]])[None]
                arm.write_own(row, arm.to_target(values, poses[index]), poses[index])
                poses[index] = arm.target(row, poses[index])
        return own.astype(np.float32)

    def _places(self) -> dict[int, int]:
        """Own column -> where its number stands in the representation; of a rotation only the first."""
        sizes = dict.fromkeys(range(len(self.own.action)), 1)
        for arm in self.arms:
            sizes |= dict.fromkeys(arm.action.rotation, 0)
            sizes[arm.action.rotation[0]] = robots.GROUP_SIZES[arm.form]
        ends = np.cumsum(list(sizes.values()))
        return {column: int(end) - size for (column, size), end in zip(sizes.items(), ends, strict=True) if size}


def make(name: Name, own: robots.RobotSpec) -> Representation:
    """The representation of a robot's actions. Raises ValueError that says what the robot lacks."""
    what = f"policy.representation={name!r}"
    action, state = (_parts(getattr(own, part), part, own, what) for part in ("action", "state"))
    if not action or set(action) != set(state):
        sides = [[side or "an arm" for side in found] for found in (action, state)]
        raise ValueError(
            f"{what} needs the same arms in the action and in the state, several told apart by the first word of their "
            f"names; robot {own.name!r} has {sides[0]} in the action and {sides[1]} in the state."
        )
    made = []
    for side, part in action.items():
        kinds = {own.action[column].kind for column in (*part.position, *part.rotation)}
        if kinds not in ({"delta"}, {"absolute"}):
            raise ValueError(f"{what} needs the arm's motions, or its poses; robot {own.name!r} has {sorted(kinds)}.")
        _require_one_frame(own, part, state[side], what)
        if name == "tcp_upstream" and part.form != "euler_xyz":
            raise ValueError(f"{what} is about Euler angles; robot {own.name!r} turns by {part.form}. Set tcp.")
        made.append(arms.Arm(name, own, part, state[side]))
    if name == "velocity" and not own.rate_hz:
        raise ValueError(f"policy.representation='velocity' needs the robot's rate; {own.name!r} has rate_hz=0.")
    return Representation(name, own, tuple(made))


def _require_one_frame(own: robots.RobotSpec, action: arms.Part, state: arms.Part, what: str) -> None:
    """Poses and motions are added up, so they must be given in one frame, which is not the tool's; an unknown one
    agrees with every other."""
    found = {
        f"{where} {kind}": {dimensions[column].frame for column in columns}
        for where, dimensions, part in (("action", own.action, action), ("state", own.state, state))
        for kind, columns in (("position", part.position), ("rotation", part.rotation))
    }
    known = set().union(*found.values()) - {""}
    if len(known) > 1 or "tcp" in known:
        said = {name: sorted(frames) for name, frames in found.items()}
        raise ValueError(
            f"{what} needs the arm's action and state in one frame, not in the tool's; robot {own.name!r} has {said}. "
            "Set policy.representation=robot, or convert the data."
        )


def _parts(
    dimensions: Sequence[robots.Dimension], where: str, own: robots.RobotSpec, what: str
) -> dict[str, arms.Part]:
    """Side -> the columns of its arm; a single arm's side is ""."""
    position = _groups(dimensions, ("position",))
    rotation = _groups(dimensions, arms.FORMS)
    if not position and not rotation:
        sides = {}
    elif len(position) == len(rotation) == 1:
        sides = {"": (position[0], rotation[0])}
    else:
        found = [
            {arms.side_of(dimensions[group[0]].name): group for group in groups} for groups in (position, rotation)
        ]
        if found[0].keys() != found[1].keys() or len(found[0]) != len(position) or len(found[1]) != len(rotation):
            raise ValueError(
                f"{what} needs one arm, or several told apart by the first word of their names (left_x, left_roll), "
                f"with xyz and a rotation each, in the action and in the state; robot {own.name!r} has {len(position)} "
                f"positions of {sorted(found[0])} and {len(rotation)} rotations of {sorted(found[1])} in the {where}."
            )
        sides = {side: (group, found[1][side]) for side, group in found[0].items()}
    return {side: _part(dimensions, *groups, where, own, what) for side, groups in sides.items()}


def _part(
    dimensions: Sequence[robots.Dimension],
    position: tuple[int, ...],
    rotation: tuple[int, ...],
    where: str,
    own: robots.RobotSpec,
    what: str,
) -> arms.Part:
    form, scales = dimensions[rotation[0]].quantity, []
    angles = form in ("euler_xyz", "axis_angle")
    for columns, unit in ((position, "m"), (rotation, "rad" if angles else "1")):
        measures = {dimensions[column].measure for column in columns}
        scale, found = next(iter(measures))
        unknown = found == "" and (where == "state" or not angles)
        if len(measures) > 1 or not (found == unit or unknown) or (unit == "1" and scale != 1):
            raise ValueError(
                f"{what} needs the arm's {where} in m and {'rad' if angles else 'numbers without unit'}; robot "
                f"{own.name!r} has {[dimensions[column].unit for column in (*position, *rotation)]}."
            )
        scales.append(scale)
    return arms.Part(position, rotation, form, tuple(scales))


def _groups(dimensions: Sequence[robots.Dimension], quantities: Sequence[str]) -> list[tuple[int, ...]]:
    """Columns of every xyz or rotation among the dimensions, in their order."""
    found = []
    for quantity in quantities:
        columns = [i for i, dimension in enumerate(dimensions) if dimension.quantity == quantity]
        size = robots.GROUP_SIZES[quantity]
        found += [tuple(columns[i : i + size]) for i in range(0, len(columns), size)]
    return sorted(found)
