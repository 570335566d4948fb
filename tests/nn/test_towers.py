"""ViT and decoder: scanned layers, rematerialisation, dropout, bad sizes."""

from __future__ import annotations

import dataclasses
import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.nn import decoder, decoder_config, stack, vit
from robovlms_jax.nn.attention import causal_mask
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.positions import sinusoid
from robovlms_jax.types import Tokens

TEXT = decoder_config.DecoderConfig(
    width=16,
    depth=3,
    mlp_dim=24,
    num_heads=2,
    vocab_size=11,
    activation="gelu",
    norm_epsilon=1e-5,
    norm="layer",
    sub_norm=True,
    is_gated=False,
    attention_bias="all",
    mlp_bias=True,
    positions="sinusoid",
    head="tied",
    embed_scale=True,
    dropout=0.5,
    attention_dropout=0.5,
)
VISION = vit.ViTConfig(
    image_size=6,
    patch_size=2,
    width=12,
    depth=3,
    mlp_dim=20,
    num_heads=3,
    activation="quick_gelu",
    norm_epsilon=1e-5,
    cls="keep",
    patch_bias=False,
    pre_norm=True,
)
B, S = 2, 5


def make_text(config: decoder_config.DecoderConfig = TEXT, remat: stack.Remat = "none"):
    module = decoder.Decoder(config, remat=remat)
    embeds = jax.random.normal(jax.random.key(0), (B, S, config.width))
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    return module, (Tokens(embeds, jnp.ones((B, S), bool), positions),)


def random_params(module, *args):
    rng = np.random.default_rng(1)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args)["params"])
    return jax.tree.map(lambda p: rng.normal(0.1, 0.3, p.shape).astype(np.float32), shapes)


def test_scanned_decoder_equals_its_layers_one_after_another(exact_matmul):
    module, (tokens,) = make_text()
    embeds, mask, positions = tokens.embeds, tokens.mask, tokens.positions
    params = random_params(module, tokens)
    found, _ = jax.jit(module.apply)({"params": params}, tokens)
    x = embeds * np.sqrt(16) + sinusoid(positions, 16)
    attend = causal_mask(positions, positions, mask)
    arguments = {"mask": attend, "bias": None, "rotary": None, "cache": None, "deterministic": True}
    step = jax.jit(functools.partial(decoder.Block(TEXT).apply, **arguments))
    for layer in range(TEXT.depth):
        block = jax.tree.map(lambda p, layer=layer: p[layer], params["layers"])
        x, _ = step({"params": block}, x)
    expected = LayerNorm(1e-5).apply({"params": params["final_norm"]}, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_scanned_vit_equals_its_layers_one_after_another(exact_matmul):
    images = jax.random.normal(jax.random.key(0), (B, 6, 6, 3))
    params = random_params(vit.ViT(VISION), images)
    found = jax.jit(vit.ViT(VISION).apply)({"params": params}, images)
    patches = [
        np.einsum(
            "bxyc,xycd->bd", images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2], params["patch"]["kernel"]
        )
        for row in range(3)
        for column in range(3)
    ]
    x = np.stack([np.broadcast_to(params["cls"], (B, 12)), *patches], 1) + params["positions"]
    x = LayerNorm(1e-5).apply({"params": params["pre_norm"]}, x)
    step = jax.jit(vit.Block(VISION).apply)
    for layer in range(VISION.depth):
        x = step({"params": jax.tree.map(lambda p, layer=layer: p[layer], params["layers"])}, x)
    expected = LayerNorm(1e-5).apply({"params": params["post_norm"]}, x)
    assert found.shape == (B, VISION.num_tokens, 12)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "kinds",
    [
        ("full",),
        # Every day: `full`, above, which makes more again than they do; what each keeps in the test below.
        pytest.param(("dots", "offload"), marks=pytest.mark.slow),
    ],
)
def test_what_remat_keeps_and_where_changes_neither_values_nor_gradients_nor_dropout(monkeypatch, kinds):
    monkeypatch.setattr(stack, "SHORT", 0)  # or none of these products would be long enough to be kept
    _, args = make_text()
    params = random_params(make_text()[0], *args)

    def run(remat):
        def loss(params):
            rngs = {"dropout": jax.random.key(5)}
            module = make_text(remat=remat)[0]
            return jnp.square(module.apply({"params": params}, *args, deterministic=False, rngs=rngs)[0]).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    value, grads = run("none")
    for remat in kinds:
        other, other_grads = run(remat)
        np.testing.assert_allclose(other, value, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), other_grads, grads)


def test_remat_recomputes_what_it_does_not_store(monkeypatch):
    monkeypatch.setattr(stack, "SHORT", 0)
    images = jnp.ones((B, 6, 6, 3))
    params = random_params(vit.ViT(VISION), images)

    def traced(remat):
        def loss(params):
            return vit.ViT(VISION, remat=remat).apply({"params": params}, images).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(params))

    none, dots, offload, full = map(traced, typing.get_args(stack.Remat))
    assert none.count("exp ") < dots.count("exp ") == offload.count("exp ") == full.count("exp ")
    # Products with parameters are made again by full alone, and wait in the host's memory for offload alone.
    assert dots.count("dot_general") == offload.count("dot_general") < full.count("dot_general")
    assert "<host>" in offload and "<host>" not in none + dots + full


