"""Arithmetic on recorded fields, written as text."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from robovlms_jax.data.registry import expressions


def test_a_range_of_any_unit_and_direction_becomes_0_to_1():
    values = {"action": np.float32([[0, -3], [50, -1], [100, 1]])}
    percent = pickle.loads(pickle.dumps(expressions.Expression("from_range(action[0], 0, 100)")))
    np.testing.assert_allclose(percent(values, 3)[:, 0], [0, 0.5, 1])
    assert percent.field == "action" and percent.width(2) == 1
    np.testing.assert_allclose(
        expressions.Expression("clip(from_range(action[1], 1, -3))")(values, 3)[:, 0], [1, 0.5, 0]
    )


@pytest.mark.parametrize(
    "text", ["from_range(action[0])", "from_range(action[0], 1, 1)", "from_range(action, 0, wide)"]
)
def test_a_range_without_two_different_numbers_is_refused(text):
    with pytest.raises(ValueError, match=r"expected from_range\(x, low, high\) with two different numbers"):
        expressions.Expression(text)
