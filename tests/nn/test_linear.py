"""Einsum, its adapters, and the token table."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.nn.linear import Einsum, Embed, Lora, merge_lora

CASES = {
    "BSD,DF->BSF": ((2, 3, 5), (5, 7), ("embed", "mlp")),
    "BSD,DNH->BSNH": ((2, 3, 5), (5, 4, 6), ("embed", "heads", "head_dim")),
    "BSNH,NHD->BSD": ((2, 3, 4, 6), (4, 6, 5), ("heads", "head_dim", "embed")),
    "BUXVYC,XYCD->BUVD": ((2, 3, 4, 2, 5, 3), (4, 5, 3, 7), ("patch", None, None, "embed")),
}


def random_like(params, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)


@pytest.mark.parametrize("equation", CASES)
def test_einsum_with_bias_and_adapter_is_one_matrix_product(exact_matmul, equation):
    inputs, shape, axes = CASES[equation]
    lora = Lora(rank=2, alpha=6.0)
    module = Einsum(equation, shape, axes, use_bias=True, lora=lora)
    x = np.random.default_rng(1).normal(size=inputs).astype(np.float32)
    params = random_like(nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)["params"]))

    contracted = len(
        [letter for letter in equation.split(",")[1].split("->")[0] if letter not in equation.split("->")[1]]
    )
    assert params["lora_a"].shape == (*shape[:contracted], 2)
    assert params["lora_b"].shape == (2, *shape[contracted:])
    kernel = params["kernel"] + 6.0 / 2 * np.tensordot(params["lora_a"], params["lora_b"], 1)
    expected = np.einsum(equation, x, kernel) + params["bias"]
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, x), expected, rtol=1e-4, atol=1e-4)

    merged = merge_lora({"layer": params}, lora)["layer"]
    assert set(merged) == {"kernel", "bias"}
    plain = Einsum(equation, shape, axes, use_bias=True)
    np.testing.assert_allclose(jax.jit(plain.apply)({"params": merged}, x), expected, rtol=1e-4, atol=1e-4)


def test_merging_adapters_of_stacked_layers_merges_each_layer():
    params = random_like(
        {"kernel": np.zeros((3, 5, 4, 6)), "lora_a": np.zeros((3, 5, 2)), "lora_b": np.zeros((3, 2, 4, 6))}
    )
    lora = Lora(rank=2, alpha=6.0)
    merged = merge_lora(params, lora)["kernel"]
    for layer in range(3):
        one = merge_lora(jax.tree.map(lambda x, layer=layer: x[layer], params), lora)["kernel"]
        np.testing.assert_allclose(merged[layer], one, rtol=1e-5, atol=1e-5)


def test_adapters_start_as_no_change_and_still_learn():
    module = Einsum("BSD,DF->BSF", (5, 7), ("embed", "mlp"), lora=Lora(rank=2))
    x = jax.random.normal(jax.random.key(1), (2, 3, 5))
    params = nn.unbox(module.init(jax.random.key(0), x)["params"])
    np.testing.assert_array_equal(module.apply({"params": params}, x), x @ params["kernel"])
    grads = jax.grad(lambda p: jnp.square(module.apply({"params": p}, x)).sum())(params)
    assert jnp.abs(grads["lora_b"]).max() > 0


def test_computation_follows_the_input_and_parameters_stay_float32():
    module = Einsum("BSD,DF->BSF", (5, 7), ("embed", "mlp"), use_bias=True, lora=Lora(rank=2))
    x = jnp.ones((2, 3, 5), jnp.bfloat16)
    params = nn.unbox(module.init(jax.random.key(0), x)["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert module.apply({"params": params}, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("equation", ["BSD,FD->BSF", "BSD,DHN->BSNH"])
def test_kernels_in_another_order_are_refused(equation):
    with pytest.raises(ValueError, match="contracted"):
        Einsum(equation, (5,) * (len(equation) - 8), (None,) * 3).init(jax.random.key(0), jnp.ones((2, 3, 5)))


def test_token_table_looks_up_ties_logits_and_shouts_about_unknown_ids(exact_matmul):
    module = Embed(11, 4)
    params = {"params": {"table": jax.random.normal(jax.random.key(0), (11, 4))}}
    table = params["params"]["table"]
    ids = jnp.asarray([[3, 10]])
    np.testing.assert_array_equal(module.apply(params, ids), table[ids])
    logits = module.apply(params, table[ids].astype(jnp.bfloat16), method="logits")
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, table[ids] @ table.T, atol=0.1)
    assert np.isnan(module.apply(params, jnp.asarray([11]))).all()
