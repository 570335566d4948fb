"""Sensors: each solves what only it can tell, control sees what training sees, silence is what dropout made."""

from __future__ import annotations

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robovlms_jax.control.interface import Observation
from robovlms_jax.nn.linear import Kernel
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies import objective, observed, serving
from robovlms_jax.policies.config import PolicyConfig, ProprioConfig
from robovlms_jax.policies.heads import mlp
from robovlms_jax.policies.sensors import audio, base, depth, imu, lidar, pointcloud, vector
from robovlms_jax.schema import from_dict, to_dict
from tests import toy

SENSORS = (
    vector.VectorConfig("torque", size=5, scale=(2.0,) * 5),
    imu.ImuConfig(samples=2, frames=8, scale=(1.0,) * 6),
    lidar.LidarConfig(num_ranges=24, max_range=4.0, patch_size=12),
    pointcloud.PointCloudConfig(num_points=12, num_tokens=2),
    depth.DepthConfig(height=8, width=8, patch_size=4),
    audio.AudioConfig(sample_rate=4000, samples=200, frames=2, window=100, hop=50, num_mels=12, patch_frames=3),
)
"""One of every kind, small."""
NAMES = tuple(sensor.name for sensor in SENSORS)


def readings(rng: np.random.Generator, sides: np.ndarray) -> dict[str, np.ndarray]:
    """What each sensor reads where bool[n, 6] says which of two things is there: name -> float32[n, past + 1, ...].

    torque: the sign of the third joint's. imu: shaken fast or slowly. lidar, depth: something near on the left or the
    right. pointcloud: a heap of points on one side. audio: a high or a low tone.
    """
    n = len(sides)
    torque = rng.normal(size=(n, 1, 5))
    torque[:, 0, 2] = np.where(sides[:, 0], 1, -1) * rng.uniform(0.5, 2, n)
    phase = rng.uniform(0, 2 * np.pi, (n, 1))
    shaken = np.sin(np.where(sides[:, 1:2], 1.8, 0.5) * np.arange(16) + phase)
    axis = rng.normal(size=(n, 1, 6))
    ranges = rng.uniform(3, 5, (n, 1, 24))
    ranges[ranges > 4.5] = np.inf
    left = rng.integers(0, 8, n) + np.where(sides[:, 2], 0, 12)
    ranges[np.arange(n)[:, None], 0, left[:, None] + np.arange(5)] = 0.5
    points = rng.normal(size=(n, 1, 12, 3)) * 0.3
    points[..., 0] += np.where(sides[:, 3], 1, -1)[:, None, None]
    points[:, 0, rng.integers(9, 12) :] = np.nan
    pictures = rng.uniform(1.5, 2.5, (n, 1, 8, 8))
    for i, side in enumerate(sides[:, 4]):
        row, column = rng.integers(0, 4), rng.integers(0, 2) + (0 if side else 4)
        pictures[i, 0, row : row + 5, column : column + 3] = 0.2
    time = np.arange(400) / 4000
    sound = 0.3 * np.sin(2 * np.pi * np.where(sides[:, 5:], 1200, 300) * time + phase)
    sound = sound + 0.01 * rng.normal(size=sound.shape)
    parts = (torque, (shaken[..., None] * axis).reshape(n, 8, 2, 6), ranges, points, pictures, sound.reshape(n, 2, 200))
    out = {}
    for sensor, values in zip(SENSORS, parts, strict=True):
        flat = sensor.reading.convert(values.reshape(-1, *values.shape[2:]))[0]
        out[sensor.name] = flat.reshape(values.shape).astype(np.float32)
    return out


def batch_of(rng: np.random.Generator, size: int, chunk: int = 1):
    """Single frames: the arm's dimension i follows from sensor i alone."""
    batch = toy.make_batch(rng, window=1, batch=1, windows=1, chunk=chunk)
    batch = jax.tree.map(lambda x: np.broadcast_to(x, (size, *x.shape[1:])), batch)
    sides = rng.random((size, 6)) < 0.5
    values = readings(rng, sides)
    actions = np.concatenate([np.where(sides, 0.4, -0.4), np.ones((size, 1))], axis=1)
    masks = {name: np.ones(x.shape[:2], bool) for name, x in values.items()}
    inputs = batch.inputs.replace(sensors=values, sensor_mask=masks)
    return batch.replace(inputs=inputs, actions=np.repeat(actions[:, None], chunk, axis=1).astype(np.float32))


