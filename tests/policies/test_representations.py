"""A policy that is trained in another representation than its robot's acts in the robot's own."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from experiments import calvin_abcd
from robovlms_jax import cli
from robovlms_jax.actions import representations
from robovlms_jax.control.interface import Observation
from robovlms_jax.control.robot import CALVIN
from robovlms_jax.policies.config import ActionHistoryConfig, PolicyConfig
from robovlms_jax.policies.serving import VLAPolicy
from robovlms_jax.runs import setup as setups
from tests import toy


@pytest.mark.parametrize("name", ["tcp", "tcp_upstream"])
def test_a_run_learns_from_actions_in_its_representation_and_keeps_everything_else(name):
    sample = calvin_abcd.PRESETS["sample"]
    setup = setups.prepare(cli.override(sample, **{"policy.representation": name}))
    plain = setups.prepare(sample)
    dataset, segment, own = setup.train.dataset, setup.train[3], plain.train[3]
    ids = np.arange(dataset.episodes[0].start, dataset.episodes[0].start + 6)
    made = representations.make(name, CALVIN)
    expected = made.encode(plain.train.dataset.actions(ids), plain.train.dataset.proprio(ids))
    np.testing.assert_array_equal(dataset.actions(ids), expected)
    assert np.abs(segment.actions - own.actions).max() > 0.01
    np.testing.assert_array_equal(segment.actions[..., 6], own.actions[..., 6])
    np.testing.assert_array_equal(segment.inputs.images["static"], own.inputs.images["static"])
    assert setup.config.policy.robot == CALVIN and setup.config.policy.predicted.action[0].frame == "tcp"
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(again.actions(ids), expected)


def test_predicted_motions_of_the_tool_are_sent_as_the_robots_own():
    batch = toy.make_batch(np.random.default_rng(0), window=1, windows=1, chunk=2)
    settings = {"history": "one_step", "window": 1, "chunk": 2, "head": toy.HEADS["mlp"]}
    models = [toy.make_model(**settings, representation=name) for name in ("robot", "tcp")]
    params = toy.random_params(models[0], batch)
    text = batch.inputs.text_ids[0], batch.inputs.text_mask[0]
    images = {camera: x[0, 0] for camera, x in batch.inputs.images.items()}
    state = np.array([0.1, -0.2, 0.5, 3.0, 0.1, 1.2, 1.0], np.float32)
    predicted, sent = (_act(VLAPolicy(model, params, lambda _: text), Observation(images, state)) for model in models)
    np.testing.assert_allclose(sent, representations.make("tcp", CALVIN).decode(predicted, state), atol=1e-6)
    assert np.abs(sent - predicted).max() > 0.01
    with pytest.raises(ValueError, match="turns actions into the robot's own by the arm's pose"):
        _act(VLAPolicy(models[1], params, lambda _: text), Observation(images))


def _act(policy, observation):
    policy.reset("open the drawer")
    return policy.act(observation).actions


def test_what_does_not_go_with_a_representation_is_said():
    with pytest.raises(ValueError, match="looks back at the robot"):
        PolicyConfig(representation="tcp", action_history=ActionHistoryConfig(length=2))
    with pytest.raises(ValueError, match="default of"):
        PolicyConfig(representation="absolute")
    with pytest.raises(ValueError, match="need 9 numbers each"):
        PolicyConfig(representation="absolute_6d")
