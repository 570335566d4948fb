"""The simulator states that chains begin in."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from robovlms_jax.envs.calvin import initial_states, task_chains, tasks


@pytest.mark.parametrize(
    ("values", "seed", "yaws"),
    [
        ([1, 1, "left", "open", "slider_left", "table", "slider_right", 0], 2138410836, (1.885941, 1.488143, 1.468399)),
        (
            [1, 1, "right", "open", "slider_right", "table", "slider_left", 0],
            2685153213,
            (1.826834, 1.507642, 1.646196),
        ),
        (
            [1, 0, "left", "closed", "slider_right", "slider_left", "table", 0],
            1288142433,
            (1.857737, 1.641566, 1.391845),
        ),
    ],
)
def test_initial_states_have_the_published_seeds_and_yaws(values, seed, yaws):
    condition = dict(zip(task_chains.initial_conditions()[0], values))
    assert initial_states.condition_seed(condition) == seed
    robot_obs, scene_obs = initial_states.initial_state(condition)
    np.testing.assert_allclose(scene_obs[[11, 17, 23]], yaws, atol=1e-6)
    assert robot_obs.shape == (15,)
    assert scene_obs.dtype == np.float64


def test_all_thousand_initial_states_are_the_published_ones_bit_for_bit():
    """The hash is that of the states which CALVIN's own function makes of the published list."""
    states = hashlib.sha256()
    for chain in task_chains.official_chains():
        for part in initial_states.initial_state(chain.condition):
            states.update(part.tobytes())
    assert states.hexdigest() == "0789732599c9f93d6506018704c1717b42d9ce8921a430403964813f3c1ebd71"


def test_the_first_chains_initial_state():
    _, scene_obs = initial_states.initial_state(task_chains.official_chains()[0].condition)
    np.testing.assert_array_equal(scene_obs[:6], [0.28, 0.22, 0, 0.088, 1, 1])
    np.testing.assert_array_equal(scene_obs[12:15], [0.229995412, -0.11999514, 0.45999001])  # blue at the second spot
    np.testing.assert_array_equal(scene_obs[6:9], [-0.240851662, 0.0924044687, 0.460990009])


@pytest.mark.parametrize("name", initial_states.SCENES)
def test_blocks_keep_their_colour_in_every_scenes_order(name):
    layout = initial_states.SCENES[name]
    condition = task_chains.initial_conditions()[100]
    _, scene_obs = initial_states.initial_state(condition, name)
    for color in tasks.BLOCKS:
        x, y, _ = scene_obs[6 + 6 * layout.block_order.index(color) :][:3]
        place = condition[f"{color}_block"]
        if place == "table":
            assert y < 0
        else:
            assert x == layout.shelf_x_m[place == "slider_right"]


def test_initial_states_do_not_touch_numpys_global_generator():
    np.random.seed(3)
    expected = np.random.RandomState(3).random_sample()
    initial_states.initial_state(task_chains.initial_conditions()[5])
    assert np.random.random_sample() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"led": True}, "led=True"),  # prints as True, so it would seed another state
        ({"slider": "middle"}, "slider='middle'"),
        ({"red_block": "table", "blue_block": "table", "pink_block": "table"}, "1 or 2 on the table"),
        ({"extra": 1}, "has keys"),
    ],
)
def test_a_wrong_initial_condition_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        initial_states.initial_state(dict(task_chains.official_chains()[0].condition) | change)


def test_an_unknown_scene_is_named():
    with pytest.raises(ValueError, match="unknown scene 'E'"):
        initial_states.initial_state(task_chains.initial_conditions()[0], "E")