class Alone(nn.Module):
    """A linear layer on every sensor's mean token, without anything between."""

    @nn.compact
    def __call__(self, values, masks, deterministic=True):
        """-> float32[n, 6], the logit of each sensor's own question."""
        logits = []
        for sensor in SENSORS:
            module = base.build(sensor, 16, Kernel(), name=sensor.scope)
            tokens, told = module(values[sensor.name], masks[sensor.name], deterministic=deterministic)
            mean = (tokens * told[..., None]).sum(axis=2) / jnp.maximum(told.sum(axis=2)[..., None], 1)
            logits.append(nn.Dense(1, name=f"answer_{sensor.name}")(mean)[:, 0, 0])
        return jnp.stack(logits, axis=1)


def fit(loss, params, data, *, learning_rate: float):
    """Parameters after one Adam step for each of the batches, leaves [steps, ...] of `data`, with dropout."""
    steps = len(jax.tree.leaves(data)[0])
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    tx = optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)))  # as in `toy.curves`

    def step(state, data):
        params, opt_state, key = state
        key, used = jax.random.split(key)
        updates, opt_state = tx.update(jax.grad(loss)(params, data, used), opt_state)
        return (optax.apply_updates(params, updates), opt_state, key), None

    run = jax.jit(lambda params, data: jax.lax.scan(step, (params, tx.init(params), jax.random.key(0)), data)[0][0])
    return run(params, data)


def stacked(seed: int, count: int, size: int):
    """Batches, leaves [count, size, ...]."""
    whole = batch_of(np.random.default_rng(seed), count * size)
    return jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), whole)


def assert_each_sensor_answers_its_own_question(answer, tested, *, told: float, others: float) -> None:
    """answer: `Inputs` -> float[n, 6]; right where its signs are those of the recorded arm."""

    def accuracy(inputs) -> np.ndarray:
        return ((np.asarray(answer(inputs)) > 0) == (tested.actions[:, 0, :6] > 0)).mean(axis=0)

    right = accuracy(tested.inputs)
    assert (right > told).all(), dict(zip(NAMES, right))
    for index, name in enumerate(NAMES):
        masks = {**tested.inputs.sensor_mask, name: np.zeros_like(tested.inputs.sensor_mask[name])}
        without = accuracy(tested.inputs.replace(sensor_mask=masks))
        assert abs(without[index] - 0.5) < 0.12, (name, without)
        assert (np.delete(without, index) > others).all(), (name, without)


def test_what_only_one_sensor_tells_is_learned_by_its_encoder_and_is_chance_without_it():
    model, data = Alone(), stacked(0, 120, 64)
    first = jax.tree.map(lambda x: x[0], data.inputs)
    params = toy.random_init(model, first.sensors, first.sensor_mask)["params"]

    def loss(params, data, key):
        inputs = data.inputs
        rngs = {"dropout": key}
        logits = model.apply({"params": params}, inputs.sensors, inputs.sensor_mask, deterministic=False, rngs=rngs)
        return optax.sigmoid_binary_cross_entropy(logits, data.actions[:, 0, :6] > 0).mean()

    params = fit(loss, params, data, learning_rate=1e-2)
    apply = jax.jit(lambda inputs: model.apply({"params": params}, inputs.sensors, inputs.sensor_mask))
    tested = batch_of(np.random.default_rng(1), 400)
    assert_each_sensor_answers_its_own_question(apply, tested, told=0.93, others=0.93)


@pytest.mark.slow
def test_what_only_one_sensor_tells_is_learned_by_a_policy_and_is_chance_without_it():
    model, data = make_policy(), stacked(0, 500, 32)
    params = toy.init(model, jax.tree.map(lambda x: x[0], data))
    params = fit(lambda p, data, key: objective.RobotLoss(model)(p, data, key)[0], params, data, learning_rate=1e-3)
    tested = batch_of(np.random.default_rng(1), 256)
    predict = jax.jit(
        lambda inputs: objective.RobotLoss(model).predict(params, tested.replace(inputs=inputs))[0][:, 0, 0, :6]
    )
    assert_each_sensor_answers_its_own_question(predict, tested, told=0.93, others=0.85)


