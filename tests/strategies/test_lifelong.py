"""Forward transfer, forgetting and their area, against LIBERO's definitions worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robovlms_jax.strategies import lifelong


def test_two_tasks_worked_out_by_hand():
    curves, after = [[0.0, 0.5, 1.0, 0.9], [0.0, 1.0, 1.0, 1.0]], [[1.0, 0.0], [0.6, 1.0]]
    np.testing.assert_allclose(lifelong.frozen_at_best(curves[0]), [0.0, 0.5, 1.0, 1.0])
    forward, backward, area = lifelong.measures(curves, after)
    assert forward == pytest.approx((0.625 + 0.75) / 2)
    assert backward == pytest.approx(0.4)
    assert area == pytest.approx(((0.625 + 0.6) / 2 + 0.75) / 2)


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(0, 9))
def test_what_nothing_is_forgotten_of_has_no_backward_transfer_and_all_lie_in_their_bounds(curves, seed):
    best = [max(curve) for curve in curves]
    found = lifelong.measures(curves, [best] * len(curves))
    assert np.isnan(found.backward) if len(curves) == 1 else found.backward == pytest.approx(0.0)
    other = lifelong.measures(curves, np.random.default_rng(seed).uniform(size=(len(curves), len(curves))))
    assert 0 <= other.forward <= 1 and 0 <= other.area <= 1 and not other.backward < -1
    assert other.forward == pytest.approx(found.forward)


def test_a_matrix_without_a_row_per_task_is_refused():
    with pytest.raises(ValueError, match=r"2 curves and a matrix of \(1, 2\)"):
        lifelong.measures([[0.0], [1.0]], [[1.0, 1.0]])
