"""Pooled tokens against torch's pooling and upstream's slices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.policies import readout
from robovlms_jax.types import Tokens

IMAGE, TEXT, D = 6, 5, 3


def prompt(words: int, slots: int = TEXT) -> Tokens:
    """[bos][images][`words` words with eos][padding], positions as a backbone gives them."""
    mask = np.r_[np.ones(1 + IMAGE, bool), np.arange(slots) < words][None]
    positions = np.minimum(np.arange(1 + IMAGE + slots), IMAGE + words)[None].astype(np.int32)
    layout = (("bos", 1), ("image", IMAGE), ("text", slots))
    return Tokens(np.zeros((*mask.shape, D), np.float32), mask, positions, layout)


def pooled(source, bins, hidden, tokens):
    return np.asarray(jax.jit(readout.Pool(bins, source))(hidden, tokens))[0]


@pytest.mark.parametrize("source", ["all", "text", "vision"])
@given(bins=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_bins_are_those_of_adaptive_pooling(source, bins, seed):
    # Upstream's slices of [bos][images][words][eos], then torch. Also with more bins than tokens.
    torch = pytest.importorskip("torch")

    tokens = prompt(TEXT)
    hidden = np.random.default_rng(seed).normal(size=tokens.embeds.shape).astype(np.float32)
    chosen = {"all": slice(None), "text": slice(1 + IMAGE, -1), "vision": slice(1, 1 + IMAGE)}[source]
    columns = torch.from_numpy(hidden[:, chosen]).transpose(1, 2)
    expected = torch.nn.functional.adaptive_max_pool1d(columns, bins).transpose(1, 2)[0].numpy()
    np.testing.assert_array_equal(pooled(source, bins, hidden, tokens), expected)


@pytest.mark.parametrize("source", ["all", "text", "vision"])
def test_padding_and_the_order_of_slots_change_nothing(source):
    # Upstream pools over padding; here a longer padding, or eos in another slot, gives the same bins.
    short, long = prompt(3, slots=3), prompt(3, slots=8)
    hidden = np.random.default_rng(0).normal(size=short.embeds.shape).astype(np.float32)
    padded = np.concatenate([hidden, np.full((1, 5, D), 99, np.float32)], axis=1)
    expected = pooled(source, 2, hidden, short)
    np.testing.assert_array_equal(pooled(source, 2, padded, long), expected)
    words = 1 + IMAGE + np.array([2, 0, 1])
    order = np.r_[np.arange(1 + IMAGE), words]
    moved = short.replace(positions=short.positions[:, order], mask=short.mask[:, order])
    np.testing.assert_array_equal(pooled(source, 2, hidden[:, order], moved), expected)


@pytest.mark.parametrize(
    ("source", "spans"), [("all", [(0, 6), (6, 12)]), ("vision", [(1, 4), (4, 7)]), (None, [(0, 12)])]
)
def test_the_gradient_of_a_maximum_goes_to_the_slot_that_is_largest(source, spans):
    # Closed form in NumPy. A compiler may compute twice what is pooled, a norm's scale and bias here, once with fused
    # multiply-add: under the tests' compiler settings the gradient of `max` was then NaN, its value being right.
    rng, rows, width = np.random.default_rng(0), 4, 16
    tokens = jax.tree.map(lambda leaf: np.repeat(leaf, rows, axis=0), prompt(TEXT))
    x = rng.normal(size=(*tokens.mask.shape, width)).astype(np.float32)
    weight = rng.normal(size=(width, D)).astype(np.float32)
    scale, bias = rng.normal(size=(2, D)).astype(np.float32)
    direction = rng.normal(size=(rows, len(spans), D)).astype(np.float32)

    def value(weight):
        hidden = (x @ weight) * scale + bias
        if source is None:
            pooled = readout.largest(hidden)[:, None]
        else:
            pooled = readout.Pool(len(spans), source)(hidden, tokens)
        return (pooled * direction).sum()

    hidden, expected = (x.astype(np.float64) @ weight) * scale + bias, np.zeros(weight.shape)
    for row, part, channel in np.ndindex(rows, len(spans), D):
        first, end = spans[part]
        slot = first + hidden[row, first:end, channel].argmax()
        expected[:, channel] += direction[row, part, channel] * scale[channel] * x[row, slot]
    np.testing.assert_allclose(jax.jit(jax.grad(value))(weight), expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_without_words_gives_zeros():
    tokens = prompt(1)  # bos and eos alone
    hidden = np.ones(tokens.embeds.shape, np.float32)
    np.testing.assert_array_equal(pooled("text", 2, hidden, tokens), np.zeros((2, D)))


def test_tokens_are_predicted_by_what_precedes_them():
    # The first action token by the last word, which is not the last slot; the others by the token before.
    tokens = prompt(4)
    positions = np.concatenate([tokens.positions, [[IMAGE + 4, IMAGE + 5]]], axis=1)
    positions[0, 1 + IMAGE + 3 : -2] = IMAGE + 6  # eos behind the action tokens
    mask = np.concatenate([tokens.mask, [[True, True]]], axis=1)
    hidden = np.arange(positions.shape[1], dtype=np.float32)[None, :, None]
    layout = (*tokens.layout, ("query", 2))
    found = readout.read_action_tokens(hidden, Tokens(hidden, mask, positions, layout))
    assert found[0, :, 0].tolist() == [1 + IMAGE + 2, 1 + IMAGE + TEXT]
