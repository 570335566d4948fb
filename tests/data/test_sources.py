"""Batches of several sources at a time."""

from __future__ import annotations

import contextlib
import itertools
import json

import jax
import numpy as np
import pytest

from robovlms_jax.data import calvin, loading, sources
from tests.data.test_loading import SPANS, make_source

READING = {"num_threads": 1, "prefetch": 1}


@pytest.fixture
def source(write_calvin):
    return make_source(calvin.open_dataset(write_calvin(SPANS), "training"))


def drawn(source, rows, count, **changes):
    names = dict.fromkeys(rows, source)
    with contextlib.closing(sources.train_batches(names, rows, seed=3, **READING, **changes)) as batches:
        return list(itertools.islice(batches, count))


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_robot_alone_gets_the_batches_that_it_always_got(source):
    with contextlib.closing(loading.train_batches(source, segments_per_batch=4, seed=3, **READING)) as batches:
        expected = list(itertools.islice(batches, 3))
    assert_equal([x["robot"] for x in drawn(source, {"robot": 4}, 3)], expected)


def test_another_source_has_its_share_of_rows_and_an_order_of_its_own(source):
    alone, both = drawn(source, {"robot": 4}, 3), drawn(source, {"robot": 4, "other": 2}, 3)
    assert_equal([x["robot"] for x in both], [x["robot"] for x in alone])
    assert [len(x["other"].episode) for x in both] == [2, 2, 2]
    same = drawn(source, {"other": 4}, 3)
    assert any((a["other"].actions != b["robot"].actions).any() for a, b in zip(same, alone, strict=True))


def test_every_source_goes_on_where_it_was(source):
    rows = {"robot": 4, "other": 2}
    assert_equal(drawn(source, rows, 2, start_step=3), drawn(source, rows, 5)[3:])


def test_what_changed_is_told_with_its_source(source):
    both = {"robot": source, "other": source}
    now = sources.fingerprints(both, {"robot": 4, "other": 2}, 3)
    sources.require_same_order(json.loads(json.dumps(now)), now)
    with pytest.raises(ValueError, match=r"^other: .*segments_per_batch was 2, is 4"):
        sources.require_same_order(now, sources.fingerprints(both, {"robot": 4, "other": 4}, 3))
    with pytest.raises(ValueError, match=r"batches are of \['robot'\], this run's of \['other', 'robot'\]"):
        sources.require_same_order({"robot": now["robot"]}, now)


def test_checkpoints_of_the_first_release_name_no_source(source):
    now = sources.fingerprints({"robot": source}, {"robot": 4}, 3)
    sources.require_same_order(now["robot"], now)
    with pytest.raises(ValueError, match=r"^the checkpoint's data order .*seed was 3, is 4"):
        sources.require_same_order(now["robot"], sources.fingerprints({"robot": source}, {"robot": 4}, 4))
