"""Extra tokens of the prompt: where they lie, that training and control see the same, that off changes nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from robovlms_jax.config import ProprioConfig
from robovlms_jax.interface import Observation
from robovlms_jax.policies import encoders, objective, rollout
from tests import toy
from tests.toy import B, W

ON = ProprioConfig(enabled=True)


def robot_states(rng, *shape):
    """float32[..., 15] like CALVIN's."""
    state = rng.normal(size=(*shape, 15)).astype(np.float32)
    state[..., 14] = np.sign(state[..., 14])
    return state


def with_states(batch, states):
    return batch.replace(inputs=batch.inputs.replace(proprio=states[..., [0, 1, 2, 3, 4, 5, 14]]))


@pytest.fixture(scope="module")
def on():
    """(model, parameters, batch, robot states float32[B, G, 15])."""
    rng = np.random.default_rng(0)
    batch = toy.make_batch(rng)
    states = robot_states(rng, *batch.inputs.step_mask.shape)
    batch = with_states(batch, states)
    model = toy.make_model(proprio=ON)
    return model, toy.init(model, batch), batch, states


def test_scaled_state_is_centred_and_takes_the_short_way_round():
    config = ProprioConfig(center=(1.0, 2.0, 3.0, 3.0, 0.0, -1.0), scale=(2.0, 1.0, 0.5, 0.5, 1.0, 1.0))
    scaled = encoders.scale_arm(jnp.asarray([2.0, 2.0, 2.0, -3.0, 0.5, -1.5]), config)
    # roll -3 lies 2 pi - 6 beyond roll 3
    np.testing.assert_allclose(scaled, [0.5, 0, -2, (2 * np.pi - 6) / 0.5, 0.5, -0.5], rtol=1e-5)
    raw = ProprioConfig(center=(0.0,) * 6, scale=(1.0,) * 6)
    readings = jnp.asarray([[0.1, -0.2, 0.5, 3.14159, -3.14159, 1.5]])
    np.testing.assert_array_equal(encoders.scale_arm(readings, raw), readings)


def test_token_is_two_encoders_fused(on):
    # Against upstream's formula, written out: fuse([Linear(arm), table[gripper is open]]).
    model, params, batch, _ = on
    p, proprio = params["proprio"], batch.inputs.proprio
    token = encoders.ProprioToken(ON, model.vlm.width).apply({"params": p}, proprio)
    arm = encoders.scale_arm(proprio[..., :6], ON) @ p["arm"]["kernel"] + p["arm"]["bias"]
    gripper = np.asarray(p["gripper"])[((proprio[..., 6] + 1) // 2).astype(int)]
    expected = np.concatenate([arm, gripper], -1) @ p["fuse"]["kernel"] + p["fuse"]["bias"]
    np.testing.assert_allclose(token[..., 0, :], expected, rtol=1e-4, atol=1e-5)


def test_control_sees_the_token_that_training_sees(on, exact_matmul):
    # Raw robot states at control time, chosen columns in training: the last step of a window gives the same actions.
    model, params, batch, states = on
    prepared = jax.jit(lambda inputs: objective.prepare(inputs, model.vlm.image, model.config.cameras))(batch.inputs)
    expected = jax.jit(lambda p, x: model.bind({"params": p}).head.actions(model.apply({"params": p}, x)))
    window = np.asarray(expected(params, prepared)).reshape(B, -1, W, model.config.chunk, 7)[:, 0, -1]
    texts = {str(row): (batch.inputs.text_ids[row], batch.inputs.text_mask[row]) for row in range(B)}
    policy = rollout.BatchedVLAPolicy(model, params, texts.__getitem__, slots=B)
    policy.reset(range(B), list(texts))
    for t in range(W):
        images = [{camera: x[row, t] for camera, x in batch.inputs.images.items()} for row in range(B)]
        chunks = policy.act([Observation(images[row], states[row, t]) for row in range(B)], range(B))
    for row, chunk in enumerate(chunks):
        np.testing.assert_allclose(chunk.actions[:, :6], 0.65 * window[row, :, :6], atol=1e-5)
        np.testing.assert_array_equal(chunk.actions[:, 6], window[row, :, 6])
    with pytest.raises(ValueError, match="needs the robot's state"):
        policy.act([Observation(images[0])], [0])
    with pytest.raises(ValueError, match="one finite robot state"):
        policy.act([Observation(images[0], np.full(15, np.nan))], [0])


def test_switched_off_the_rest_is_bit_identical(on):
    # The token adds parameters and moves none of the others.
    _, params, batch, _ = on
    off = toy.make_model()
    plain = batch.replace(inputs=batch.inputs.replace(proprio=None))
    ours, theirs = flatten_dict(toy.init(off, plain), sep="/"), flatten_dict(params, sep="/")
    assert {path for path in theirs if path not in ours} == {
        *("proprio/arm/kernel", "proprio/arm/bias", "proprio/fuse/kernel", "proprio/fuse/bias", "proprio/gripper"),
    }
    for path, x in ours.items():
        np.testing.assert_array_equal(x, theirs[path], err_msg=path)


def test_the_token_is_learned_from(on):
    # Frames are all alike and the action is a function of the state alone: without the token nothing can be learned.
    model, _, batch, _ = on
    images = {camera: np.zeros_like(x) for camera, x in batch.inputs.images.items()}
    state = batch.inputs.proprio
    actions = batch.actions.copy()
    steps = np.minimum(np.arange(actions.shape[1]), state.shape[1] - 1)
    actions[..., :6] = 0.6 * np.tanh(state[:, steps, :6])
    frame = dataclasses.replace(model, config=dataclasses.replace(model.config, chunk=1, window=1))
    batch = batch.replace(
        inputs=batch.inputs.replace(images=images),
        actions=actions[:, : state.shape[1]],
        action_mask=np.ones(state.shape[:2], bool),
        window_mask=np.ones(state.shape[:2], bool),
    )
    losses = toy.overfit(frame, toy.init(frame, batch), batch, steps=60, learning_rate=1e-2)
    # Errors stay below 1, where Huber is half the square: the best constant costs half the targets' variance.
    blind = 0.5 * np.var(actions[:, : state.shape[1], :6] / 0.65, axis=(0, 1)).mean()
    assert losses[-1] < 0.6 * blind
