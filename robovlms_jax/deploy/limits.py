"""What a robot may do: the numbers of the safety layer, and how a robot's action dimensions are read."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Literal

import numpy as np

from robovlms_jax.control.robot import Dimension, RobotSpec, unit_scale
from robovlms_jax.deploy.motion import Group


def is_number(value: object) -> bool:
    """Whether it is a real number; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


Bounds = tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one robot. The defaults are those of the mobile robot's design documents where they name one (0.5 m/s;
    x and y within 0.5 m, z from 0 to 0.3 m; 0.1 m to obstacles; stop enabled), in metres and seconds."""

    speed_m_s: float = 0.5
    acceleration_m_s2: float = 1.0
    jerk_m_s3: float = 10.0
    turn_rad_s: float = 1.5
    turn_acceleration_rad_s2: float = 4.0
    turn_jerk_rad_s3: float = 40.0
    joint_rad_s: float = 1.0
    joint_acceleration_rad_s2: float = 4.0
    joint_jerk_rad_s3: float = 40.0
    workspace_m: Bounds | None = ((-0.5, 0.5), (-0.5, 0.5), (0.0, 0.3))
    """Where the tool, or the centre of a base, may be: x, y, z in the frame of `Measured.position`. A base has no z.
    None: anywhere."""
    joint_bounds_rad: Bounds | None = None
    """Lowest and highest angle of every joint, for robots that are commanded by joints."""
    clearance_m: float = 0.1
    """Least distance to obstacles."""
    self_clearance_m: float = 0.02
    """Least distance of the tool to the robot's own body."""
    on_collision_risk: Literal["stop", "slow"] = "stop"
    """stop: a request that would bring the robot nearer than `clearance_m` latches a stop. slow: it is reduced, and
    only being too near latches one."""
    following_error_m: float = 0.05
    """Furthest that an arm's tool may be from where it was sent; more (a blocked arm) latches a stop. A base is sent
    velocities and has none."""
    following_error_rad: float = 0.2
    """The same for joints and the tool's angles, of robots that are sent places."""
    gripper_force_n: float = math.inf
    """Above it, grippers open or stay as they are."""
    observation_age_s: float = 0.3
    action_age_s: float = 1.0
    missing_ticks: int = 10
    """Ticks in a row without a usable action before the stop is latched; the robot brakes from the first on."""
    category: Literal[0, 1, 2] = 2
    """Of the stop, as IEC 60204-1 means it. 0: power is asked to be removed at once. 1: the robot is braked, then power
    is asked to be removed. 2: it is braked and held, with power on. Software can only ask."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("workspace_m", "joint_bounds_rad", "on_collision_risk", "category"):
                continue
            finite = field.name == "gripper_force_n" or (is_number(value) and math.isfinite(value))
            if not (is_number(value) and finite and value >= 0):
                raise ValueError(f"limits: {field.name}={value!r} must be a finite number of 0 or more.")
        if self.missing_ticks != int(self.missing_ticks) or self.missing_ticks < 1:
            raise ValueError(f"limits: missing_ticks={self.missing_ticks!r} must be a whole number of 1 or more.")
        if self.on_collision_risk not in ("stop", "slow"):
            raise ValueError(f"limits: on_collision_risk={self.on_collision_risk!r}; expected 'stop' or 'slow'.")
        if self.category not in (0, 1, 2):
            raise ValueError(f"limits: category={self.category!r}; expected 0, 1 or 2 (IEC 60204-1).")
        for name, what in (("workspace_m", "x, y and z"), ("joint_bounds_rad", "every joint")):
            pairs = getattr(self, name)
            if pairs is None:
                continue
            shaped = isinstance(pairs, tuple | list) and all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs)
            if not shaped or not all(is_number(x) for p in pairs for x in p) or (what[0] == "x" and len(pairs) != 3):
                raise ValueError(f"limits: {name}={pairs!r}; expected (low, high) for {what}, or None.")
            for low, high in pairs:
                if not low < high:
                    raise ValueError(f"limits: {name} has {low} ... {high}; the first must be below the second.")


BASE = ("linear_x", "linear_y", "angular_z")

MOBILE = RobotSpec(
    "mobile base",
    50.0,
    action=(
        Dimension("linear_x", "m/s", "velocity", "base", "base", -0.5, 0.5),
        Dimension("linear_y", "m/s", "velocity", "base", "base", -0.5, 0.5),
        Dimension("angular_z", "rad/s", "velocity", "base", "base", -1.5, 1.5),
    ),
    state=(
        Dimension("x", "m", "absolute", "other", "world"),
        Dimension("y", "m", "absolute", "other", "world"),
        Dimension("heading", "rad", "absolute", "other", "world"),
    ),
)
"""A wheeled base as ROS's geometry_msgs/Twist commands it: x forward, y left, turns counter-clockwise positive."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an action becomes motion.

    order: columns of the action that move, as the filter has them. grippers: the other columns.
    scale: float[D], m or rad (per second) of 1.0. kinds: of the columns in `order`.
    groups: limits of the columns in `order`. low, high: float[D], bounds of positions, in m and rad.
    tools: columns, of those in `order`, that hold a tool's x, y and z, of each arm. angles: bool[D], Euler angles.
    """

    order: tuple[int, ...]
    grippers: tuple[int, ...]
    scale: np.ndarray
    kinds: tuple[str, ...]
    groups: tuple[Group, ...]
    low: np.ndarray
    high: np.ndarray
    tools: tuple[tuple[int, int, int], ...]
    angles: np.ndarray
    base: bool


def layout(spec: RobotSpec, limits: Limits) -> Layout:
    """Raises ValueError that names the dimension that cannot be limited, and why."""
    moving = [(i, d) for i, d in enumerate(spec.action) if d.quantity != "gripper"]
    if not moving:
        raise ValueError(f"robot {spec.name!r} describes no action dimension that moves it; nothing can be limited.")
    base = any(d.quantity == "base" for _, d in moving)
    names = tuple(d.name for _, d in moving)
    if base and names != BASE:
        raise ValueError(f"robot {spec.name!r}: a base is commanded by {BASE}, found {names}.")
    parts = [(0, 1), (2,)] if base else _parts(moving, spec.name)
    groups = tuple(_group(tuple(part), moving[part[0]][1], limits, base) for part in parts)
    low, high = np.full(len(moving), -np.inf), np.full(len(moving), np.inf)
    tools = () if base else tuple(tuple(p) for p in parts if moving[p[0]][1].quantity == "position")
    for column, bounds in _bounds(moving, tools, limits, base):
        low[column], high[column] = max(low[column], bounds[0]), min(high[column], bounds[1])
    return Layout(
        order=tuple(i for i, _ in moving),
        grippers=tuple(i for i, d in enumerate(spec.action) if d.quantity == "gripper"),
        scale=np.array([unit_scale(d) for _, d in moving]),
        kinds=tuple(d.kind for _, d in moving),
        groups=groups,
        low=low,
        high=high,
        tools=tools,
        angles=np.array([d.quantity == "euler_xyz" for _, d in moving]),
        base=base,
    )


def _parts(moving: list[tuple[int, Dimension]], robot: str) -> list[tuple[int, ...]]:
    """Columns that are limited together."""
    parts, column = [], 0
    while column < len(moving):
        dimension = moving[column][1]
        size = {"position": 3, "euler_xyz": 3, "axis_angle": 3, "joint": 1}.get(dimension.quantity)
        if size is None or (dimension.quantity == "axis_angle" and dimension.kind == "absolute"):
            raise ValueError(
                f"robot {robot!r}: action dimension {dimension.name!r} is {dimension.quantity}, {dimension.kind}; the "
                "safety layer limits positions, Euler angles, small rotation vectors, joints and bases. Convert the "
                "action before it."
            )
        parts.append(tuple(range(column, column + size)))
        column += size
    return parts


def _group(part: tuple[int, ...], dimension: Dimension, limits: Limits, base: bool) -> Group:
    translation = part == (0, 1) if base else dimension.quantity == "position"
    if translation:
        return Group("translation", part, limits.speed_m_s, limits.acceleration_m_s2, limits.jerk_m_s3)
    if dimension.quantity == "joint":
        joint = (limits.joint_rad_s, limits.joint_acceleration_rad_s2, limits.joint_jerk_rad_s3)
        return Group(f"joint {dimension.name}", part, *joint)
    return Group("rotation", part, limits.turn_rad_s, limits.turn_acceleration_rad_s2, limits.turn_jerk_rad_s3)


def _bounds(
    moving: list[tuple[int, Dimension]], tools: tuple[tuple[int, ...], ...], limits: Limits, base: bool
) -> list[tuple[int, tuple[float, float]]]:
    found: list[tuple[int, tuple[float, float]]] = []
    if limits.workspace_m is not None:
        places = [(0, 1)] if base else tools
        found += [(column, bounds) for place in places for column, bounds in zip(place, limits.workspace_m)]
    joints = [column for column, (_, d) in enumerate(moving) if d.quantity == "joint"]
    if limits.joint_bounds_rad is not None:
        if len(limits.joint_bounds_rad) != len(joints):
            raise ValueError(
                f"limits: joint_bounds_rad has {len(limits.joint_bounds_rad)} pairs, the robot {len(joints)} joints."
            )
        found += list(zip(joints, limits.joint_bounds_rad))
    for column, (_, dimension) in enumerate(moving):
        if dimension.kind == "absolute":
            scale = unit_scale(dimension)
            found.append((column, (dimension.low * scale, dimension.high * scale)))
    return found
