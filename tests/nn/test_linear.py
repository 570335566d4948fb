"""Einsum, its adapters, and the token table."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from robovlms_jax.nn.linear import Dense, Einsum, Embed, Kernel, Lora, merge_lora, quantize_tokens

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
    module = Einsum(equation, shape, axes, use_bias=True, kernel=Kernel(lora=lora))
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


def test_biases_of_several_axes_are_added_along_one():
    # Fails where they are added to [B, S, N, H]: XLA for GPUs then writes them as large as the result, in every layer.
    module = Einsum("BSD,DNH->BSNH", (5, 4, 6), ("embed", "heads", "head_dim"), use_bias=True)
    x = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)
    params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
    sums = [y for y in jax.make_jaxpr(module.apply)(params, x).eqns if y.primitive.name == "add"]
    assert [y.outvars[0].aval.shape for y in sums] == [(2, 3, 24)]


@pytest.mark.parametrize("equation", CASES)
@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_kinds_of_adapters_are_their_formulas_and_merge_into_one_matrix(exact_matmul, equation, kind):
    inputs, shape, axes = CASES[equation]
    lora = Lora(rank=2, alpha=6.0, kind=kind)
    module = Einsum(equation, shape, axes, kernel=Kernel(lora=lora))
    x = np.random.default_rng(1).normal(size=inputs).astype(np.float32)
    params = random_like(nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)["params"]))
    kernel = params["kernel"] + 6.0 / (2 if kind == "dora" else 2**0.5) * np.tensordot(
        params["lora_a"], params["lora_b"], 1
    )
    merged = np.asarray(merge_lora(params, lora)["kernel"])
    if kind == "dora":
        axis = tuple(range(params["lora_a"].ndim - 1))
        length = np.linalg.norm(params["kernel"].reshape(-1, *shape[len(axis) :]), axis=0)
        kernel *= params["lora_m"] * length / np.linalg.norm(kernel.reshape(-1, *shape[len(axis) :]), axis=0)
        # The published property: each output channel is as long as its learned magnitude.
        lengths = np.linalg.norm(merged.reshape(-1, *shape[len(axis) :]), axis=0)
        np.testing.assert_allclose(lengths, np.abs(params["lora_m"]) * length, rtol=1e-5)
    np.testing.assert_allclose(merged, kernel, rtol=1e-4, atol=1e-5)
    expected = np.einsum(equation, x, kernel)
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


def test_dora_learns_lengths_apart_and_does_not_differentiate_through_the_norm():
    lora = Lora(rank=2, alpha=2.0, kind="dora")
    module = Einsum("BSD,DF->BSF", (5, 7), ("embed", "mlp"), kernel=Kernel(lora=lora))
    x = jax.random.normal(jax.random.key(1), (2, 3, 5))
    params = random_like(nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)["params"]))
    grads = jax.jit(jax.grad(lambda p: module.apply({"params": p}, x).sum()))(params)
    adapted = params["kernel"] + lora.scale * params["lora_a"] @ params["lora_b"]
    factor = np.linalg.norm(params["kernel"], axis=0) / np.linalg.norm(adapted, axis=0)
    summed = np.asarray(x).sum((0, 1))
    np.testing.assert_allclose(grads["lora_m"], summed @ adapted * factor, rtol=1e-4)
    expected = lora.scale * np.outer(summed @ params["lora_a"], params["lora_m"] * factor)
    np.testing.assert_allclose(grads["lora_b"], expected, rtol=1e-4)


def test_adapters_drop_inputs_in_training_alone_and_the_matrix_sees_all_of_them():
    lora = Lora(rank=2, alpha=2.0, dropout=0.25)
    module = Einsum("BSD,DF->BSF", (64, 7), ("embed", "mlp"), kernel=Kernel(lora=lora))
    x = jnp.ones((2, 300, 64))
    params = random_like(nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)["params"]))
    control = module.apply({"params": params}, x)
    trained = module.apply({"params": params}, x, rngs={"dropout": jax.random.key(2)})
    assert not np.allclose(trained, control)
    spread = np.abs(np.asarray(trained - control)).mean()
    np.testing.assert_allclose(trained.mean((0, 1)), control.mean((0, 1)), atol=0.2 * spread)  # unbiased
    silent = params | {"lora_b": np.zeros_like(params["lora_b"])}
    keys = {"dropout": jax.random.key(2)}
    np.testing.assert_array_equal(module.apply({"params": silent}, x, rngs=keys), module.apply({"params": silent}, x))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merging_adapters_of_stacked_layers_merges_each_layer(kind):
    params = random_like(
        {"kernel": np.zeros((3, 5, 4, 6)), "lora_a": np.zeros((3, 5, 2)), "lora_b": np.zeros((3, 2, 4, 6))}
        | ({"lora_m": np.zeros((3, 4, 6))} if kind == "dora" else {})
    )
    lora = Lora(rank=2, alpha=6.0, kind=kind)
    merged = merge_lora(params, lora)["kernel"]
    for layer in range(3):
        one = merge_lora(jax.tree.map(lambda x, layer=layer: x[layer], params), lora)["kernel"]
        np.testing.assert_allclose(merged[layer], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_adapters_start_as_no_change_and_still_learn(kind):
    module = Einsum("BSD,DF->BSF", (5, 7), ("embed", "mlp"), kernel=Kernel(lora=Lora(rank=2, kind=kind)))
    x = jax.random.normal(jax.random.key(1), (2, 3, 5))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x)["params"])
    np.testing.assert_array_equal(module.apply({"params": params}, x), x @ params["kernel"])
    grads = jax.jit(jax.grad(lambda p: jnp.square(module.apply({"params": p}, x)).sum()))(params)
    assert jnp.abs(grads["lora_b"]).max() > 0


def test_computation_follows_the_input_and_parameters_stay_float32():
    module = Einsum("BSD,DF->BSF", (5, 7), ("embed", "mlp"), use_bias=True, kernel=Kernel(lora=Lora(rank=2)))
    x = jnp.ones((2, 3, 5), jnp.bfloat16)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x)["params"])
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


@pytest.mark.parametrize("equation", CASES)
def test_an_int8_kernel_is_its_numbers_times_the_scale_of_their_output_channel(exact_matmul, equation):
    # Scales are powers of two and inputs whole numbers, so that float32 rounds nothing and equality is exact.
    inputs, shape, axes = CASES[equation]
    module = Einsum(equation, shape, axes, use_bias=True, kernel=Kernel("int8"))
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 8, inputs).astype(np.float32)
    params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    assert (params["kernel"].shape, params["kernel"].dtype) == (shape, jnp.int8)
    values = rng.integers(-127, 128, shape).astype(np.int8)
    scale = 2.0 ** rng.integers(-6, 3, params["scale"].shape).astype(np.float32)
    bias = rng.integers(-3, 3, params["bias"].shape).astype(np.float32)
    params = {"kernel": values, "scale": scale, "bias": bias}
    expected = np.einsum(equation, x, values * scale) + bias
    np.testing.assert_array_equal(jax.jit(module.apply)({"params": params}, x), expected)

    half = jax.jit(module.apply)({"params": params}, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, rtol=2**-7, atol=2**-7 * np.abs(bias).max())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_int8_kernel_with_adapters_adds_their_product(exact_matmul, kind):
    equation = "BSD,DNH->BSNH"
    inputs, shape, axes = CASES[equation]
    lora = Lora(rank=2, alpha=6.0, kind=kind)
    x = np.random.default_rng(1).normal(size=inputs).astype(np.float32)
    int8, plain = (Einsum(equation, shape, axes, kernel=Kernel(storage, lora)) for storage in ("int8", "float"))
    shapes = nn.unbox(jax.eval_shape(int8.init, jax.random.key(0), x)["params"])
    adapters = [name for name in shapes if name.startswith("lora_")]
    params = random_like({name: shapes[name] for name in ("scale", *adapters)})
    params["kernel"] = np.random.default_rng(2).integers(-127, 128, shape).astype(np.int8)
    whole = {name: params[name] for name in adapters} | {"kernel": params["kernel"] * params["scale"]}
    expected = plain.apply({"params": whole}, x)
    np.testing.assert_allclose(int8.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-4)


def test_dense_is_flax_dense_with_named_axes():
    x = jax.random.normal(jax.random.key(1), (2, 3, 5))
    ours, theirs = Dense(7, ("embed", "mlp")), nn.Dense(7)
    boxed = jax.jit(ours.init)(jax.random.key(0), x)["params"]
    assert (boxed["kernel"].names, boxed["bias"].names) == (("embed", "mlp"), ("mlp",))
    params = nn.unbox(boxed)
    jax.tree.map(np.testing.assert_array_equal, params, jax.jit(theirs.init)(jax.random.key(0), x)["params"])
    np.testing.assert_array_equal(ours.apply({"params": params}, x), theirs.apply({"params": params}, x))


def test_an_int8_token_table_is_its_rows_times_their_scales(exact_matmul):
    module, rng = Embed(11, 4, Kernel("int8", Lora(rank=2))), np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 2), int))["params"])
    assert {name: x.shape for name, x in shapes.items()} == {"table": (11, 4), "scale": (11, 1)}
    table, scale = rng.integers(-127, 128, (11, 4)).astype(np.int8), 2.0 ** rng.integers(-4, 2, (11, 1))
    params = {"params": {"table": table, "scale": scale.astype(np.float32)}}
    ids = jnp.asarray([[3, 10]])
    np.testing.assert_array_equal(module.apply(params, ids), (table * scale)[ids])
    x = rng.integers(-8, 8, (2, 4)).astype(np.float32)
    np.testing.assert_array_equal(module.apply(params, x, method="logits"), x @ (table * scale).T.astype(np.float32))
    assert np.isnan(module.apply(params, jnp.asarray([11]))).all()


@pytest.mark.parametrize("equation", [*CASES, "...D,DF->...F"])
def test_a_w8a8_kernel_multiplies_rounded_tokens_in_whole_numbers(exact_matmul, equation):
    # Every token's largest value is 127 times a power of two, and the others are whole multiples of it: rounding
    # changes nothing, so that the float product is met exactly whichever axes are a token's.
    inputs, shape, axes = CASES.get(equation, CASES["BSD,DF->BSF"])
    module, rng = Einsum(equation, shape, axes, kernel=Kernel("w8a8")), np.random.default_rng(0)
    params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), np.zeros(inputs, np.float32))["params"])
    letters, outputs = equation.split(",")[0].replace("...", "BS"), equation.split("->")[1].replace("...", "BS")
    contracted = tuple(axis for axis, letter in enumerate(letters) if letter not in outputs)
    x = rng.integers(-126, 127, inputs)
    first = tuple(slice(None) if axis not in contracted else 0 for axis in range(x.ndim))
    x[first] = 127
    kept = tuple(size if axis not in contracted else 1 for axis, size in enumerate(inputs))
    x = (x * 2.0 ** rng.integers(-5, 5, kept)).astype(np.float32)
    values = rng.integers(-127, 128, shape).astype(np.int8)
    scale = 2.0 ** rng.integers(-6, 3, params["scale"].shape).astype(np.float32)
    found = jax.jit(module.apply)({"params": {"kernel": values, "scale": scale}}, x)
    np.testing.assert_array_equal(found, np.einsum(equation, x, values * scale))


def test_one_large_channel_costs_its_own_token_and_no_other():
    # The known trap: a token's largest value takes the bits of all its channels.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 64)).astype(np.float32)
    x[1, 0] = 100.0
    rounded, scale = quantize_tokens(jnp.asarray(x), (1,))
    error = np.linalg.norm((rounded * scale - x)[:, 1:], axis=1) / np.linalg.norm(x[:, 1:], axis=1)
    assert error[0] < 0.01 and 0.1 < error[1] < 0.4
    plain, _ = quantize_tokens(jnp.asarray(x[:1]), (1,))
    np.testing.assert_array_equal(rounded[:1], plain)


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=3, max_side=6),
        elements=st.floats(-(2.0**60), 2.0**60, width=32),
    )
)
def test_rounded_tokens_err_by_at_most_half_their_scale(x):
    with jax.disable_jit():
        rounded, scale = (np.asarray(a, np.float64) for a in quantize_tokens(jnp.asarray(x), (-1,)))
    assert (np.abs(x - rounded * scale) <= scale / 2 * (1 + 1e-4) + 1e-36).all()  # smaller tokens may be flushed to 0


def test_tokens_that_are_not_finite_do_not_become_numbers():
    module = Dense(3, (None, None), use_bias=False, kernel=Kernel("w8a8"))
    params = {"kernel": np.ones((4, 3), np.int8), "scale": np.ones((1, 3), np.float32)}
    x = np.ones((3, 4), np.float32)
    x[1, 2], x[2, 2] = np.nan, np.inf
    found = np.isfinite(module.apply({"params": params}, x))
    assert found[0].all() and not found[1:].any()


def test_a_w8a8_token_table_looks_up_as_int8_does_and_rounds_what_its_logits_are_made_of(exact_matmul):
    rng = np.random.default_rng(0)
    table, scale = rng.integers(-127, 128, (11, 4)).astype(np.int8), 2.0 ** rng.integers(-4, 2, (11, 1))
    params = {"params": {"table": table, "scale": scale.astype(np.float32)}}
    module = Embed(11, 4, Kernel("w8a8"))
    np.testing.assert_array_equal(module.apply(params, np.array([[3, 10]])), (table * scale)[[[3, 10]]])
    x = np.array([[127, -3, 0, 60], [-254, 2, 4, 100]], np.float32)  # whole multiples of the largest / 127
    np.testing.assert_array_equal(module.apply(params, x, method="logits"), x @ (table * scale).T.astype(np.float32))
