"""Blocks fall until they touch, slide off what does not carry their centre, and stand up straight."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.playtable.mechanics import bodies, contacts, vectors
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
    own = vectors.constant(_own(obstacles), blocks.center[0, 0])
    way = jnp.where(own, jnp.inf, _way_down(axes))
    height = height_of(blocks.rotation, blocks.half)
    below_center = _way_down(axes._replace(row_reach=[jnp.zeros_like(reach) for reach in axes.row_reach]))
    carries = (way < contacts.TOUCH_M) & (below_center < (height + 3 * contacts.TOUCH_M)[:, None])
    # Stacked, they are computed once, and their minima by one kernel; XLA computes arrays anew for every slice of them.
    ways = jnp.stack([way, jnp.where(carries, way - 1.0, way)])
    drop, least = nearest = jax.lax.optimization_barrier(vectors.fold(jnp.minimum, ways, 2))
    lowest = vectors.first(ways, nearest, 2)[1]
    on = (drop < contacts.TOUCH_M) & (lowest < bodies.TABLE + 3)
    return Falls(way, drop, jnp.where(on, lowest, bodies.FREE).astype(jnp.int32), least < 0)


def height_of(rotation: Array, half: Array) -> Array:
    """float[M], m: how far boxes with these rotations [M, 3, 3] and half extents [M, 3] reach up from their centres."""
    return sum(jnp.abs(rotation[:, 2, k]) * half[:, k] for k in range(3))


def _own(obstacles: Boxes) -> np.ndarray:
    """bool[3, K], True where the obstacle is the block itself."""
    return np.eye(3, obstacles.center.shape[0], bodies.TABLE, dtype=bool)


def _way_down(axes: contacts.Axes) -> Array:
    """float[M, N], m: how far each row can fall before it meets each column; inf = never."""
    reach = [a + b for a, b in zip(axes.row_reach, axes.column_reach)]
    enter, leave = -jnp.inf, jnp.inf
    for i, (_, _, slope) in enumerate(axes.vectors):
        # bodies that merely lean on each other sideways, within tolerance, do not hold each other up
        limit = reach[i] - jnp.where(jnp.abs(slope) < 0.5, contacts.TOLERANCE_M, 0.0)
        level = jnp.abs(slope) < 1e-4
        steep = 1 / jnp.where(level, 1.0, slope)
        first, second = (axes.offset[i] - limit) * steep, (axes.offset[i] + limit) * steep
        never = jnp.where(jnp.abs(axes.offset[i]) < limit, -jnp.inf, jnp.inf)
        enter = jnp.maximum(enter, jnp.where(level, never, jnp.minimum(first, second)))
        leave = jnp.minimum(leave, jnp.where(level, -never, jnp.maximum(first, second)))
    meets = (enter < leave) & (leave > contacts.TOLERANCE_M)
    return jnp.where(meets, jnp.maximum(enter, 0.0), jnp.inf)


def settle(scene: Scene, state: bodies.State) -> bodies.State:
    """Blocks that are not held fall, slide off what does not carry their centre, and stand up straight."""
    free = state.held != vectors.constant(np.arange(3), state.held)
    blocks, obstacles = bodies.block_boxes(scene, state), bodies.obstacles(scene, state)
    falls = fall(blocks, obstacles)
    drop = jnp.where(free, jnp.minimum(falls.drop, _FALL_M), 0.0)
    x, y, z = (state.block_position[:, k] for k in range(3))
    fallen = jnp.stack([x, y, z - drop], axis=1)
    away = _off_the_edge(blocks, obstacles, falls)
    slips = free & (falls.drop < contacts.TOUCH_M) & ~falls.stands
    slid = [jnp.where(slips, _SLIDE_M * part, 0.0) for part in away]
    upright = jax.lax.optimization_barrier(_stood_up(state.block_rotation, free))
    rise = height_of(upright, scene.block_half) - height_of(state.block_rotation, scene.block_half)
    moved = jnp.stack([x + slid[0], y + slid[1], z - drop + rise], axis=1)

    # whichever of the others move or stay, the moved block must fit
    trial = Boxes(moved, upright, scene.block_half)
    center = [obstacles.center[: bodies.TABLE], fallen, obstacles.center[bodies.TABLE + 3 :]]
    others = dataclasses.replace(obstacles, center=jnp.concatenate(center))
    own = np.concatenate([_own(others), np.eye(3, dtype=bool)], axis=1)
    depth = contacts.between(trial, contacts.join(others, trial)).depth
    deepest = vectors.fold(jnp.maximum, jnp.where(vectors.constant(own, state.held), -1.0, depth), 1)
    fits = (deepest <= contacts.TOLERANCE_M) & free
    return dataclasses.replace(
        state,
        block_position=jnp.where(fits[:, None], moved, fallen),
        block_rotation=jnp.where(fits[:, None, None], upright, state.block_rotation),
        support=jnp.where(free, falls.support, bodies.FREE),
    )


def _off_the_edge(blocks: Boxes, obstacles: Boxes, falls: Falls) -> list[Array]:
    """x and y float[3] of the direction, at most of length 1, away from the nearest points of all that touches each
    block from below."""
    three, rotation = range(3), obstacles.rotation
    between = [blocks.center[:, k][:, None] - obstacles.center[:, k][None] for k in three]  # [3, K] each
    inside = [sum(rotation[:, i, k] * between[i] for i in three) for k in three]
    inside = [jnp.clip(inside[k], -obstacles.half[:, k], obstacles.half[:, k]) for k in three]
    away = [between[k] - sum(rotation[:, k, i] * inside[i] for i in three) for k in range(2)]
    scale = (falls.way < contacts.TOUCH_M) / jnp.maximum(jnp.sqrt(away[0] ** 2 + away[1] ** 2), 1e-6)
    away = jax.lax.optimization_barrier(vectors.fold(jnp.add, jnp.stack([part * scale for part in away]), 2))
    scale = 1 / jnp.maximum(jnp.sqrt(away[0] ** 2 + away[1] ** 2), 1.0)
    return [part * scale for part in away]


def _stood_up(rotation: Array, free: Array) -> Array:
    """Rotations [3, 3, 3] with the most vertical axis of blocks that are not held turned a little towards upright."""
    x, y, z = (rotation[:, :, k] for k in range(3))
    first, second, third = (jnp.abs(axis[:, 2:]) for axis in (x, y, z))
    axis = jnp.where((first >= second) & (first >= third), x, jnp.where(second >= third, y, z))
    axis = axis * jnp.where(axis[:, 2:] < 0, -1.0, 1.0)
    lean = jnp.stack([axis[:, 1], -axis[:, 0], jnp.zeros_like(axis[:, 0])], axis=1)  # its cross product with upright
    lean = lean * jnp.minimum(1.0, _TILT_RAD / jnp.maximum(vectors.length(lean, 1, keep=True), 1e-9))
    return vectors.multiply(vectors.from_axis_angle(lean * free[:, None], 1), rotation, 1)
