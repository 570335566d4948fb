"""Where oriented boxes touch: pure geometry, M boxes (rows) against N boxes (columns).

Boxes that turn together may have one rotation [1, 3, 3] for all."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from robovlms_jax.playtable.scene import Boxes
from robovlms_jax.types import Array

TOLERANCE_M = 1e-3
"""No two bodies ever overlap by more than this."""
TOUCH_M = 1e-3
"""Bodies closer than this are in contact."""
_FLAT_RAD = 0.05  # faces tilted by less than this share the load between both ends of their overlap


def join(*boxes: Boxes) -> Boxes:
    """All of them as one, in this order."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *boxes)


class Axes(NamedTuple):
    """M rows against N columns, seen along six directions: the face normals of each row, then of each column.

    Six entries each. vectors: unit vectors, three components that broadcast to [M, N]. offset: float[M, N], row centre
    minus column centre. row_reach, column_reach: half extents that broadcast to [M, N].
    """

    vectors: list[list[Array]]
    offset: list[Array]
    row_reach: list[Array]
    column_reach: list[Array]


def axes_between(rows: Boxes, columns: Boxes) -> Axes:
    """How far apart the boxes are along each direction, and how far they reach.

    Edge-edge axes are left out: boxes standing upright do not need them, tilted ones touch a little early without.
    """
    three = range(3)
    row = [[rows.rotation[:, k, i][:, None] for k in three] for i in three]  # row[i][k]: component k of axis i
    column = [[columns.rotation[:, k, j][None] for k in three] for j in three]
    row_half = [rows.half[:, i][:, None] for i in three]
    column_half = [columns.half[:, j][None] for j in three]
    between = [rows.center[:, k][:, None] - columns.center[:, k][None] for k in three]
    cosine = [[jnp.abs(sum(row[i][k] * column[j][k] for k in three)) for j in three] for i in three]
    offset = [sum(axis[k] * between[k] for k in three) for axis in row + column]
    row_reach = row_half + [sum(cosine[i][j] * row_half[i] for i in three) for j in three]
    column_reach = [sum(cosine[i][j] * column_half[j] for j in three) for i in three] + column_half
    return Axes(row + column, offset, row_reach, column_reach)


class Contacts(NamedTuple):
    """depth: float[M, N], m, negative = apart. normal: three components float[M, N] of the unit vector from column to
    row, along one of the six directions."""

    depth: Array
    normal: list[Array]


def between(rows: Boxes, columns: Boxes) -> Contacts:
    """How deep each row is in each column, and which way it would have to move out.

    Each of the four results becomes a kernel of its own that computes everything anew, which is faster than to keep
    what they have in common.
    """
    axes = axes_between(rows, columns)
    overlap = [a + b - jnp.abs(c) for a, b, c in zip(axes.row_reach, axes.column_reach, axes.offset)]
    depth, normal = overlap[0], [0.0, 0.0, 0.0]
    for size, offset, vector in zip(overlap, axes.offset, axes.vectors):
        least, sign = size <= depth, jnp.where(offset < 0, -1.0, 1.0)  # of equal ones the last
        depth = jnp.where(least, size, depth)
        normal = [jnp.where(least, sign * v, n) for v, n in zip(vector, normal)]
    return Contacts(depth, [jnp.broadcast_to(n, depth.shape) for n in normal])


def points(rows: Boxes, columns: Boxes, normal: list[Array]) -> list[Array]:
    """x and y float[M, N], m, of where boxes touch.

    In the row's frame, where the column counts with its bounding box: the middle of the overlap when faces lie flat on
    each other, its deeper end when they are tilted, which is what turns a pushed block flat to the finger.
    """
    axes, three = axes_between(rows, columns), range(3)
    low = [jnp.maximum(-a, -c - b) for a, b, c in zip(axes.row_reach, axes.column_reach, axes.offset)]
    high = [jnp.minimum(a, -c + b) for a, b, c in zip(axes.row_reach, axes.column_reach, axes.offset)]
    tilt = [sum(n * v for n, v in zip(normal, vector)) / _FLAT_RAD for vector in axes.vectors[:3]]
    place = [(low[i] + high[i] - (high[i] - low[i]) * jnp.clip(tilt[i], -1.0, 1.0)) / 2 for i in three]
    return [rows.center[:, k][:, None] + sum(place[i] * axes.vectors[i][k] for i in three) for k in range(2)]
