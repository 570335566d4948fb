"""What every vision-language model promises: layout, positions, padding, cache, adapters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.backbones import base
from robovlms_jax.nn.linear import merge_lora
from robovlms_jax.types import Tokens
from tests.backbones.oracle import Twin, abstract, example, relative_error

pytestmark = pytest.mark.usefixtures("exact_matmul")
P = 6  # tokens per image of the twin
FAMILIES = {base.get(name).model_type: name for name in reversed(base.names())}


@pytest.fixture(scope="module", params=FAMILIES.values())
def twin(request) -> Twin:
    config = base.get(request.param).tiny()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, dropout=0.1, attention_dropout=0.1))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: rng.normal(0.05, 0.2, x.shape).astype(np.float32), abstract(config))
    return Twin(config, None, params)


@pytest.fixture(scope="module")
def queries(twin) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(4).normal(size=(2, twin.config.width)) * 0.1, jnp.float32)


def query_features(twin, images, ids, mask, queries) -> np.ndarray:
    tokens = twin.apply(images, ids, mask, queries, method="embed")
    return np.asarray(twin.apply(tokens, method="decode")[0][:, tokens.slot("query")])


def test_layout_mask_and_positions_of_a_padded_prompt(twin, queries):
    images, ids, mask = example(twin.config, lengths=(7, 5))
    tokens = twin.apply(images, ids, mask, queries, method="embed")
    assert tokens.layout == (("bos", 1), ("image", 2 * P), ("text", 6), ("query", 2))
    image = list(range(1, 13))
    # Text after the images from 13 on; the queries before eos, which comes after them; padding counts for nothing.
    assert tokens.positions[0].tolist() == [0, *image, 13, 14, 15, 16, 17, 20, 18, 19]
    assert tokens.positions[1, :17].tolist() == [0, *image, 13, 14, 15, 18]
    assert tokens.positions[1, tokens.slot("query")].tolist() == [16, 17]
    assert tokens.mask[1].tolist() == [True] * 17 + [False, False] + [True, True]


def test_a_plain_prompt_has_no_query_run_and_counts_through(twin):
    images, ids, mask = example(twin.config, cameras=("static",), lengths=(7, 5))
    tokens = twin.apply(images, ids, mask, method="embed")
    assert tokens.layout == (("bos", 1), ("image", P), ("text", 6))
    assert tokens.positions[0].tolist() == list(range(13))
    assert tokens.positions[1, :11].tolist() == list(range(11))
    with pytest.raises(KeyError, match="query"):
        tokens.slot("query")


def test_text_alone_needs_no_image(twin):
    _, ids, mask = example(twin.config)
    tokens = twin.apply({}, ids, mask, method="embed")
    assert tokens.layout == (("bos", 1), ("image", 0), ("text", 6))
    np.testing.assert_array_equal(tokens.embeds, twin.params["text"]["embed"]["table"][ids])


def test_cameras_keep_the_order_they_are_given_in(twin):
    images, ids, mask = example(twin.config, cameras=("wrist", "static"))
    both = twin.apply(images, ids, mask, method="embed")
    both = both.embeds[:, both.slot("image")]
    for place, camera in enumerate(images):
        one = twin.apply({camera: images[camera]}, method="encode_images")
        np.testing.assert_allclose(both[:, place * P : (place + 1) * P], one, atol=1e-5)


def test_padding_changes_nothing(twin, queries):
    images, ids, mask = example(twin.config, lengths=(5, 4))
    short = query_features(twin, images, ids[:, :5], mask[:, :5], queries)
    garbage = np.where(mask, ids, 77)
    assert relative_error(query_features(twin, images, garbage, mask, queries), short) < 1e-5


def test_queries_see_images_and_text_but_not_what_ends_the_prompt(twin, queries):
    images, ids, mask = example(twin.config, lengths=(7, 5))
    before = query_features(twin, images, ids, mask, queries)
    other_end = ids.copy()
    other_end[np.arange(2), mask.sum(1) - 1] = 9
    np.testing.assert_array_equal(query_features(twin, images, other_end, mask, queries), before)
    other_word = ids.copy()
    other_word[:, 3] = 9
    assert relative_error(query_features(twin, images, other_word, mask, queries), before) > 1e-3
    for camera in images:
        moved = images | {camera: images[camera][:, ::-1]}
        assert relative_error(query_features(twin, moved, ids, mask, queries), before) > 1e-4


def test_cached_decoding_equals_decoding_at_once(twin, queries):
    images, ids, mask = example(twin.config, lengths=(7, 5))
    tokens = twin.apply(images, ids, mask, queries, method="embed")
    slots = tokens.mask.shape[1]
    expected, none = twin.apply(tokens, method="decode")
    assert none is None

    # By position, so that nothing is decoded before what it attends to: eos lies in an earlier slot than the queries.
    order = jnp.argsort(tokens.positions, axis=1)
    ordered = Tokens(*(jnp.take_along_axis(x, order[..., None] if x.ndim == 3 else order, 1) for x in part_of(tokens)))
    model, params = base.build(twin.config), {"params": twin.params}
    cache = model.apply(params, 2, slots + 3, method="init_cache")
    decode = jax.jit(lambda tokens, cache: model.apply(params, tokens, cache, method="decode"))
    found = []
    for start, stop in [(0, slots - 2), (slots - 2, slots - 1), (slots - 1, slots)]:
        hidden, cache = decode(Tokens(*(x[:, start:stop] for x in part_of(ordered))), cache)
        found.append(hidden)
    assert int(cache.length) == slots
    found = jnp.concatenate(found, 1)
    expected = jnp.take_along_axis(expected, order[..., None], 1)
    real = np.asarray(ordered.mask)
    assert relative_error(found[real], expected[real]) < 1e-5


def part_of(tokens: Tokens) -> tuple[jax.Array, jax.Array, jax.Array]:
    return tokens.embeds, tokens.mask, tokens.positions


def test_dropout_acts_only_when_asked_and_reaches_images_and_text(twin, queries):
    images, ids, mask = example(twin.config, lengths=(7, 5))
    model, params = base.build(twin.config), {"params": twin.params}

    @jax.jit
    def embeds(key):
        tokens = model.apply(
            params, images, ids, mask, queries, deterministic=False, rngs={"dropout": key}, method="embed"
        )
        hidden, _ = model.apply(params, tokens, deterministic=False, rngs={"dropout": key}, method="decode")
        return tokens.embeds[:, tokens.slot("image")], hidden

    (image, hidden), (other_image, other_hidden) = embeds(jax.random.key(0)), embeds(jax.random.key(1))
    assert relative_error(image, other_image) > 1e-3
    assert relative_error(hidden, other_hidden) > 1e-3


@pytest.mark.parametrize("change", [{"remat": True}, {"lora_rank": 4}])
def test_what_only_concerns_training_changes_no_value(twin, queries, change):
    images, ids, mask = example(twin.config)
    expected = query_features(twin, images, ids, mask, queries)
    config = dataclasses.replace(twin.config, **change)
    shapes = flatten_dict(abstract(config), sep="/")
    adapters = {
        path: jnp.full(x.shape, float(path.endswith("lora_a"))) for path, x in shapes.items() if "/lora_" in path
    }
    params = unflatten_dict(flatten_dict(twin.params, sep="/") | adapters, sep="/")
    found = query_features(Twin(config, None, params), images, ids, mask, queries)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_adapters_reach_every_matrix_and_can_be_merged(twin, queries):
    config = dataclasses.replace(twin.config, lora_rank=4, lora_alpha=2.0)
    shapes = flatten_dict(abstract(config), sep="/")
    kernels = {path.rpartition("/")[0] for path in shapes if path.endswith("/kernel")}
    assert kernels == {path.rpartition("/")[0] for path in shapes if path.endswith("/lora_a")}
    assert shapes["text/layers/attn/q/lora_a"].shape == (3, 32, 4)
    assert shapes["text/layers/attn/q/lora_b"].shape == (3, 4, 4, 8)
    assert shapes["text/layers/attn/o/lora_a"].shape == (3, 4, 8, 4)

    rng = np.random.default_rng(5)
    adapters = {path: rng.normal(0, 0.2, x.shape).astype(np.float32) for path, x in shapes.items() if "/lora_" in path}
    params = unflatten_dict(flatten_dict(twin.params, sep="/") | adapters, sep="/")
    images, ids, mask = example(twin.config)
    adapted = query_features(Twin(config, None, params), images, ids, mask, queries)
    merged = Twin(twin.config, None, merge_lora(params, config.lora))
    assert relative_error(query_features(merged, images, ids, mask, queries), adapted) < 1e-5
    assert relative_error(query_features(twin, images, ids, mask, queries), adapted) > 1e-2
