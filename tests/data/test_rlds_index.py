"""Indexes of RLDS shards: made once, in many processes, whole after a killed run, and made again when damaged."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from robovlms_jax.data import base, shard_index, splits, storage
from tests.data import toy_rlds
from tests.data.test_rlds import open_toy


def scans(monkeypatch) -> list[str]:
    done = []
    original = shard_index._index_shard
    monkeypatch.setattr(
        shard_index, "_index_shard", lambda *job: (done.append(job[1]["file"][-14:-9]), original(*job))[1]
    )
    return done


def test_an_index_is_made_once_and_only_for_shards_that_changed(tmp_path, monkeypatch):
    done = scans(monkeypatch)
    root = toy_rlds.write(tmp_path, shard_bytes=1)
    first = open_toy(root)
    assert len(done) == 6
    assert open_toy(root).episodes == first.episodes and len(done) == 6
    shard = sorted(root.glob("*-train*"))[2]
    os.utime(shard, ns=(1, 1))
    open_toy(root)
    assert done[6:] == ["00002"]


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    done = scans(monkeypatch)
    root = toy_rlds.write(tmp_path, shard_bytes=1)
    write = np.savez

    def stop():
        raise OSError("killed")

    monkeypatch.setattr(np, "savez", lambda *a, **k: write(*a, **k) if len(done) < 4 else stop())
    with pytest.raises(OSError, match="killed"):
        open_toy(root)
    monkeypatch.setattr(np, "savez", write)
    assert len(open_toy(root).episodes) == 5
    assert done == ["00000", "00001", "00002", "00003", "00003", "00004", "00005"]


def test_damaged_index_files_are_made_again(tmp_path, caplog):
    root = toy_rlds.write(tmp_path, shard_bytes=1)
    first = open_toy(root)
    expected = first.actions(range(20))
    index = root / shard_index.BESIDE_DATA / "train"
    for path in sorted(p for p in index.rglob("*") if p.is_file() and p.name != "dataset_statistics.json"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        again = open_toy(root)
        assert again.episodes == first.episodes
        np.testing.assert_array_equal(again.actions(range(20)), expected, err_msg=path.name)
    assert caplog.text.count("is damaged") >= 3 or caplog.text.count("is made again") >= 3


def test_an_index_goes_where_it_can_be_written(tmp_path, monkeypatch):
    root = toy_rlds.write(tmp_path)
    split = splits.read(storage.Directory(root))["train"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert shard_index.place(storage.Directory(root), split).is_relative_to(root)
    monkeypatch.setattr(os, "access", lambda path, _: not path.is_relative_to(root))
    assert shard_index.place(storage.Directory(root), split).is_relative_to(tmp_path / "cache")
    assert shard_index.place(storage.Directory(root), split, str(tmp_path / "own")).is_relative_to(tmp_path / "own")


@pytest.mark.slow
def test_processes_make_the_same_index(tmp_path):
    root = toy_rlds.write(tmp_path, shard_bytes=1)
    alone = open_toy(root)
    shutil.rmtree(root / shard_index.BESIDE_DATA)
    together = open_toy(root, workers=2)
    np.testing.assert_array_equal(alone.actions(range(30)), together.actions(range(30)))


def test_a_frame_changed_after_indexing_is_noticed(tmp_path):
    root = toy_rlds.write(tmp_path)
    dataset = open_toy(root)
    shard = next(root.glob("*-train*"))
    place = int(dataset._index._offset[3, 0]) + 200
    data = bytearray(shard.read_bytes())
    data[place] ^= 0x01  # still a valid JPEG, other pixels
    shard.write_bytes(data)
    with pytest.raises(base.CorruptFrameError, match="not those that were indexed"):
        dataset.images([3], ["static"])
    dataset.images([5], ["static"])
