"""Rotations against scipy, and there and back."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from robovlms_jax.actions import rotations

vectors = hnp.arrays(np.float64, (2, 3), elements=st.floats(-3.1, 3.1, allow_subnormal=False))
ORDERS = {"fixed": "xyz", "intrinsic": "XYZ"}  # scipy's spelling: lower case turns about fixed axes


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=30, deadline=None)
@given(angles=vectors)
def test_euler_angles_are_scipys_and_survive(order, angles):
    matrix = rotations.from_euler(angles, order)
    np.testing.assert_allclose(matrix, Rotation.from_euler(ORDERS[order], angles).as_matrix(), atol=1e-12)
    back = rotations.to_euler(matrix, order)
    assert np.abs(back[..., 1]).max() <= np.pi / 2 + 1e-9
    # also at the poles, where the angles are not unique but the rotation is
    np.testing.assert_allclose(rotations.from_euler(back, order), matrix, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(vectors)
def test_axis_angle_is_scipys_and_survives(vector):
    matrix = rotations.from_axis_angle(vector)
    np.testing.assert_allclose(matrix, Rotation.from_rotvec(vector).as_matrix(), atol=1e-6)
    back = rotations.to_axis_angle(matrix)
    assert np.linalg.norm(back, axis=-1).max() <= np.pi + 1e-9
    np.testing.assert_allclose(rotations.from_axis_angle(back), matrix, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float64, 4, elements=st.floats(-1, 1)).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_quaternions_are_scipys_and_survive(quaternion):
    matrix = rotations.from_quaternion(quaternion)
    np.testing.assert_allclose(matrix, Rotation.from_quat(quaternion).as_matrix(), atol=1e-12)
    unit, back = quaternion / np.linalg.norm(quaternion), rotations.to_quaternion(matrix)
    np.testing.assert_allclose(back * np.sign(back @ unit), unit, atol=1e-7)


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.6, 0, -0.8)])
def test_half_turns_and_no_turn_have_axis_angles(axis):
    # Where formulas that divide by the sine of the angle give 0 or NaN.
    vector = np.pi * np.array(axis)
    back = rotations.to_axis_angle(rotations.from_axis_angle(vector))
    np.testing.assert_allclose(back * np.sign(back @ vector), vector, atol=1e-7)
    np.testing.assert_array_equal(rotations.to_axis_angle(np.eye(3)), np.zeros(3))


def test_numpy_and_jax_agree():
    angles = np.random.default_rng(0).uniform(-1.5, 1.5, (20, 3)).astype(np.float32)

    def chain(angles):
        matrix = rotations.from_quaternion(rotations.to_quaternion(rotations.from_euler(angles)))
        return rotations.to_euler(rotations.from_axis_angle(rotations.to_axis_angle(matrix)))

    np.testing.assert_allclose(chain(angles), angles, atol=1e-5)
    np.testing.assert_allclose(jax.jit(chain)(angles), angles, atol=1e-5)


def test_wrap_leaves_what_is_in_range():
    angles = np.array([-np.pi, 3.0, np.pi, 3.5, -7.0])
    np.testing.assert_allclose(
        rotations.wrap(angles), [-np.pi, 3.0, np.pi, 3.5 - 2 * np.pi, 2 * np.pi - 7.0], atol=1e-12
    )
