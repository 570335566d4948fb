"""Extra inputs and losses: what they compute, that training and control see the same, that off changes nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import unbox
from flax.traverse_util import flatten_dict

from robovlms_jax.control.interface import Observation
from robovlms_jax.control.robot import CALVIN
from robovlms_jax.nn.perceiver import PerceiverConfig
from robovlms_jax.policies import objective, serving
from robovlms_jax.policies.auxiliary_config import AheadConfig, AuxiliaryConfig, ClipConfig, ForwardConfig, SceneConfig
from robovlms_jax.policies.config import ActionHistoryConfig, ProprioConfig
from robovlms_jax.policies.sensors import robot_state
from tests import toy
from tests.toy import B, W

NUMBERS = CALVIN.state[:6]
ON = ProprioConfig(enabled=True)


PAST = ActionHistoryConfig(length=2)
STATE, EXECUTED = robot_state.RobotState(ON, CALVIN.state), robot_state.PastActions(PAST, CALVIN.action)
AUXILIARY = AuxiliaryConfig(
    forward=ForwardConfig(loss_weight=0.1, offsets=(1, 2), patch_size=14, width=8, depth=1, head_dim=4),
    clip=ClipConfig(weights="opened by training alone", dim=5),
    ahead=AheadConfig(loss_weight=0.1, offsets=(3, 5)),
    scene=SceneConfig(loss_weight=0.1, columns=(6, 8)),
    caption_weight=0.1,
)
RESAMPLER = PerceiverConfig(num_latents=2, depth=1, num_heads=2, head_dim=4)


def make_model(**changes):
    """A small policy with every module switched on."""
    model = toy.make_model(**{"proprio": ON, "action_history": PAST, "auxiliary": AUXILIARY, **changes})
    return dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, resampler=RESAMPLER))


def robot_states(rng, *shape):
    """float32[..., 15] like CALVIN's."""
    state = rng.normal(size=(*shape, 15)).astype(np.float32)
    state[..., 14] = np.sign(state[..., 14])
    return state


