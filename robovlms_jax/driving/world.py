"""How a round base moves among boxes: kinematic, many rooms at once, pure functions. NumPy only.

The base is sent velocities along its own axes and reaches them with bounded acceleration; then it moves on exact arcs.
A base that touches a box, a wall or the cup's stand has collided and stays where it was.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from robovlms_jax.control.robot import Camera
from robovlms_jax.deploy import limits, mobile
from robovlms_jax.driving.scenarios import CUP_RADIUS, ROBOT_RADIUS, ROOM, Layout

PERIOD_S = 0.1
ACCELERATION_M_S2, TURN_ACCELERATION_RAD_S2 = 1.0, 4.0
ARRIVED_M = 0.2
"""Gap between base and stand at which it has arrived, if it is slow enough."""
ARRIVED_M_S = 0.2

ROBOT = dataclasses.replace(
    limits.MOBILE, name="driving base", rate_hz=1 / PERIOD_S, cameras=(Camera("front", 60, 96),)
)
"""Commands as ROS's geometry_msgs/Twist, state from odometry: x, y (m) and heading (rad) since the start."""


class State(NamedTuple):
    """N bases.

    pose: float[N, 3], x, y, heading in the room. velocity: float[N, 3], forward, left, turn.
    winding: float[N, 2], angle by which the line from each box to the base has turned, counter-clockwise positive: near
      -pi after passing on the left, +pi after passing on the right.
    collided: bool[N]. clearance: float[N], the least gap to boxes and walls so far.
    """

    pose: np.ndarray
    velocity: np.ndarray
    winding: np.ndarray
    collided: np.ndarray
    clearance: np.ndarray


def reset(layout: Layout) -> State:
    count = len(layout.start)
    pose = layout.start.astype(np.float64)
    gap = np.minimum(box_gaps(layout, pose).min(axis=1), wall_gap(pose))
    return State(pose, np.zeros((count, 3)), np.zeros((count, 2)), np.zeros(count, bool), gap)


def step(layout: Layout, state: State, commands: np.ndarray, drive: str = "holonomic") -> State:
    """One control period.

    Args:
      commands: float[N, 3], m/s, m/s, rad/s; beyond the robot's bounds they are cut.
      drive: "holonomic", or "differential", which cannot move to the side: linear_y is not executed.
    """
    low, high = np.array([[d.low, d.high] for d in ROBOT.action]).T
    wanted = np.clip(commands, low, high)
    if drive == "differential":
        wanted = wanted * (1.0, 0.0, 1.0)
    change = wanted - state.velocity
    plane = np.linalg.norm(change[:, :2], axis=1, keepdims=True)
    most = ACCELERATION_M_S2 * PERIOD_S
    change[:, :2] *= most / np.maximum(plane, most)
    turn = TURN_ACCELERATION_RAD_S2 * PERIOD_S
    change[:, 2] = np.clip(change[:, 2], -turn, turn)
    velocity = state.velocity + change
    pose = mobile.base_path(velocity[:, None], state.pose, PERIOD_S)[:, 0]
    gap = np.minimum(box_gaps(layout, pose).min(axis=1), wall_gap(pose))
    hit = state.collided | (gap <= 0) | (cup_gap(layout, pose) <= 0)
    pose = np.where(hit[:, None], state.pose, pose)
    turned = bearings(layout, pose) - bearings(layout, state.pose)
    turned = (turned + np.pi) % (2 * np.pi) - np.pi
    return State(
        pose,
        np.where(hit[:, None], 0.0, velocity),
        state.winding + turned,
        hit,
        np.minimum(state.clearance, np.maximum(gap, 0)),
    )


def bearings(layout: Layout, pose: np.ndarray) -> np.ndarray:
    """float[N, 2]: direction from each box's centre to the base."""
    gap = pose[:, None, :2] - layout.boxes[:, :, :2]
    return np.arctan2(gap[..., 1], gap[..., 0])


def box_gaps(layout: Layout, pose: np.ndarray) -> np.ndarray:
    """float[N, 2]: distance between surfaces of base and box, at most 0 where they touch; infinite without a box."""
    outside = np.maximum(np.abs(pose[:, None, :2] - layout.boxes[:, :, :2]) - layout.boxes[:, :, 2:4], 0)
    return np.where(layout.present, np.linalg.norm(outside, axis=-1) - ROBOT_RADIUS, np.inf)


def wall_gap(pose: np.ndarray) -> np.ndarray:
    """float[N]."""
    low, high = np.array(ROOM).T
    return np.minimum(pose[:, :2] - low, high - pose[:, :2]).min(axis=1) - ROBOT_RADIUS


def cup_gap(layout: Layout, pose: np.ndarray) -> np.ndarray:
    """float[N]."""
    return np.linalg.norm(layout.cup - pose[:, :2], axis=1) - ROBOT_RADIUS - CUP_RADIUS


def odometry(layout: Layout, state: State) -> np.ndarray:
    """float32[N, 3]: x, y, heading in the frame of where each base started; without drift."""
    gap = state.pose[:, :2] - layout.start[:, :2]
    cos, sin = np.cos(layout.start[:, 2]), np.sin(layout.start[:, 2])
    x, y = cos * gap[:, 0] + sin * gap[:, 1], cos * gap[:, 1] - sin * gap[:, 0]
    heading = state.pose[:, 2] - layout.start[:, 2]
    return np.stack([x, y, heading], axis=1).astype(np.float32)


def as_told(layout: Layout, state: State) -> np.ndarray:
    """bool[N]: every box was passed, on the side that the scenario names. By winding, not by where the base is."""
    passed = -np.sign(state.winding) * (np.abs(state.winding) > np.pi / 2)
    return ((passed == layout.signs) | ~layout.present).all(axis=1)


def arrived(layout: Layout, state: State) -> np.ndarray:
    """bool[N]: at the cup, slow, and without a collision."""
    slow = np.linalg.norm(state.velocity[:, :2], axis=1) <= ARRIVED_M_S
    return (cup_gap(layout, state.pose) <= ARRIVED_M) & slow & ~state.collided


def succeeded(layout: Layout, state: State) -> np.ndarray:
    """bool[N]."""
    return arrived(layout, state) & as_told(layout, state)
