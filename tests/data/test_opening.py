"""Opening whatever `data.dataset` and `data.root` name."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

import pytest

from robovlms_jax.data import notices, opening
from robovlms_jax.data.config import DataConfig

SAMPLES = pathlib.Path(__file__).resolve().parents[2] / "data"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.parametrize(
    "pattern",
    [
        "training/episode_*.npz",
        "training/lang_annotations/auto_lang_ann.npy",
        "bridge/bridge_dataset/1.0.0/*.tfrecord*",
        "bridge/bridge_dataset/1.0.0/features.json",
        "bridge/bridge_dataset/1.0.0/dataset_info.json",
        "lerobot/meta/info.json",
        "lerobot/meta/tasks.parquet",
        "lerobot/meta/episodes/**/*.parquet",
        "lerobot/data/**/*.parquet",
        "lerobot/videos/**/*.mp4",
    ],
)
def test_files_that_git_lfs_has_not_fetched_are_called_so(tmp_path, write_calvin, pattern):
    kind = pattern.split("/")[0]
    if kind == "lerobot":
        pytest.importorskip("pyarrow")
        from tests.data import toy_lerobot

        toy_lerobot.write(tmp_path / kind, video="videos" in pattern)
    elif kind == "bridge":
        shutil.copytree(SAMPLES / "bridge_sample", tmp_path / kind, ignore=shutil.ignore_patterns(".frame_index"))
    else:
        kind = write_calvin([(0, 7)]).relative_to(tmp_path)
        pattern = f"{kind}/{pattern}"
    spoilt = list(tmp_path.glob(pattern))
    for path in spoilt:
        path.write_text(POINTER)
    assert spoilt
    dataset, root = kind if kind in ("lerobot", "bridge") else "calvin", tmp_path / kind
    with pytest.raises(ValueError, match="is a pointer of Git LFS, not the file itself; run `git lfs pull`"):
        opening.open_split(DataConfig(dataset=dataset, root=str(root), index_workers=1), "training")


@pytest.mark.parametrize("dataset", ["calvin", "lerobot", "bridge"])
def test_a_file_in_place_of_the_dataset_is_called_a_file(dataset):
    root = SAMPLES / "README.md"
    with pytest.raises(ValueError, match=r"README\.md' is a file; pass the dataset's directory"):
        opening.open_split(DataConfig(dataset=dataset, root=str(root)), "training")


def test_settings_that_a_format_does_not_read_are_said_once(caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    settings = DataConfig(root=str(SAMPLES / "calvin_sample"), unlabelled_share=0.5, image_size=64)
    for split in ("training", "validation"):
        opening.open_split(settings, split)
    assert [record.getMessage() for record in caplog.records] == [
        "data.image_size=64 has no effect on data.dataset='calvin': it is for rlds and lerobot.",
        "data.unlabelled_share=0.5 has no effect on data.dataset='calvin': it is for rlds and lerobot.",
    ]


def test_room_for_decoded_pictures_is_heeded_of_packed_data_and_said_to_have_no_effect_of_others(
    caplog, monkeypatch, write_calvin
):
    monkeypatch.setattr(notices, "_said", set())
    settings = DataConfig(root=str(SAMPLES / "calvin_sample"), decoded_gb=0.5)
    assert opening.open_split(settings, "training")._kept is not None and not caplog.text
    opening.open_split(dataclasses.replace(settings, root=str(write_calvin([(0, 7)]))), "training")
    assert "data.decoded_gb=0.5 has no effect on" in caplog.text and "which is not packed" in caplog.text
    caplog.clear()
    memory = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(opening.os, "sysconf", memory.__getitem__)
    small = opening.open_split(dataclasses.replace(settings, num_workers=2), "training")
    assert small._limit == 1000 * 4096 // 2 // 2 and "2 reading processes is more than half" in caplog.text
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"data\.decoded_gb=.* must be finite, not negative"):
            DataConfig(decoded_gb=wrong)


def test_the_table_of_what_formats_read_names_settings_there_are():
    assert set(opening.READ_BY) <= {field.name for field in dataclasses.fields(DataConfig)}
