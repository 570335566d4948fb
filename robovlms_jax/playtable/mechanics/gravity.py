"""Blocks fall until they touch, slide off what does not carry their centre, and stand up straight."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from robovlms_jax.actions import rotations
from robovlms_jax.playtable.mechanics import bodies, contacts
from robovlms_jax.playtable.scene import Boxes, Scene
from robovlms_jax.types import Array

_FALL_M = 0.006  # per substep
_SLIDE_M = 0.002
_TILT_RAD = 0.06


class Falls(NamedTuple):
    """What is under the blocks.

    way: float[3, K], m to fall until each of the K obstacles is met, inf = never. drop: float[3], the least of it.
    support: int32[3], what carries the block already, -1 nothing (or the hand). stands: bool[3], its centre is carried.
    """

    way: Array
    drop: Array
    support: Array
    stands: Array


def fall(blocks: Boxes, obstacles: Boxes) -> Falls:
    """blocks: the 3. obstacles: as `bodies.obstacles`, the blocks after the table."""
    axes = contacts.axes_between(blocks, obstacles)
    way = jnp.where(_own(obstacles), jnp.inf, _way_down(axes))
    height = contacts.apply(jnp.abs(blocks.rotation), blocks.half)[:, 2]
    below_center = _way_down(axes._replace(row_reach=[jnp.zeros_like(reach) for reach in axes.row_reach]))
    touched = way < contacts.TOUCH_M
    carries = touched & (below_center < (height + 3 * contacts.TOUCH_M)[:, None])
    lowest = jnp.argmin(jnp.where(carries, way - 1.0, way), axis=1)
    on = touched.any(1) & (lowest < bodies.TABLE + 3)
    return Falls(way, way.min(1), jnp.where(on, lowest, bodies.FREE).astype(jnp.int32), carries.any(1))


def _own(obstacles: Boxes) -> Array:
    """bool[3, K], True where the obstacle is the block itself."""
    return jnp.asarray(np.eye(3, obstacles.center.shape[0], bodies.TABLE, dtype=bool))


def _way_down(axes: contacts.Axes) -> Array:
    """float[M, N], m: how far each row can fall before it meets each column; inf = never."""
    reach = [a + b for a, b in zip(axes.row_reach, axes.column_reach)]
    enter, leave = -jnp.inf, jnp.inf
    for i, (_, _, slope) in enumerate(axes.vectors):
        # bodies that merely lean on each other sideways, within tolerance, do not hold each other up
        limit = reach[i] - jnp.where(jnp.abs(slope) < 0.5, contacts.TOLERANCE_M, 0.0)
        level = jnp.abs(slope) < 1e-4
        safe = jnp.where(level, 1.0, slope)
        first, second = (axes.offset[i] - limit) / safe, (axes.offset[i] + limit) / safe
        never = jnp.where(jnp.abs(axes.offset[i]) < limit, -jnp.inf, jnp.inf)
        enter = jnp.maximum(enter, jnp.where(level, never, jnp.minimum(first, second)))
        leave = jnp.minimum(leave, jnp.where(level, -never, jnp.maximum(first, second)))
    meets = (enter < leave) & (leave > contacts.TOLERANCE_M)
    return jnp.where(meets, jnp.maximum(enter, 0.0), jnp.inf)


def settle(scene: Scene, state: bodies.State) -> bodies.State:
    """Blocks that are not held fall, slide off what does not carry their centre, and stand up straight."""
    free = state.held != jnp.arange(3)
    blocks, obstacles = bodies.block_boxes(scene, state), bodies.obstacles(scene, state)
    falls = fall(blocks, obstacles)
    drop = jnp.where(free, jnp.minimum(falls.drop, _FALL_M), 0.0)
    fallen = state.block_position.at[:, 2].add(-drop)

    # off an edge: away from the nearest points of all that touches from below
    between = state.block_position[:, None] - obstacles.center
    inside = contacts.apply(jnp.swapaxes(obstacles.rotation, -1, -2), between)
    inside = jnp.clip(inside, -obstacles.half, obstacles.half)
    away = (between - contacts.apply(obstacles.rotation, inside))[..., :2]
    away = away / jnp.maximum(jnp.linalg.norm(away, axis=-1, keepdims=True), 1e-6)
    under = falls.way < contacts.TOUCH_M
    away = (away * under[..., None]).sum(1)
    away = away / jnp.maximum(jnp.linalg.norm(away, axis=-1, keepdims=True), 1.0)
    slips = free & under.any(1) & ~falls.stands
    slid = fallen.at[:, :2].add(jnp.where(slips[:, None], _SLIDE_M * away, 0.0))

    # stand up: turn the most vertical axis upright, keeping the lowest point where it is
    rotation = state.block_rotation
    most = jnp.argmax(jnp.abs(rotation[:, 2]), axis=-1)
    axis = jnp.take_along_axis(rotation, most[:, None, None], axis=2)[..., 0]
    axis = axis * jnp.where(axis[:, 2:] < 0, -1.0, 1.0)
    lean = jnp.cross(axis, jnp.array([0.0, 0.0, 1.0]))
    lean = lean * jnp.minimum(1.0, _TILT_RAD / jnp.maximum(jnp.linalg.norm(lean, axis=-1, keepdims=True), 1e-9))
    upright = rotations.from_axis_angle(lean * free[:, None]) @ rotation
    height, new_height = (contacts.apply(jnp.abs(r), scene.block_half)[:, 2] for r in (rotation, upright))
    moved = slid.at[:, 2].add(new_height - height)

    # whichever of the others move or stay, the moved block must fit
    trial = Boxes(moved, upright, scene.block_half)
    others = dataclasses.replace(obstacles, center=obstacles.center.at[bodies.TABLE : bodies.TABLE + 3].set(fallen))
    own = jnp.concatenate([_own(others), jnp.eye(3, dtype=bool)], axis=1)
    depth = contacts.between(trial, contacts.join(others, trial)).depth
    fits = jnp.all(own | (depth <= contacts.TOLERANCE_M), axis=1) & free
    return dataclasses.replace(
        state,
        block_position=jnp.where(fits[:, None], moved, fallen),
        block_rotation=jnp.where(fits[:, None, None], upright, rotation),
        support=jnp.where(free, falls.support, bodies.FREE),
    )
