"""Walking along a plan of waypoints (`walking.Plan`) on PlayTable."""

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
class Progress:
    """How far an expert is: waypoint int32[], steps spent at it int32[]."""

    waypoint: Array
    waited: Array


def begin() -> Progress:
    """At the first waypoint."""
    return Progress(jnp.int32(0), jnp.int32(0))


def act(plan: walking.Plan, progress: Progress, state: bodies.State) -> tuple[Array, Progress]:
    """The next action float32[7] (column 6 exactly +1 or -1) and the progress after it."""
    target = state.target_position, state.target_euler
    action, waypoint, waited = walking.act(plan, progress.waypoint, progress.waited, target, state.position, jnp)
    return action, Progress(waypoint, waited)
