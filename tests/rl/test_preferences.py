"""Rewards learned from noisy answers, and what needs no reward."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from robovlms_jax.rl import objective, preferences
from robovlms_jax.rl.config import UpdateConfig
from tests.rl.test_objective import Bandit, decisions, start, tried


def test_the_loss_of_an_answer_is_that_of_the_worked_example():
    np.testing.assert_allclose(preferences.preference_loss(2.0, 1.0, 1.0, 0.0), 0.31326, atol=1e-5)
    np.testing.assert_allclose(preferences.preference_loss(2.0, 1.0, 1.0, 0.1), 0.34538, atol=1e-5)
    np.testing.assert_allclose(preferences.preference_loss(1.0, 1.0, 0.5, 0.0), np.log(2), rtol=1e-5)


def reaching(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments float32[N, 8, 9] of a hand (3), a goal (3) and the way it goes (3), and how much nearer it comes."""
    hand, goal = rng.uniform(-1, 1, (2, count, 3))
    share = rng.uniform(-0.1, 0.2, (count, 1))
    frames, progress = [], 0.0
    for _ in range(8):
        move = share * (goal - hand) + rng.normal(0, 0.03, (count, 3))
        frames.append(np.concatenate([hand, goal, move], axis=1))
        progress += np.linalg.norm(goal - hand, axis=1) - np.linalg.norm(goal - hand - move, axis=1)
        hand = hand + move
    return np.stack(frames, axis=1).astype(np.float32), progress


def answered(rng: np.random.Generator, count: int, noise: float) -> tuple[preferences.Pairs, np.ndarray]:
    """Pairs, a share of whose answers is turned round, and what is true."""
    (first, a), (second, b) = reaching(rng, count), reaching(rng, count)
    better = a > b
    turned = rng.uniform(size=count) < noise
    return preferences.Pairs(*(jnp.asarray(x) for x in (first, second, (better ^ turned).astype(np.float32)))), better


def test_rewards_from_answers_of_which_a_tenth_is_wrong_agree_with_85_percent_of_new_ones():
    """And they order segments as the progress that nobody told them about does."""
    rng = np.random.default_rng(0)
    pairs, _ = answered(rng, 1200, 0.1)
    model, numbers = preferences.fit(pairs, preferences.RewardConfig(members=2, steps=250, widths=(64, 64)))
    fresh, true = answered(rng, 1000, 0.1)
    clean = fresh.replace(first_better=jnp.asarray(true, jnp.float32))
    assert preferences.accuracy(model, clean) >= 0.85
    assert numbers["accuracy"] >= 0.75  # a tenth of these answers cannot be given
    frames, progress = reaching(rng, 500)
    assert stats.spearmanr(model(frames).sum(-1), progress).statistic > 0.8
    every = model.members(jnp.concatenate([pairs.first, pairs.second]))
    np.testing.assert_allclose(every.mean((1, 2)), 0, atol=0.1)
    np.testing.assert_allclose(every.std((1, 2)), 1, atol=0.1)
    doubt = preferences.disagreement(model, pairs.first, pairs.second)
    margin = jnp.abs((model(pairs.first) - model(pairs.second)).sum(-1))
    assert stats.spearmanr(doubt, margin).statistic < -0.3  # members differ where the answer is close


def test_an_answer_that_is_beyond_doubt_has_a_finite_loss_and_gradient():
    """Shares of 0 and 1, as float32 rounds them, with and without random answers."""
    for noise, wrong in ((0.0, 200.0), (0.1, -np.log(0.05))):
        both = jax.value_and_grad(lambda x, n=noise: preferences.preference_loss(x, 0.0, 1.0, n))
        losses, gradients = jax.jit(jax.vmap(both))(jnp.array([200.0, -200.0]))
        np.testing.assert_allclose(losses, [-np.log1p(-noise / 2), wrong], rtol=1e-5)
        assert np.isfinite(gradients).all()


def test_what_no_answer_has_shown_is_worth_no_more_than_what_they_have():
    """A number that never changed counts nothing when it does, and one that goes far counts as at the last place that
    rewards know. Before, a block in the hand cost more than all else in an iteration together."""
    pairs, _ = answered(np.random.default_rng(0), 40, 0.0)
    never = jnp.full((*pairs.first.shape[:2], 1), 0.3) + 1e-6 * pairs.first[..., :1]
    pairs = pairs.replace(first=jnp.append(pairs.first, never, -1), second=jnp.append(pairs.second, never, -1))
    model, _ = preferences.fit(pairs, preferences.RewardConfig(members=2, steps=2, widths=()))
    known = pairs.first[0, 0]
    np.testing.assert_allclose(model(known.at[-1].set(9.0)), model(known), atol=1e-3)
    far, farther = (model(known.at[6].set(model.center[6] + n * model.scale[6])) for n in (10, 1000))
    assert abs(float(far - model(known))) > 0.1
    np.testing.assert_allclose(farther, far, rtol=1e-5)


def test_segments_of_unequal_length_are_not_compared():
    pairs = preferences.Pairs(jnp.zeros((4, 3, 2)), jnp.zeros((4, 5, 2)), jnp.zeros(4))
    with pytest.raises(ValueError, match="equal length"):
        preferences.fit(pairs, preferences.RewardConfig())
    with pytest.raises(ValueError, match="too few"):
        preferences.fit(dataclasses.replace(pairs, second=pairs.first).take(slice(2)), preferences.RewardConfig())


def test_cloning_weighs_what_turned_out_well_and_bounds_the_weight():
    params = start()
    actions, log_prob = tried(params, jax.random.key(0), 3)
    batch = decisions(actions, log_prob, jnp.array([0.0, 1.0, 50.0]))
    own = objective.tasks_of(UpdateConfig(method="awr", hold_weight=1.0))
    assert [task.name for task in own] == ["cloning", "value", "hold"]
    loss = jax.jit(objective.DecisionLoss(Bandit(), (objective.WeightedCloningTask(),)))
    value, metrics = loss(params, batch, None, 3.0)
    weights = np.array([1, np.e, 20])
    np.testing.assert_allclose(value, -(weights * np.asarray(log_prob)[:, 0, 0]).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["share"], weights.mean(), rtol=1e-5)
    np.testing.assert_allclose((metrics["ratio"], metrics["moved"]), (1, 0), atol=1e-6)
    held = batch.replace(held=jnp.array([True, True, False]))
    np.testing.assert_allclose(loss(params, held, None, 3.0)[1]["share"], 20 / 3, rtol=1e-5)
