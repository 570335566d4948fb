"""Every head: upstream's numbers where there are some, its two forms against each other, and masks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import unbox
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.policies import losses
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads import base, discrete, flow, gpt, mlp
from robovlms_jax.policies.sensors import base as sensors
from tests.toy import HEADS, random_init

W, C, D, Q, A, V = 4, 3, 24, 2, 7, 40


def make(kind: str, **sizes):
    """A small head of that kind and features of a window for it."""
    token = HEADS[kind].readouts == ("token",)
    shape = (C * A, V) if token else (Q, D)
    sizes = {
        "window": W,
        "chunk": C,
        "action_dim": A,
        "binary": (6,),
        "feature_dim": shape[1],
        "num_queries": shape[0],
    } | sizes
    return base.build(HEADS[kind], **sizes), shape


@functools.cache
def params_of(kind: str):
    head, shape = make(kind)
    params = random_init(head, jnp.zeros((1, W, *shape)), jnp.ones((1, W), bool))
    rng = np.random.default_rng(3)
    # Zeros at the start would hide what they multiply.
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), params)


def test_toy_has_every_head():
    assert set(HEADS) == set(base.kinds())


@pytest.mark.parametrize(("registry", "noun", "taken"), [(base, "head", "lstm"), (sensors, "sensor", "lidar")])
def test_heads_and_sensors_have_names_of_their_own_and_each_name_once(registry, noun, taken):
    with pytest.raises(ValueError, match=f"{noun} '{taken}' is registered already, by "):
        registry.register(taken, mlp.MLPHeadConfig)(flow.FlowHead)
    assert not set(base.HeadConfig.kinds()) & set(sensors.SensorConfig.kinds())
    other = "lidar" if noun == "head" else "lstm"
    config = base.HeadConfig if noun == "head" else sensors.SensorConfig
    with pytest.raises(ValueError, match=f"no {noun} '{other}'. Registered: "):
        config.config_of(other)
    with pytest.raises(ValueError, match=f"PolicyConfig belongs to no registered {noun}; registered: "):
        config.kind_of(PolicyConfig)


@pytest.mark.parametrize("kind", HEADS)
def test_step_repeated_equals_the_window(kind, exact_matmul):
    # At every step, before and after the window is full. The window form gets the same steps behind masked nonsense,
    # so this also fails where padding in front is counted, attended to, or given a place.
    head, shape = make(kind)
    params = params_of(kind)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 7, *shape)).astype(np.float32)
    step = jax.jit(lambda x, carry: decided(head, params, x, carry))
    window = jax.jit(lambda x, mask: head.apply(params, x, mask, method=whole))
    carry = head.init_carry(2)
    for t in range(7):
        actions, carry = step(x[:, t], carry)
        frames = np.arange(t - W + 1, t + 1)
        expected = window(x[:, frames], np.broadcast_to(frames >= 0, (2, W)))
        np.testing.assert_allclose(actions, expected[:, -1], atol=2e-5, err_msg=f"step {t}")
        assert actions.shape == (2, C, A)
        assert set(np.unique(actions[..., -1])) <= {-1.0, 1.0}
        assert np.abs(actions[..., :-1]).max() <= 1


def decided(head, params, x, carry):
    bound = head.bind(params)
    prediction, carry = bound.step(x, carry)
    return bound.actions(prediction), carry


def whole(head, x, mask):
    return head.actions(head(x, mask))


@pytest.mark.parametrize("kind", HEADS)
def test_masked_entries_count_for_nothing(kind, exact_matmul):
    # Loss and gradients do not see what a mask hides, whatever it holds; an empty mask gives zeros, not NaN.
    head, shape = make(kind)
    params = params_of(kind)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, W, *shape)).astype(np.float32)
    actions = rng.uniform(-1, 1, (2, W, C, A)).astype(np.float32)
    mask = rng.random((2, W, C)) < 0.5

    def loss(params, actions, mask):
        bound = head.bind(params)
        return bound.loss(bound(x, np.ones((2, W), bool)), actions, mask, mask.sum().astype(jnp.float32))

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))
    hidden = np.where(mask[..., None], actions, np.inf)
    (value, metrics), grads = gradient(params, hidden, mask)
    (same, _), _ = gradient(params, actions, mask)
    assert np.isfinite(value) and value > 0 and value == metrics["loss"]
    assert set(metrics) == {"loss", *HEADS[kind].metrics}
    np.testing.assert_allclose(value, same, rtol=1e-6)
    (nothing, _), none = gradient(params, hidden, np.zeros_like(mask))
    assert nothing == 0
    for some in (grads, none):
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(some))


def upstream_mlp(weights: dict[str, np.ndarray]) -> dict:
    flat = {}
    for ours, theirs, depth in (("mlp", "mlp", 2), ("arm", "actions.mlp", 4), ("gripper", "gripper.mlp", 4)):
        for layer in range(depth):
            flat[f"{ours}/layer_{layer}/kernel"] = weights[f"w/{theirs}.{2 * layer}.weight"].T
            flat[f"{ours}/layer_{layer}/bias"] = weights[f"w/{theirs}.{2 * layer}.bias"]
    return {"params": unflatten_dict(flat, sep="/")}


@functools.partial(jax.jit, static_argnums=0)
def gradient_of_loss(head, params, x, actions, mask):
    def loss(params):
        bound = head.bind(params)
        prediction = bound(x, jnp.ones(x.shape[:2], bool))
        total, metrics = bound.loss(prediction, actions, mask, mask.sum().astype(jnp.float32))
        return total, (prediction, metrics)

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("case", ["full", "partial", "single"])
def test_mlp_equals_upstream(golden, case, exact_matmul):
    data = golden("heads/fc_none_lat1.npz")
    params = upstream_mlp(data)
    config = mlp.MLPHeadConfig(hidden_size=16)
    head = base.build(config, window=3, chunk=10, action_dim=7, binary=(6,), feature_dim=24, num_queries=1)
    mask = jnp.asarray(data[f"mask_{case}"], bool)
    actions = jnp.concatenate([data["label_arm"], 2.0 * data["label_gripper"][..., None] - 1.0], axis=-1)
    (_, (prediction, metrics)), grads = gradient_of_loss(head, params, data["x"], actions, mask)
    np.testing.assert_allclose(prediction.arm, data["out_arm"], atol=1e-5)
    np.testing.assert_allclose(prediction.gripper_logit[..., 0], data["out_gripper"][..., 0], rtol=1e-5, atol=1e-5)
    found = [metrics["loss_arm"], metrics["loss_gripper"], metrics["acc_gripper"]]
    np.testing.assert_allclose(found, data[f"loss_{case}"], rtol=1e-5)
    if case == "partial":  # the mask the reference gradients were taken with
        names = {"mlp": "mlp", "arm": "actions.mlp", "gripper": "gripper.mlp"}
        norms = {}
        for path, grad in flatten_dict(grads["params"], sep="/").items():
            part, layer, kind = path.split("/")
            key = f"{names[part]}.{2 * int(layer[6:])}.{'weight' if kind == 'kernel' else 'bias'}"
            norms[key] = float(np.linalg.norm(grad))
        for key, norm in zip(data["gradnorm_keys"].tolist(), data["gradnorm"].tolist(), strict=True):
            np.testing.assert_allclose(norms[key], norm, rtol=1e-4, atol=1e-9, err_msg=key)


def test_discrete_loss_and_metrics_equal_upstream(golden):
    # Upstream counts the token that ends a sequence as a label, too; ours has none, so the loss is compared by token.
    data = golden("heads/discrete_v120_b32.npz")
    end = int(data["orig_size"])
    labels, logits = data["labels"][:, 1:], data["logits"][:, :-1]
    valid = labels != -100
    count = valid.sum().astype(np.float32)
    loss, gradient = jax.value_and_grad(
        lambda logits: losses.masked_mean(losses.token_cross_entropy(logits[:, :-1], labels), valid, count)
    )(data["logits"])
    np.testing.assert_allclose(loss, data["out"][0], rtol=1e-5)
    np.testing.assert_allclose(gradient, data["grad_logits"], atol=1e-6)

    # Metrics, and labels from actions, by the head: rows of seven tokens are its chunk.
    is_action = valid & (labels > data["begin_idx"]) & (labels < end)
    tokens = logits[is_action].reshape(1, 1, -1, A, logits.shape[-1])
    chunk = tokens.shape[2]
    config = discrete.DiscreteHeadConfig(num_bins=32, vocab_end=end, constrained=False)
    head = base.build(config, window=1, chunk=chunk, action_dim=A, binary=(6,), feature_dim=120, num_queries=chunk * A)
    ids = labels[is_action].reshape(1, 1, chunk, A)
    bins = config.bins
    edges = np.append(bins.centers, bins.high).astype(np.float32)  # the last bin holds its edge alone
    actions = edges[end - 1 - ids]
    np.testing.assert_array_equal(head.ids(jnp.asarray(actions)).reshape(ids.shape), ids)
    mask = jnp.ones((1, 1, chunk), bool)
    bound = head.bind({})
    _, metrics = bound.loss(bound(tokens.reshape(1, 1, chunk * A, -1), None), jnp.asarray(actions), mask, mask.sum())
    found = [metrics["action_l1"], metrics["acc_arm"], metrics["acc_gripper"]]
    np.testing.assert_allclose(found, data["out"][1:], rtol=1e-5)


def test_gpt_equals_hugging_faces_gpt2(exact_matmul):
    # Positions, pre-norm order, the tanh form of GELU, the final norm.
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2Model

    width, layers, heads = 16, 3, 4
    torch.manual_seed(0)
    reference = GPT2Model(
        GPT2Config(vocab_size=1, n_positions=W, n_embd=width, n_layer=layers, n_head=heads, initializer_range=0.3)
    ).eval()
    state = {name: x.detach().numpy() for name, x in reference.state_dict().items()}
    flat = {"positions": state["wpe.weight"]}

    def stack(name):
        return np.stack([state[f"h.{i}.{name}"] for i in range(layers)])

    for ours, theirs in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2")):
        flat[f"layers/{ours}/scale"], flat[f"layers/{ours}/bias"] = stack(f"{theirs}.weight"), stack(f"{theirs}.bias")
    kernels = np.split(stack("attn.c_attn.weight"), 3, axis=-1), np.split(stack("attn.c_attn.bias"), 3, axis=-1)
    for name, kernel, bias in zip("qkv", *kernels, strict=True):
        flat[f"layers/attn/{name}/kernel"] = kernel.reshape(layers, width, heads, -1)
        flat[f"layers/attn/{name}/bias"] = bias.reshape(layers, heads, -1)
    flat["layers/attn/o/kernel"] = stack("attn.c_proj.weight").reshape(layers, heads, -1, width)
    flat["layers/attn/o/bias"] = stack("attn.c_proj.bias")
    for ours, theirs in (("up", "c_fc"), ("down", "c_proj")):
        flat[f"layers/mlp/{ours}/kernel"] = stack(f"mlp.{theirs}.weight")
        flat[f"layers/mlp/{ours}/bias"] = stack(f"mlp.{theirs}.bias")
    flat["final_norm/scale"], flat["final_norm/bias"] = state["ln_f.weight"], state["ln_f.bias"]

    config = gpt.GPTHeadConfig(hidden_size=width, num_layers=layers, num_heads=heads, trunk=(8,))
    head = base.build(config, window=W, chunk=C, action_dim=A, binary=(6,), feature_dim=width, num_queries=1)
    x = np.random.default_rng(0).normal(size=(2, W, 1, width)).astype(np.float32)
    mask = np.ones((2, W), bool)
    shapes = unbox(jax.eval_shape(head.init, jax.random.key(0), x, mask))["params"]
    params = {
        "params": unflatten_dict(flat, sep="/")
        | {name: jax.tree.map(lambda s: np.zeros(s.shape), shapes[name]) for name in ("arm", "gripper")}
    }
    assert jax.tree.map(lambda s: s.shape, shapes) == jax.tree.map(np.shape, params["params"])
    found = jax.jit(lambda params, x: head.apply(params, x, mask, method="encode"))(params, x)
    expected = reference(inputs_embeds=torch.from_numpy(x[:, :, 0])).last_hidden_state.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_flow_follows_a_straight_path_to_its_end(num_steps):
    # With the true velocity of rectified flow towards one chunk, any number of Euler steps lands on it exactly.
    goal = np.random.default_rng(0).uniform(-0.9, 0.9, (C, A)).astype(np.float32)

    class Known(flow.FlowHead):
        def setup(self):
            pass

        def velocity(self, condition, x, time):
            return (goal - x) / (1 - time[:, None, None])

    config = flow.FlowHeadConfig(hidden_size=16, num_heads=2, num_steps=num_steps)
    head = Known(config, window=W, chunk=C, action_dim=A, binary=(6,), feature_dim=D, num_queries=1).bind({})
    condition = flow.Condition(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))
    actions = head.actions(flow.FlowPrediction(condition, (2, 3)))
    np.testing.assert_allclose(actions[..., :-1], np.broadcast_to(goal[:, :-1], (2, 3, C, A - 1)), atol=1e-5)
    np.testing.assert_array_equal(actions[..., -1], np.broadcast_to(np.sign(goal[:, -1]), (2, 3, C)))


def small_flow(**fields) -> flow.FlowHead:
    config = flow.FlowHeadConfig(hidden_size=32, num_layers=1, num_heads=2, **fields)
    sizes = {"window": 1, "chunk": 8, "action_dim": A, "binary": (6,), "feature_dim": D, "num_queries": 1}
    return base.build(config, **sizes)


@functools.cache
def fresh_params():
    """What `small_flow` begins with; its fields decide nothing of it."""
    return unbox(jax.jit(small_flow().init)(jax.random.key(0), jnp.zeros((1, 1, 1, D)), jnp.ones((1, 1), bool)))


def fresh_velocity(head: flow.FlowHead, noise: jax.Array, time: jax.Array) -> jax.Array:
    """What a head that has learned nothing tells actions and times apart by: its velocity, but for the last matrix,
    which begins at zero."""
    x = jnp.zeros((1, 1, 1, D))
    params = fresh_params()["params"]
    params = params | {"out": jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params["out"])}
    bound = head.bind({"params": params})
    condition = jax.jit(bound._condition)(x, jnp.ones((1, 1), bool))
    condition = condition.replace(mask=jnp.repeat(condition.mask, len(noise), axis=1))
    return jax.jit(bound.velocity)(condition, noise, time)


def test_a_new_flow_head_tells_the_actions_of_a_chunk_apart():
    # Tables of places as small as a language model's drown in the noise that they are added to.
    head = small_flow()
    noise = jax.random.normal(jax.random.key(2), (200, 8, A))
    velocity = fresh_velocity(head, noise, jnp.full(200, 0.5))
    by_place = velocity.mean(0).std(0).mean()
    assert by_place > 0.3 * velocity.std(), (by_place, velocity.std())


def test_neighbouring_times_are_alike_to_a_flow_head_and_distant_ones_are_not():
    noise = jnp.broadcast_to(jax.random.normal(jax.random.key(2), (8, A)), (100, 8, A))
    times = jnp.linspace(0, 1, 100)
    velocity = fresh_velocity(small_flow(), noise, times)
    near = jnp.abs(velocity[1:] - velocity[:-1]).mean()
    far = jnp.abs(velocity[50:] - velocity[:50]).mean()
    assert near < 0.2 * far, (near, far)
    old = fresh_velocity(small_flow(time_turns=flow.FlowHeadConfig.EARLIER["time_turns"]), noise, times)
    assert jnp.abs(old[1:] - old[:-1]).mean() > 0.5 * jnp.abs(old[50:] - old[:50]).mean()


def test_a_flow_head_that_has_learned_nothing_leads_from_noise_to_actions_of_the_datas_size():
    # What follows from the noise alone is computed, not learned: a network that says 0 is right to the least squares.
    head = small_flow(data_std=0.4, num_steps=200)
    x = jnp.zeros((1, 1, 1, D))
    params = fresh_params()
    bound = head.bind(params)
    condition = jax.jit(bound._condition)(x, jnp.ones((1, 1), bool))
    condition = condition.replace(mask=jnp.repeat(condition.mask, 500, axis=1))
    noise = jax.random.normal(jax.random.key(2), (500, 8, A))
    integrate = jax.jit(lambda noise: bound._integrate(condition, noise, None))
    np.testing.assert_allclose(integrate(noise), 0.4 * noise, atol=0.02)
    actions = 0.4 * jax.random.normal(jax.random.key(4), (1, 500, 8, A))
    mask = jnp.ones((1, 500, 8), bool)

    def loss(params, condition, actions):
        return head.bind(params).loss(flow.FlowPrediction(condition, (1, 500)), actions, mask, jnp.float32(4000))[0]

    np.testing.assert_allclose(
        jax.jit(loss)(params, condition, actions), 1, atol=0.03
    )  # at every time of unit variance


def test_temperature_0_starts_a_flow_in_the_middle():
    head = small_flow(temperature=0.0)
    x = jnp.zeros((1, 1, 1, D))
    params = fresh_params()
    bound = head.bind(params)
    actions = jax.jit(lambda x: bound.actions(bound(x, jnp.ones((1, 1), bool))))(x)
    assert (actions[..., :-1] == 0).all()


def test_several_draws_are_the_mean_of_single_ones_and_near_the_noise_by_time_power(exact_matmul):
    # A head whose velocity is its time: the loss then says which times were drawn, and for which chunk.
    seen = []

    class Told(flow.FlowHead):
        def setup(self):
            pass

        def velocity(self, condition, x, time):
            seen.append((condition.mask.shape, time))
            return jnp.zeros_like(x)

    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (4000, 1, 2, 3)).astype(np.float32)
    mask = np.ones((4000, 1, 2), bool)
    config = flow.FlowHeadConfig(hidden_size=8, num_heads=2, draws=3, time_power=2.0, data_std=0.0)
    head = Told(config, window=1, chunk=2, action_dim=3, binary=(), feature_dim=4, num_queries=1)
    head = head.bind({}, rngs={"dropout": jax.random.key(0)})
    condition = flow.Condition(jnp.zeros(()), jnp.zeros(()), jnp.ones((4000, 1, 1), bool))
    value, _ = head.loss(flow.FlowPrediction(condition, (4000, 1)), actions, mask, jnp.float32(8000))
    (shape, time), variance = seen[0], 1 + np.square(actions).mean()
    assert shape == (4000, 3, 1) and time.shape == (12000,)
    np.testing.assert_allclose(value, variance, rtol=0.02)
    np.testing.assert_allclose(np.quantile(time, [0.25, 0.5, 0.75]), 1 - np.sqrt([0.75, 0.5, 0.25]), atol=0.02)


@pytest.mark.parametrize("kind", ["mlp", "lstm", "gpt", "attention", "flow"])
def test_impossible_sizes_are_named(kind):
    config_type = type(HEADS[kind])
    with pytest.raises(ValueError, match="hidden_size=0"):
        config_type(hidden_size=0)
    if kind in ("gpt", "attention", "flow"):
        with pytest.raises(ValueError, match="num_heads=3"):
            config_type(hidden_size=16, num_heads=3)


def test_a_discrete_head_that_does_not_fit_its_vocabulary_is_refused():
    with pytest.raises(ValueError, match="leaves no room"):
        discrete.DiscreteHeadConfig(num_bins=256, vocab_end=100)
    head = base.build(
        discrete.DiscreteHeadConfig(), window=1, chunk=1, action_dim=7, binary=(6,), feature_dim=100, num_queries=7
    )
    with pytest.raises(ValueError, match="vocabulary of 100"):
        head.ids(jnp.zeros((1, 7)))
    with pytest.raises(ValueError, match="must span"):
        discrete.DiscreteHeadConfig(low=-0.5)
