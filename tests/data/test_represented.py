"""A dataset's actions in another representation: frames whose rotation is none are corrupt, as others are."""

import types

import numpy as np
import pytest

from robovlms_jax.control import robot
from robovlms_jax.data import base, represented

XYZ = [robot.Dimension(f"x{i}", "m", "absolute", "position") for i in range(3)]
TURN = [robot.Dimension(f"q{i}", "1", "absolute", "quaternion_xyzw") for i in range(4)]


def test_a_frame_whose_quaternion_is_zero_is_named_and_the_others_are_read():
    spec = robot.RobotSpec("arm", 5.0, (), (*XYZ, *TURN), (*XYZ, *TURN))
    states = np.tile([0, 0, 0, 0, 0, 0, 1], (3, 1)).astype(np.float32)
    states[1, 6] = 0
    own = types.SimpleNamespace(
        name="mine",
        robot=spec,
        image_sizes={},
        episodes=(),
        may_lack_images=False,
        names_tasks=True,
        groups=(),
        actions=lambda ids: np.tile(np.float32([1, 0, 0, 0, 0, 0, 1]), (len(ids), 1)),
        proprio=lambda ids: states[np.asarray(ids)],
    )
    dataset = represented.represented(own, "relative")
    np.testing.assert_allclose(dataset.actions([0, 2]), np.tile([1, 0, 0, 0, 0, 0], (2, 1)), atol=1e-6)
    with pytest.raises(base.CorruptFrameError, match=r"mine: frame 1 has actions that are relative .*nan"):
        dataset.actions([0, 1])
