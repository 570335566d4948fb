"""The memory estimate's reading of loops; tests/experiments/test_plan.py compares whole estimates with XLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from robovlms_jax.training import memory

WIDTH, TURNS = 1000, 50
ROW = 4 * WIDTH  # bytes


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_needs_room_for_what_a_turn_cuts_out_and_none_for_its_constants(reverse):
    # Told by shapes: the parameters of jax's scan that count constants and carries changed their names in jax 0.11.
    def program(constant, carry, rows):
        def turn(carry, row):
            return jnp.sort(carry + constant @ row), None

        return jax.lax.scan(turn, carry, rows, reverse=reverse)[0]

    shapes = ((WIDTH, WIDTH), (WIDTH,), (TURNS, WIDTH))
    traced = jax.make_jaxpr(program)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    peak = memory._peak(traced.jaxpr, {})
    assert 3 * ROW <= peak <= 6 * ROW  # a row, a product, a sum, and the result: neither 1000 rows nor 50
