"""Real-time chunking: the reference's weights, guidance on a head whose velocity is known, and prefixes in training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.control.interface import Observation
from robovlms_jax.policies import chunking, serving
from robovlms_jax.policies.heads import base, flow
from tests import toy

C, A = 10, 3


def test_weights_are_the_papers():
    np.testing.assert_allclose(chunking.weights(10, 2, 6, "linear"), [1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0], atol=1e-6)
    expected = [1, 1, 0.5706, 0.2871, 0.1145, 0.0258, 0, 0, 0, 0]
    np.testing.assert_allclose(chunking.weights(10, 2, 6), expected, atol=1e-4)


@given(st.integers(1, 20), st.data(), st.sampled_from(["exp", "linear"]))
@settings(max_examples=50, deadline=None)
def test_weights_fall_from_one_to_zero_between_delay_and_what_is_left(chunk, data, schedule):
    left = data.draw(st.integers(0, chunk))
    delay = data.draw(st.integers(0, left))
    weights = chunking.weights(chunk, delay, left, schedule)
    assert (weights[:delay] == 1).all() and (weights[left:] == 0).all()
    assert (np.diff(weights) <= 0).all() and (weights[delay:left] > 0).all()


def test_more_delay_than_is_left_is_refused():
    with pytest.raises(ValueError, match="delay=5"):
        chunking.weights(10, 5, 4)


def test_the_guidance_weight_is_the_papers_and_capped():
    weights = [float(flow.guidance_weight(jnp.float32(t), 5.0)) for t in (0.0, 0.1, 0.5, 0.9)]
    np.testing.assert_allclose(weights, [5, 5, 2, 5], rtol=1e-5)
    assert float(flow.guidance_weight(jnp.float32(0.1), 100.0)) == pytest.approx(9.111, rel=1e-3)


class Known(flow.FlowHead):
    """A head without parameters."""

    def setup(self):
        pass


class Straight(Known):
    """Velocity straight towards `goal`, which is where the guided path may not end."""

    def velocity(self, condition, x, time):
        time = time.reshape(len(x), -1)[..., None]
        return (goal() - x) / jnp.maximum(1 - time, 1e-3)


def goal():
    return jnp.linspace(-0.6, 0.6, C)[:, None] * jnp.ones(A)


def sample(guidance, weights=None, delay=0, planned=0.5, steps=20, kind=Straight, **changes):
    """Chunk float[C, A] that goes on from a plan of equal numbers."""
    config = flow.FlowHeadConfig(hidden_size=8, num_heads=2, num_steps=steps, guidance=guidance, **changes)
    head = kind(config, 1, C, A, (), 4, 1)
    condition = flow.Condition(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))
    plan = None
    if weights is not None:
        actions = jnp.full((1, C, A), planned)
        plan = base.Plan(actions, jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (1, C)), jnp.array([delay]))
    act = jax.jit(lambda: head.apply({}, flow.FlowPrediction(condition, (1,)), plan, method="actions"))
    return np.asarray(act())[0]


@pytest.mark.parametrize("guidance", ["vjp", "identity"])
def test_without_weight_guidance_is_plain_sampling(guidance):
    np.testing.assert_allclose(sample(guidance, 0.0), sample(guidance), atol=1e-5)
    np.testing.assert_allclose(sample(guidance), goal(), atol=1e-4)


def test_guidance_draws_steps_towards_the_plan_as_far_as_they_weigh():
    # This head's end does not depend on where it is, so its derivative is 0 and only "identity" can move it: where the
    # two variants differ most.
    plain, guided = sample("identity", 0.0), sample("identity", chunking.weights(C, 3, 6))
    moved = np.abs(guided - plain).max(-1)
    assert (moved[:3] > moved[5]).all() and (moved[6:] < 1e-5).all()
    np.testing.assert_allclose(sample("vjp", 1.0), goal(), atol=1e-4)


class Gaussian(Known):
    """The true velocity where actions are normal with mean `goal` and deviation 0.3: known in closed form."""

    def velocity(self, condition, x, time):
        t = time.reshape(len(x), -1)[..., None]
        variance = (1 - t) ** 2 + (0.3 * t) ** 2
        return goal() + (0.09 * t - (1 - t)) / variance * (x - t * goal())


@pytest.mark.parametrize("guidance", ["vjp", "identity"])
def test_a_plan_that_must_be_kept_is_kept(guidance):
    near = sample(guidance, 1.0, planned=0.4, steps=100, kind=Gaussian, guidance_limit=50.0)
    np.testing.assert_allclose(near, 0.4, atol=0.04)
    weak = sample(guidance, 1.0, planned=0.4, steps=100, kind=Gaussian, guidance_limit=0.2)
    assert np.abs(weak - 0.4).mean() > 3 * np.abs(near - 0.4).mean()


def test_a_prefix_is_followed_exactly():
    found = sample("prefix", chunking.weights(C, 4, 6), delay=4, max_delay=5)
    np.testing.assert_array_equal(found[:4], np.full((4, A), 0.5, np.float32))
    np.testing.assert_allclose(found[4:], goal()[4:], atol=1e-4)


def model_with(**changes):
    return toy.make_model(head=dataclasses.replace(toy.HEADS["flow"], **changes), history="one_step", window=1)


class Follows(Known):
    """Velocity -x, and at every action its own time."""

    def velocity(self, condition, x, time):
        assert time.shape in (x.shape[:1], x.shape[:2])
        return -x


def loss_of(kind, max_delay, training=True):
    """The loss of 4000 chunks of zeros."""
    head = kind(flow.FlowHeadConfig(hidden_size=8, num_heads=2, max_delay=max_delay), 1, C, A, (), 4, 1)
    actions, mask = jnp.zeros((4000, 1, C, A)), jnp.ones((4000, 1, C), bool)
    prediction = flow.FlowPrediction(flow.Condition(jnp.zeros(()), jnp.zeros(()), jnp.zeros(())), (4000, 1))
    rngs = {"dropout": jax.random.key(0)} if training else {}
    count = jnp.float32(mask.sum())
    return float(jax.jit(lambda: head.apply({}, prediction, actions, mask, count, method="loss", rngs=rngs))()[0])


def test_a_given_prefix_has_no_loss_and_the_rest_counts_for_all():
    # -noise is to be predicted and -(1 - t) noise is: a mean of t^2 = 1/3 over the actions that are not given.
    assert loss_of(Follows, 0) == pytest.approx(1 / 3, abs=0.02)
    assert loss_of(Follows, C - 1) == pytest.approx(1 / 3, abs=0.02)
    assert loss_of(Follows, C - 1) != loss_of(Follows, 0)


def test_evaluation_simulates_no_delay():
    assert loss_of(Follows, C - 1, training=False) == loss_of(Follows, 0, training=False)


def test_a_delay_as_long_as_the_chunk_is_refused():
    with pytest.raises(ValueError, match=r"max_delay=5 must be below policy\.chunk=5"):
        toy.random_params(model_with(max_delay=toy.C), toy.make_batch(np.random.default_rng(0), window=1))


def test_a_served_policy_goes_on_from_what_it_is_told():
    model = model_with(guidance="prefix", max_delay=3, num_steps=2)
    batch = toy.make_batch(np.random.default_rng(0), window=1)
    policy = serving.VLAPolicy(
        model, toy.random_params(model, batch), lambda _: (batch.inputs.text_ids[0], batch.inputs.text_mask[0])
    )
    policy.reset("open the drawer")
    images = {camera: x[0, 0] for camera, x in batch.inputs.images.items()}
    policy.act(Observation(images))
    left = np.tile(np.float32([0.1, -0.2, 0.3, 0, 0.1, 0.2, 1.0]), (4, 1))
    told = policy.act(Observation(images, committed=left, delay=2)).actions
    np.testing.assert_allclose(told[:2], left[:2], atol=1e-6)
    assert np.abs(told[2:] - left[2]).max() > 0.01
    assert policy._batched._step._cache_size() == 2  # with a plan and without
    with pytest.raises(ValueError, match=r"delay is 4; expected a whole number 0 ... 3.*max_delay"):
        policy.act(Observation(images, committed=left, delay=4))
    with pytest.raises(ValueError, match=r"committed is .*expected finite float\[n, 7\]"):
        policy.act(Observation(images, committed=left[:, :3], delay=1))


def test_other_heads_say_that_they_cannot_go_on():
    model = toy.make_model(head=toy.HEADS["mlp"], history="one_step", window=1)
    batch = toy.make_batch(np.random.default_rng(0), window=1)
    text = batch.inputs.text_ids[0], batch.inputs.text_mask[0]
    policy = serving.VLAPolicy(model, toy.random_params(model, batch), lambda _: text)
    policy.reset("open the drawer")
    images = {camera: x[0, 0] for camera, x in batch.inputs.images.items()}
    with pytest.raises(ValueError, match=r"MLPHeadConfig.*cannot"):
        policy.act(Observation(images, committed=np.zeros((2, 7)), delay=1))