def make_policy(**changes):
    """A tiny policy with every kind of sensor."""
    head = mlp.MLPHeadConfig(hidden_size=32, trunk=(32,))
    settings = {"history": "one_step", "window": 1, "chunk": 1, "head": head, "cameras": ("static",)}
    return toy.make_model(sensors=SENSORS, **{**settings, **changes})


# Between control steps.


def test_control_reads_what_training_reads_and_a_silent_sensor_is_the_dropped_one(exact_matmul, caplog):
    # Window 1, G = 4 frames: the readings of a frame and, of imu and audio, of those before it. At frame 2 some sensors
    # are silent; training's mask says so. Fails if control shifts, repeats or keeps readings otherwise.
    frames, silent = 4, ("torque", "imu", "depth")
    model = make_policy(proprio=ProprioConfig(enabled=True, dropout=0.5))
    rng = np.random.default_rng(0)
    batch = toy.make_batch(rng, window=1, batch=1, windows=frames, chunk=1)
    sides = rng.random((frames, 6)) < 0.5
    read = {name: x[:, -1] for name, x in readings(rng, sides).items()}  # the newest reading of each frame
    values, masks = {}, {}
    for sensor in SENSORS:
        past = sensor.reading.past
        masks[sensor.name] = np.ones((1, past + frames), bool)
        values[sensor.name] = np.concatenate([read[sensor.name][:1]] * past + [read[sensor.name]])[None]
        if sensor.name in silent:
            masks[sensor.name][:, past + 2], values[sensor.name][:, past + 2] = False, 0
    states = rng.normal(size=(1, frames, 7)).astype(np.float32)
    masks["proprio"] = np.array([[True, True, False, True]])
    values["proprio"] = np.where(masks["proprio"][..., None], states, 0)
    batch = batch.replace(inputs=batch.inputs.replace(sensors=values, sensor_mask=masks))
    params = toy.random_params(model, batch)
    predicted, *_ = jax.jit(lambda batch: objective.RobotLoss(model).predict(params, batch))(batch)
    text = batch.inputs.text_ids[0], batch.inputs.text_mask[0]
    policy = serving.VLAPolicy(model, params, lambda _: text)
    policy.reset("open the drawer")
    for t in range(frames):
        seen = {name: x[t] for name, x in read.items() if t != 2 or name not in silent}
        if t != 2:
            seen["proprio"] = states[0, t]
        images = {"static": batch.inputs.images["static"][0, t]}
        actions = policy.act(Observation(images, sensors=seen)).actions
        np.testing.assert_allclose(actions[0, :6], predicted[t, 0, 0, :6], atol=1e-5)
    said = [record.getMessage() for record in caplog.records if "goes on without" in record.getMessage()]
    assert len(said) == 4 and "slot 0: no reading of sensor 'torque'" in " ".join(said)
    # Bit for bit: what a silent sensor said before leaves no trace in a frame without history.
    quiet = []
    for changed in (1.0, 2.0):
        policy.reset("open the drawer")
        policy.act(Observation(images, sensors={**seen, "torque": seen["torque"] + changed}))
        without = {name: x for name, x in seen.items() if name != "torque"}
        quiet.append(policy.act(Observation(images, sensors=without)).actions)
    np.testing.assert_array_equal(*quiet)
    assert not np.array_equal(quiet[0], policy.act(Observation(images, sensors=seen)).actions)
    policy.act(Observation(images, sensors=seen | {"torqe": seen["torque"]}))
    policy.act(Observation(images, sensors=seen | {"torqe": seen["torque"]}))
    unread = [record.getMessage() for record in caplog.records if "does not read" in record.getMessage()]
    assert len(unread) == 1 and "'torqe', which this policy does not read" in unread[0] and "'torque'?" in unread[0]
    with pytest.raises(ValueError, match=r"slot 0: observation.sensors\['depth'\].*12 numbers per frame; expected 64"):
        policy.act(Observation(images, sensors={"depth": np.zeros((3, 4))}))
    with pytest.raises(ValueError, match=r"observation.sensors\['torque'\] has values that are not finite"):
        policy.act(Observation(images, sensors={"torque": np.array([0, 0, np.inf, 0, 0])}))


