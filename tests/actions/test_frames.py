"""Absolute and relative actions, world and tool frame."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from robovlms_jax.actions import frames, rotations

actions = hnp.arrays(np.float64, (3, 7), elements=st.floats(-1, 1))
# pitch stays away from the poles, as CALVIN's hand does
poses = hnp.arrays(np.float64, (3, 15), elements=st.floats(-1, 1)).map(
    lambda x: np.concatenate([x[:, :3], x[:, 3:6] * [np.pi, 1.2, np.pi], x[:, 6:]], axis=1)
)


@pytest.mark.parametrize("frame", [frames.ToolFrame(), frames.UPSTREAM_TOOL])
@settings(max_examples=40, deadline=None)
@given(world=actions, pose=poses)
def test_tool_frame_both_ways(frame, world, pose):
    tool = frame.from_world(world, pose)
    np.testing.assert_allclose(np.linalg.norm(tool[:, :3], axis=1), np.linalg.norm(world[:, :3], axis=1), atol=1e-9)
    np.testing.assert_allclose(frame.to_world(tool, pose), world, atol=1e-6)
    np.testing.assert_array_equal(tool[:, 6], world[:, 6])


@settings(max_examples=20, deadline=None)
@given(actions, poses)
def test_tool_frame_means_the_same_motion(world, pose):
    # The pose that follows, computed without the module: R' = R * turn, p' = p + R * move.
    tool = frames.ToolFrame().from_world(world, pose)
    rotation = Rotation.from_euler("xyz", pose[:, 3:6])
    asked = Rotation.from_euler("xyz", pose[:, 3:6] + 0.05 * world[:, 3:6])
    turned = rotation * Rotation.from_euler("xyz", 0.05 * tool[:, 3:6])
    np.testing.assert_allclose((turned * asked.inv()).magnitude(), 0, atol=1e-7)
    np.testing.assert_allclose(rotation.apply(tool[:, :3]), world[:, :3], atol=1e-9)


def test_upstreams_formulas():
    # R(e)^-1 p; E(R(e + 0.01 o)^-1 R(e)) * 100, with R = Rx Ry Rz (its pose_transforms.py).
    rng = np.random.default_rng(0)
    world, pose = rng.uniform(-1, 1, (5, 7)), rng.uniform(-1, 1, (5, 6))
    rotation = Rotation.from_euler("XYZ", pose[:, 3:6])
    asked = Rotation.from_euler("XYZ", pose[:, 3:6] + 0.01 * world[:, 3:6])
    expected = np.concatenate(
        [rotation.inv().apply(world[:, :3]), 100 * (asked.inv() * rotation).as_euler("XYZ"), world[:, 6:]], axis=1
    )
    np.testing.assert_allclose(frames.UPSTREAM_TOOL.from_world(world, pose), expected, atol=1e-9)


def test_numpy_and_jax_agree():
    rng = np.random.default_rng(1)
    world, pose = (rng.uniform(-1, 1, (4, n)).astype(np.float32) for n in (7, 15))

    def there(world, pose):
        return frames.ToolFrame().from_world(frames.ToolFrame().to_world(world, pose), pose)

    np.testing.assert_allclose(jax.jit(there)(world, pose), there(world, pose), atol=1e-4)
    np.testing.assert_allclose(rotations.wrap(pose), pose)