def complete(batch, states):
    """The batch with all that the modules look at; the actions before a frame are those of the frames before it."""
    rng, frames = np.random.default_rng(1), batch.inputs.step_mask.shape[1]
    past = np.pad(batch.actions[:, : frames - 1], ((0, 0), (PAST.length, 0), (0, 0)), constant_values=np.nan)
    sentence = rng.normal(size=(B, 5)).astype(np.float32)
    return batch.replace(
        inputs=batch.inputs.replace(sensors={"proprio": states[..., [0, 1, 2, 3, 4, 5, 14]], "action_history": past}),
        future={camera: x[:, :2] for camera, x in batch.inputs.images.items()},
        future_mask=np.ones((B, 2), bool),
        sentence=sentence / np.linalg.norm(sentence, axis=1, keepdims=True),
        ahead=rng.normal(size=(B, batch.window_mask.shape[1], 2, 3)).astype(np.float32),
        scene=rng.normal(size=(B, batch.window_mask.shape[1], 2)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def on():
    """(model with every module, parameters, batch, robot states float32[B, G, 15])."""
    rng = np.random.default_rng(0)
    batch = toy.make_batch(rng)
    states = robot_states(rng, *batch.inputs.step_mask.shape)
    batch = complete(batch, states)
    model = make_model()
    return model, toy.random_params(model, batch), batch, states


def test_scaled_state_is_centred_and_takes_the_short_way_round():
    config = ProprioConfig(center=(1.0, 2.0, 3.0, 3.0, 0.0, -1.0), scale=(2.0, 1.0, 0.5, 0.5, 1.0, 1.0))
    scaled = robot_state.scale_state(jnp.asarray([2.0, 2.0, 2.0, -3.0, 0.5, -1.5]), config, NUMBERS)
    # roll -3 lies 2 pi - 6 beyond roll 3
    np.testing.assert_allclose(scaled, [0.5, 0, -2, (2 * np.pi - 6) / 0.5, 0.5, -0.5], rtol=1e-5)
    raw = ProprioConfig(center=(0.0,) * 6, scale=(1.0,) * 6)
    readings = jnp.asarray([[0.1, -0.2, 0.5, 3.14159, -3.14159, 1.5]])
    np.testing.assert_array_equal(robot_state.scale_state(readings, raw, NUMBERS), readings)


def test_token_is_two_encoders_fused(on):
    # Against upstream's formula, written out: fuse([Linear(arm), table[gripper is open]]).
    model, params, batch, _ = on
    p, proprio = params["proprio"], batch.inputs.sensors["proprio"]
    token, _ = robot_state.ProprioToken(STATE, model.vlm.width).apply({"params": p}, proprio)
    arm = robot_state.scale_state(proprio[..., :6], ON, NUMBERS) @ p["arm"]["kernel"] + p["arm"]["bias"]
    gripper = np.asarray(p["gripper"])[((proprio[..., 6] + 1) // 2).astype(int)]
    expected = np.concatenate([arm, gripper], -1) @ p["fuse"]["kernel"] + p["fuse"]["bias"]
    np.testing.assert_allclose(token[..., 0, :], expected, rtol=1e-4, atol=1e-5)


def test_past_actions_are_told_apart_by_age_and_by_whether_they_were(on):
    # Token of age a of frame g = encoder(action g - H + a) + age[a]; before the episode, the age alone.
    model, params, batch, _ = on
    p = params["action_history"]
    past = model.config.normalizer.normalize(batch.inputs.sensors["action_history"])
    tokens, _ = robot_state.ActionHistory(EXECUTED, model.vlm.width).apply({"params": p}, past)
    assert tokens.shape == (*batch.inputs.step_mask.shape, 2, model.vlm.width)
    np.testing.assert_array_equal(tokens[:, 0], np.broadcast_to(p["age"], tokens[:, 0].shape))
    np.testing.assert_array_equal(tokens[:, 1, 0], np.broadcast_to(p["age"][0], tokens[:, 1, 0].shape))
    action = past[1, 2 + 3 - 1]  # the newest one that frame 3 of segment 1 knows
    x = action[:6] @ p["arm"]["kernel"] + action[6:] @ p["gripper"]["kernel"]
    x = x + p["arm"]["bias"] + p["gripper"]["bias"]
    for layer in ("mix", "out"):
        x = x @ p[layer]["kernel"] + p[layer]["bias"]
    np.testing.assert_allclose(tokens[1, 3, 1], x + p["age"][1], rtol=1e-4, atol=1e-5)


def test_untold_frames_know_no_past_action():
    config = ActionHistoryConfig(length=2, dropout=0.5)
    module, past = (
        robot_state.ActionHistory(robot_state.PastActions(config, CALVIN.action), 8),
        np.ones((1, 60, 7), np.float32),
    )
    params = jax.jit(module.init)(jax.random.key(0), past)
    tokens, _ = module.apply(params, past, deterministic=False, rngs={"dropout": jax.random.key(1)})
    told = np.asarray(module.apply(params, past)[0] == tokens).all(axis=(2, 3))[0]
    assert 10 < told.sum() < 50


def test_untold_frames_know_no_state():
    # Of frames that are not told, tokens are all the same whatever the state is; deterministic calls tell every frame.
    config = ProprioConfig(enabled=True, dropout=0.5)
    module = robot_state.ProprioToken(robot_state.RobotState(config, CALVIN.state), 8)
    state = np.random.default_rng(0).normal(size=(1, 60, 7)).astype(np.float32)
    params = jax.jit(module.init)(jax.random.key(0), state)
    some = module.apply(params, state, deterministic=False, rngs={"dropout": jax.random.key(1)})[0][0, :, 0]
    told = np.asarray(some == module.apply(params, state)[0][0, :, 0]).all(axis=1)
    assert 10 < told.sum() < 50
    assert (np.asarray(some)[~told] == 0).all()  # the last bias, zero here
    assert len(np.unique(np.asarray(some)[told], axis=0)) == told.sum()


def test_control_sees_what_training_sees(on, exact_matmul):
    # Raw robot states and executed actions at control time: the last step of a window gives training's actions.
    model, params, batch, states = on
    prepared = jax.jit(lambda inputs: objective.prepare(inputs, model.vlm.image, model.config.cameras))(batch.inputs)
    expected = jax.jit(lambda p, x: model.bind({"params": p}).head.actions(model.apply({"params": p}, x)))
    window = np.asarray(expected(params, prepared)).reshape(B, -1, W, model.config.chunk, 7)[:, 0, -1]
    texts = {str(row): (batch.inputs.text_ids[row], batch.inputs.text_mask[row]) for row in range(B)}
    policy = serving.BatchedVLAPolicy(model, params, texts.__getitem__, slots=B)
    policy.reset(range(B), list(texts))
    for t in range(W):
        seen = [
            Observation(
                {camera: x[row, t] for camera, x in batch.inputs.images.items()},
                states[row, t],
                executed=batch.actions[row, max(t - 1, 0) : t],
            )
            for row in range(B)
        ]
        chunks = policy.act(seen, range(B))
    for row, chunk in enumerate(chunks):
        np.testing.assert_allclose(chunk.actions[:, :6], 0.65 * window[row, :, :6], atol=1e-5)
        np.testing.assert_array_equal(chunk.actions[:, 6], window[row, :, 6])
    # What is not said was the first action of the last chunk.
    told = policy.act([dataclasses.replace(x, executed=chunks[i].actions[:1]) for i, x in enumerate(seen)], range(B))
    policy.reset(range(B), list(texts))
    for t in range(W):
        images = [{camera: x[row, t] for camera, x in batch.inputs.images.items()} for row in range(B)]
        before = batch.actions[:, max(t - 1, 0) : t]
        policy.act([Observation(images[i], states[i, t], executed=before[i]) for i in range(B)], range(B))
    untold = policy.act([dataclasses.replace(x, executed=None) for x in seen], range(B))
    np.testing.assert_array_equal(untold[0].actions, told[0].actions)
    with pytest.raises(ValueError, match="needs the robot's state"):
        policy.act([dataclasses.replace(seen[0], proprio=None)], [0])
    with pytest.raises(ValueError, match="one finite robot state"):
        policy.act([dataclasses.replace(seen[0], proprio=np.full(15, np.nan))], [0])


def test_switched_off_the_rest_is_bit_identical(on):
    # Modules add parameters and move none of the others. Of the values a part of each room stands for all: the compiler
    # then leaves out the rest.
    model, params, batch, _ = on
    off = toy.make_model()
    shapes = flatten_dict(jax.tree.map(jnp.shape, toy.random_params(off, batch)), sep="/")
    with_modules = flatten_dict(jax.tree.map(jnp.shape, params), sep="/")
    added = {path.replace("backbone/", "").split("/")[0] for path in with_modules if path not in shapes}
    assert added == {"proprio", "action_history", "auxiliary", "resampler"}
    assert shapes.items() <= with_modules.items()

    def some(model):
        inputs = toy.example(model, batch)
        chosen = (
            "head/arm",
            "head/lstm_1",
            "readout",
            "backbone/text/embed",
            "backbone/connector",
            "backbone/vision/cls",
        )

        def make():
            flat = flatten_dict(unbox(model.init(jax.random.key(0), inputs)["params"]), sep="/")
            return {path: x for path, x in flat.items() if path.startswith(chosen)}

        return jax.jit(make)()

    values, others = some(off), some(model)
    assert len(values) > 12
    for path, x in values.items():
        np.testing.assert_array_equal(x, others[path], err_msg=path)


def test_every_module_learns_on_one_batch(on):
    # Frames are all alike; three arm dimensions follow from the robot's state and three from the action before, so the
    # loss only falls below what the better one of them alone explains if both tokens are read. Auxiliary losses have
    # something to learn each: the coming frame, the sentence's embedding, where the robot will be and where things are,
    # the prompt.
    _, _, batch, _ = on
    frames = batch.inputs.step_mask.shape[1]
    state, past = batch.inputs.sensors["proprio"], batch.inputs.sensors["action_history"][:, 1 : 1 + frames]
    actions = batch.actions[:, :frames].copy()
    actions[..., :3], actions[..., 3:6] = 0.6 * np.tanh(state[..., :3]), 0.6 * np.nan_to_num(past[..., 3:6])

    def still(images, length):
        return {camera: np.repeat(x[:1, :1], length, axis=1).repeat(B, axis=0) for camera, x in images.items()}

    batch = batch.replace(
        inputs=batch.inputs.replace(images=still(batch.inputs.images, frames)),
        future=still(batch.inputs.images, 2),
        actions=actions,
        action_mask=np.ones((B, frames), bool),
        window_mask=np.ones((B, frames), bool),
        ahead=0.1 * state[:, :, None, :3].repeat(2, axis=2),
        scene=np.full((B, frames, 2), (0.3, -0.2), np.float32),
    )
    model = make_model(chunk=1, window=1)
    params = toy.random_params(model, batch)
    metrics = toy.curves(model, params, batch, steps=200, learning_rate=6e-3)
    # Errors stay below 1, where Huber is half the square: the best constant costs half the targets' variance.
    blind = 0.5 * np.var(actions[..., :6] / 0.65, axis=(0, 1)).sum() / 6
    assert metrics["loss_arm"][-1] < 0.2 * blind  # measured: 0.013 of it
    for name, share in (("forward", 0.7), ("clip", 0.5), ("ahead", 0.5), ("scene", 0.1), ("caption", 0.5)):
        assert metrics[f"loss_{name}"][-1] < share * metrics[f"loss_{name}"][0], name
