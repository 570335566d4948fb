"""Tables drawn at random."""

from __future__ import annotations

import numpy as np
import pytest

from robovlms_jax.envs.calvin import initial_states, task_chains
from robovlms_jax.playtable import scene


def test_random_tables_differ_and_start_like_the_others():
    # Fails if two seeds give one table, a seed gives two, a button stands where a block starts, or a door stands open
    # by more than it can slide.
    condition = task_chains.initial_conditions()[3]
    names = [f"random-{i}" for i in range(6)]
    buttons = [float(scene.make_scene(name).anchors.button_top[0]) for name in names]
    assert len(set(buttons)) == 6
    assert buttons == [float(scene.make_scene(name).anchors.button_top[0]) for name in names]
    for name, button in zip(names, buttons):
        made = scene.make_scene(name)
        for state in ("left", "right"):
            _, obs = scene.initial_obs({**condition, "slider": state}, name)
            assert 0 <= obs[0] <= float(made.joint_range[0]) + 1e-6
            on_table = obs[6:].reshape(3, 6)[:, :2]
            on_table = on_table[on_table[:, 1] < 0]
            assert np.abs(on_table[:, 0] - button).min() > 0.033 + 0.04
    for known in scene.SCENES:
        for ours, official in zip(scene.initial_obs(condition, known), initial_states.initial_state(condition, known)):
            np.testing.assert_array_equal(ours, official)
    for name in ("random-x", "random-01", "random-"):
        with pytest.raises(ValueError, match=f"unknown scene '{name}'"):
            scene.make_scene(name)
