"""Matrices in eight bits: how far off they are, which ones they are, and adapters beside them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from robovlms_jax.backbones import base, registry
from robovlms_jax.nn.linear import Kernel, Lora, merge_lora
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel.rules import RULES
from robovlms_jax.policies import objective
from robovlms_jax.policies.config import ActionHistoryConfig, ProprioConfig
from robovlms_jax.policies.heads import lstm
from robovlms_jax.runs import build
from robovlms_jax.weights import quantize
from tests import toy
from tests.backbones.oracle import DISTINCT, boxed

MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)


@settings(max_examples=30, deadline=None)
@given(MATRICES, st.integers(0, 3))
def test_rounding_errs_by_at_most_half_a_scale_and_uses_all_bits(matrix, axis):
    axis %= matrix.ndim
    with jax.disable_jit():
        values, scale = (np.asarray(x) for x in quantize.quantize_matrix(jnp.asarray(matrix), (axis,)))
    assert values.dtype == np.int8 and scale.dtype == np.float32
    assert scale.shape == (*matrix.shape[:axis], 1, *matrix.shape[axis + 1 :])
    exact = scale.astype(np.float64)
    assert (np.abs(matrix - values * exact) <= exact / 2 * (1 + 1e-4)).all()  # the quotient itself is rounded, too
    assert (np.abs(values.astype(int)).max(axis, keepdims=True) == 127)[
        np.abs(matrix).max(axis, keepdims=True) > 1e-35
    ].all()
    np.testing.assert_array_equal(values[matrix == 0], 0)


def int8(config: base.VLMConfig) -> base.VLMConfig:
    return dataclasses.replace(config, storage="int8")


@pytest.mark.parametrize("name", DISTINCT)
def test_the_table_speaks_about_every_parameter_and_calls_matrix_what_the_modules_keep_in_int8(name):
    config = dataclasses.replace(registry.get(name).tiny(), lora_rank=2)
    plain, stored = (flatten_dict(boxed(c), sep="/") for c in (config, int8(config)))
    matrices = {path for path in plain if quantize.stored_as(f"backbone/{path}") == "matrix"}
    assert matrices == {path for path, x in stored.items() if x.value.dtype == jnp.int8}
    scales = {path.rpartition("/")[0] + "/scale": path for path in matrices}
    assert set(stored) == set(plain) | set(scales)
    for scale, path in scales.items():
        # The axes of the output, by name, and nothing else: stacked layers have one scale each.
        scale, kernel = stored[scale], stored[path]
        assert scale.value.dtype == jnp.float32
        assert all(
            (size, axis) in ((1, None), (width, name))
            for size, axis, width, name in zip(scale.value.shape, scale.names, kernel.value.shape, kernel.names)
        ), path
        assert ("layers" in scale.names) == ("layers" in kernel.names)
        added = [size for size, axis in zip(scale.value.shape, scale.names) if (size, axis) != (1, None)]
        assert 1 < np.prod(added) < np.prod(kernel.value.shape)
        assert set(scale.names) - {None} <= {axis for axis, _ in RULES}


def test_scales_are_per_head_and_channel_where_kernels_have_several_axes_and_layers_are_stacked():
    config = registry.get("paligemma-3b-224").tiny()  # one key/value head for four query heads
    shapes = flatten_dict(unbox(boxed(int8(config))), sep="/")
    text = config.text
    layer, heads, size, width = text.depth, text.num_heads, text.head_dim, text.width
    for path, shape in {
        "attn/q": (layer, 1, heads, size),
        "attn/k": (layer, 1, 1, size),
        "attn/o": (layer, 1, 1, width),
        "mlp/up": (layer, 1, text.mlp_dim),
    }.items():
        assert shapes[f"text/layers/{path}/scale"].shape == shape
    assert shapes["text/embed/scale"].shape == (text.vocab_size, 1)
    params = quantize.quantize({"backbone": toy_params(config)}, {"backbone": unbox(boxed(int8(config)))})["backbone"]
    kernel, scale = toy_params(config)["text"]["layers"]["attn"]["o"]["kernel"], params["text"]["layers"]["attn"]["o"]
    np.testing.assert_allclose(scale["scale"], np.abs(kernel).max((1, 2), keepdims=True) / 127, rtol=1e-6)


def toy_params(config: base.VLMConfig):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), unbox(boxed(config)))


def test_a_parameter_that_no_line_speaks_about_is_named():
    with pytest.raises(ValueError, match=r"backbone/text/gamma.*add one"):
        quantize.stored_as("backbone/text/gamma")


def test_what_does_not_fit_the_model_is_refused_by_name():
    kernel = {"kernel": np.ones((2, 3), np.float32)}
    shapes = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.int8), "scale": jax.ShapeDtypeStruct((1, 3), jnp.float32)}
    with pytest.raises(ValueError, match=r"backbone/b/bias: not a parameter of both"):
        quantize.quantize({"backbone": {"a": kernel}}, {"backbone": {"a": shapes, "b": {"bias": shapes["scale"]}}})
    with pytest.raises(ValueError, match=r"head/a/kernel: the table says 'kept', the model int8"):
        quantize.quantize({"head": {"a": kernel}}, {"head": {"a": shapes}})
    kernel["kernel"][0, 0] = np.nan
    with pytest.raises(ValueError, match=r"backbone/a/kernel holds values that are not finite"):
        quantize.quantize({"backbone": {"a": kernel}}, {"backbone": {"a": shapes}})


@pytest.fixture(scope="module")
def policy():
    """A small policy with adapters, a batch, its parameters, and the same policy and parameters in int8."""
    model = toy.make_product("policy_head", "action_query", "lstm")
    model = dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, lora_rank=2))
    batch = toy.make_batch(np.random.default_rng(0), windows=1, chunk=2)
    params = toy.random_params(model, batch)
    served = dataclasses.replace(model, vlm=int8(model.vlm))
    prepare = functools.partial(objective.prepare, spec=model.vlm.image, cameras=model.config.cameras)
    shapes = unbox(jax.eval_shape(lambda inputs: served.init(jax.random.key(0), prepare(inputs)), batch.inputs))
    return model, batch, params, served, quantize.quantize(params, shapes["params"])


def test_gradients_of_an_int8_policy_reach_its_adapters_and_are_those_of_the_matrices_it_stands_for(policy):
    model, batch, params, served, stored = policy
    flat, quantised = flatten_dict(params, sep="/"), flatten_dict(stored, sep="/")
    dequantised = dict(flat)
    for path, x in quantised.items():
        if x.dtype == jnp.int8:
            dequantised[path] = x * quantised[path.rpartition("/")[0] + "/scale"]
    adapters = {path: x for path, x in flat.items() if path.endswith(("lora_a", "lora_b"))}
    assert adapters

    @functools.partial(jax.jit, static_argnums=0)
    def grads(model, adapters, rest):
        def loss(adapters):
            return objective.RobotLoss(model)(unflatten_dict({**rest, **adapters}, sep="/"), batch)[0]

        return jax.value_and_grad(loss)(adapters)

    found, expected = grads(served, adapters, quantised), grads(model, adapters, dequantised)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for path in adapters:
        np.testing.assert_allclose(found[1][path], expected[1][path], rtol=1e-2, atol=1e-6, err_msg=path)
        assert np.abs(found[1][path]).max() > 0 or path.endswith("lora_a"), path
    with pytest.raises(ValueError, match="merge before quantising"):
        merge_lora(stored["backbone"], model.vlm.lora)


def test_merged_adapters_are_quantised_with_the_matrix(policy):
    model, _, params, served, _ = policy
    lora, path = model.vlm.lora, ("backbone", "text", "layers", "mlp", "up", "kernel")
    merged = flatten_dict(merge_lora(params, lora))
    plain = dataclasses.replace(served, vlm=dataclasses.replace(served.vlm, lora_rank=0))
    shapes = flatten_dict({"backbone": unbox(boxed(plain.vlm))})
    backbone = {key: x for key, x in merged.items() if key in shapes}
    kept = {key: x for key, x in shapes.items() if key in backbone or key[-1] == "scale"}
    found = flatten_dict(quantize.quantize(unflatten_dict(backbone), unflatten_dict(kept)))
    error = np.abs(found[path] * found[(*path[:-1], "scale")] - merged[path])
    assert (error <= found[(*path[:-1], "scale")] * 0.5001).all()
    assert error.max() < np.abs(merged[path] - flatten_dict(params)[path]).max() / 10


@pytest.mark.parametrize("head", sorted(set(toy.HEADS) - {"discrete"}))
def test_heads_and_encoders_have_adapters_beside_every_matrix_where_the_config_asks_for_them_and_nowhere_else(head):
    extra = {"proprio": ProprioConfig(enabled=True), "action_history": ActionHistoryConfig(length=2)}
    window = {"history": "one_step", "window": 1} if head == "mlp" else {}
    model = toy.make_model(head=toy.HEADS[head], **window, **extra)
    asked = [(dataclasses.replace(model.config, lora_rank=2), 2)]
    if head == "lstm":  # without them nothing of a head is asked
        asked.append((model.config, 0))
    for policy, rank in asked:
        adapted = dataclasses.replace(model, config=policy)
        shapes, _ = build.abstract_params(adapted, meshes.make_mesh((1, 1, 1), jax.devices()[:1]))
        flat = flatten_dict(shapes, sep="/")
        matrices = {path for path in flat if path.endswith("kernel") and not path.startswith("backbone/")}
        assert {"proprio/fuse/kernel", "action_history/out/kernel"} < matrices
        assert any(path.startswith("head/") for path in matrices)
        adapters = {path for path in flat if path.endswith("lora_a")}
        assert adapters == ({path.removesuffix("kernel") + "lora_a" for path in matrices} if rank else set())


def test_adapters_of_recurrent_matrices_merge():
    features = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    kernel = Kernel(lora=Lora(2, 4.0))
    layer = lstm.LSTMLayer(4, kernel)
    shapes = unbox(jax.eval_shape(layer.init, jax.random.key(0), features, np.ones((2, 3), bool))["params"])
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), shapes)
    run = jax.jit(
        lambda layer, params: layer.apply({"params": params}, features, np.ones((2, 3), bool))[0], static_argnums=0
    )
    merged = merge_lora(params, kernel.lora)
    assert set(merged) == {"input_kernel", "hidden_kernel", "input_bias", "hidden_bias"}
    np.testing.assert_allclose(run(layer, params), run(lstm.LSTMLayer(4), merged), rtol=1e-4, atol=1e-4)


def test_a_discrete_head_says_that_it_has_no_matrices_for_adapters():
    with pytest.raises(ValueError, match=r"policy.lora_rank=2.*backbone.lora_rank"):
        toy.make_product("interleaved", "token", "discrete", lora_rank=2)


def test_what_int8_stands_for_is_float_again_and_is_rounded_to_the_same(policy):
    _, _, params, _, stored = policy
    plain = quantize.dequantize(stored)
    assert {x.dtype for x in jax.tree.leaves(plain)} == {jnp.dtype("float32")}
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)
    again = flatten_dict(quantize.quantize(plain, shapes), sep="/")
    for path, x in flatten_dict(stored, sep="/").items():
        if x.dtype == jnp.int8:
            np.testing.assert_array_equal(again[path], x, err_msg=path)
        else:
            np.testing.assert_allclose(again[path], x, rtol=1e-6, err_msg=path)
