"""Attention, masks by position, and the cache."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.nn.attention import Attention, Cache, causal_mask, joint
from robovlms_jax.nn.linear import Kernel

B, S, D, N, H = 2, 5, 12, 6, 4


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), jnp.float32)


def init(module: Attention, *args, **kwargs):
    rng = np.random.default_rng(1)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs))
    return jax.tree.map(lambda p: rng.normal(0.1, 0.3, p.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def apply(module: Attention, *args, **kwargs):
    return module.apply(*args, **kwargs)


def naive(params, x, context, mask, kv_heads: int) -> np.ndarray:
    """One head after another, in NumPy."""
    p = jax.tree.map(np.asarray, params["params"])
    x, context = np.asarray(x), np.asarray(context)
    heads = []
    for head in range(N):
        group = head // (N // kv_heads)
        q = x @ p["q"]["kernel"][:, head] + p["q"]["bias"][head]
        k = context @ p["k"]["kernel"][:, group] + p["k"]["bias"][group]
        v = context @ p["v"]["kernel"][:, group] + p["v"]["bias"][group]
        scores = np.where(mask, np.einsum("bsh,bth->bst", q, k) / np.sqrt(H), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v)
    y = np.stack(heads, -2)
    if "inner_norm" in p:
        flat = y.reshape(*y.shape[:2], -1)
        flat = (flat - flat.mean(-1, keepdims=True)) / np.sqrt(flat.var(-1, keepdims=True) + 1e-5)
        y = (flat * p["inner_norm"]["scale"] + p["inner_norm"]["bias"]).reshape(y.shape)
    return np.einsum("bsnh,nhd->bsd", y, p["o"]["kernel"]) + p["o"]["bias"]


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("inner_norm", [None, 1e-5])
def test_equals_attention_written_out_head_by_head(exact_matmul, x, kv_heads, inner_norm):
    rng = np.random.default_rng(0)
    context = rng.normal(size=(B, 7, 9)).astype(np.float32)
    mask = rng.random((B, S, 7)) < 0.6
    mask[..., 0] = True
    module = Attention(N, H, num_kv_heads=kv_heads, inner_norm_epsilon=inner_norm)
    params = init(module, x, context)
    assert params["params"]["k"]["kernel"].shape == (9, kv_heads, H)
    y, keys = apply(module, params, x, context, mask=jnp.asarray(mask))
    np.testing.assert_allclose(y, naive(params, x, context, mask, kv_heads), rtol=1e-4, atol=1e-4)
    again, new = apply(module, params, x, keys, mask=jnp.asarray(mask))  # what was made of the context is enough
    np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-6)  # another program: some processors round otherwise
    assert new is None


@pytest.mark.parametrize("storage", ["float", "int8"])
@pytest.mark.parametrize(("kv_heads", "norm"), [(6, None), (2, ("layer", 1e-5)), (1, None)])
def test_one_product_makes_queries_keys_and_values(exact_matmul, x, storage, kv_heads, norm):
    # Fails if heads change places, or if what follows on queries and keys is done to others. Layers are stacked here.
    apart, together = (
        Attention(N, H, num_kv_heads=kv_heads, head_norm=norm, kernel=Kernel(storage, joint=joined))
        for joined in (False, True)
    )
    shapes = nn.unbox(jax.eval_shape(together.init, jax.random.key(0), x))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: rng.integers(-9, 9, p.shape).astype(p.dtype) if p.dtype == jnp.int8 else p, init(apart, x)
    )
    tower = {name: {"attn": {"attn": tree["params"]}} for name, tree in (("all", params), ("shapes", shapes))}
    found = joint(tower["all"], tower["shapes"])["attn"]["attn"]
    assert set(found) & {"q", "k", "v", "qkv"} == {"qkv"}
    expected = apply(apart, params, x)[0]
    np.testing.assert_allclose(apply(together, {"params": found}, x)[0], expected, rtol=1e-5, atol=1e-5)
    context = jnp.ones((B, 3, D))
    assert "qkv" not in init(together, x, context)["params"]  # of different tokens: products apart


def test_what_is_put_together_is_deleted_where_it_was():
    parts = {name: {"kernel": jnp.ones((D, N, H))} for name in "qkv"}
    found = joint({"attn": parts}, {"attn": {"qkv": {"kernel": None}}}, take=True)
    assert found["attn"]["qkv"]["kernel"].shape == (D, 3 * N, H) and parts["q"]["kernel"].is_deleted()


def test_biases_are_optional(x):
    params = init(Attention(N, H, use_bias=False), x)["params"]
    assert all(set(layer) == {"kernel"} for layer in params.values())


def test_few_key_value_heads_stay_whole_and_many_split_like_query_heads(x):
    def axes(kv_heads):
        params = jax.eval_shape(Attention(N, H, num_kv_heads=kv_heads).init, jax.random.key(0), x)["params"]
        return params["k"]["kernel"].names

    assert axes(2) == ("embed", "kv_heads", "head_dim")
    assert axes(None) == ("embed", "heads", "head_dim")


def test_order_comes_from_positions_not_from_slots(exact_matmul, x):
    module = Attention(N, H)
    params = init(module, x)
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    real = jnp.ones((B, S), bool)
    expected, _ = apply(module, params, x, mask=causal_mask(positions, positions, real))
    order = np.asarray([3, 0, 4, 2, 1])
    shuffled, _ = apply(module, params, x[:, order], mask=causal_mask(positions[:, order], positions[:, order], real))
    np.testing.assert_allclose(shuffled, expected[:, order], atol=1e-5)


def test_a_later_or_unreal_key_changes_nothing(exact_matmul, x):
    module = Attention(N, H)
    params = init(module, x)
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    mask = causal_mask(positions, positions, jnp.asarray([[True, False, True, True, True]] * B))
    before, _ = apply(module, params, x, mask=mask)
    after, _ = apply(module, params, x.at[:, 1].add(1.0).at[:, 4].add(1.0), mask=mask)
    np.testing.assert_array_equal(before[:, jnp.asarray([0, 2, 3])], after[:, jnp.asarray([0, 2, 3])])
    assert jnp.abs(before[:, 4] - after[:, 4]).max() > 1e-3


def test_rows_that_may_attend_nothing_are_finite_with_finite_gradients(x):
    module = Attention(N, H)
    params = init(module, x)

    def total(params):
        return apply(module, params, x, mask=jnp.zeros((B, S, S), bool))[0].sum()

    value, grads = jax.jit(jax.value_and_grad(total))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_cache_equals_the_whole_sequence(exact_matmul, x):
    module = Attention(N, H, num_kv_heads=2)
    params = init(module, x)
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    real = jnp.asarray([[True] * S, [True, True, False, True, True]])
    expected, _ = apply(module, params, x, mask=causal_mask(positions, positions, real))
    cache = Cache.create(1, B, S + 2, 2, H, jnp.float32)
    found = []
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        now = positions[:, start:stop], real[:, start:stop]
        seen = jnp.concatenate([cache.positions, now[0]], 1), jnp.concatenate([cache.mask, now[1]], 1)
        kept = cache.key[0], cache.value[0]
        y, (key, value) = apply(module, params, x[:, start:stop], mask=causal_mask(now[0], *seen), cache=kept)
        cache = cache.append(Cache(key[None], value[None], *now, now[0], jnp.int32(stop - start)))
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found, 1), expected, atol=1e-5)
    assert int(cache.length) == S


def test_more_tokens_than_the_cache_has_slots_are_refused():
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of 4 slots"):
        Cache.create(1, B, 4, N, H, jnp.float32).append(Cache.create(1, B, 5, N, H, jnp.float32))


def test_slots_are_put_and_taken_per_row():
    # What a ring of frames does: every row writes and reads at its own place, and rows that are not chosen stay.
    def numbered(slots, first):
        empty = Cache.create(2, B, slots, N, H, jnp.float32)
        return jax.tree.map(lambda x: (jnp.arange(x.size).reshape(x.shape) + first).astype(x.dtype), empty)

    whole, part, start = numbered(7, 0), numbered(2, 1000), jnp.asarray([1, 5])
    found = whole.put(part.select(jnp.asarray([True, False]), whole.take(start, 2)), start)
    for name, axes in (("key", (1, 3)), ("value", (1, 3)), ("positions", (0, 1)), ("mask", (0, 1)), ("places", (0, 1))):
        expected, new = (np.moveaxis(np.asarray(getattr(x, name)), axes, (0, 1)).copy() for x in (whole, part))
        expected[0, 1:3] = new[0]
        np.testing.assert_array_equal(np.moveaxis(np.asarray(getattr(found, name)), axes, (0, 1)), expected)
