from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.actions import rotations
from robovlms_jax.envs.calvin import initial_states
from robovlms_jax.playtable import kinematics
from robovlms_jax.playtable.mechanics import vectors

HOME = initial_states.INITIAL_ROBOT_OBS[7:14].astype(np.float32)
forward = jax.jit(kinematics.forward)
solve = jax.jit(lambda q, p, r: kinematics.inverse(q, p, r, iterations=60))


def triples(size: float):
    return st.tuples(*[st.floats(-size, size, allow_subnormal=False)] * 3)


@settings(max_examples=50, deadline=None)
@given(triples(3.1))
def test_turns_lead_back_to_their_rotations(xyz):
    rotation = rotations.from_euler(jnp.array(xyz))
    np.testing.assert_allclose(rotations.from_axis_angle(vectors.to_axis_angle(rotation)), rotation, atol=2e-3)


def test_the_arm_is_where_calvin_says(recordings):
    """Joint angles recorded in CALVIN lead to the tool poses recorded beside them."""
    for recording in recordings:
        robot = recording.robot_obs[0]
        arm = forward(robot[7:14])
        np.testing.assert_allclose(arm.origins[7], robot[:3], atol=5e-4)
        np.testing.assert_allclose(arm.rotations[7], rotations.from_euler(robot[3:6]), atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(triples(0.1), triples(0.2))
def test_inverse_reaches_what_can_be_reached(shift, turn):
    home = forward(HOME)
    position = home.origins[7] + jnp.array(shift)
    rotation = rotations.from_axis_angle(jnp.array(turn)) @ home.rotations[7]
    joints = solve(HOME, position, rotation)
    arm = forward(joints)
    np.testing.assert_allclose(arm.origins[7], position, atol=1e-3)
    np.testing.assert_allclose(arm.rotations[7], rotation, atol=2e-3)
    assert np.all(joints >= kinematics.JOINT_LOW)
    assert np.all(joints <= kinematics.JOINT_HIGH)


def test_inverse_stretches_towards_what_is_out_of_reach():
    home = forward(HOME)
    far = home.origins[7] + np.array([2.0, 0.0, 0.0], np.float32)
    arm = forward(solve(HOME, far, home.rotations[7]))
    assert np.linalg.norm(arm.origins[7] - far) < np.linalg.norm(home.origins[7] - far) - 0.2
