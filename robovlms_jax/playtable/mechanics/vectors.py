"""Small vectors and matrices in the layout of the mechanics: their axes come before those of the tables.

A vector is [3, ...], a rotation [3, 3, ...]; of N bodies they are [N, 3, ...] and [N, 3, 3, ...], and `axis` says where
the vector begins. Whatever comes after is carried along: nothing for one table, [B] for B tables. XLA vectorises over
the last axis on CPUs, so tables that lie there are computed eight or sixteen at a time; in the first axis, where `vmap`
puts them, hardly at all (docs/log.md, 2026-11-26).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.types import Array


def tables_last(tree: Any) -> Any:
    """Leaves [B, ...] -> [..., B]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), tree)


def tables_first(tree: Any) -> Any:
    """Leaves [..., B] -> [B, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), tree)


def constant(values: np.ndarray, like: Array) -> Array:
    """`values` with axes of length 1 behind, as many as `like`, a number of each table, has."""
    return jnp.asarray(values).reshape(values.shape + (1,) * like.ndim)


def at(axis: int, *where: Any) -> tuple:
    """The index that is `where` from `axis` on."""
    return (slice(None),) * axis + where


def fold(operation: Callable[[Array, Array], Array], x: Array, axis: int = 0) -> Array:
    """Sums, or whatever else, over an axis by halves.

    Slices and operations on them are fused and vectorised over the last axis by XLA, its own reductions over other axes
    are not. It computes what it is given anew for every slice, unless that is a stack or a concatenation."""
    parts, begin, length = [], 0, x.shape[axis]
    while begin < length:
        count = 1 << ((length - begin).bit_length() - 1)
        part = x[at(axis, slice(begin, begin + count))]
        begin += count
        while count > 1:
            count //= 2
            part = operation(part[at(axis, slice(None, count))], part[at(axis, slice(count, None))])
        parts.append(part[at(axis, 0)])
    return functools.reduce(operation, parts)


def first(x: Array, value: Array, axis: int) -> Array:
    """float32: the first place at which `x` has `value`. In floating point, for XLA does not vectorise booleans and
    whole numbers here."""
    places = jax.lax.broadcasted_iota(jnp.float32, x.shape, axis)
    return fold(jnp.minimum, jnp.where(x == jnp.expand_dims(value, axis), places, jnp.inf), axis)


def length(vector: Array, axis: int = 0, *, keep: bool = False) -> Array:
    """Of vectors of a few components; `keep`: with an axis of length 1 where these were."""
    found = jnp.sqrt(sum(vector[at(axis, k)] ** 2 for k in range(vector.shape[axis])))
    return jnp.expand_dims(found, axis) if keep else found


def apply(rotation: Array, vector: Array, axis: int = 0) -> Array:
    """Rotation times vector."""
    return sum(rotation[at(axis, slice(None), k)] * vector[at(axis, slice(k, k + 1))] for k in range(3))


def multiply(first: Array, second: Array, axis: int = 0) -> Array:
    """Rotation times rotation."""
    return sum(first[at(axis, slice(None), slice(k, k + 1))] * second[at(axis, slice(k, k + 1))] for k in range(3))


def transposed(rotation: Array, axis: int = 0) -> Array:
    """The opposite rotation."""
    return jnp.swapaxes(rotation, axis, axis + 1)


def from_axis_angle(vector: Array, axis: int = 0) -> Array:
    """`rotations.from_axis_angle` in this layout."""
    x, y, z = (vector[at(axis, k)] for k in range(3))
    angle_sq = x**2 + y**2 + z**2
    angle = jnp.sqrt(jnp.maximum(angle_sq, 1e-12))
    cosine, sinc, cosc = jnp.cos(angle), jnp.sin(angle) / angle, (1 - jnp.cos(angle)) / angle**2
    rows = (
        (cosine + cosc * x * x, cosc * x * y - sinc * z, cosc * x * z + sinc * y),
        (cosc * x * y + sinc * z, cosine + cosc * y * y, cosc * y * z - sinc * x),
        (cosc * x * z - sinc * y, cosc * y * z + sinc * x, cosine + cosc * z * z),
    )
    return jnp.stack([jnp.stack(row, axis=axis) for row in rows], axis=axis)


def to_axis_angle(rotation: Array, axis: int = 0) -> Array:
    """`rotations.to_axis_angle` in this layout, cheaper, and wrong at half a turn: angles in [0, pi)."""
    r = [[rotation[at(axis, i, j)] for j in range(3)] for i in range(3)]
    x, y, z = ((r[i][j] - r[j][i]) / 2 for i, j in ((2, 1), (0, 2), (1, 0)))
    sine = jnp.sqrt(jnp.maximum(x**2 + y**2 + z**2, 1e-12))
    scale = jnp.arctan2(sine, (r[0][0] + r[1][1] + r[2][2] - 1) / 2) / sine
    return jnp.stack([x * scale, y * scale, z * scale], axis=axis)
