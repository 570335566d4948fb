"""Control steps of every history against the window form: what is kept between them must change nothing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.backbones import registry
from robovlms_jax.control.interface import Observation
from robovlms_jax.nn import attention
from robovlms_jax.policies import objective, serving
from robovlms_jax.policies.histories import interleaved
from tests import toy
from tests.toy import T, W

pytestmark = pytest.mark.usefixtures("exact_matmul")
STEPS = W + 3


@pytest.fixture(scope="module")
def batch():
    return toy.make_batch(np.random.default_rng(0), batch=1, windows=STEPS - W + 1, chunk=2)


@functools.cache
def window_form(model):
    """(params, prepared window, chunks) -> normalised actions of the window's newest step."""

    def run(params, inputs, actions):
        bound = model.bind({"params": params})
        return bound.head.actions(bound(inputs, actions=actions))[:, -1]

    return jax.jit(run)


@functools.cache
def preparation(model):
    return jax.jit(lambda inputs: objective.prepare(inputs, model.vlm.image, model.config.cameras))


def window_until(batch, t: int, window: int):
    """The newest `window` frames up to t; in front of the episode stand masked frames of nonsense."""
    frames = np.arange(t - window + 1, t + 1)
    return batch.inputs.replace(
        images={camera: x[:, frames] for camera, x in batch.inputs.images.items()}, step_mask=(frames >= 0)[None]
    )


def drive(model, params, batch, steps=STEPS):
    """Actions float[steps, C, A] of a policy that sees the frames one by one, in normalised units."""
    text = batch.inputs.text_ids[0], batch.inputs.text_mask[0]
    policy = serving.VLAPolicy(model, params, lambda _: text)
    policy.reset("open the drawer")
    chunks = []
    for t in range(steps):
        chunks.append(policy.act(Observation({c: x[0, t] for c, x in batch.inputs.images.items()})).actions)
    assert policy._batched._step._cache_size() == 1
    return np.stack(chunks) / np.array([0.65] * 6 + [1.0], np.float32)


def expected(model, params, batch, t, own):
    """The window form at step t; an autoregressive policy is told its own earlier tokens of this step, and nonsense
    for those of other steps, which it must not look at."""
    window = model.config.window
    actions = np.random.default_rng(t).uniform(-1, 1, (1, window, *own.shape)).astype(np.float32)
    actions[0, -1] = own
    inputs = preparation(model)(window_until(batch, t, window))
    return window_form(model)(params, inputs, actions)[0]


EXACT = [
    pytest.param(product, marks=marks, id="-".join(product))
    for product, marks in (
        (("interleaved", "pool", "lstm"), pytest.mark.slow),
        (("interleaved", "token", "discrete"), ()),
        (("video", "action_query", "mlp"), ()),
        (("interleaved", "action_query", "mlp"), pytest.mark.slow),
        (("video", "token", "discrete"), pytest.mark.slow),
        (("one_step", "token", "discrete"), pytest.mark.slow),
        (("policy_head", "action_query", "flow"), pytest.mark.slow),
    )
]


@pytest.mark.parametrize("product", EXACT)
def test_control_steps_equal_the_window(product, batch):
    # While the window grows and after it slides. Fails if a frame is lost, seen twice, misplaced, or seen too long.
    # Chunks of one, because what an action's gripper stands for is not always the token that was decoded.
    model = toy.make_product(*product, chunk=1)
    params = toy.random_params(model, batch)
    acted = drive(model, params, batch)
    if product[1] != "token":  # the likeliest word need not change from frame to frame
        assert np.abs(acted[1:, :, :6] - acted[:-1, :, :6]).max() > 1e-3
    for t in range(STEPS):
        np.testing.assert_allclose(acted[t], expected(model, params, batch, t, acted[t]), atol=2e-5, err_msg=str(t))


