"""Actions as bins and vocabulary ids: upstream's tokenizer to the last edge, and round trips."""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.actions import discretize, normalize
from robovlms_jax.actions.discretize import QuantileBins, UniformBins


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_ids_and_values_equal_upstreams_tokenizer(golden, shared_data, case):
    # Every edge and its float neighbours, in float64 and float32. Fails on an edge rounded the wrong way, on a bin
    # counted from 0 instead of 1, and on a special token left out of the count.
    data = golden("action_tokenizer.npz")
    meta = json.loads((shared_data / "golden" / "action_tokenizer.json").read_text())[case]
    special = dict(meta["special_tokens_map_extended"])
    further = special.pop("additional_special_tokens", [])
    tokenizer = types.SimpleNamespace(
        vocab_size=meta["vocab"], special_tokens_map=special, extra_special_tokens=further
    )
    end = discretize.vocabulary_end(tokenizer)
    assert end == meta["end_idx"]
    bins = UniformBins(meta["bins"], meta["min_action"], meta["max_action"])
    np.testing.assert_array_equal(
        discretize.to_ids(discretize.discretize(data[f"{case}/x"], bins), end), data[f"{case}/ids"]
    )
    encode = jax.jit(lambda x: discretize.to_ids(discretize.discretize(x, bins), end))
    np.testing.assert_array_equal(encode(data[f"{case}/x32"]), data[f"{case}/ids_from_x32"])
    values = discretize.undiscretize(discretize.from_ids(data[f"{case}/decode_in"], end), bins)
    np.testing.assert_allclose(values, data[f"{case}/decode_out"], atol=1e-7)


@given(st.integers(2, 300), st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_round_trip_errs_by_half_a_bin(num_bins, values):
    bins = UniformBins(num_bins)
    actions = np.array(values, np.float32)
    numbers = discretize.discretize(actions, bins)
    assert numbers.dtype == np.int32 and numbers.min() >= 0 and numbers.max() < num_bins
    back = discretize.undiscretize(numbers, bins)
    half = 1 / (num_bins - 1)
    assert np.abs(back - np.clip(actions, -1, 1)).max() <= half + 1e-6
    ids = discretize.to_ids(numbers, 1000)
    np.testing.assert_array_equal(discretize.from_ids(ids, 1000), numbers)
    assert discretize.is_action_id(ids, 1000, num_bins).all()


def test_ids_outside_the_range_are_told_apart():
    ids = np.array([1000, 999, 968, 967, 0])
    np.testing.assert_array_equal(discretize.is_action_id(ids, 1000, 32), [False, True, True, False, False])


def test_bad_bins_are_refused():
    with pytest.raises(ValueError, match="num_bins >= 2"):
        UniformBins(1)
    with pytest.raises(ValueError, match="low < high"):
        UniformBins(8, 1.0, 1.0)


def test_quantile_bins_hold_equally_many_actions_and_spare_the_gripper():
    rng = np.random.default_rng(0)
    actions = np.clip(rng.normal(size=(5000, 7)) * [0.1, 0.2, 0.3, 0.1, 0.1, 0.0, 1], -1, 1)
    actions[:, 6] = np.sign(actions[:, 6])
    bins = QuantileBins.of(actions, 21, (6,))
    numbers = discretize.discretize(actions, bins)
    for dimension in range(5):
        counts = np.bincount(numbers[:, dimension], minlength=21)
        assert np.abs(counts[:20] - 250).max() <= 2
    back = discretize.undiscretize(numbers, bins)
    widest = np.diff(bins.edges, axis=1).max(axis=1)
    assert (np.abs(back - actions) <= widest / 2 + 1e-6).all()
    # finer than equal bins where most actions are
    uniform = discretize.undiscretize(discretize.discretize(actions, UniformBins(21)), UniformBins(21))
    assert np.abs(back - actions)[:, 0].mean() < 0.5 * np.abs(uniform - actions)[:, 0].mean()
    np.testing.assert_array_equal(np.sign(back[:, 6]), actions[:, 6])
    np.testing.assert_array_equal(back[:, 5], 0)  # a dimension that never moves stays where it is


@pytest.mark.parametrize("table", [((0.0,),), ((0.0, 1.0), (0.0, 0.5, 1.0)), ((1.0, 0.0),)])
def test_bad_quantile_tables_are_refused(table):
    with pytest.raises(ValueError, match="equally many ascending edges"):
        QuantileBins(table)


@pytest.mark.parametrize("kind", ["uniform", "quantile"])
def test_normalising_and_discretizing_are_one_loop_on_the_device(kind):
    # The compiled program is a single fusion: nothing between raw actions and ids is written to memory, no library
    # call and no transfer to the host. Fails when someone cuts and joins columns, or counts edges along an axis.
    rng = np.random.default_rng(0)
    bins = UniformBins() if kind == "uniform" else QuantileBins.of(rng.uniform(-1, 1, (500, 7)), 64, (6,))
    normalizer = normalize.Normalizer((-0.65,) * 6, (0.5,) * 6, (6,), mean=0.1, std=0.9, mu=255.0)

    def encode(actions):
        return discretize.to_ids(discretize.discretize(normalizer.normalize(actions), bins), 32_000)

    actions = jnp.asarray(rng.uniform(-1, 1, (4, 8, 10, 7)), jnp.float32)
    program = jax.jit(encode).lower(actions).compile()
    entry = program.as_text().split("ENTRY", 1)[1]
    operations = [line.split(" = ", 1)[1].split("(")[0].split()[-1] for line in entry.splitlines() if " = " in line]
    assert operations.count("fusion") == 1
    assert set(operations) <= {"fusion", "parameter", "constant"}, operations
    np.testing.assert_array_equal(program(actions), encode(np.asarray(actions)))
