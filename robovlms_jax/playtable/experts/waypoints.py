"""A plan as waypoints for the hand, and walking along it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from robovlms_jax.actions import frames
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.types import Array

NUM_WAYPOINTS = 20
"""K of every plan."""
OPEN, CLOSED = 1.0, -1.0
"""Gripper commands."""
_PATIENCE = 12  # steps to wait for a hand that does not get to where it was sent
_NEAR_M = 0.006


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """K waypoints for the tool centre point, visited in order; the last is held.

    position: float32[K, 3], m. euler: float32[K, 3], rad. gripper: float32[K], +1 open or -1 closed.
    wait: int32[K], steps to stay before going on. speed: float32[K], share of the largest action.
    """

    position: Array
    euler: Array
    gripper: Array
    wait: Array
    speed: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an expert is: waypoint int32[], steps spent at it int32[]."""

    waypoint: Array
    waited: Array


def begin() -> Progress:
    """At the first waypoint."""
    return Progress(jnp.int32(0), jnp.int32(0))


def act(plan: Plan, progress: Progress, state: bodies.State) -> tuple[Array, Progress]:
    """The next action float32[7] (column 6 exactly +1 or -1) and the progress after it."""
    k = progress.waypoint
    shift = plan.position[k] - state.target_position
    turn = jnp.mod(plan.euler[k] - state.target_euler + jnp.pi, 2 * jnp.pi) - jnp.pi
    step = jnp.concatenate([shift / frames.TRANSLATION_M, turn / frames.ROTATION_RAD])
    step = step * jnp.minimum(1.0, plan.speed[k] / jnp.maximum(jnp.abs(step).max(), 1e-6))
    action = jnp.append(step, plan.gripper[k])
    there = jnp.abs(jnp.concatenate([shift, turn])).max() < 2e-3
    near = jnp.linalg.norm(plan.position[k] - state.position) < _NEAR_M
    waited = jnp.where(there, progress.waited + 1, 0)
    go_on = there & (waited >= plan.wait[k]) & (near | (plan.wait[k] == 0) | (waited >= _PATIENCE))
    waypoint = jnp.where(go_on, jnp.minimum(k + 1, NUM_WAYPOINTS - 1), k)
    return action, Progress(waypoint, jnp.where(go_on, 0, waited))
