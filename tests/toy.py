"""A tiny policy and random batches, shared by tests."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import unbox
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.backbones import registry
from robovlms_jax.control.interface import Observation
from robovlms_jax.policies import objective, serving, vla
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads import attention, discrete, flow, gpt, lstm, mlp
from robovlms_jax.runs import drawing
from robovlms_jax.types import Batch, Inputs

W, K, C, T, B = 3, 4, 5, 7, 2
HEAD = lstm.LSTMHeadConfig(hidden_size=8, num_layers=2, trunk=(12,))


HEADS = {
    "attention": attention.AttentionHeadConfig(hidden_size=16, num_heads=8, trunk=(12,)),
    "discrete": discrete.DiscreteHeadConfig(num_bins=32),
    "flow": flow.FlowHeadConfig(hidden_size=16, num_layers=1, num_heads=2, num_steps=3),
    "gpt": gpt.GPTHeadConfig(hidden_size=8, num_layers=2, num_heads=2, dropout=0.0, trunk=(12,)),
    "lstm": HEAD,
    "mlp": mlp.MLPHeadConfig(hidden_size=8, trunk=(12,)),
}
"""A small configuration of every head."""


def make_product(history: str, readout: str, head: str, **changes) -> vla.VLA:
    """A small policy of that structure; chunks of two actions keep token decoding short."""
    window = {"window": 1} if history == "one_step" else {}
    settings = {"history": history, "readout": readout, "head": HEADS[head], "num_queries": 2, "chunk": 2, **window}
    return make_model(**(settings | changes))


def make_model(**changes) -> vla.VLA:
    config = PolicyConfig(**{"window": W, "chunk": C, "head": HEAD, **changes})
    vlm = registry.get("kosmos-2").tiny()
    # One layer that sees: what a policy does with pictures begins behind the tower, which tests of backbones compare.
    return vla.VLA(config, dataclasses.replace(vlm, vision=dataclasses.replace(vlm.vision, depth=1)))


def make_batch(
    rng: np.random.Generator, *, window: int = W, batch: int = B, mask_tail: int = 0, windows: int = K, chunk: int = C
) -> Batch:
    frames = window + windows - 1
    steps = frames + chunk - 1
    actions = rng.uniform(-1, 1, (batch, steps, 7)).astype(np.float32)
    actions[..., 6] = np.sign(actions[..., 6])
    lengths = rng.integers(3, T + 1, batch)
    return Batch(
        inputs=Inputs(
            images={
                "static": rng.integers(0, 256, (batch, frames, 20, 20, 3), dtype=np.uint8),
                "wrist": rng.integers(0, 256, (batch, frames, 12, 12, 3), dtype=np.uint8),
            },
            text_ids=rng.integers(4, 100, (batch, T)).astype(np.int32),
            text_mask=np.arange(T) < lengths[:, None],
            step_mask=np.ones((batch, frames), bool),
        ),
        actions=actions,
        action_mask=np.broadcast_to(np.arange(steps) < steps - mask_tail, (batch, steps)),
        window_mask=np.ones((batch, windows), bool),
        episode=np.zeros(batch, np.int32),
        corrupt=np.full(batch, -1, np.int32),
    )


def as_read(vlm, batch: Batch) -> Batch:
    """The batch with what the connector reads beside the prompts, where it has a tokenizer of its own."""
    if not vlm.connector_tokenizer:
        return batch
    inputs = batch.inputs
    ids, mask = np.stack([inputs.text_ids, inputs.text_ids[:, ::-1]], -1), np.stack([inputs.text_mask] * 2, -1)
    return batch.replace(inputs=inputs.replace(text_ids=ids, text_mask=mask))


def example(model: vla.VLA, batch: Batch) -> Inputs:
    """The batch's inputs as the model takes them."""
    prepare = jax.jit(lambda inputs: objective.prepare(inputs, model.vlm.image, model.config.cameras))
    return prepare(batch.inputs)


def init(model: vla.VLA, batch: Batch):
    """Parameters as `init` makes them, but for the queries. The same for batches of the same shapes."""
    params = _init(model, *_described(batch.inputs))
    return jax.tree.map(lambda x: x, params)  # dicts of the caller's own


@functools.lru_cache
def _init(model: vla.VLA, tree, leaves):
    inputs = jax.tree.unflatten(tree, [np.zeros(shape, dtype) for shape, dtype in leaves])
    prepare = functools.partial(objective.prepare, spec=model.vlm.image, cameras=model.config.cameras)
    params = initial(lambda key: model.init(key, prepare(inputs))["params"], 0)
    # Queries start at zero; random ones exercise their path.
    if "readout" in params:
        params["readout"]["queries"] = jax.random.normal(jax.random.key(1), params["readout"]["queries"].shape)
    return params


