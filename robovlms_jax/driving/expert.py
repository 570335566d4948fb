"""Who knows the way: a velocity for every state, without memory, so that it also comes back from where it was pushed.

The way is a curve y(x): level beside every box, at its clearance on the side that is named, and smooth in between. The
base heads for the point of the curve a little ahead, is pushed off by boxes that are too near, and ends at the cup.
"""

from __future__ import annotations

import numpy as np

from robovlms_jax.driving import world
from robovlms_jax.driving.scenarios import MAX_BOXES, ROBOT_RADIUS, Layout

SPEED_M_S = 0.4
MARGIN_M = 0.26
"""Gap that is kept to a box while passing it."""
AHEAD_M = 0.25
PUSHED_BELOW_M = 0.3
STOP_M = 0.13
"""Gap to the cup's stand at which it stops."""
TURN_GAIN, TURN_RAD_S = 1.6, 1.2


def act(layout: Layout, state: world.State, drive: str = "holonomic") -> np.ndarray:
    """float[N, 3]: what a base should be sent now.

    Args:
      drive: "differential" turns towards where a holonomic base would go, and drives there as far as it faces it.
    """
    x, y, heading = state.pose.T
    way = np.stack([np.full_like(x, AHEAD_M), _way(layout, x + AHEAD_M) - y], axis=1)
    to_cup = layout.cup - state.pose[:, :2]
    past = x + AHEAD_M > _last_edge(layout) + AHEAD_M
    target = np.where(past[:, None], to_cup, way)
    direction = target / np.maximum(np.linalg.norm(target, axis=1, keepdims=True), 1e-9)
    direction = _pushed(layout, state.pose, direction)
    left = world.cup_gap(layout, state.pose) - STOP_M
    speed = np.clip(1.5 * left, 0.0, SPEED_M_S)
    error = _difference(direction, heading)
    near = left < 0.05
    if drive == "differential":
        forward, sideways, turn = speed * np.maximum(np.cos(error), 0.0) ** 2, np.zeros_like(speed), 1.8 * error
    else:  # it looks half where it drives and half at the cup, so that the camera keeps both
        forward, sideways = speed * np.cos(error), speed * np.sin(error)
        turn = _difference(
            direction + to_cup / np.maximum(np.linalg.norm(to_cup, axis=1, keepdims=True), 1e-9), heading
        )
    # beside the cup there is nothing left to turn to
    turn = np.where(near, 0.0, np.clip(TURN_GAIN * turn, -TURN_RAD_S, TURN_RAD_S))
    return np.stack([forward, sideways, turn], axis=1)


def _difference(direction: np.ndarray, heading: np.ndarray) -> np.ndarray:
    """float[N]: by how much a heading has to turn to face a direction float[N, 2], in [-pi, pi)."""
    return (np.arctan2(direction[:, 1], direction[:, 0]) - heading + np.pi) % (2 * np.pi) - np.pi


def _points(layout: Layout) -> np.ndarray:
    """float[N, 2 + 2 * boxes, 2]: the curve's corners by x; a box that is not there repeats the ones before it."""
    count = len(layout.start)
    points = [layout.start[:, :2]]
    for i in range(MAX_BOXES):
        cx, cy, hx, hy, _ = layout.boxes[:, i].T
        beside = cy + layout.signs[:, i] * (hy + ROBOT_RADIUS + MARGIN_M)
        reach = hx + ROBOT_RADIUS
        for edge in (cx - reach, cx + reach):
            corner = np.stack([edge, beside], axis=1)
            points.append(np.where(layout.present[:, i, None], corner, points[-1]))
    return np.stack([*points, layout.cup], axis=1).reshape(count, -1, 2)


def _way(layout: Layout, x: np.ndarray) -> np.ndarray:
    """float[N]: y of the curve at x."""
    points = _points(layout)
    y = points[:, 0, 1]
    for left, right in zip(points[:, :-1].swapaxes(0, 1), points[:, 1:].swapaxes(0, 1)):
        share = np.clip((x - left[:, 0]) / np.maximum(right[:, 0] - left[:, 0], 1e-9), 0, 1)
        y = np.where(x >= left[:, 0], left[:, 1] + (right[:, 1] - left[:, 1]) * share**2 * (3 - 2 * share), y)
    return y


def _last_edge(layout: Layout) -> np.ndarray:
    """float[N]: x from which the cup is headed for."""
    edges = layout.boxes[:, :, 0] + layout.boxes[:, :, 2] + ROBOT_RADIUS
    return np.where(layout.present, edges, -np.inf).max(axis=1)


def _pushed(layout: Layout, pose: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The direction, unit length, turned away from boxes nearer than `PUSHED_BELOW_M`."""
    gaps = world.box_gaps(layout, pose)
    offset = pose[:, None, :2] - layout.boxes[:, :, :2]
    outside = offset - np.clip(offset, -layout.boxes[:, :, 2:4], layout.boxes[:, :, 2:4])
    away = outside / np.maximum(np.linalg.norm(outside, axis=-1, keepdims=True), 1e-9)
    force = np.clip(1 - gaps / PUSHED_BELOW_M, 0, 1)[..., None]
    pushed = direction + 1.5 * (force * away).sum(axis=1)
    return pushed / np.maximum(np.linalg.norm(pushed, axis=1, keepdims=True), 1e-9)
