"""Opening whatever `data.dataset` and `data.root` name."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from robovlms_jax.data import notices, opening
from robovlms_jax.data.config import DataConfig

SAMPLES = pathlib.Path(__file__).resolve().parents[2] / "data"


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


def test_the_table_of_what_formats_read_names_settings_there_are():
    assert set(opening.READ_BY) <= {field.name for field in dataclasses.fields(DataConfig)}
