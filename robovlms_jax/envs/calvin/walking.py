"""Walking along a plan of waypoints by relative actions: one rule for the embedded table (jax) and the real simulator
(NumPy, in a process that has no jax)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from robovlms_jax.actions import frames

OPEN, CLOSED = 1.0, -1.0
"""Gripper commands."""
_PATIENCE = 12  # steps to wait for a hand that does not get to where it was sent
_NEAR_M = 0.006


class Plan(NamedTuple):
    """K waypoints for the tool centre point, visited in order; the last is held. NumPy's arrays, or jax's on PlayTable.

    position: float[K, 3], m. euler: float[K, 3], rad. gripper: float[K], +1 open or -1 closed.
    wait: int[K], steps to stay before going on. speed: float[K], share of the largest action.
    """

    position: Any
    euler: Any
    gripper: Any
    wait: Any
    speed: Any


def act(
    plan: Any, waypoint: Any, waited: Any, target: tuple[Any, Any], hand: Any, xp: Any = np
) -> tuple[Any, Any, Any]:
    """The next action float[7] (column 6 exactly +1 or -1), and the two counts after it.

    Args:
      plan: with the fields of `Plan`. waypoint: int[], which one the hand is on its way to. waited: int[], steps there.
      target: position float[3] and Euler angles float[3] that relative actions are added to, m and rad.
      hand: float[3], where the tool centre point is, m. xp: numpy or jax.numpy.
    """
    shift = plan.position[waypoint] - target[0]
    turn = xp.mod(plan.euler[waypoint] - target[1] + xp.pi, 2 * xp.pi) - xp.pi
    step = xp.concatenate([shift / frames.TRANSLATION_M, turn / frames.ROTATION_RAD])
    step = step * xp.minimum(1.0, plan.speed[waypoint] / xp.maximum(xp.abs(step).max(), 1e-6))
    action = xp.append(step, plan.gripper[waypoint])
    there = xp.abs(xp.concatenate([shift, turn])).max() < 2e-3
    near = xp.linalg.norm(plan.position[waypoint] - hand) < _NEAR_M
    waited = xp.where(there, waited + 1, 0)
    go_on = there & (waited >= plan.wait[waypoint]) & (near | (plan.wait[waypoint] == 0) | (waited >= _PATIENCE))
    waypoint = xp.where(go_on, xp.minimum(waypoint + 1, len(plan.speed) - 1), waypoint)
    return action, waypoint, xp.where(go_on, 0, waited)