@pytest.mark.parametrize(
    "product",
    [
        # Every day: frames as they are joined here; tokens as they are decoded in the test above.
        ("interleaved", "action_query", "mlp"),
        pytest.param(("interleaved", "token", "discrete"), marks=pytest.mark.slow),
        pytest.param(("video", "token", "discrete"), marks=pytest.mark.slow),
        pytest.param(("video", "action_query", "mlp"), marks=pytest.mark.slow),
        pytest.param(("one_step", "token", "discrete"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_pictures_beside_the_sequence_are_seen_in_control_as_in_the_window(product, batch):
    # Keys of the media are kept while action tokens are decoded; a frame attends to its own pictures, or, in a video,
    # to those of all frames of the window.
    model = with_flamingo(toy.make_product(*product, chunk=1))
    params = toy.random_params(model, batch)
    acted = drive(model, params, batch)
    for t in range(STEPS):
        np.testing.assert_allclose(acted[t], expected(model, params, batch, t, acted[t]), atol=2e-5, err_msg=str(t))


def with_flamingo(model):
    """The same policy on a Flamingo whose layers take turns."""
    return dataclasses.replace(model, vlm=registry.get("flamingo-neox-3b").tiny())


@pytest.mark.parametrize("every", [pytest.param(0, marks=pytest.mark.slow), 2])  # two drifts, too, between exact steps
def test_a_ring_that_is_not_encoded_anew_is_exact_until_it_slides(every, batch):
    # And with every = 2 again at each second step after that, with one window of drift at most.
    exact = toy.make_product("interleaved", "action_query", "mlp")
    params = toy.random_params(exact, batch)
    model = dataclasses.replace(exact, config=dataclasses.replace(exact.config, reencode_every=every))
    acted = drive(model, params, batch)
    for t in range(STEPS):
        error = np.abs(acted[t] - expected(exact, params, batch, t, acted[t])).max()
        past = t + 1 - W
        if past <= 0 or (every and past % every == 0):
            assert error < 2e-5, t
        else:
            assert 1e-5 < error < 1, t


@pytest.mark.slow
@pytest.mark.parametrize(
    "product", [("interleaved", "action_query", "mlp"), ("interleaved", "token", "discrete"), ("video", "pool", "mlp")]
)
def test_slots_and_prompts_of_other_lengths_do_not_disturb_an_episode(product, batch):
    # An episode goes on while another begins with a longer prompt and while one with a short prompt takes its place,
    # asked itself or not.
    model = toy.make_product(*product, reencode_every=2)
    params = toy.random_params(model, batch)
    ids, mask = batch.inputs.text_ids[0], batch.inputs.text_mask[0]
    longer = np.pad(ids, (0, 4), constant_values=5), np.ones(T + 4, bool)
    texts = {"a": (ids, mask), "b": longer}

    def observation(t):
        return Observation({c: x[0, t] for c, x in batch.inputs.images.items()})

    policy = serving.BatchedVLAPolicy(model, params, texts.__getitem__, slots=2)
    policy.reset([1], ["a"])
    found = [policy.act([observation(t)], [1])[0].actions for t in range(2)]
    policy.reset([0], ["b"])
    for t in range(2, STEPS):
        if t == STEPS - 2:
            policy.reset([0], ["a"])
        policy.act([observation(0)], [0])
        found.append(policy.act([observation(t)], [1])[0].actions)
    assert policy._step._cache_size() == 2
    single = serving.VLAPolicy(model, params, texts.__getitem__)
    single.reset("a")
    for t in range(STEPS):
        np.testing.assert_allclose(found[t], single.act(observation(t)).actions, atol=2e-5, err_msg=str(t))
    single.reset("a")
    np.testing.assert_allclose(single.act(observation(0)).actions, found[0], atol=2e-5)  # reset forgets


def ring_of(rng, real, slots, scratch=2):
    """A ring of frames of which bool[B, W, S] `real` are tokens, numbered in `positions`."""
    rows, window, _ = real.shape
    wide = np.zeros((rows, window, slots), bool)
    wide[..., : real.shape[2]] = real[..., :slots]
    mask = np.concatenate([wide.reshape(rows, -1), np.zeros((rows, scratch), bool)], axis=1)
    numbers = np.where(mask, rng.permutation(mask.size).reshape(mask.shape) + 1, 0).astype(np.int32)
    key = np.broadcast_to(numbers[None, :, None, :, None], (2, rows, 1, mask.shape[1], 1)).astype(np.float32)
    cache = attention.Cache(key, 2 * key, numbers, mask, 3 * numbers, np.int32(window * slots))
    counter = np.arange(rows, dtype=np.int32)
    return interleaved.RingCache(cache, counter, counter, counter, slots)


@given(st.integers(0, 99), st.integers(4, 9))
@settings(max_examples=15, deadline=None)
def test_a_ring_keeps_every_real_token_in_its_frame_whatever_length_prompts_get(seed, slots):
    rng = np.random.default_rng(seed)
    real = rng.random((2, 3, 6)) < 0.5
    real[np.cumsum(real, axis=-1) > 4] = False  # four at most, so four slots suffice
    old, fresh = ring_of(rng, real, 6), ring_of(rng, np.zeros((2, 3, 6), bool), slots)
    fitted = old.fit(fresh, window=3)
    assert fitted.slots == slots and fitted.cache.length == 3 * slots
    assert jax.tree.map(jnp.shape, fitted.cache) == jax.tree.map(jnp.shape, fresh.cache)

    def frames(ring, x):  # per frame its real tokens, in order
        masks = np.asarray(ring.cache.mask)[:, : 3 * ring.slots].reshape(2, 3, -1)
        values = np.asarray(x)[:, : 3 * ring.slots].reshape(2, 3, -1)
        return [values[at][masks[at]].tolist() for at in np.ndindex(2, 3)]

    for name in ("positions", "places"):
        assert frames(fitted, getattr(fitted.cache, name)) == frames(old, getattr(old.cache, name))
    assert frames(fitted, fitted.cache.value[1, :, 0, :, 0]) == frames(old, old.cache.value[1, :, 0, :, 0])
    assert not np.asarray(fitted.cache.mask)[:, 3 * slots :].any()
