"""Where the index of an RLDS split goes, and what is said when it can go nowhere."""

from __future__ import annotations

import pathlib

import pytest

from robovlms_jax.data import shard_index, splits, storage

SPLIT = splits.Split("arm", "1.0.0", "train", "tfrecord", (), ())


@pytest.fixture
def read_only(tmp_path, monkeypatch) -> storage.Directory:
    """A dataset in whose directory nothing can be made, as on a read-only mount."""
    made, data = pathlib.Path.mkdir, tmp_path / "data"

    def mkdir(self, *args, **kwargs):
        if self.is_relative_to(data):
            raise OSError(30, "Read-only file system", str(self))
        made(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "mkdir", mkdir)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return storage.Directory(data)


def test_data_that_cannot_be_written_are_indexed_in_the_users_cache(read_only, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = shard_index.place(read_only, SPLIT)
    assert found.is_dir() and found.is_relative_to(tmp_path / "home" / ".cache" / "robovlms_jax" / "index")


def test_without_a_home_either_the_error_names_both_places_and_the_flag(read_only, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/none")
    with pytest.raises(
        OSError,
        match=r"(?s)data/.frame_index/train \(Read-only file system\) nor to /proc/none/.cache.*"
        r"\(No such file or directory\). Please set XDG_CACHE_HOME, or name a directory .*--data.index_dir DIR",
    ):
        shard_index.place(read_only, SPLIT)


def test_a_directory_that_was_named_is_made_or_named_in_the_error(read_only, tmp_path):
    assert shard_index.place(read_only, SPLIT, str(tmp_path / "index")).is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError,
        match=r"file/arm-.*\(Not a directory\). Please name a directory that can be written with --data.index_dir",
    ):
        shard_index.place(read_only, SPLIT, str(tmp_path / "file"))
