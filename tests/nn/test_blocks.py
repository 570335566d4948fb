"""Norm, MLP and sinusoids against torch or their definition."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.nn.mlp import ACTIVATIONS, MLP
from robovlms_jax.nn.norms import LayerNorm, RMSNorm
from robovlms_jax.nn.positions import alibi_slopes, resize_positions, rotary, rotate, sinusoid


def test_layer_norm_equals_torch_and_keeps_the_type():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 7)).astype(np.float32)
    scale, bias = np.linspace(0.5, 2, 7, dtype=np.float32), np.linspace(-1, 1, 7, dtype=np.float32)
    params = {"params": {"scale": scale, "bias": bias}}
    expected = torch.nn.functional.layer_norm(
        torch.tensor(x), (7,), torch.tensor(scale), torch.tensor(bias), 0.1
    ).numpy()
    np.testing.assert_allclose(LayerNorm(0.1).apply(params, x), expected, atol=1e-5)
    low = LayerNorm(0.1).apply(params, jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, atol=0.05)


def test_gelu_in_sixteen_bits_is_exact_and_keeps_nothing_but_its_input(capsys):
    # Fails if it is computed in sixteen bits, or if a layer keeps numbers of 32 bits for the gradient.
    torch = pytest.importorskip("torch")
    x = jnp.linspace(-6, 6, 400, dtype=jnp.bfloat16)
    expected = torch.nn.functional.gelu(torch.tensor(np.asarray(x, np.float32)))
    found = np.asarray(ACTIVATIONS["gelu"](x), np.float32)
    np.testing.assert_allclose(found, expected.to(torch.bfloat16).float().numpy(), rtol=2**-8, atol=5e-5)
    jax.ad_checkpoint.print_saved_residuals(lambda x: ACTIVATIONS["gelu"](x).sum(), x)
    kept = capsys.readouterr().out.split()
    assert "bf16[400]" in kept and not any(word.startswith("f32[4") for word in kept)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_the_same_name_in_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](x), ACT2FN[name](torch.tensor(x)).numpy(), atol=1e-6)


@pytest.mark.parametrize("inner_norm", [None, 1e-5])
def test_mlp(exact_matmul, inner_norm):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    module = MLP(8, "gelu", inner_norm)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    params = jax.tree.map(lambda p: np.random.default_rng(1).normal(0.1, 0.3, p.shape).astype(np.float32), shapes)
    p = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), params)
    y = torch.nn.functional.gelu(torch.tensor(x) @ p["up"]["kernel"] + p["up"]["bias"])
    if inner_norm is not None:
        y = torch.nn.functional.layer_norm(y, (8,), p["inner_norm"]["scale"], p["inner_norm"]["bias"], inner_norm)
    y = y @ p["down"]["kernel"] + p["down"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), y.numpy(), atol=1e-5)


def test_sinusoids_follow_their_definition():
    found = sinusoid(jnp.asarray([[0, 5, 2500]]), 8)
    for row, position in enumerate((0, 5, 2500)):
        angles = [(position + 2) * math.exp(-math.log(10_000) * i / 3) for i in range(4)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        np.testing.assert_allclose(found[0, row], expected, atol=2e-4)  # float32 of an angle near 2500


@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm_equals_torch_and_keeps_the_type(plus_one):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 7)).astype(np.float32)
    scale = np.linspace(0.5, 2, 7, dtype=np.float32)
    expected = torch.nn.functional.rms_norm(torch.tensor(x), (7,), torch.tensor(scale), 0.1).numpy()
    params = {"params": {"scale": scale - plus_one}}
    np.testing.assert_allclose(RMSNorm(0.1, plus_one).apply(params, x), expected, atol=1e-5)
    assert RMSNorm(0.1, plus_one).apply(params, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_layer_norm_without_bias():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 7)).astype(np.float32)
    expected = torch.nn.functional.layer_norm(torch.tensor(x), (7,)).numpy()
    found = LayerNorm(1e-5, use_bias=False).apply({"params": {"scale": np.ones(7, np.float32)}}, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "norm",
    [LayerNorm(0.1), LayerNorm(0.1, use_bias=False), RMSNorm(0.1, plus_one=True)],
    ids=["layer", "layer_no_bias", "rms"],
)
def test_gradients_of_norms_equal_those_of_their_definition(norm):
    # Fails if a term of the written gradient is wrong or missing, or if TPUs, which multiply in fewer bits,
    # are asked for products.
    rng = np.random.default_rng(0)
    x, weights = jnp.asarray(rng.normal(3, 2, (2, 5, 7)), jnp.float32), rng.normal(size=(2, 5, 7))
    params = jax.tree.map(lambda p: p + jnp.linspace(-0.5, 1, 7), nn.unbox(norm.init(jax.random.key(0), x)))

    def by_definition(params, x):
        values = params["params"]
        y = x - x.mean(-1, keepdims=True) if isinstance(norm, LayerNorm) else x
        scale = values["scale"] + getattr(norm, "plus_one", 0)
        y = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 0.1) * scale
        return y + values.get("bias", 0)

    def gradients(function):
        return jax.jit(jax.grad(lambda *args: (function(*args) * weights).sum(), argnums=(0, 1)))

    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5),
        gradients(norm.apply)(params, x),
        gradients(by_definition)(params, x),
    )
    low = gradients(norm.apply)(params, x.astype(jnp.bfloat16))
    assert low[1].dtype == jnp.bfloat16 and low[0]["params"]["scale"].dtype == jnp.float32
    there = gradients(norm.apply).trace(params, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "dot_general" not in there and "dot_general" in gradients(norm.apply).lower(params, x).as_text()


def test_rotary_scores_depend_on_distances_and_leave_the_other_channels():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 12)).astype(np.float32)

    def score(at_q, at_k):
        turned = [rotate(jnp.asarray(x), rotary(jnp.full((1, 1, 1), at), 8, 100.0)) for x, at in ((q, at_q), (k, at_k))]
        np.testing.assert_array_equal(turned[0][..., 8:], q[..., 8:])
        return float((turned[0] * turned[1]).sum())

    assert score(3, 1) == pytest.approx(score(13, 11), abs=1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-2
    assert score(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-5)


def test_rotary_sections_follow_their_own_coordinate():
    places = jnp.asarray([[[3, 5, 7]]])
    cos, _ = rotary(places, 12, 100.0, (1, 2, 3))
    for axis, part in enumerate((slice(0, 1), slice(1, 3), slice(3, 6))):
        alone, _ = rotary(places[..., axis : axis + 1], 12, 100.0)
        np.testing.assert_allclose(cos[..., part], alone[..., part], atol=1e-6)


@pytest.mark.parametrize("heads", [4, 6, 32])
def test_alibi_slopes_are_those_of_mpt_in_transformers(heads):
    pytest.importorskip("torch")
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    expected = build_mpt_alibi_tensor(heads, 2)  # [heads, 1, 2]: -slope at distance 1, 0 at the last key
    np.testing.assert_allclose(alibi_slopes(heads), -expected[:, 0, 0].numpy(), rtol=1e-6)


@pytest.mark.parametrize(("stored", "side", "scale"), [(4, 7, None), (6, 4, None), (4, 6, 6.1 / 4), (3, 3, None)])
def test_position_tables_are_resized_as_torch_does(exact_matmul, stored, side, scale):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(stored * stored, 5)).astype(np.float32)
    grid = torch.tensor(table).reshape(1, stored, stored, 5).permute(0, 3, 1, 2)
    how = {"size": (side, side)} if scale is None else {"scale_factor": (scale, scale)}
    expected = torch.nn.functional.interpolate(grid, mode="bicubic", align_corners=False, **how)
    found = resize_positions(jnp.asarray(table), side, scale=scale)
    np.testing.assert_allclose(found, expected[0].flatten(1).T.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="not square"):
        resize_positions(jnp.asarray(table)[:-1], side)


def test_norms_have_their_written_gradient_in_float32_alone():
    # In sixteen bits it costs a GPU's program traffic, see robovlms_jax/nn/norms.py.
    for module in (LayerNorm(1e-5), RMSNorm(1e-5)):
        for dtype, written in ((jnp.float32, True), (jnp.bfloat16, False)):
            traced = jax.make_jaxpr(lambda x, module=module: module.init_with_output(jax.random.key(0), x)[0])
            assert ("custom_vjp_call" in str(traced(jnp.ones((2, 4), dtype)))) == written