def test_a_sensor_without_an_entry_and_one_that_is_none_are_silent_alike():
    for sensor in SENSORS:
        assert sensor.observe(Observation({}, sensors={sensor.name: None})) is None
        assert sensor.observe(Observation({})) is None
    with pytest.raises(ValueError, match=r"slot 2: observation\.sensors is a NoneType; expected name -> reading"):
        observed.check(Observation({}, sensors=None), PolicyConfig(sensors=SENSORS), 2)


@pytest.mark.parametrize(
    ("sensor", "shape"),
    [
        (depth.DepthConfig(height=8, width=4, patch_size=4), (4, 8)),
        (imu.ImuConfig(samples=2), (6, 2)),
        (pointcloud.PointCloudConfig(num_points=12), (3, 12)),
    ],
)
def test_readings_whose_axes_are_swapped_are_refused_and_flat_ones_are_not(sensor, shape):
    with pytest.raises(ValueError, match=rf"its shape is \[{shape[0]}, {shape[1]}\]; expected"):
        sensor.observe(Observation({}, sensors={sensor.name: np.ones(shape, np.float32)}))
    for right in (np.ones(shape[::-1]), np.ones(shape[::-1]).ravel(), np.ones((*shape[::-1], 1))[..., 0]):
        assert sensor.observe(Observation({}, sensors={sensor.name: right})).shape == sensor.reading.shape


def test_dropout_masks_whole_frames_and_masked_tokens_are_zero():
    sensor = dataclasses.replace(SENSORS[0], dropout=0.5)
    module, values = base.build(sensor, 8, Kernel()), np.ones((1, 60, 5), np.float32)
    mask = np.arange(60)[None] != 7
    params = jax.jit(module.init)(jax.random.key(0), values, mask)
    tokens, told = module.apply(params, values, mask, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert told.shape == (1, 60, 1) and 10 < told.sum() < 50 and not told[0, 7, 0]
    assert (np.asarray(tokens)[~np.asarray(told)] == 0).all() and (np.asarray(tokens)[np.asarray(told)] != 0).any()


# Configurations.


def test_a_checkpoint_remembers_every_kind_of_sensor():
    assert {sensor.kind for sensor in SENSORS} == set(base.SensorConfig.kinds())
    config = PolicyConfig(sensors=SENSORS)
    assert from_dict(PolicyConfig, json.loads(json.dumps(to_dict(config)))) == config
    shapes, _ = meshes.abstract_params(
        lambda: make_policy().init(jax.random.key(0), *_inputs(make_policy()))["params"],
        meshes.make_mesh((1, 1, 1), jax.devices()[:1]),
    )
    assert {f"sensors_{name}" for name in NAMES} <= set(shapes)


def _inputs(model):
    return (toy.make_batch(np.random.default_rng(0), window=1, batch=1, windows=1).inputs.replace(
        images={"static": np.zeros((1, 1, *[model.vlm.image.size] * 2, 3), np.float32)},
        **base.blank(SENSORS, 1, 1),
    ),)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vector.VectorConfig(size=3, scale=(1.0,)), r"policy\.sensors\.vector\.scale has 1 numbers"),
        (lambda: vector.VectorConfig("proprio"), "settings of their own"),
        (lambda: vector.VectorConfig("query"), "'query' is taken by other tokens"),
        (lambda: vector.VectorConfig("a b"), "letters, digits and underscores"),
        (lambda: vector.VectorConfig(dropout=1.0), r"policy\.sensors\.vector\.dropout=1\.0 must lie"),
        (lambda: vector.VectorConfig(size="7"), r"policy\.sensors\.size='7' is a str; expected int"),
        (lambda: imu.ImuConfig(samples=1, frames=3), "set policy.sensors.imu.frames higher"),
        (lambda: lidar.LidarConfig(num_ranges=100), r"patch_size=30 must divide num_ranges=100"),
        (lambda: depth.DepthConfig(height=60), "must divide height=60"),
        (lambda: audio.AudioConfig(frames=1), "set frames higher"),
        (lambda: pointcloud.PointCloudConfig(center=(0.0,)), "need a number each"),
        (lambda: PolicyConfig(sensors=(SENSORS[0], SENSORS[0])), "not unique"),
        (lambda: from_dict(PolicyConfig, {"sensors": [{"kind": "sonar"}]}), "no sensor 'sonar'. Registered:"),
        (lambda: from_dict(PolicyConfig, {"sensors": [{"kind": "imu", "frame": 3}]}), "did you mean 'frames'"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
