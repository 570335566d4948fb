"""Rearrangements, rules and names."""

from __future__ import annotations

import itertools

import einops
import numpy as np
import pytest

from robovlms_jax.weights.rearrange import Rearrange
from robovlms_jax.weights.rules import Ignore, Rename, Rule, canonical, normalize, prefixed

CASES = {
    "o i -> i o": ((6, 4), {}),
    "(n h) d -> d n h": ((12, 5), {"n": 3}),
    "(n h) -> n h": ((12,), {"n": 3}),
    "d (n h) -> n h d": ((5, 12), {"n": 3}),
    "o c h w -> h w c o": ((6, 3, 4, 2), {}),
    "(a b c) d -> c d a b": ((24, 5), {"a": 2, "b": 3}),
}
PARTS = {  # a third of the source each
    "({part}/3 n h) d -> d n h": lambda x, part: np.split(x, 3)[part].reshape(2, 2, 5).transpose(2, 0, 1),
    "(n {part}/3 h) d -> d n h": lambda x, part: x.reshape(2, 3, 2, 5)[:, part].transpose(2, 0, 1),
}


def source(pattern: str) -> np.ndarray:
    shape, _ = CASES[pattern]
    return np.arange(np.prod(shape)).reshape(shape)


@pytest.mark.parametrize("pattern", CASES)
def test_rearrangement_is_that_of_einops_both_ways(pattern):
    x = source(pattern)
    expected = einops.rearrange(x, pattern, **CASES[pattern][1])
    rearrange = Rearrange.parse(pattern, expected.ndim)
    assert rearrange.source_shape(expected.shape) == x.shape
    everything = (slice(None),) * expected.ndim
    np.testing.assert_array_equal(rearrange.forward(x.__getitem__, expected.shape, everything), expected)
    np.testing.assert_array_equal(rearrange.backward(expected), x)


