"""A plan as waypoints for the hand, and walking along it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from robovlms_jax.envs.calvin import walking
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.types import Array

NUM_WAYPOINTS = 20
"""K of every plan."""
OPEN, CLOSED = walking.OPEN, walking.CLOSED
"""Gripper commands."""


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
    target = state.target_position, state.target_euler
    action, waypoint, waited = walking.act(plan, progress.waypoint, progress.waited, target, state.position, jnp)
    return action, Progress(waypoint, waited)
