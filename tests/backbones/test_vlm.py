"""What every vision-language model promises: layout, positions, padding, cache, adapters."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.backbones import base, registry, sequence
from robovlms_jax.nn.linear import merge_lora
from robovlms_jax.types import Tokens
from tests.backbones import families
from tests.backbones.oracle import Twin, abstract, as_read, example, relative_error

pytestmark = pytest.mark.usefixtures("exact_matmul")
P = 6  # tokens per image of KOSMOS-2's twin
CAMERAS = ("wrist", "static")


def make_twin(name: str, **text) -> Twin:
    config = registry.get(name).tiny()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **text))
    rng = np.random.default_rng(3)
    return Twin(
        config, None, jax.tree.map(lambda x: rng.normal(0.05, 0.2, x.shape).astype(np.float32), abstract(config))
    )


@pytest.fixture(scope="module", params=families.FORMS.values())
def twin(request) -> Twin:
    return make_twin(request.param)


@pytest.fixture(scope="module")
def kosmos_twin() -> Twin:
    return make_twin("kosmos-2", dropout=0.1, attention_dropout=0.1)


@functools.partial(jax.jit, static_argnums=0)
def _run(config, params, images, ids, mask, queries):
    model = base.build(config)
    images = {camera: images[camera] for camera in CAMERAS}
    runs = [sequence.query(queries, len(ids))]
    tokens = model.apply({"params": params}, images, ids, mask, runs, method="embed")
    return tokens, model.apply({"params": params}, tokens, method="decode")[0]


@pytest.mark.parametrize("name", ["internvl3-1b", "janus-pro-1b", "gemma-3-4b"])
def test_tokens_around_images_that_the_vocabulary_lacks_are_named_and_no_nan(name):
    config = dataclasses.replace(registry.get(name).tiny(), image_end=(151_666,))
    images, *text = example(config)
    with pytest.raises(ValueError, match=r"\[151666\] of a \w+, and its vocabulary has 128 ids. Name those of its tok"):
        jax.eval_shape(lambda: base.build(config).init(jax.random.key(0), images, *text))


def queries_of(twin) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(4).normal(size=(2, twin.config.width)) * 0.1, jnp.float32)


def run(twin, images, ids, mask) -> tuple[Tokens, jax.Array]:
    """Tokens with two queries, and their hidden states: one compiled program for most tests of a family."""
    return _run(twin.config, twin.params, images, *as_read(twin.config, ids, mask), queries_of(twin))


def query_features(twin, images, ids, mask) -> np.ndarray:
    tokens, hidden = run(twin, images, ids, mask)
    return np.asarray(hidden[:, tokens.slot("query")])


def test_layout_mask_and_positions_of_a_padded_prompt(kosmos_twin):
    images, ids, mask = example(kosmos_twin.config, lengths=(7, 5))
    tokens, _ = run(kosmos_twin, images, ids, mask)
    assert tokens.layout == (("bos", 1), ("image", 2 * P), ("text", 6), ("query", 2))
    image = list(range(1, 13))
    # Text after the images from 13 on; the queries before eos, which comes after them; padding counts for nothing.
    assert tokens.positions[0].tolist() == [0, *image, 13, 14, 15, 16, 17, 20, 18, 19]
    assert tokens.positions[1, :17].tolist() == [0, *image, 13, 14, 15, 18]
    assert tokens.positions[1, tokens.slot("query")].tolist() == [16, 17]
    assert tokens.mask[1].tolist() == [True] * 17 + [False, False] + [True, True]


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("tail", [0, 1])
def test_lead_and_tail_say_where_images_and_queries_stand(kosmos_twin, lead, tail):
    config = dataclasses.replace(kosmos_twin.config, lead=lead, tail=tail, image_start=(9,), image_end=(8, 7))
    images, ids, mask = example(config, lengths=(7, 5))
    model, queries = base.build(config), [sequence.query(queries_of(kosmos_twin), 2)]
    embed = jax.jit(lambda p: model.apply({"params": p}, images, ids, mask, queries, method="embed"))
    tokens = embed(kosmos_twin.params)
    assert tokens.layout == (("bos", lead), ("image", 2 * (P + 3)), ("text", 7 - lead), ("query", 2))
    table = kosmos_twin.params["text"]["embed"]["table"]
    for row, length in enumerate((7, 5)):
        order = np.argsort(np.where(tokens.mask[row], tokens.positions[row], 99))[: int(tokens.mask[row].sum())]
        assert np.sort(tokens.positions[row][order]).tolist() == list(range(length + 20))
        seen = np.asarray(tokens.embeds[row][order])
        for place in (lead, lead + P + 3):
            np.testing.assert_array_equal(seen[place], table[9])
            np.testing.assert_array_equal(seen[place + P + 1 : place + P + 3], table[np.asarray([8, 7])])
        text = np.r_[seen[:lead], seen[lead + 2 * (P + 3) : length + 18 - tail], seen[length + 20 - tail :]]
        np.testing.assert_array_equal(text, table[ids[row, :length]])
        np.testing.assert_array_equal(seen[length + 18 - tail : length + 20 - tail], queries_of(kosmos_twin))


def test_a_plain_prompt_has_no_query_run_and_counts_through(kosmos_twin):
    images, ids, mask = example(kosmos_twin.config, cameras=("static",), lengths=(7, 5))
    tokens = kosmos_twin.apply(images, ids, mask, method="embed")
    assert tokens.layout == (("bos", 1), ("image", P), ("text", 6))
    assert tokens.positions[0].tolist() == list(range(13))
    assert tokens.positions[1, :11].tolist() == list(range(11))
    with pytest.raises(KeyError, match="query"):
        tokens.slot("query")


def test_text_alone_needs_no_image(kosmos_twin):
    _, ids, mask = example(kosmos_twin.config)
    tokens = kosmos_twin.apply({}, ids, mask, method="embed")
    assert tokens.layout == (("bos", 1), ("image", 0), ("text", 6))
    np.testing.assert_array_equal(tokens.embeds, kosmos_twin.params["text"]["embed"]["table"][ids])


def test_cameras_keep_the_order_they_are_given_in(kosmos_twin):
    images, ids, mask = example(kosmos_twin.config, cameras=CAMERAS)
    tokens, _ = run(kosmos_twin, images, ids, mask)
    both = tokens.embeds[:, tokens.slot("image")]
    one = kosmos_twin.apply({"static": images["static"]}, method="encode_images")
    np.testing.assert_allclose(both[:, P:], one, atol=1e-5)


def test_what_stands_in_padding_changes_nothing(twin):
    images, ids, mask = example(twin.config, lengths=(5, 4))
    before = query_features(twin, images, ids, mask)
    np.testing.assert_array_equal(query_features(twin, images, np.where(mask, ids, 77), mask), before)


def test_the_length_of_padding_changes_nothing(kosmos_twin):
    images, ids, mask = example(kosmos_twin.config, lengths=(5, 4))
    short = query_features(kosmos_twin, images, ids[:, :5], mask[:, :5])
    assert relative_error(query_features(kosmos_twin, images, ids, mask), short) < 1e-5


def test_queries_see_images_and_text_but_not_what_ends_the_prompt(twin):
    images, ids, mask = example(twin.config, lengths=(7, 5))
    before = query_features(twin, images, ids, mask)
    other_end = ids.copy()
    other_end[np.arange(2), mask.sum(1) - 1] = 9
    seen = relative_error(query_features(twin, images, other_end, mask), before)
    assert seen == 0 if twin.config.tail else seen > 1e-4
    other_word = ids.copy()
    other_word[:, 3] = 9
    assert relative_error(query_features(twin, images, other_word, mask), before) > 1e-4
    for camera in images:
        moved = images | {camera: images[camera][:, ::-1]}
        assert relative_error(query_features(twin, moved, ids, mask), before) > 1e-5


def assert_cached_equals_at_once(twin):
    images, ids, mask = example(twin.config, lengths=(7, 5))
    tokens, expected = run(twin, images, ids, mask)
    # By position, so that nothing is decoded before what it attends to: eos lies in an earlier slot than the queries.
    # A whole prompt is one step where its tokens see each other.
    order = jnp.argsort(jnp.where(tokens.mask, tokens.positions, 10**6), axis=1, stable=True)

    def take(x):
        return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1)

    ordered = tokens.map_slots(take)
    model, params = base.build(twin.config), {"params": twin.params}
    is_causal = twin.config.attention == "causal" and not twin.config.image_block
    step = tokens.mask.shape[1] // 2 if is_causal else int(tokens.mask.sum(1).min()) - 2
    cache = model.apply(params, 2, 2 * step + 3, method="init_cache")
    decode = jax.jit(lambda tokens, cache: model.apply(params, tokens, cache, method="decode"))
    found = []
    for start in (0, step):
        part = ordered.map_slots(lambda x, start=start: x[:, start : start + step])
        # What stands beside the sequence is in the cache from the first step on.
        hidden, new = decode(part if start == 0 else part.replace(media=None), cache)
        cache = cache.append(new)
        found.append(hidden)
    found = jnp.concatenate(found, 1)
    assert int(cache.length) == found.shape[1]
    real = np.asarray(ordered.mask)[:, : found.shape[1]]
    assert relative_error(found[real], take(expected)[:, : found.shape[1]][real]) < 1e-5


def test_cached_decoding_equals_decoding_at_once(twin):
    assert_cached_equals_at_once(twin)


def test_dropout_acts_only_when_asked_and_reaches_images_and_text(kosmos_twin):
    images, ids, mask = example(kosmos_twin.config, lengths=(7, 5))
    model, params = base.build(kosmos_twin.config), {"params": kosmos_twin.params}
    queries = [sequence.query(queries_of(kosmos_twin), 2)]

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


def test_rematerialisation_changes_no_value(kosmos_twin):
    images, ids, mask = example(kosmos_twin.config)
    config = dataclasses.replace(kosmos_twin.config, remat="full")
    found = query_features(dataclasses.replace(kosmos_twin, config=config), images, ids, mask)
    np.testing.assert_allclose(found, query_features(kosmos_twin, images, ids, mask), rtol=1e-6, atol=1e-6)


def test_adapters_reach_every_matrix_begin_as_nothing_and_can_be_merged(twin):
    config = dataclasses.replace(twin.config, lora_rank=4, lora_alpha=2.0)
    shapes = flatten_dict(abstract(config), sep="/")
    kernels = {path.rpartition("/")[0] for path in shapes if path.endswith("/kernel")}
    assert kernels == {path.rpartition("/")[0] for path in shapes if path.endswith("/lora_a")}
    depth, heads, head_dim = config.text.depth, config.text.num_heads, config.text.head_dim
    assert shapes["text/layers/attn/q/lora_a"].shape == (depth, 32, 4)
    assert shapes["text/layers/attn/q/lora_b"].shape == (depth, 4, heads, head_dim)
    assert shapes["text/layers/attn/o/lora_a"].shape == (depth, heads, head_dim, 4)

    images, ids, mask = example(twin.config)
    plain = query_features(twin, images, ids, mask)
    rng = np.random.default_rng(5)
    for scale_b in (0.0, 0.2):
        adapters = {
            path: rng.normal(0, 0.2 if path.endswith("lora_a") else scale_b, x.shape).astype(np.float32)
            for path, x in shapes.items()
            if "/lora_" in path
        }
        params = unflatten_dict(flatten_dict(twin.params, sep="/") | adapters, sep="/")
        adapted = query_features(Twin(config, None, params), images, ids, mask)
        if scale_b == 0:
            np.testing.assert_allclose(adapted, plain, rtol=1e-5, atol=1e-5)
    merged = Twin(twin.config, None, merge_lora(params, config.lora))
    assert relative_error(query_features(merged, images, ids, mask), adapted) < 2e-5
    assert relative_error(plain, adapted) > 1e-3
