"""The robot's state: which numbers a policy takes from it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.inputs import proprio


@pytest.mark.parametrize("xp", [np, jnp])
def test_pose_and_last_gripper_command_are_taken(xp):
    # Fails if the measured width (column 6) or a joint is taken for the gripper.
    state = xp.arange(30.0).reshape(2, 15)
    taken = proprio.from_robot_state(state)
    np.testing.assert_array_equal(taken, [[0, 1, 2, 3, 4, 5, 14], [15, 16, 17, 18, 19, 20, 29]])
    np.testing.assert_array_equal(proprio.from_robot_state(taken), taken)


def test_another_layout_is_refused():
    with pytest.raises(ValueError, match="robot state has 8 numbers; expected 15"):
        proprio.from_robot_state(np.zeros(8))
