"""The order of samples across a resume: the same data in either layout go on, a changed order is refused by name."""

from __future__ import annotations

import json

import pytest

from robovlms_jax.data import calvin, order, packing
from tests.data.test_loading import SPANS, assert_same, make_source, train


def test_the_fingerprint_accepts_the_same_data_in_either_layout(write_calvin, tmp_path):
    root = write_calvin(SPANS)
    npz = calvin.open_npz(root, "training")
    packed = packing.pack(npz, tmp_path / "packed", frame_ids=npz.frame_ids, codec="png")
    sources = [make_source(dataset) for dataset in (npz, packed)]
    saved, current = (order.order_fingerprint(source, segments_per_batch=4, seed=1) for source in sources)
    order.require_same_order(json.loads(json.dumps(saved)), current)
    for a, b in zip(*(train(source, 3) for source in sources), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(
    "change",
    [{"window": 7}, {"chunk": 5}, {"windows_per_segment": 2}, {"segments_per_batch": 8}, {"seed": 2}, {"tasks": 1}],
)
def test_a_changed_order_is_refused_by_name(write_calvin, change):
    root = write_calvin(SPANS)

    def fingerprint(*, segments_per_batch=4, seed=1, tasks=0, **options):
        excluded = ["open_drawer"][:tasks]
        source = make_source(calvin.open_dataset(root, "training", exclude_tasks=excluded), **options)
        return order.order_fingerprint(source, segments_per_batch=segments_per_batch, seed=seed)

    (name,) = change
    with pytest.raises(
        ValueError, match=rf"cannot be continued: {'episodes' if name == 'tasks' else name} was .*, is "
    ):
        order.require_same_order(fingerprint(), fingerprint(**change))
