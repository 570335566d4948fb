"""Heads that are the token table, and others that only claim to be."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

from robovlms_jax.backbones import registry
from robovlms_jax.weights import convert, rules, tying
from tests.weights.array_source import ArraySource

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3)
TIED = (rules.Rule("embed.weight", "text/embed/table"), *rules.head("lm_head", "text", tied=True))


def load(table: rules.Rules, arrays: dict[str, np.ndarray]):
    wanted = {"text": {"embed": {"table": jax.ShapeDtypeStruct((4, 3), np.float32)}}}
    if any(isinstance(row, rules.Rule) and row.target == "text/head/kernel" for row in table):
        wanted["text"]["head"] = {"kernel": jax.ShapeDtypeStruct((3, 4), np.float32)}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    source = ArraySource(arrays, "here")
    return convert.load_params(table, source, wanted, jax.tree.map(lambda _: place, wanted))


@pytest.mark.parametrize("names", [["embed.weight"], ["lm_head.weight"], ["lm_head.weight", "model.embed.weight"]])
def test_a_tied_matrix_is_read_under_whichever_name_it_is_stored(names):
    np.testing.assert_array_equal(load(TIED, dict.fromkeys(names, TABLE))["text"]["embed"]["table"], TABLE)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_head_that_differs_from_its_table_is_refused_with_the_largest_difference(dtype, monkeypatch):
    monkeypatch.setattr(tying, "_BLOCK", 4)  # a row at a time
    other = TABLE.copy()
    other[3, 1] += 0.5
    arrays = {"embed.weight": TABLE.astype(dtype), "module.lm_head.weight": other.astype(dtype)}
    with pytest.raises(ValueError, match=r"here: .*module.lm_head.weight and embed.weight.* up to 0.5 and in 1 of 12"):
        load(TIED, arrays)
    untied = rules.with_head(TIED, tied=False)
    found = load(untied, arrays)["text"]
    np.testing.assert_array_equal(found["embed"]["table"], TABLE)
    np.testing.assert_array_equal(found["head"]["kernel"], other.T)
    assert rules.with_head(untied, tied=True) == TIED


SHARED = rules.shared("shared.weight", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])


@pytest.mark.parametrize("kept", [(0,), (1,), (0, 1, 2), (1, 2)])
def test_a_table_shared_by_encoder_and_decoder_is_read_under_any_of_its_names(kept):
    names = [[row.source for row in SHARED][number] for number in kept]
    np.testing.assert_array_equal(load(SHARED, dict.fromkeys(names, TABLE))["text"]["embed"]["table"], TABLE)
    if len(names) > 1:
        with pytest.raises(ValueError, match=rf"{names[-1]} and {names[0]} .*differ.*read one token table. Delete"):
            load(SHARED, dict.fromkeys(names, TABLE) | {names[-1]: TABLE + 1})


@pytest.mark.parametrize("name", ["florence-2-base", "blip2-flan-t5-xl"])
def test_no_encoder_decoder_drops_a_second_token_table_unseen(name):
    table = registry.get(name).rules
    copies = [row for row in table if isinstance(row, rules.Tied) and not row.head]
    assert [row.source.split(".")[-3] for row in copies] == ["encoder", "decoder"]
    assert all(row in rules.with_head(table, tied=False) for row in copies)  # whatever the head does
    moved = rules.prefixed(tuple(copies), source="a.", target="b/")
    assert [row.source for row in moved] == [f"a.{row.source}" for row in copies]
    assert {(row.table, row.head) for row in moved} == {("b/text/embed/table", "")}


def test_a_tied_head_of_another_shape_is_reported():
    with pytest.raises(ValueError, match=r"another shape:\n +lm_head.weight  found \[5, 3\], expected \[4, 3\]"):
        load(TIED, {"embed.weight": TABLE, "lm_head.weight": np.ones((5, 3), np.float32)})


def test_a_missing_head_asks_whether_it_is_the_token_table():
    with pytest.raises(ValueError, match=r"lm_head.weight .*is it the token table\? Then config.json says tie_word"):
        load(rules.with_head(TIED, tied=False), {"embed.weight": TABLE})


def test_rules_of_a_policy_keep_the_tie():
    table = rules.prefixed(TIED, source="vlm.", target="backbone/")
    shapes = {"backbone/text/embed/table": (4, 3)}
    assert convert.plan(table, {"vlm.lm_head.weight": (4, 3)}, shapes).keys() == shapes.keys()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_numbers_that_are_none_are_named_with_their_tensor(wrong, dtype):
    broken = TABLE.astype(dtype)
    broken[1, 2] = wrong
    for kept in (np.float32, dtype):
        numbers = broken.astype(kept)
        with pytest.raises(ValueError, match=r"here holds x with 1 of the 12"):
            convert._require_finite(numbers, "x", "here")
        numbers[1, 2] = 1
        convert._require_finite(numbers, "x", "here")
    with pytest.raises(ValueError, match=r"here holds embed.weight with 1 of the 12 numbers read NaN or infinite"):
        load(TIED, {"embed.weight": broken})


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.bool_, ml_dtypes.float8_e4m3fn])
def test_parameters_are_never_made_from_integers_or_bytes(dtype):
    with pytest.raises(ValueError, match=rf"here holds embed.weight in {np.dtype(dtype)}; expected float32"):
        load(TIED, {"embed.weight": np.ones((4, 3), dtype)})
