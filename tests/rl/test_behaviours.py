"""What is drawn, and how probable it was, by kind of head."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads import discrete, lstm
from robovlms_jax.policies.heads.continuous import ContinuousPrediction
from robovlms_jax.rl import behaviours
from robovlms_jax.rl.config import BehaviourConfig

HEAD = types.SimpleNamespace(scaled=(0, 2), binary=(1,), action_dim=3)
SPREAD, RHO = (0.1, 0.3), 0.8


def prediction(batch: int) -> ContinuousPrediction:
    rng = np.random.default_rng(0)
    arm, logit = rng.uniform(-0.5, 0.5, (1, 4, 2)), rng.normal(size=(1, 4, 1))
    return ContinuousPrediction(*(jnp.asarray(np.tile(x, (batch, 1, 1)), jnp.float32) for x in (arm, logit)))


def test_numbers_are_drawn_around_the_prediction_with_noise_that_lasts():
    behaviour = behaviours.Gaussian(SPREAD, RHO, 0.01, 1.0)
    seen = prediction(20_000)
    actions, drawn = behaviour.draw(HEAD, seen, behaviour.parameters(), jax.random.key(0))
    noise = (np.asarray(drawn.actions)[..., [0, 2]] - np.asarray(seen.arm)) / np.array(SPREAD)
    expected = RHO ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    np.testing.assert_allclose(np.cov(noise[..., 1].T), expected, atol=0.03)
    share = jax.nn.sigmoid(seen.gripper_logit[0, :, 0])
    np.testing.assert_allclose((drawn.actions[..., 1] > 0).mean(0), share, atol=0.02)
    assert float(jnp.abs(actions).max()) <= 1


def test_the_probability_of_a_chunk_is_that_of_the_joint_normal_distribution_and_the_grippers():
    behaviour = behaviours.Gaussian(SPREAD, RHO, 0.01, 2.0)
    seen = prediction(3)
    _, drawn = behaviour.draw(HEAD, seen, behaviour.parameters(), jax.random.key(1))
    found, entropy = behaviour.log_prob(HEAD, seen, behaviour.parameters(), drawn)
    assert found.shape == entropy.shape == (3, 4, 3)
    covariance = RHO ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    for column, place, spread in ((0, 0, 0.1), (2, 1, 0.3)):
        normal = stats.multivariate_normal(np.asarray(seen.arm)[0, :, place], covariance * spread**2)
        np.testing.assert_allclose(found[..., column].sum(1), normal.logpdf(drawn.actions[..., column]), rtol=2e-4)
        np.testing.assert_allclose(entropy[0, :, column].sum(), normal.entropy(), rtol=1e-5)
    share = jax.nn.sigmoid(np.asarray(seen.gripper_logit)[..., 0] / 2)
    taken = np.where(np.asarray(drawn.actions)[..., 1] > 0, share, 1 - share)
    np.testing.assert_allclose(found[..., 1], np.log(taken), rtol=1e-5)


def test_a_standard_deviation_stays_above_its_floor():
    behaviour = behaviours.Gaussian(SPREAD, 0.0, 0.2, 1.0)
    seen = prediction(2)
    drawn = behaviours.Chosen(jnp.zeros((2, 4, 3)))
    floored = behaviour.log_prob(HEAD, seen, {"log_std": jnp.log(jnp.array([0.2, 0.3]))}, drawn)[0]
    np.testing.assert_allclose(behaviour.log_prob(HEAD, seen, behaviour.parameters(), drawn)[0], floored, rtol=1e-6)


def test_tokens_are_drawn_by_the_softmax_over_action_ids_at_the_temperature():
    config = discrete.DiscreteHeadConfig(num_bins=8, decoding="parallel")
    head = discrete.DiscreteHead(config, 1, 1, 2, (1,), 40, 2)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 2, 40)), jnp.float32)
    seen = head.apply({}, jnp.broadcast_to(logits.reshape(1, 2, 40), (20_000, 2, 40)), None)
    behaviour = behaviours.Softmax(1.6)
    actions, drawn = behaviour.draw(head, seen, {}, jax.random.key(0))
    share = jax.nn.softmax(logits[0, 0, 0, 32:] / 1.6)
    counts = np.bincount(np.asarray(drawn.ids)[:, 0, 0] - 32, minlength=8) / 20_000
    np.testing.assert_allclose(counts, share, atol=0.02)
    found, entropy = behaviour.log_prob(head, seen, {}, drawn)
    np.testing.assert_allclose(found[:, 0, 0], np.log(share)[np.asarray(drawn.ids)[:, 0, 0] - 32], rtol=1e-4)
    np.testing.assert_allclose(entropy[0, 0, 0], -(share * np.log(share)).sum(), rtol=1e-4)
    assert set(np.unique(actions[..., 1])) == {-1.0, 1.0}
    np.testing.assert_array_equal(actions[..., 0], head.values(drawn.ids)[..., 0])


def test_heads_without_probabilities_are_named():
    config = PolicyConfig(history="one_step", window=1, readout="token", head=discrete.DiscreteHeadConfig())
    with pytest.raises(ValueError, match="decoding='parallel'"):
        behaviours.make(config, BehaviourConfig())
    with pytest.raises(ValueError, match=r"spread=.* has 2 numbers; expected one, or 6"):
        behaviours.make(PolicyConfig(head=lstm.LSTMHeadConfig()), BehaviourConfig(spread=(0.1, 0.2)))