def initial(init, seed: int):
    """`init(jax.random.key(seed))`, compiled only where a run would compile it; see `runs.drawing`."""
    traced = drawing.trace(init)
    shapes = flatten_dict(unbox(traced.shapes), sep="/")
    drawn = jax.device_put(drawing.draw(traced, seed, shapes))
    if left := shapes.keys() - drawn.keys():
        drawn |= jax.jit(lambda key: {path: flatten_dict(unbox(init(key)), sep="/")[path] for path in left})(
            jax.random.key(seed)
        )
    return unflatten_dict(drawn, sep="/")


def overfit(model: vla.VLA, params, batch: Batch, *, steps: int, learning_rate: float) -> np.ndarray:
    """Losses float[steps] of Adam on one batch, compiled as one loop."""
    return curves(model, params, batch, steps=steps, learning_rate=learning_rate)["loss"]


def curves(model: vla.VLA, params, batch: Batch, *, steps: int, learning_rate: float) -> dict[str, np.ndarray]:
    """Every metric of `overfit`, float[steps] each."""
    # On one long vector: kernels of its own for each parameter take longer to compile.
    tx, batch = optax.flatten(optax.adam(learning_rate)), jax.tree.map(jnp.asarray, batch)

    def step(state, _):
        params, opt_state = state
        grads, metrics = jax.grad(lambda params: objective.RobotLoss(model)(params, batch), has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), metrics

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), None, steps)[1])
    return jax.device_get(run(params))


def param_shapes(model: vla.VLA, batch: Batch):
    """Shapes and types of the parameters that `init` makes."""
    return _param_shapes(model, *_described(batch.inputs))


@functools.lru_cache
def _param_shapes(model: vla.VLA, tree, leaves):
    inputs = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    prepare = functools.partial(objective.prepare, spec=model.vlm.image, cameras=model.config.cameras)
    return unbox(jax.eval_shape(lambda inputs: model.init(jax.random.key(0), prepare(inputs)), inputs))["params"]


def _described(inputs: Inputs):
    """Their tree, shapes and types, which can be looked up."""
    leaves, tree = jax.tree.flatten(inputs)
    return tree, tuple((x.shape, str(x.dtype)) for x in leaves)


def random_params(model: vla.VLA, batch: Batch):
    """Parameters as large as `init` makes them, without compiling it."""
    return random_like(param_shapes(model, batch))


def random_init(module: nn.Module, *inputs):
    """Variables as large as `module.init` makes them, without compiling it: a program that draws each parameter takes
    longer to compile than what most tests do with them. Not for tests that ask what values a module begins with."""
    return random_like(unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)))


def random_like(shapes):
    """Parameters of these shapes, as large as initialisation makes them."""
    rng = np.random.default_rng(0)

    def make(path, leaf):
        name, fan_in = path[-1].key, int(np.prod(leaf.shape[:-1]))
        if name in ("scale", "bias"):
            return np.full(leaf.shape, name == "scale", np.float32)
        return (rng.normal(size=leaf.shape) * max(fan_in, 1) ** -0.5).astype(np.float32)

    return jax.device_put(jax.tree_util.tree_map_with_path(make, shapes))


def assert_learns_and_acts(model: vla.VLA, *, steps: int, learning_rate: float, left: float) -> None:
    """One batch is learned until a share `left` of the loss is left, and two control steps give legal actions."""
    batch = make_batch(np.random.default_rng(0), window=model.config.window, windows=2, chunk=2)
    batch = as_read(model.vlm, batch)
    params = random_params(model, batch)
    losses = overfit(model, params, batch, steps=steps, learning_rate=learning_rate)
    assert np.isfinite(losses).all()
    assert losses[1] != losses[0]  # one step moves it
    assert losses[-5:].mean() < left * losses[0], losses[:: len(losses) // 8]

    text = batch.inputs.text_ids[0], batch.inputs.text_mask[0]
    policy = serving.VLAPolicy(model, params, lambda _: text)
    policy.reset("open the drawer")
    for t in (0, 1):
        images = {camera: x[0, t] for camera, x in batch.inputs.images.items()}
        actions = policy.act(Observation(images)).actions
        assert actions.shape == (2, 7) and np.isfinite(actions).all()
        assert np.abs(actions[:, :6]).max() <= 0.65 + 1e-6
        assert set(actions[:, 6]) <= {-1.0, 1.0}
    assert policy._batched._step._cache_size() == 1