def test_dropout_draws_anew_for_attention_and_mlp():
    # Output biases alone: attention adds 0 or 2, the MLP 0 or 200.
    config = dataclasses.replace(TEXT, attention_dropout=0.0)
    module, (tokens,) = make_text(config)
    embeds, mask, positions = tokens.embeds, tokens.mask, tokens.positions
    block = jax.tree.map(lambda p: jnp.zeros_like(p[0]), random_params(module, tokens)["layers"])
    block["attn"]["o"]["bias"] += 1
    block["mlp"]["down"]["bias"] += 100
    attend = causal_mask(positions, positions, mask)
    arguments = {"mask": attend, "bias": None, "rotary": None, "cache": None, "deterministic": False}
    rngs = {"dropout": jax.random.key(0)}
    y, _ = decoder.Block(config).apply({"params": block}, jnp.zeros_like(embeds), **arguments, rngs=rngs)
    assert set(np.unique(y)) == {0, 2, 200, 202}


def test_embeddings_are_dropped_twice_like_the_published_code_does():
    module, _ = make_text()
    embeds = jnp.full((B, 64, 16), 1000.0)  # sinusoids are nothing beside it
    tokens = Tokens(embeds, jnp.ones((B, 64), bool), jnp.broadcast_to(jnp.arange(64), (B, 64)))
    params = jax.tree.map(jnp.zeros_like, random_params(module, tokens))
    params["final_norm"]["scale"] += 1  # dropped entries lie below the mean, kept ones above
    rngs = {"dropout": jax.random.key(0)}
    hidden, _ = module.apply({"params": params}, tokens, deterministic=False, rngs=rngs)
    assert abs((hidden <= 0).mean() - 0.75) < 0.04


class _Noise(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.param("seed", nn.with_logical_partitioning(nn.initializers.normal(), ("embed",)), (4,))
        return nn.Dropout(0.5, deterministic=False)(jnp.ones_like(x))


class _Tower(nn.Module):
    @nn.compact
    def __call__(self, x):
        return stack.scan_layers(lambda block, x, _: (x, block(x)), _Noise(name="layers"), x, length=3, remat="none")[1]


def test_layers_have_their_own_parameters_dropout_and_a_named_axis():
    x = jnp.ones((64,))
    variables = _Tower().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    seed = variables["params"]["layers"]["seed"]
    assert seed.names == ("layers", "embed")
    assert len(np.unique(seed.value[:, 0])) == 3
    drawn = _Tower().apply(variables, x, rngs={"dropout": jax.random.key(1)})
    assert drawn.shape == (3, 64)
    assert all((drawn[i] != drawn[j]).any() for i, j in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (VISION, {"patch_size": 4}, "image_size=6 is no multiple of patch_size=4"),
        (VISION, {"num_heads": 5}, "width=12 does not divide over num_heads=5"),
        (VISION, {"activation": "swish"}, "'swish' is unknown; known: .*quick_gelu"),
        (TEXT, {"num_heads": 3}, "width=16 must be even and divide over num_heads=3"),
        (TEXT, {"activation": "swish"}, "'swish' is unknown"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_built(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_images_of_another_size_are_refused():
    with pytest.raises(AssertionError, match="shape"):
        jax.eval_shape(vit.ViT(VISION).init, jax.random.key(0), jnp.ones((B, 8, 8, 3)))


@pytest.mark.parametrize("tower", ["vit", pytest.param("vit, rotary", marks=pytest.mark.slow), "decoder"])
def test_slots_that_a_tower_puts_behind_its_tokens_change_neither_results_nor_gradients(monkeypatch, tower):
    # In float32, where none are put unless told so and rounding hides nothing: 10 tokens become 16, 11 become 16.
    if tower == "decoder":
        module = decoder.Decoder(dataclasses.replace(TEXT, dropout=0.0, attention_dropout=0.0))
        mask = jnp.ones((2, 11), bool).at[1, 7:].set(False)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        given = jax.random.normal(jax.random.key(0), (2, 11, TEXT.width))

        def call(params, x):
            group = jnp.zeros((2, 11), jnp.int32).at[:, 9:].set(1)
            return module.apply(params, Tokens(x, mask, positions, group=group))[0]

        params = jax.jit(module.init)(jax.random.key(1), Tokens(given, mask, positions))
    else:
        turned = {"grid_rotary": True, "cls": "none", "width": 24} if "rotary" in tower else {}
        module = vit.ViT(dataclasses.replace(VISION, **turned))
        given = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
        params, call = jax.jit(module.init)(jax.random.key(1), given), module.apply

    def found():
        cotangent = jax.random.normal(jax.random.key(2), jax.eval_shape(call, params, given).shape)
        return jax.jit(jax.value_and_grad(lambda *x: (call(*x) * cotangent).sum(), (0, 1)))(params, given)

    plain = found()
    for room in (vit, decoder):
        monkeypatch.setattr(room, "spare", lambda size, dtype: -size % 8)
    for x, y in zip(jax.tree.leaves(found()), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
