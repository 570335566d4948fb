"""The policy as a whole: frames shared by windows, padding, control steps."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.backbones import registry
from robovlms_jax.control.interface import Observation
from robovlms_jax.policies import objective, serving, vla
from robovlms_jax.types import Batch
from tests import toy
from tests.toy import B, C, K, W, make_batch, make_model, random_params


@functools.lru_cache
def compiled(model):
    return jax.jit(objective.RobotLoss(model))


def loss_of(model, params, batch):
    return compiled(model)(params, batch)


def window_of(batch: Batch, k: int) -> Batch:
    """Window k of every segment as a batch of its own: what upstream would have sampled."""
    inputs = batch.inputs
    return batch.replace(
        inputs=inputs.replace(
            images={camera: x[:, k : k + W] for camera, x in inputs.images.items()},
            step_mask=inputs.step_mask[:, k : k + W],
        ),
        actions=batch.actions[:, k : k + W + C - 1],
        action_mask=batch.action_mask[:, k : k + W + C - 1],
        window_mask=batch.window_mask[:, k : k + 1],
    )


@functools.lru_cache
def decider(model):
    """(params, inputs) -> the actions of every step of the window."""

    def decide(params, inputs):
        bound = model.bind({"params": params})
        return bound.head.actions(bound(objective.prepare(inputs, model.vlm.image, model.config.cameras)))

    return jax.jit(decide)


def concatenate(batches: list[Batch]) -> Batch:
    return jax.tree.map(lambda *xs: np.concatenate(xs), *batches)


def test_segment_equals_its_windows_encoded_apart(exact_matmul):
    # Fails if a window sees a frame, a chunk or a mask of its neighbour, or if sharing changes how entries are weighed.
    # At two places: functions that are equal have equal gradients, which take four times as long to compile.
    batch = make_batch(np.random.default_rng(0), mask_tail=4)
    model = make_model()
    params = random_params(model, batch)
    apart, rng = concatenate([window_of(batch, k) for k in range(K)]), np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    here, there = (loss_of(model, place, batch)[0] for place in (params, moved))
    assert abs(here - there) > 1e-3 * here
    for place, loss in ((params, here), (moved, there)):
        np.testing.assert_allclose(loss, loss_of(model, place, apart)[0], rtol=1e-5)


@pytest.mark.slow  # every day: their losses, above
@pytest.mark.parametrize("mask_tail", [0, 4])
def test_gradients_of_a_segment_equal_those_of_its_windows_encoded_apart(exact_matmul, mask_tail):
    batch = make_batch(np.random.default_rng(0), mask_tail=mask_tail)
    model = make_model()
    params = random_params(model, batch)
    apart = concatenate([window_of(batch, k) for k in range(K)])
    gradient = jax.jit(jax.value_and_grad(lambda params, batch: objective.RobotLoss(model)(params, batch)[0]))
    loss, grads = gradient(params, batch)
    loss_apart, grads_apart = gradient(params, apart)
    np.testing.assert_allclose(loss, loss_apart, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_apart)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    if mask_tail == 0:  # equal counts: also the plain mean over the windows' own losses
        singles = [gradient(params, window_of(batch, k))[0] for k in range(K)]
        np.testing.assert_allclose(loss, np.mean(singles), rtol=1e-5)


@pytest.mark.parametrize("product", [("interleaved", "token", "discrete"), ("video", "action_query", "mlp")])
def test_windows_that_share_images_are_decoded_apart(exact_matmul, product):
    # The same for histories whose sequences are windows: they share a frame's images, and nothing that is said of it.
    batch = make_batch(np.random.default_rng(0), batch=1, windows=2, mask_tail=4)
    model = toy.make_product(*product, chunk=C)
    params = random_params(model, batch)
    apart = concatenate([window_of(batch, k) for k in range(2)])
    np.testing.assert_allclose(loss_of(model, params, batch)[0], loss_of(model, params, apart)[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("product", [("interleaved", "token", "discrete"), ("video", "action_query", "mlp")])
def test_windows_that_share_pictures_beside_the_sequence_are_decoded_apart(exact_matmul, product):
    batch = make_batch(np.random.default_rng(0), batch=1, windows=2, mask_tail=4)
    model = dataclasses.replace(toy.make_product(*product, chunk=C), vlm=registry.get("flamingo-neox-3b").tiny())
    params = random_params(model, batch)
    apart = concatenate([window_of(batch, k) for k in range(2)])
    np.testing.assert_allclose(loss_of(model, params, batch)[0], loss_of(model, params, apart)[0], rtol=1e-5)


def test_missing_windows_do_not_count(exact_matmul):
    # The last segment of an episode carries fewer windows; the frames it repeats must not be learned from.
    batch = make_batch(np.random.default_rng(1))
    model = make_model()
    params = random_params(model, batch)
    mask = np.array([[True] * K, [True, True, False, False]])
    loss, _ = loss_of(model, params, batch.replace(window_mask=mask))
    windows = [window_of(batch, k) for k in range(K)]
    kept = concatenate(
        [jax.tree.map(lambda x: x[:1], w) for w in windows] + [jax.tree.map(lambda x: x[1:], w) for w in windows[:2]]
    )
    np.testing.assert_allclose(loss, loss_of(model, params, kept)[0], rtol=1e-5)


def test_text_padding_changes_nothing(exact_matmul):
    # Upstream's action token moves with the batch's longest prompt; ours is placed by mask.
    batch = make_batch(np.random.default_rng(2))
    model = make_model()
    params = random_params(model, batch)
    inputs = batch.inputs
    padded = batch.replace(
        inputs=inputs.replace(
            text_ids=np.pad(np.where(inputs.text_mask, inputs.text_ids, 99), ((0, 0), (0, 9)), constant_values=77),
            text_mask=np.pad(inputs.text_mask, ((0, 0), (0, 9))),
        )
    )
    np.testing.assert_allclose(loss_of(model, params, padded)[0], loss_of(model, params, batch)[0], rtol=1e-6)


def test_what_follows_the_query_is_not_seen(exact_matmul):
    # Causal: eos comes behind the action query, so its id must not matter, while every other token's must.
    batch = make_batch(np.random.default_rng(3))
    model = make_model()
    params = random_params(model, batch)
    last = batch.inputs.text_mask.sum(1) - 1

    def loss(column):
        ids = batch.inputs.text_ids.copy()
        ids[np.arange(B), column] = (ids[np.arange(B), column] + 1) % 100
        return loss_of(model, params, batch.replace(inputs=batch.inputs.replace(text_ids=ids)))[0]

    here = loss_of(model, params, batch)[0]
    assert loss(last) == here
    assert loss(last - 1) != here


@pytest.mark.parametrize("cameras", [("static",), ("wrist", "static"), ("static", "wrist")])
def test_cameras_and_their_order_matter(cameras):
    # A config naming one camera must not read the other, and the order of token blocks is part of the model.
    batch = make_batch(np.random.default_rng(4))
    model = make_model(cameras=cameras)
    params = random_params(model, batch)
    here = loss_of(model, params, batch)[0]
    swapped = make_model(cameras=cameras[::-1])
    if len(cameras) > 1:
        assert loss_of(swapped, params, batch)[0] != here
    else:
        blind = batch.inputs.replace(images={"static": batch.inputs.images["static"]})
        assert loss_of(model, params, batch.replace(inputs=blind))[0] == here


def test_control_steps_equal_the_window(exact_matmul):
    # Serving frame by frame = the last step of the window form over the newest W frames, in dataset units, and
    # compiled once.
    frames = W + K - 1
    batch = make_batch(np.random.default_rng(5), batch=1)
    model = make_model()
    params = random_params(model, batch)
    ids, mask = batch.inputs.text_ids[0], batch.inputs.text_mask[0]
    policy = serving.VLAPolicy(model, params, lambda _: (ids, mask))
    policy.reset("open the drawer")
    for t in range(frames):
        images = {camera: x[0, t] for camera, x in batch.inputs.images.items()}
        chunk = policy.act(Observation(images))
        steps = np.arange(t - W + 1, t + 1)  # in front of the episode stand masked frames of nonsense
        seen = batch.inputs.replace(
            images={camera: x[:, steps] for camera, x in batch.inputs.images.items()}, step_mask=(steps >= 0)[None]
        )
        expected = decider(model)(params, seen)[0, -1]
        np.testing.assert_allclose(chunk.actions[:, :6], 0.65 * expected[:, :6], atol=1e-5)
        np.testing.assert_array_equal(chunk.actions[:, 6], expected[:, 6])
    assert policy._batched._step._cache_size() == 1


def test_slots_are_independent(exact_matmul):
    # Two episodes in one batched policy, started at different times, act as two single policies do.
    batch = make_batch(np.random.default_rng(6))
    model = make_model()
    params = random_params(model, batch)
    texts = {
        "a": (batch.inputs.text_ids[0], batch.inputs.text_mask[0]),
        "b": (batch.inputs.text_ids[1], batch.inputs.text_mask[1]),
    }

    def observation(slot, t):
        return Observation({camera: x[slot, t] for camera, x in batch.inputs.images.items()})

    batched = serving.BatchedVLAPolicy(model, params, texts.__getitem__, slots=3)
    batched.reset([2], ["a"])
    together = {"a": [batched.act([observation(0, 0)], [2])[0]], "b": []}
    batched.reset([0], ["b"])
    for t in range(1, 4):
        first, second = batched.act([observation(0, t), observation(1, t - 1)], [2, 0])
        together["a"].append(first)
        together["b"].append(second)
    for slot, name in enumerate("ab"):
        single = serving.VLAPolicy(model, params, texts.__getitem__)
        single.reset(name)
        for t, chunk in enumerate(together[name]):
            np.testing.assert_allclose(chunk.actions, single.act(observation(slot, t)).actions, atol=1e-6)


def test_bad_observations_are_named():
    batch = make_batch(np.random.default_rng(7))
    model = make_model()
    policy = serving.VLAPolicy(model, random_params(model, batch), lambda _: (np.ones(4, np.int32), np.ones(4, bool)))
    good = {camera: x[0, 0] for camera, x in batch.inputs.images.items()}
    with pytest.raises(RuntimeError, match="reset"):
        policy.act(Observation(good))
    with pytest.raises(ValueError, match="instruction is empty"):
        policy.reset("  ")
    policy.reset("push the block")
    with pytest.raises(ValueError, match="no 'wrist' image"):
        policy.act(Observation({"static": good["static"]}))
    with pytest.raises(ValueError, match="uint8"):
        policy.act(Observation({**good, "static": good["static"].astype(np.float32)}))


def test_bfloat16_backbone_keeps_the_head_in_float32():
    batch = make_batch(np.random.default_rng(8))
    model = make_model()
    params = random_params(model, batch)
    half = vla.VLA(model.config, dataclasses.replace(model.vlm, dtype="bfloat16"))
    loss, metrics = loss_of(half, params, batch)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, loss_of(model, params, batch)[0], rtol=0.05)
    assert all(bool(jnp.isfinite(x)) for x in metrics.values())