@pytest.mark.parametrize("pattern", CASES)
def test_every_slice_comes_from_one_slice_of_the_source(pattern):
    x = source(pattern)
    expected = einops.rearrange(x, pattern, **CASES[pattern][1])
    rearrange = Rearrange.parse(pattern, expected.ndim)
    halves = [(slice(None), slice(0, size // 2), slice(size // 2, None), slice(0, 1)) for size in expected.shape]
    for index in itertools.product(*halves):
        found = rearrange.forward(x.__getitem__, expected.shape, index)
        np.testing.assert_array_equal(found, expected[index])


@pytest.mark.parametrize("pattern", CASES)
def test_cutting_any_axis_but_an_inner_one_of_a_group_reads_no_more_than_the_slice(pattern):
    x = source(pattern)
    expected = einops.rearrange(x, pattern, **CASES[pattern][1])
    rearrange = Rearrange.parse(pattern, expected.ndim)
    outer = {group[0] for group in rearrange.source}
    for place, axis in enumerate(rearrange.target):
        index = [slice(None)] * expected.ndim
        index[place] = slice(1, 2)
        read = []
        found = rearrange.forward(
            lambda cut, read=read: read.append(x[cut].size) or x[cut], expected.shape, tuple(index)
        )
        assert len(read) == 1
        assert read[0] == (found.size if axis in outer else read[0])
        assert found.size <= read[0] <= x.size


@pytest.mark.parametrize("template", PARTS)
def test_parts_of_a_fused_tensor_are_cut_out_and_put_together_again(template):
    x = np.arange(60).reshape(12, 5)
    parts = [Rearrange.parse(template.format(part=part), 3) for part in range(3)]
    whole = [PARTS[template](x, part) for part in range(3)]
    for rearrange, expected in zip(parts, whole):
        assert rearrange.source_shape(expected.shape) == x.shape
        for index in itertools.product((slice(None), slice(1, 2)), repeat=3):
            np.testing.assert_array_equal(rearrange.forward(x.__getitem__, expected.shape, index), expected[index])
    for rearrange in parts:  # whichever of them is asked
        np.testing.assert_array_equal(rearrange.backward(*whole), x)


def test_axes_of_one_are_dropped_and_come_back():
    x = np.arange(6).reshape(1, 1, 6)
    rearrange = Rearrange.parse("1 1 d -> d", 1)
    np.testing.assert_array_equal(rearrange.forward(x.__getitem__, (6,), (slice(2, 4),)), [2, 3])
    np.testing.assert_array_equal(rearrange.backward(np.arange(6)), x)


def test_a_block_of_parts_reads_no_more_than_its_slice():
    x, sizes = np.arange(60).reshape(12, 5), []
    Rearrange.parse("(1/3 n h) d -> d n h", 3).forward(
        lambda cut: sizes.append(x[cut].size) or x[cut], (5, 2, 2), (slice(None), slice(0, 1), slice(None))
    )
    assert sizes == [10]


def test_an_inner_axis_of_one_outer_index_is_read_alone():
    x = source("(n h) d -> d n h")
    sizes = []
    Rearrange.parse("(n h) d -> d n h", 3).forward(
        lambda cut: sizes.append(x[cut].size) or x[cut], (5, 3, 4), (slice(None), slice(2, 3), slice(1, 3))
    )
    assert sizes == [2 * 5]


def test_the_empty_pattern_leaves_a_tensor_as_it_is():
    x = np.arange(6).reshape(2, 3)
    rearrange = Rearrange.parse("", 2)
    assert rearrange.source_shape((2, 3)) == (2, 3)
    np.testing.assert_array_equal(rearrange.forward(x.__getitem__, (2, 3), (slice(1, 2), slice(0, 2))), x[1:2, :2])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a b", "same axes on both sides"),
        ("a b -> a c", "same axes on both sides"),
        ("a a -> a a", "same axes on both sides"),
        ("a b -> (a b)", "group them only on the left"),
        ("a b c -> c b a", "makes 3 axes, but the parameter has 2"),
        ("(3/3 a) b -> a b", "may take one part, counted from 0"),
        ("(0/3 a) (0/2 b) -> a b", "may take one part"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        Rearrange.parse(pattern, 2)


def test_a_rule_names_the_tensors_it_matches():
    rule = Rule("blocks.{layer}.fc.weight", "layers/fc/kernel", "o i -> i o")
    assert rule.match("blocks.12.fc.weight") == (True, 12)
    assert rule.name(12) == "blocks.12.fc.weight"
    assert rule.match("blocks.x.fc.weight") == (False, None)
    assert rule.match("blocks.1.fcXweight") == (False, None)  # a dot is a dot
    assert rule.match("blocks.1.fc.weight.extra") == (False, None)
    assert Rule("norm.weight", "norm/scale").match("norm.weight") == (True, None)


def test_renames_admit_other_spellings_after_wrappers_are_stripped():
    rows = (Rename(r"^lm_head\.", "language_model.lm_head."), Rule("language_model.lm_head.weight", "head/kernel"))
    assert canonical(rows, "module.model.lm_head.weight") == "language_model.lm_head.weight"
    assert rows[1].match(canonical(rows, "lm_head.weight")) == (True, None)


def test_prefixes_move_sources_and_targets():
    moved = prefixed((Rule("a.{layer}.w", "a/w", "o i -> i o"), Ignore(r"b\d", "why")), source="x.y.", target="p/")
    assert moved == (Rule("x.y.a.{layer}.w", "p/a/w", "o i -> i o"), Ignore(r"x\.y\.b\d", "why"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("text_model.model.layers.0.w", "text_model.model.layers.0.w"),
        ("model.backbone.text_model.model.w", "text_model.model.w"),
        ("module.model.backbone.x", "x"),
        ("_orig_mod.model.backbone.x._orig_mod.w", "x.w"),
        ("_forward_module.model.action_token", "action_token"),
        ("remodel.w", "remodel.w"),
    ],
)
def test_training_wrappers_are_stripped_from_names(name, expected):
    assert normalize(name) == expected
