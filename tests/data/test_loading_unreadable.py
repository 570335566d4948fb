"""Samples that cannot be read: replaced in training, masked in evaluation, named in both."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from robovlms_jax.data import base, calvin
from tests.data.test_loading import SPANS, assert_same, evaluate, join, make_source, train


@pytest.fixture
def corrupt(write_calvin) -> base.Dataset:
    """Frame 112 lies in episodes 0 and 1; frame 155 in episode 3."""
    bad = {112: {"rel_actions": np.full(7, np.nan)}, 155: {"rgb_static": np.zeros((3, 3, 3), np.uint8)}}
    return calvin.open_dataset(write_calvin(SPANS, change=bad), "training")


def test_an_unreadable_segment_is_replaced_reported_and_named(corrupt, caplog):
    source = make_source(corrupt)
    batch = join(train(source, 3))
    replaced = batch.corrupt >= 0
    assert 0 < replaced.sum() < len(replaced)
    assert set(batch.corrupt[replaced].tolist()) <= {0, 1, 3}
    assert np.isfinite(batch.actions).all()
    assert batch.window_mask.any(axis=1).all()
    assert caplog.text.count("episode_0000112.npz") == 1  # however often it is met
    assert_same(batch, join(train(source, 3, num_threads=4)))


def test_a_replacement_leaves_the_other_rows_alone(corrupt, write_calvin):
    replaced = join(train(make_source(corrupt), 3))
    whole = join(train(make_source(calvin.open_dataset(write_calvin(SPANS, split="validation"), "validation")), 3))
    good = replaced.corrupt < 0
    assert (whole.corrupt < 0).all()
    np.testing.assert_array_equal(whole.episode[~good], replaced.corrupt[~good])
    assert_same(jax.tree.map(lambda x: x[good], whole), jax.tree.map(lambda x: x[good], replaced))


def test_nothing_readable_stops_with_the_reason(write_calvin):
    bad = {frame_id: {"rel_actions": np.full(7, np.inf)} for frame_id in range(20)}
    source = make_source(calvin.open_dataset(write_calvin([(0, 19)], change=bad), "training"))
    with pytest.raises(
        base.CorruptFrameError, match=r"17 segments in a row cannot be read, the last one: .*must be finite"
    ):
        train(source, 1)


def test_evaluation_masks_what_it_cannot_read(corrupt, caplog):
    whole = join(evaluate(make_source(corrupt)))
    bad = whole.corrupt >= 0
    assert 0 < bad.sum() < 12
    assert not whole.window_mask[bad].any()
    assert not whole.action_mask[bad].any()
    assert np.isfinite(whole.actions).all()
    assert "left out of the evaluation" in caplog.text


def test_a_single_sample_raises(corrupt):
    with pytest.raises(base.CorruptFrameError, match=r"episode_0000112\.npz"):
        list(make_source(corrupt))
