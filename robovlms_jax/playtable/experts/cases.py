"""What all skills work with: the case they are given, the steps they return, and where things are.

Skills know the table, so they stay out of its way: up, back from the cabinet, over to the goal, down.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from robovlms_jax.actions import rotations
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.scene import BOX_BODY, TABLE_TOP_M, Scene
from robovlms_jax.types import Array

DOWN_RAD = (3.09, -0.03, 1.5)  # hand pointing down, opening along x: the posture chains begin with
SHELF_TILT_RAD = -0.5  # leaning back, so that the palm stays outside of the cabinet
CORRIDOR_M = -0.08  # y in front of everything that sticks out of the cabinet
TIP_M = 0.0156  # fingers reach this far beyond the tool centre point
PAIR_M, FINGER_M = 0.0175, 0.011  # half extents of the closed fingers along the opening and across it
BLOCK_SUPPORT = len(BOX_BODY)  # `State.support` of what stands on the red block; blue and pink follow


class Step(NamedTuple):
    """One waypoint under construction."""

    position: Array
    euler: Array
    gripper: Array | float
    wait: Array | int = 0
    slow: float = 1.0
    use: Array | bool = True
    """False = left out."""


class Case(NamedTuple):
    """What a skill may look at. block, side: int32[], the numbers that `plans.plan` reads off the task's name."""

    scene: Scene
    state: bodies.State
    block: Array
    side: Array
    noise: Array
    """float32[6], uniform in [-1, 1]."""
    height: Array
    """m, to travel at."""


def for_block(state: bodies.State, center: Array, euler: Array) -> Array:
    """Where the tool has to be, at Euler angles `euler`, for the held block's centre to be at `center`."""
    return center - rotations.from_euler(euler) @ state.hold_position


def angles(yaw: Array | float, tilt: Array | float = DOWN_RAD[1]) -> Array:
    """float32[3], Euler angles (rad) of a hand that points down, turned by `yaw` and leaning by `tilt`."""
    return jnp.stack([jnp.asarray(angle, jnp.float32) for angle in (DOWN_RAD[0], tilt, yaw)])


def lean(x: Array) -> Array:
    """Tilt that lets the arm reach the far right of the table, rad."""
    return DOWN_RAD[1] - 0.45 * jnp.clip((x - 0.26) / 0.14, 0.0, 1.0)


def at(x, y, z) -> Array:
    """float32[3], m."""
    return jnp.stack([jnp.asarray(v, jnp.float32) for v in (x, y, z)])


def yaw_of(rotation: Array) -> Array:
    """Direction of a block's long axis, rad."""
    return jnp.arctan2(rotation[1, 0], rotation[0, 0])


def reach_along(case: Case, axis: int) -> Array:
    """Half extent of the case's block along a world axis, m."""
    return (jnp.abs(case.state.block_rotation[case.block, axis]) * case.scene.block_half[case.block]).sum()


def spread(points: Array, case: Case, others: Array) -> Array:
    """The candidate float[P, 2] farthest from the blocks marked in `others` bool[3]; the earlier one when in doubt."""
    distance = jnp.linalg.norm(points[:, None] - case.state.block_position[None, :, :2], axis=-1)
    nearest = jnp.where(others, distance, 1.0).min(-1)
    return points[jnp.argmax(jnp.minimum(nearest, 0.13) - 1e-4 * jnp.arange(len(points)))]


def stands_on(body: str, state: bodies.State) -> Array:
    """bool[3]: blocks that stand on a part of the table, one of `tasks.BODIES`."""
    return jnp.isin(state.support, np.flatnonzero(np.isin(BOX_BODY, tasks.BODIES.index(body))))


def stands_on_table(state: bodies.State) -> Array:
    """bool[3]: on the table top, not on the cabinet, which is the same body."""
    return stands_on("base", state) & (jnp.abs(state.block_position[:, 2] - TABLE_TOP_M - 0.03) < 0.015)
