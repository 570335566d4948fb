"""From seven numbers to three."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from robovlms_jax.deploy.mobile import BaseMapping, arm_from_base, base_from_arm

PLANAR = BaseMapping(linear_m_s=1.0, angular_rad_s=1.0, speed_m_s=10.0, turn_rad_s=10.0)
NORM = BaseMapping("norm", linear_m_s=1.0, angular_rad_s=1.0, speed_m_s=10.0, turn_rad_s=10.0)


def test_norm_is_the_design_documents_formula():
    np.testing.assert_allclose(base_from_arm(np.array([3, 4, 9, 9, 9, 0.5, 1.0]), NORM), [5, 4, 0.5])


def test_norm_cannot_drive_backwards_and_drives_forward_when_asked_to_the_side():
    backwards, aside = np.zeros((2, 7))
    backwards[0], aside[1] = -1, 1
    assert base_from_arm(backwards, NORM)[0] == 1
    assert base_from_arm(aside, NORM)[0] == 1
    with pytest.raises(ValueError, match="'norm' has no inverse"):
        arm_from_base(np.zeros(3), NORM)


def test_planar_drives_backwards_and_turns():
    np.testing.assert_array_equal(base_from_arm(np.array([-1, 0, 0, 0, 0, -2, 1.0]), PLANAR), [-1, 0, -2])


@given(arrays.arrays(np.float64, (5, 3), elements=st.floats(-0.35, 0.35)))
def test_planar_is_undone_by_its_inverse(velocities):
    mapping = BaseMapping()
    np.testing.assert_allclose(base_from_arm(arm_from_base(velocities, mapping), mapping), velocities, atol=1e-15)


@given(
    arrays.arrays(np.float64, (7,), elements=st.floats(allow_nan=False, allow_infinity=False)),
    st.sampled_from(["planar", "norm"]),
    st.sampled_from(["holonomic", "differential"]),
)
def test_whatever_is_finite_comes_out_within_the_limits(action, variant, drive):
    mapping = BaseMapping(variant, drive=drive, lateral="turn")
    x, y, turn = base_from_arm(action, mapping)
    assert np.hypot(x, y) <= 0.5 * (1 + 1e-12) and abs(turn) <= 1.5
    assert drive == "holonomic" or y == 0


def test_too_fast_keeps_its_direction():
    np.testing.assert_allclose(base_from_arm(np.array([3, 4, 0, 0, 0, 0, 0.0]), BaseMapping()), [0.3, 0.4, 0])


def test_an_action_that_is_not_finite_gives_numbers_that_the_safety_layer_stops_at():
    assert np.isnan(base_from_arm(np.array([0, 0, np.inf, 0, 0, 0, 0.0]), PLANAR)).all()


def test_a_differential_drive_turns_or_refuses_what_goes_to_the_side():
    action = np.array([0, 0.4, 0, 0, 0, 0, 0.0])
    with pytest.raises(ValueError, match=r"linear_y=0.2 m/s for a differential drive"):
        base_from_arm(action, BaseMapping(drive="differential"))
    turning = base_from_arm(action, BaseMapping(drive="differential", lateral="turn"))
    np.testing.assert_allclose(turning, [0, 0, 0.4])


@pytest.mark.parametrize("shape", [(3,), (), (2, 6)])
def test_other_than_seven_numbers_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 7\]"):
        base_from_arm(np.zeros(shape), PLANAR)
