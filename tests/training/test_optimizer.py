"""Optimizers, schedules, rates of parts and the moving average, against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.training import checkpoints
from robovlms_jax.training import optimizer as optimizers
from robovlms_jax.training import state as states
from robovlms_jax.training.config import OptimizerConfig
from robovlms_jax.training.step import make_train_step

TOWER = {
    "backbone/text/embed/table": np.ones((6, 4), np.float32),
    "backbone/text/layers/attn/o/kernel": np.ones((3, 2, 2, 4), np.float32),
    "backbone/text/layers/mlp/up/kernel": np.ones((3, 4, 5), np.float32),
    "backbone/text/final_norm/scale": np.ones(4, np.float32),
    "head/kernel": np.ones((4, 2), np.float32),
}


def updates(config: OptimizerConfig, params=TOWER):
    grads = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), params)
    tx = optimizers.make_optimizer(config, 10)
    return tx.update(grads, tx.init(params), params)[0], grads


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2.0, 2.0, 2.0]),
        ("cosine", [2.0, 2 * (0.1 + 0.9 * 0.5), 0.2]),
        ("step", [2.0, 1.0, 0.5]),
        ("rsqrt", [2.0, 2 * (5 / 15) ** 0.5, 2 * (5 / 25) ** 0.5]),
        ("warmup_stable_decay", [2.0, 2.0, 0.2]),
    ],
)
def test_schedules(schedule, expected):
    # Warm-up first: upstream's first update has rate 0. Then the schedule's closed form.
    config = OptimizerConfig(
        learning_rate=2.0,
        warmup_steps=4,
        schedule=schedule,
        min_scale=0.1,
        step_every=10,
        step_factor=0.5,
        rsqrt_steps=5,
        decay_share=0.25,
    )
    rate = optimizers.learning_rate(config, 24)
    np.testing.assert_allclose([rate(step) for step in (0, 1, 2)], [0.0, 0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose([rate(step) for step in (4, 14, 24)], expected, rtol=1e-6)
    if schedule == "warmup_stable_decay":  # half way through the last quarter of the 20 steps after warm-up
        np.testing.assert_allclose([rate(19), rate(21), rate(22)], [2.0, 2 * 0.64, 2 * 0.46], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_weight_decay_is_decoupled_and_scaled_by_the_learning_rate_in_every_optimizer(name):
    rate, decay = 0.01, 0.5
    with_decay, _ = updates(OptimizerConfig(name=name, learning_rate=rate, weight_decay=decay, clip_norm=0))
    without, _ = updates(OptimizerConfig(name=name, learning_rate=rate, clip_norm=0))
    for path, param in TOWER.items():
        np.testing.assert_allclose(with_decay[path], without[path] - rate * decay * param, rtol=1e-4, atol=1e-6)


def test_muon_orthogonalises_matrices_of_layers_one_by_one_and_leaves_the_rest_to_adam():
    # A wrong axis split of an attention output or stacked layers orthogonalised as one matrix fail here.
    got, _ = updates(OptimizerConfig(name="muon", learning_rate=1.0, clip_norm=0))
    adam, _ = updates(OptimizerConfig(learning_rate=1.0, clip_norm=0))
    for layer in range(3):
        for path, shape in (
            ("backbone/text/layers/attn/o/kernel", (4, 4)),
            ("backbone/text/layers/mlp/up/kernel", (4, 5)),
        ):
            values = np.linalg.svd(np.asarray(got[path][layer]).reshape(shape), compute_uv=False)
            assert values.max() / values.min() < 2.5, (path, values)  # five Newton-Schulz steps: 0.7 to 1.2
    assert np.linalg.cond(np.asarray(adam["backbone/text/layers/mlp/up/kernel"][0])) > 2.5
    # Nesterov momentum apart, Adam's first update is the sign.
    np.testing.assert_allclose(np.sign(got["backbone/text/embed/table"]), np.sign(adam["backbone/text/embed/table"]))


def test_layer_decay_and_rates_multiply_the_update_of_each_part():
    config = OptimizerConfig(learning_rate=1.0, layer_decay=0.5, rates={"^head/": 10.0}, clip_norm=0)
    (got, _), (plain, _) = updates(config), updates(OptimizerConfig(learning_rate=1.0, clip_norm=0))
    factors = {
        "backbone/text/embed/table": 0.125,
        "backbone/text/layers/mlp/up/kernel": np.array([0.25, 0.5, 1.0])[:, None, None],
        "backbone/text/final_norm/scale": 1.0,
        "head/kernel": 10.0,
    }
    for path, factor in factors.items():
        np.testing.assert_allclose(got[path], plain[path] * factor, rtol=1e-6)


def test_layers_between_a_towers_own_are_as_deep_as_those_beside_them():
    params = {"text/layers/up/kernel": np.ones((4, 3, 3)), "text/cross_layers/q/kernel": np.ones((2, 3, 3))}
    rates = optimizers.part_rates(params, OptimizerConfig(layer_decay=0.5, last_layers={"text": 3}))
    np.testing.assert_allclose(rates["text/layers/up/kernel"], [0, 0.25, 0.5, 1])
    np.testing.assert_allclose(rates["text/cross_layers/q/kernel"], [0.25, 1])
    assert optimizers.matrix_axes("text/cross_layers/q/kernel", 3) == optimizers.matrix_axes("text/layers/q/kernel", 3)


def test_only_the_last_layers_move_and_only_their_gradient_is_clipped():
    params = {path: TOWER[path] for path in ("backbone/text/layers/mlp/up/kernel",)}
    config = OptimizerConfig(name="lion", learning_rate=1.0, last_layers={"/text/": 1}, weight_decay=0.1)
    got = updates(config, params)[0]["backbone/text/layers/mlp/up/kernel"]
    assert not np.any(got[:2]) and np.all(got[2] != 0)
    tx = optimizers.make_optimizer(OptimizerConfig(last_layers={"/text/": 1}, clip_norm=1.0), 10)
    grads = {path: np.full(x.shape, 3.0, np.float32) for path, x in params.items()}
    moment = optax.tree.get(tx.update(grads, tx.init(params), params)[1], "mu")
    np.testing.assert_allclose(optax.tree.norm(moment), 0.1, rtol=1e-5)  # (1 - beta1) * a norm of 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(rates={"^haed/": 2.0}), r"optimizer.rates has '\^haed/'"),
        (OptimizerConfig(last_layers={"^head/": 2}), r"optimizer.last_layers has '\^head/'.*stacked"),
        (OptimizerConfig(last_layers={"/text/": 100}), r"last_layers has {'/text/': 100}, and there are \d layers"),
    ],
)
def test_a_pattern_that_is_found_in_nothing_trainable_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        optimizers.make_optimizer(config, 10).init(TOWER)
    with pytest.raises(ValueError, match="layer_decay"):
        optimizers.make_optimizer(OptimizerConfig(layer_decay=0.5), 10).init({"head/kernel": TOWER["head/kernel"]})
    with pytest.raises(ValueError, match="adafactor has neither"):
        OptimizerConfig(name="adafactor", beta1=0.8)


class Quadratic:
    """Loss 0.5 |x - batch|^2 of one parameter."""

    def count(self, batch):
        return jnp.float32(1)

    def __call__(self, params, batch, key, count):
        loss = 0.5 * jnp.sum((params["x"] - jnp.mean(batch, axis=0)) ** 2)
        return loss, {"loss": loss}


def run(config: OptimizerConfig, steps: int, params=None, mesh=None):
    mesh = mesh or meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    tx = optimizers.make_optimizer(config, steps)
    params = {"x": jax.device_put(jnp.zeros(3), meshes.replicated(mesh))} if params is None else params
    state = states.create(params, (".*",), tx, 0, mesh)
    step = make_train_step(Quadratic(), tx, optimizers.learning_rate(config, steps), state, mesh)
    seen = []
    for _ in range(steps):
        state, _ = step(state, jnp.ones((2, 3)))
        seen.append(np.asarray(state.trainable["x"]))
    return state, seen, (tx, mesh, step)


@pytest.mark.parametrize(
    "values",
    [
        *({"weight_decay": -1.0}, {"weight_decay": math.nan}, {"beta1": 1.5}, {"beta2": -1.0}, {"epsilon": -1.0}),
        *({"learning_rate": math.inf}, {"step_factor": -1.0}, {"rates": {"x": math.inf}}, {"last_layers": {"x": 1.5}}),
    ],
)
def test_a_number_that_no_optimizer_can_use_is_named(values):
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(values))}"):
        OptimizerConfig(**values)


def test_the_average_is_its_closed_form_and_the_parameters_move_as_without_it():
    state, seen, _ = run(OptimizerConfig(learning_rate=0.1, ema=0.75), 4)
    _, plain, _ = run(OptimizerConfig(learning_rate=0.1), 4)
    np.testing.assert_allclose(seen, plain, rtol=1e-6)
    expected = 0.75**4 * 0 + sum(0.25 * 0.75 ** (3 - i) * x for i, x in enumerate(seen))
    np.testing.assert_allclose(state.served["x"], expected, rtol=1e-6)
    np.testing.assert_array_equal(state.params["x"], seen[-1])


def test_a_checkpoint_serves_the_average_and_training_goes_on_from_the_parameters(tmp_path):
    config = OptimizerConfig(learning_rate=0.1, ema=0.75)
    state, seen, (tx, mesh, step) = run(config, 3)
    saver = checkpoints.Checkpointer(tmp_path, keep=2, serving={})
    saver.save(state, {})
    saver.wait()
    start = states.create({"x": jax.device_put(jnp.zeros(3), meshes.replicated(mesh))}, (".*",), tx, 0, mesh)
    restored, _ = saver.restore(start)
    served = checkpoints.read_params(
        tmp_path / "checkpoints/3", jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    )
    saver.close()
    np.testing.assert_array_equal(served["x"], state.served["x"])
    np.testing.assert_array_equal(restored.trainable["x"], seen[-1])
    ends = [step(x, jnp.ones((2, 3)))[0] for x in (state, restored)]
    np.testing.assert_array_equal(ends[0].served["x"], ends[1].served["x"])
    np.testing.assert_array_equal(ends[0].params["x"], ends[1].params["x"])


@pytest.mark.parametrize("clips", [True, False])
def test_averaging_can_be_switched_on_and_off_when_a_run_goes_on(clips):
    old, new = OptimizerConfig(learning_rate=0.1), OptimizerConfig(learning_rate=0.1, ema=0.5, clip_norm=float(clips))
    state, _, (_, mesh, _) = run(old, 2)
    on = optimizers.rewrap(state.opt_state, state.trainable, before=old, now=new)
    tx = optimizers.make_optimizer(new, 4)
    assert jax.tree.structure(on) == jax.tree.structure(tx.init(state.trainable))
    off = optimizers.rewrap(on, state.trainable, before=new, now=old)
    jax.tree.map(np.testing.assert_array_equal, off, state.opt_state)
    step = make_train_step(Quadratic(), tx, lambda _: 0.1, state.replace(opt_state=on), mesh)
    assert step(state.replace(opt_state=on), jnp.ones((2, 3)))[0].averages  # buffers are taken over once each


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_what_is_kept_per_parameter_lies_where_it_lies(name):
    mesh = jax.make_mesh((1,), ("x",))
    split, whole = NamedSharding(mesh, PartitionSpec("x")), meshes.replicated(mesh)
    tx = optimizers.make_optimizer(OptimizerConfig(name=name, ema=0.9), 10)
    shapes = {
        "big/kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32),
        "bias": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    found = states.opt_shardings(tx, shapes, dict.fromkeys(shapes, split), mesh)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    shape = {
        jax.tree_util.keystr(k): x.shape
        for k, x in jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, shapes))
    }
    for keys, sharding in leaves:
        name = jax.tree_util.keystr(keys)
        kept = ("['big/kernel']" in name and shape[name] == (256, 512)) or ("['bias']" in name and shape[name] == (8,))
        assert sharding == (split if kept else whole), name
    assert any(sharding == split for _, sharding in leaves)
