"""The mechanics' layout: axes of vectors first, tables last."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.actions import rotations
from robovlms_jax.playtable.mechanics import vectors


def test_vectors_with_tables_last_are_those_with_tables_first():
    rng = np.random.default_rng(0)
    turns, points = (rng.uniform(-1.5, 1.5, (2, 5, 3)).astype(np.float32) for _ in range(2))  # 2 tables, 5 bodies
    right = rotations.from_axis_angle(turns)

    @jax.jit
    def found(turns, points):
        turns, points = vectors.tables_last((turns, points))
        matrices = vectors.from_axis_angle(turns, 1)
        made = {
            "matrices": matrices,
            "applied": vectors.apply(matrices, points, 1),
            "opposite": vectors.apply(vectors.transposed(matrices, 1), points, 1),
            "product": vectors.multiply(matrices, matrices, 1),
            "turns": vectors.to_axis_angle(matrices, 1),
            "length": vectors.length(points, 1),
        }
        return vectors.tables_first(made)

    wanted = {
        "matrices": right,
        "applied": np.einsum("bnij,bnj->bni", right, points),
        "opposite": np.einsum("bnji,bnj->bni", right, points),
        "product": right @ right,
        "turns": turns,
        "length": np.linalg.norm(points, axis=-1),
    }
    made = found(turns, points)
    for name, values in wanted.items():
        np.testing.assert_allclose(made[name], values, atol=2e-6, err_msg=name)


def test_folding_an_axis_of_any_length_leaves_nothing_out():
    for length in (1, 2, 7, 35):
        x = np.random.default_rng(length).permutation(length * 6).reshape(3, length, 2).astype(np.float32)
        np.testing.assert_array_equal(vectors.fold(jnp.add, x, 1), x.sum(1))
        np.testing.assert_array_equal(vectors.fold(jnp.maximum, x, 1), x.max(1))
        np.testing.assert_array_equal(vectors.first(jnp.asarray(x), x.min(1), 1), x.argmin(1))
