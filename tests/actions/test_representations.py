"""Actions as policies predict them and as robots are sent them: both ways, against SciPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from robovlms_jax.actions import representations, rotations
from robovlms_jax.control import robot

NAMES = ("relative", "absolute", "absolute_6d", "velocity", "tcp", "tcp_upstream")
seeds = st.integers(0, 2**31)


def trajectory(seed: int, steps: int = 5):
    """CALVIN's actions float[C, 7], and the states float[C, 7] that those before each lead to."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (steps, 7))
    actions[:, 6] = np.sign(actions[:, 6])
    pose = np.concatenate([rng.uniform(-1, 1, 3), rng.uniform(-1.2, 1.2, 3)])
    poses = [pose]
    for action in actions[:-1]:
        poses.append(poses[-1] + action[:6] * ([0.02] * 3 + [0.05] * 3))
    return actions, np.concatenate([poses, np.ones((steps, 1))], axis=1)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_a_chunk_that_was_encoded_step_by_step_is_decoded_from_its_first_state_alone(name, seed):
    actions, states = trajectory(seed)
    made = representations.make(name, robot.CALVIN)
    encoded = made.encode(actions, states)
    assert encoded.shape[1] == len(made.robot.action) and encoded.dtype == np.float32
    np.testing.assert_allclose(made.decode(encoded, states[0]), actions, atol=2e-3)
    assert made.robot.binary == (len(made.robot.action) - 1,)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_absolute_poses_are_where_the_motion_leads_to(seed):
    actions, states = trajectory(seed)
    poses = representations.make("absolute", robot.CALVIN).encode(actions, states)
    np.testing.assert_allclose(poses[:, :3], states[:, :3] + 0.02 * actions[:, :3], atol=1e-6)
    columns = representations.make("absolute_6d", robot.CALVIN).encode(actions, states)[:, 3:9]
    matrices = Rotation.from_euler("xyz", poses[:, 3:6]).as_matrix()
    np.testing.assert_allclose(columns, np.concatenate([matrices[..., 0], matrices[..., 1]], axis=1), atol=1e-6)
    tool = representations.make("tcp", robot.CALVIN).encode(actions, states)
    turned = Rotation.from_euler("xyz", states[:, 3:6])
    np.testing.assert_allclose(turned.apply(tool[:, :3]), actions[:, :3], atol=1e-5)
    np.testing.assert_allclose(
        (turned * Rotation.from_euler("xyz", 0.05 * tool[:, 3:6])).as_matrix(), matrices, atol=1e-5
    )


def test_what_a_robot_cannot_do_in_a_step_is_cut_and_the_next_action_begins_there():
    # CALVIN's factors are 50 and 20, clipped to 1: a target 0.1 m away is 5 units, of which one is made per step.
    far = np.array([[0.1, 0, 0, 0, 0, 0, 1.0]] * 3)
    own = representations.make("absolute", robot.CALVIN).decode(far, np.zeros(7))
    np.testing.assert_allclose(own[:, 0], 1)
    near = np.array([[0.03, 0, 0, 0.07, 0, 0, 1.0]] * 3)
    own = representations.make("absolute", robot.CALVIN).decode(near, np.zeros(7))
    np.testing.assert_allclose(own[:, [0, 3]], [[1, 1], [0.5, 0.4], [0, 0]], atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_a_robot_that_is_sent_poses_may_be_taught_motions(seed):
    pose = robot.CALVIN.state[:6]
    sent = dataclasses.replace(robot.CALVIN, name="poses", action=(robot.GRIPPER, *pose), state=(*pose, robot.GRIPPER))
    rng = np.random.default_rng(seed)
    targets = rng.uniform(-1, 1, (4, 7))
    states = np.concatenate([rng.uniform(-1, 1, (1, 6)), targets[:-1, 1:]])
    for name in ("relative", "tcp", "velocity"):
        made = representations.make(name, sent)
        encoded = made.encode(targets, states)
        np.testing.assert_array_equal(encoded[:, 0], np.float32(targets[:, 0]))
        np.testing.assert_allclose(made.decode(encoded, states[0]), targets, atol=1e-4)
    assert {d.kind for d in representations.make("relative", sent).robot.action[1:]} == {"delta"}


@given(seeds)
def test_six_numbers_turn_into_the_rotation_they_came_from_even_when_they_are_scaled(seed):
    rng = np.random.default_rng(seed)
    matrices = Rotation.random(4, random_state=seed).as_matrix()
    values = rotations.to_6d(matrices) * rng.uniform(0.5, 2)
    np.testing.assert_allclose(rotations.from_6d(values), matrices, atol=1e-9)


def test_a_robot_without_an_arm_is_told_what_it_lacks():
    base = robot.RobotSpec("base", 10.0, (), (robot.Dimension("v", "m/s", "velocity", "base"),))
    with pytest.raises(ValueError, match=r"needs one arm: .*robot 'base' has 0 and 0"):
        representations.make("tcp", base)
    with pytest.raises(ValueError, match="rate_hz=0"):
        representations.make("velocity", dataclasses.replace(robot.CALVIN, rate_hz=0.0))
