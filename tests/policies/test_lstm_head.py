"""The LSTM head against PyTorch's LSTM, against upstream's own numbers, and against itself step by step."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import unbox
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.policies.heads import base, lstm
from tests.toy import random_init

W, C, D, HIDDEN = 8, 10, 24, 16


def make_head(**changes):
    config = lstm.LSTMHeadConfig(**{"hidden_size": HIDDEN, **changes})
    return base.build(config, window=W, chunk=C, action_dim=7, binary=(6,), feature_dim=D, num_queries=1)


def upstream_params(weights: dict[str, np.ndarray], layers: int) -> dict:
    """Upstream's state dict (torch layout) -> our tree, spelt out here so that the test does not lean on the
    converter."""
    flat = {}
    for layer in range(layers):
        for ours, theirs in (("input", "ih"), ("hidden", "hh")):
            kernel = weights[f"rnn.weight_{theirs}_l{layer}"]
            flat[f"lstm_{layer}/{ours}_kernel"] = kernel.reshape(4, -1, kernel.shape[1]).transpose(2, 0, 1)
            flat[f"lstm_{layer}/{ours}_bias"] = weights[f"rnn.bias_{theirs}_l{layer}"].reshape(4, -1)
    for ours, theirs in (("arm", "actions"), ("gripper", "gripper")):
        for layer in range(4):
            flat[f"{ours}/layer_{layer}/kernel"] = weights[f"{theirs}.mlp.{2 * layer}.weight"].T
            flat[f"{ours}/layer_{layer}/bias"] = weights[f"{theirs}.mlp.{2 * layer}.bias"]
    return {"params": unflatten_dict(flat, sep="/")}


@pytest.fixture(scope="module")
def upstream(golden):
    data = golden("heads/lstm_none_lat1_ws8.npz")
    params = upstream_params({key.removeprefix("w/"): x for key, x in data.items() if key.startswith("w/")}, layers=4)
    return data, params


def test_window_equals_upstream(upstream, exact_matmul):
    # Fails on a swapped gate, a missing bias, chunk-major regrouping or a missing tanh.
    data, params = upstream
    prediction = make_head().apply(params, data["x"], np.ones(data["x"].shape[:2], bool))
    np.testing.assert_allclose(prediction.arm, data["out_arm"], atol=1e-5)
    np.testing.assert_allclose(prediction.gripper_logit[..., 0], data["out_gripper"][..., 0], atol=1e-5)


def test_streaming_equals_upstream_past_the_window(upstream, exact_matmul):
    # Fails if the carry forgets too late, too early, or is not reset to zero state at the window's edge.
    data, params = upstream
    head = make_head()
    carry = head.init_carry(2)
    step = jax.jit(lambda x, carry: head.apply(params, x, carry, method="step"))
    for t in range(data["stream_x"].shape[1]):
        prediction, carry = step(data["stream_x"][:, t], carry)
        np.testing.assert_allclose(prediction.arm, data["stream_arm"][:, t, 0], atol=1e-5)
        np.testing.assert_allclose(prediction.gripper_logit[..., 0], data["stream_gripper"][:, t, 0, :, 0], atol=1e-5)


@jax.jit
def gradient_of_loss(params, x, actions, mask):
    head = make_head()

    def loss(params):
        prediction = head.apply(params, x, jnp.ones(x.shape[:2], bool))
        return head.loss(prediction, actions, mask, mask.sum().astype(jnp.float32))

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("case", ["full", "partial", "single"])
def test_losses_equal_upstream(upstream, case, exact_matmul):
    # Fails on a wrong Huber delta, sum instead of mean, or a mean over masked entries.
    data, params = upstream
    mask = jnp.asarray(data[f"mask_{case}"], bool)
    actions = jnp.concatenate([data["label_arm"], 2.0 * data["label_gripper"][..., None] - 1.0], axis=-1)
    (total, metrics), grads = gradient_of_loss(params, data["x"], actions, mask)
    arm, gripper, accuracy = data[f"loss_{case}"]
    np.testing.assert_allclose(
        [metrics["loss_arm"], metrics["loss_gripper"], metrics["acc_gripper"]], [arm, gripper, accuracy], rtol=1e-5
    )
    np.testing.assert_allclose(total, arm + 0.01 * gripper, rtol=1e-5)
    if case == "partial":  # the mask the reference gradients were taken with
        ours = upstream_gradient_norms(grads)
        theirs = dict(zip(data["gradnorm_keys"].tolist(), data["gradnorm"].tolist()))
        assert set(ours) == set(theirs)
        for key, norm in theirs.items():
            np.testing.assert_allclose(ours[key], norm, rtol=1e-4, atol=1e-9, err_msg=key)


def upstream_gradient_norms(grads: dict) -> dict[str, float]:
    names = {}
    for path, grad in flatten_dict(grads["params"], sep="/").items():
        first, *rest = path.split("/")
        if first.startswith("lstm_"):
            side, kind = rest[0].split("_")
            key = f"rnn.{'weight' if kind == 'kernel' else 'bias'}_{'ih' if side == 'input' else 'hh'}_l{first[5:]}"
        else:
            trunk, kind = "actions" if first == "arm" else "gripper", "weight" if rest[1] == "kernel" else "bias"
            key = f"{trunk}.mlp.{2 * int(rest[0][6:])}.{kind}"
        names[key] = float(np.linalg.norm(grad))
    return names


def test_empty_mask_gives_zero_loss_and_finite_gradients():
    # Upstream's mean over nothing is NaN and poisons the run.
    head = make_head()
    x, steps = np.ones((1, W, 1, D), np.float32), np.ones((1, W), bool)
    params = random_init(head, x, steps)

    def loss(params):
        mask = jnp.zeros((1, W, C), bool)
        return head.loss(
            head.apply(params, x, steps), jnp.full((1, W, C, 7), jnp.inf), mask, mask.sum().astype(jnp.float32)
        )[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert value == 0
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_layer_equals_torch_lstm(exact_matmul):
    # The same proof as the golden one, for machines without the reference data.
    torch = pytest.importorskip("torch")

    rng = np.random.default_rng(0)
    reference = torch.nn.LSTM(D, HIDDEN, num_layers=2, batch_first=True)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.5, parameter.shape).astype(np.float32)))
    x = rng.normal(size=(3, W, D)).astype(np.float32)
    expected = reference(torch.from_numpy(x))[0].detach().numpy()
    weights = {f"rnn.{name}": value.detach().numpy() for name, value in reference.named_parameters()}
    dummy = {
        f"{n}.mlp.{i}.{k}": np.zeros((1, 1), np.float32)
        for n in ("actions", "gripper")
        for i in (0, 2, 4, 6)
        for k in ("weight", "bias")
    }
    params = upstream_params(weights | dummy, layers=2)["params"]
    out = x
    for layer in range(2):
        out = lstm.LSTMLayer(HIDDEN).apply({"params": params[f"lstm_{layer}"]}, out, np.ones((3, W), bool))[0]
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("queries", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_step_repeated_equals_the_last_step_of_each_window(queries, exact_matmul):
    # Closed form of streaming: output t is the window form over the newest min(t, W) features.
    config = lstm.LSTMHeadConfig(hidden_size=HIDDEN, num_layers=2, trunk=(12,))
    head = base.build(config, window=4, chunk=3, action_dim=7, binary=(6,), feature_dim=D, num_queries=queries)
    x = np.random.default_rng(1).normal(size=(2, 9, queries, D)).astype(np.float32)
    params = random_init(head, x[:, :4], np.ones((2, 4), bool))
    step, window = jax.jit(functools.partial(head.apply, method="step")), jax.jit(head.apply)
    carry = head.init_carry(2)
    for t in range(9):
        prediction, carry = step(params, x[:, t], carry)
        seen = x[:, max(0, t - 3) : t + 1]
        whole = window(params, seen, np.ones(seen.shape[:2], bool))
        np.testing.assert_allclose(prediction.arm, whole.arm[:, -1], atol=1e-6)
        np.testing.assert_allclose(head.actions(prediction), head.actions(whole)[:, -1], atol=1e-6)


@pytest.mark.parametrize("steps", [2, 6])
def test_renewed_windows_are_those_of_steps_with_the_renewed_features(steps, exact_matmul):
    # Before and after the window is full; of two episodes one is renewed, the other goes on from what it had.
    config = lstm.LSTMHeadConfig(hidden_size=HIDDEN, num_layers=2, trunk=(12,))
    head = base.build(config, window=4, chunk=3, action_dim=7, binary=(6,), feature_dim=D, num_queries=1)
    old, new = np.random.default_rng(3).normal(size=(2, 2, steps + 1, 1, D)).astype(np.float32)
    params = random_init(head, np.zeros((2, 4, 1, D), np.float32), np.ones((2, 4), bool))
    step = jax.jit(functools.partial(head.apply, params, method="step"))
    carries = [head.init_carry(2), head.init_carry(2)]
    for t in range(steps):
        carries = [step(x[:, t], carry)[1] for x, carry in zip((old, new), carries)]
    window = np.pad(new, ((0, 0), (3, 0), (0, 0), (0, 0)))[:, -4:]
    due = np.array([True, False])
    renewed = jax.jit(functools.partial(head.apply, params, method="renew"))(carries[0], window, due)
    expected = jax.tree.map(lambda x, y: np.stack([y[0], x[1]]), *carries)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), renewed, expected)


def test_front_padding_changes_nothing(exact_matmul):
    # A window that begins before its episode must predict as a shorter window does.
    head = make_head(num_layers=2, trunk=(12,))
    x = np.random.default_rng(2).normal(size=(2, W, 1, D)).astype(np.float32)
    params = random_init(head, x, np.ones((2, W), bool))
    mask = np.arange(W) >= 3
    padded = head.apply(params, x, np.broadcast_to(mask, (2, W)))
    short = head.apply(params, x[:, 3:], np.ones((2, W - 3), bool))
    np.testing.assert_allclose(padded.arm[:, 3:], short.arm, atol=1e-6)


def test_initial_values_are_upstreams():
    # PyTorch's LSTM default (uniform, all four tensors) and Xavier-uniform trunks with zero biases.
    params = flatten_dict(
        unbox(jax.jit(make_head().init)(jax.random.key(0), np.zeros((1, W, 1, D)), np.ones((1, W), bool)))["params"],
        sep="/",
    )
    bound = HIDDEN**-0.5
    for name in ("input_kernel", "hidden_kernel", "input_bias", "hidden_bias"):
        values = np.asarray(params[f"lstm_1/{name}"])
        assert np.abs(values).max() <= bound and values.std() == pytest.approx(bound / 3**0.5, rel=0.15)
    kernel = np.asarray(params["arm/layer_1/kernel"])
    assert kernel.std() == pytest.approx((2 / sum(kernel.shape)) ** 0.5, rel=0.05)
    assert not np.any(params["arm/layer_1/bias"])
