"""How uncertain heads are, against closed forms; and split-conformal intervals, against the reference's values."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robovlms_jax.actions.normalize import Normalizer
from robovlms_jax.control.interface import Observation
from robovlms_jax.policies import confidence, losses, objective, serving
from robovlms_jax.policies.heads import base, discrete, flow
from tests import toy

BINARY = (6,)


@pytest.mark.parametrize(
    ("number", "coverage", "k"),
    [(9, 0.9, 9), (19, 0.9, 18), (99, 0.9, 90), (100, 0.9, 91), (19, 0.95, 19), (99, 0.95, 95)],
)
def test_the_quantile_is_the_kth_smallest(number, coverage, k):
    assert confidence.quantile(np.random.default_rng(0).permutation(np.arange(1.0, number + 1)), coverage) == k


@pytest.mark.parametrize(("number", "coverage"), [(8, 0.9), (18, 0.95), (0, 0.5)])
def test_too_few_episodes_hold_anything(number, coverage):
    assert confidence.quantile(np.zeros(number), coverage) == math.inf


def test_coverage_is_what_it_says_over_many_calibrations():
    # n = 99 at 90 %: Beta(90, 10), mean .9, deviation .030.
    rng = np.random.default_rng(0)
    held = [rng.random() <= confidence.quantile(rng.random(99), 0.9) for _ in range(20_000)]
    assert np.mean(held) == pytest.approx(0.9, abs=0.007)
    true = [confidence.quantile(rng.random(99), 0.9) for _ in range(2000)]
    assert np.mean(true) == pytest.approx(0.9, abs=0.002) and np.std(true) == pytest.approx(0.03, abs=0.002)


def test_one_score_is_for_all_numbers_of_an_action():
    predicted, recorded = np.zeros((2, 3)), np.array([[0.1, -0.4, 9.0], [0.3, 0.2, 9.0]])
    np.testing.assert_allclose(confidence.scores(predicted, recorded, None, (0, 1)), [0.4, 0.3])
    scale = np.array([[0.1, 0.8, 1.0], [0.1, 0.1, 1.0]])
    np.testing.assert_allclose(confidence.scores(predicted, recorded, scale, (0, 1)), [1.0, 3.0])


def test_intervals_are_in_the_robots_units_and_a_gripper_has_none():
    calibration = confidence.Calibration((2.0, math.inf), 0.9, 100, scaled=True)
    scale = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]], np.float32)
    normalizer = Normalizer((-1.0, -5.0), (1.0, 5.0), (2,))
    interval = calibration.interval(np.zeros((2, 3), np.float32), scale, normalizer)
    np.testing.assert_allclose(interval[0], [0.2, 2.0, 0], rtol=1e-6)
    assert np.isinf(interval[1, :2]).all() and interval[1, 2] == 0
    with pytest.raises(ValueError, match="calibrated with a spread"):
        calibration.interval(np.zeros((2, 3)), None, normalizer)
    curved = dataclasses.replace(normalizer, mu=255.0)
    middle = np.array([[0.5, 2.0, 1.0]], np.float32)
    wide = dataclasses.replace(calibration, quantiles=(1.0,)).interval(middle, scale[:1], curved)
    inside = curved.unnormalize(curved.normalize(middle) + scale[:1] * np.array([[0.99, -0.99, 0]]))
    assert (np.abs(inside - middle) <= wide + 1e-6)[:, :2].all()  # whoever is held there is held here


def test_a_spread_is_learned_as_the_deviation_that_there_is():
    # The reference's check: errors N(0, .3^2) give .3, and at the optimum log s + 1/2 = .215 - log(2 pi) / 2 + ...
    errors = 0.3 * np.random.default_rng(0).normal(size=50_000).astype(np.float32)

    def loss(log_scale):
        return losses.gaussian(jnp.float32(0.0), log_scale, jnp.asarray(errors)).mean()

    tx = optax.adam(0.05)

    def step(state, _):
        log_scale, moments = state
        updates, moments = tx.update(jax.grad(loss)(log_scale), moments)
        return (optax.apply_updates(log_scale, updates), moments), None

    (log_scale, _), _ = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), None, 200))(jnp.float32(0.0))
    assert float(jnp.exp(log_scale)) == pytest.approx(0.3, rel=0.02)
    assert float(loss(log_scale)) + 0.5 * math.log(2 * math.pi) == pytest.approx(0.215, abs=0.01)


def head_of(kind, **changes):
    config = dataclasses.replace(toy.HEADS[kind], **changes)
    return base.build(config, window=1, chunk=3, action_dim=7, binary=BINARY, feature_dim=8, num_queries=1)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_asking_for_the_spread_changes_no_other_gradient(kind):
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(4, 1, 1, 8)), jnp.float32)
    actions = jnp.asarray(np.sign(rng.normal(size=(4, 1, 3, 7))) * 0.5, jnp.float32)
    mask = jnp.ones((4, 1, 3), bool)
    step_mask, count = jnp.ones((4, 1), bool), jnp.float32(12)
    plain, spread = head_of(kind), head_of(kind, spread=True)
    params = toy.random_init(spread, features, step_mask)["params"]

    def gradient(head, params):
        def loss(params):
            prediction = head.apply({"params": params}, features, step_mask)
            return head.apply({"params": params}, prediction, actions, mask, count, method="loss")[0]

        return jax.jit(jax.grad(loss))(params)

    rest = {name: x for name, x in params.items() if name != "scale"}
    with_spread = gradient(spread, params)
    own = with_spread.pop("scale")
    jax.tree.map(np.testing.assert_array_equal, with_spread, gradient(plain, rest))
    assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(own))
    prediction = spread.apply({"params": params}, features, step_mask)
    found = spread.apply({"params": params}, prediction, method="spread")
    assert found.scale.shape == (4, 1, 3, 7) and found.uncertainty.shape == (4, 1, 3)
    np.testing.assert_allclose(found.scale[..., :6], np.exp(prediction.log_scale), rtol=1e-6)
    np.testing.assert_allclose(found.uncertainty, found.scale[..., :6].mean(-1), rtol=1e-6)
    wrong = 1 / (1 + np.exp(np.abs(prediction.gripper_logit[..., 0])))
    np.testing.assert_allclose(found.scale[..., 6], wrong, rtol=1e-5)
    assert plain.apply({"params": rest}, plain.apply({"params": rest}, features, step_mask), method="spread") is None


def test_tokens_are_as_uncertain_as_their_distribution():
    config = discrete.DiscreteHeadConfig(num_bins=32, spread=True)
    head = discrete.DiscreteHead(config, 1, 2, 2, (1,), 40, 4)
    sure = jnp.zeros((1, 2, 2, 40)).at[..., 20].set(50.0)
    for logits, entropy in ((jnp.zeros((1, 2, 2, 40)), 1.0), (sure, 0.0)):
        found = head.spread(discrete.TokenPrediction(logits))
        np.testing.assert_allclose(found.uncertainty, entropy, atol=1e-4)
    flat = head.spread(discrete.TokenPrediction(jnp.zeros((1, 2, 2, 40)).at[..., :8].set(99.0)))
    values = np.asarray(config.bins.centers)  # words that are no actions do not count
    values = np.append(values, values[-1])
    np.testing.assert_allclose(flat.scale[..., 0], values.std(), rtol=1e-4)
    np.testing.assert_allclose(flat.scale[..., 1], 0.5, atol=0.02)
    assert (
        discrete.DiscreteHead(discrete.DiscreteHeadConfig(num_bins=32), 1, 2, 2, (1,), 40, 4).spread(
            discrete.TokenPrediction(sure)
        )
        is None
    )


def test_the_flows_spread_is_that_of_its_samples_and_changes_no_action():
    class Doubling(flow.FlowHead):
        """Ends at half its noise: actions are N(0, .5^2)."""

        def setup(self):
            pass

        def velocity(self, condition, x, time):
            return -x / (2 - time.reshape(len(x), -1)[..., None])

    config = flow.FlowHeadConfig(hidden_size=8, num_heads=2, num_steps=50, num_samples=4000)
    condition = flow.Condition(jnp.zeros(()), jnp.zeros(()), jnp.ones((1, 2, 1), bool))
    prediction = flow.FlowPrediction(condition, (1, 2))
    found = jax.jit(lambda: Doubling(config, 2, 3, 2, (1,), 4, 1).apply({}, prediction, method="spread"))()
    assert found.scale.shape == (1, 2, 3, 2)
    np.testing.assert_allclose(
        found.scale[..., 0], np.clip(0.5 * np.random.default_rng(0).normal(size=10**5), -1, 1).std(), rtol=0.05
    )
    np.testing.assert_allclose(found.scale[..., 1], 0.5, atol=0.03)
    few = dataclasses.replace(config, num_samples=0)
    assert Doubling(few, 2, 3, 2, (1,), 4, 1).apply({}, prediction, method="spread") is None


@pytest.mark.parametrize("kind", ["mlp", "flow"])
def test_a_served_chunk_says_how_uncertain_it_is_and_how_far_it_may_be_off(kind):
    changes = {"mlp": {"spread": True}, "flow": {"num_samples": 4, "num_steps": 2}}[kind]
    model = toy.make_model(head=dataclasses.replace(toy.HEADS[kind], **changes), history="one_step", window=1)
    batch = toy.make_batch(np.random.default_rng(0), window=1, windows=2)
    params, text = toy.random_params(model, batch), (batch.inputs.text_ids[0], batch.inputs.text_mask[0])
    calibration = confidence.Calibration((2.0,) * toy.C, 0.9, 50, scaled=True)
    policy = serving.BatchedVLAPolicy(model, params, lambda _: text, 2, calibration)
    policy.reset([0, 1], ["open the drawer"] * 2)
    look = [Observation({camera: x[i, 0] for camera, x in batch.inputs.images.items()}) for i in (0, 1)]
    chunks = policy.act(look, [0, 1])
    _, _, _, spread = jax.jit(objective.RobotLoss(model).confidence)(params, batch)
    for row, chunk in enumerate(chunks):
        assert chunk.uncertainty.shape == (toy.C,) and chunk.coverage == 0.9
        if row == 0:  # both have the first one's prompt here
            np.testing.assert_allclose(chunk.uncertainty, spread.uncertainty[0], atol=2e-4)
            np.testing.assert_allclose(chunk.interval[:, :6], 2 * 0.65 * spread.scale[0, :, :6], atol=1e-3)
        assert (chunk.interval[:, 6] == 0).all() and (chunk.interval[:, :6] > 0).all()
