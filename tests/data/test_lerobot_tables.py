"""Tables of a LeRobotDataset: images read when asked for, in any form; numbers that are missing or no numbers."""

from __future__ import annotations

import logging
import pickle
import re

import numpy as np
import pytest

from robovlms_jax.data import base, lerobot
from robovlms_jax.data.lerobot import tables
from tests.data import toy_lerobot as toy
from tests.data.toy_lerobot import pa, parquet


@pytest.mark.parametrize("form", ["PNG", "BMP", "WEBP", "JPEG", "plain bytes", "paths", "paths alone"])
def test_images_are_read_from_any_kind_of_cell(tmp_path, form):
    root = toy.write(tmp_path / "d")
    kind = form if form.isupper() else "PNG"

    def change(rows):
        images = [
            toy.encode(toy.picture(e, t), kind) for e, t in zip(rows["episode_index"], rows["frame_index"], strict=True)
        ]
        cells: list = [{"bytes": image, "path": None} for image in images]
        if form == "plain bytes":
            cells = images
        if form.startswith("paths"):
            (root / "images").mkdir()
            for place, image in enumerate(images):
                (root / f"images/{place}.png").write_bytes(image)
            cells = [f"images/{place}.png" for place in range(len(images))]
            cells = cells if form == "paths alone" else [{"bytes": None, "path": cell} for cell in cells]
        rows[toy.FRONT] = cells

    toy.edit(toy.data_file(root), change)
    assert len(toy.seen(lerobot.open_dataset(root, "training"))) == 15


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"bytes": None, "path": None}, "row 9 of observation.images.front is no encoded image, found NoneType"),
        ({"bytes": b"not an image", "path": None}, "row 9 of observation.images.front: the image cannot be decoded"),
        ({"bytes": None, "path": "images/7.png"}, "names images/7.png: "),
        ({"bytes": None, "path": "../../etc/passwd"}, "which lies outside"),
        ({"bytes": toy.encode(np.zeros((16, 16, 3), np.uint8)), "path": ""}, "has 16 x 16 pixels, info.json says 32 x"),
    ],
)
def test_a_cell_that_is_no_image_is_named_and_skipped(tmp_path, cell, message):
    root = toy.write(tmp_path / "d")
    toy.edit(toy.data_file(root), lambda rows: rows[toy.FRONT].__setitem__(9, cell))
    dataset = lerobot.open_dataset(root, "training")
    with pytest.raises(base.CorruptFrameError, match=re.escape(message)):
        dataset.images([10], ["static"])  # each episode has one id more than rows
    dataset.images([9, 11], ["static"])


def test_images_of_another_size_than_info_says_are_refused_on_opening(tmp_path):
    root = toy.write(tmp_path / "d")
    small = {"bytes": toy.encode(np.zeros((16, 24, 3), np.uint8)), "path": None}
    toy.edit(toy.data_file(root), lambda rows: rows.update({toy.FRONT: [small] * 20}))
    with pytest.raises(ValueError, match=r"front have 16 x 24 pixels, info\.json says 32 x 48"):
        lerobot.open_dataset(root, "training")


def test_a_row_group_is_read_when_asked_for_and_never_travels(tmp_path, monkeypatch):
    root = toy.write(tmp_path / "d")
    table = parquet.read_table(toy.data_file(root))
    parquet.write_table(table, toy.data_file(root), row_group_size=4)
    dataset = lerobot.open_dataset(root, "training")
    assert not dataset._table._groups
    read, real = [], parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_group", lambda self, group, **k: (read.append(group), real(self, group, **k))[1]
    )
    dataset.images([0, 13, 1, 14], ["static"])  # rows 0, 11, 1, 12
    assert sorted(read) == [0, 2, 3]
    dataset.images([2], ["static"])
    assert len(read) == 3
    monkeypatch.setattr(tables, "_CACHE_BYTES", 1)
    dataset.images([6], ["static"])
    assert len(dataset._table._groups) == 1
    images = sum(len(cell["bytes"]) for cell in table[toy.FRONT].to_pylist())
    copy = pickle.dumps(dataset)
    assert len(copy) < images + 4000
    assert toy.encode(toy.picture(1, 1)) not in copy and toy.seen(pickle.loads(copy)) == toy.seen(dataset)


def test_an_opening_of_large_images_holds_numbers_only(tmp_path, monkeypatch):
    root = toy.write(tmp_path / "d")
    monkeypatch.setattr(tables, "_SAMPLED_BYTES", 100)
    read, real = [], parquet.read_table

    def recorded(path, columns=None, **settings):
        read.extend(columns or [])
        return real(path, columns=columns, **settings)

    monkeypatch.setattr(parquet, "read_table", recorded)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", None)
    lerobot.open_dataset(root, "training")
    assert "action" in read and toy.FRONT not in read


def test_a_last_action_that_is_no_number_is_left_out_and_others_are_replaced(tmp_path, caplog):
    root = toy.write(tmp_path / "d")

    def change(rows):
        for row in (4, 10, 13):  # the last of episodes 0 and 1, one in the middle of episode 2
            rows["action"][row][2] = float("nan")

    toy.edit(toy.data_file(root), change)
    dataset = lerobot.open_dataset(root, "training")
    assert [(e.start, e.end) for e in dataset.episodes] == [(0, 4), (5, 10), (11, 15)]
    assert np.isfinite(dataset.actions(range(4))).all()
    with pytest.raises(base.CorruptFrameError, match="nan"):
        dataset.actions([13])
    assert "left out 2 steps at ends of episodes" in caplog.text and "1 steps in 1 episodes" in caplog.text
    toy.edit(toy.data_file(root), lambda rows: rows.update(action=[[float("nan")] * 7] * 20))
    with pytest.raises(ValueError, match="no episode has a step whose action and state are finite"):
        lerobot.open_dataset(root, "training")


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 7)])
def test_numbers_are_read_from_any_kind_of_list(tmp_path, kind):
    root = toy.write(tmp_path / "d")
    toy.edit(toy.data_file(root), lambda rows: rows.update(action=pa.array(rows["action"], kind)))
    assert len(toy.seen(lerobot.open_dataset(root, "training"))) == 15


def test_nested_scalar_and_null_cells_have_their_sizes():
    column = pa.chunked_array([pa.array([[[1, 2], [3, 4]], None, [[5, 6], [7]], [[1, 2], None], [[8, 9], [None, 1]]])])
    values, sizes = tables._numbers(column, 4, "x")
    assert sizes.tolist() == [4, -1, 3, -1, -1]
    np.testing.assert_array_equal(values[0], [1, 2, 3, 4])
    assert np.isnan(values[1:]).all()
    values, sizes = tables._numbers(pa.chunked_array([pa.array([1, None])]), 1, "x")
    assert sizes.tolist() == [1, -1] and values[0, 0] == 1
    with pytest.raises(ValueError, match="x holds string, expected numbers"):
        tables._numbers(pa.chunked_array([pa.array(["a"])]), 1, "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "fps is 0, expected a number above 0"),
        ({"fps": None}, "lacks 'fps'"),
        ({"features": {"action": {"shape": None}}}, "feature 'action' has shape None"),
        ({"features": [1]}, "features is list"),
        ({"total_episodes": "4"}, "total_episodes is '4'"),
    ],
)
def test_info_is_answered_by_field(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lerobot.open_dataset(toy.edit_info(toy.write(tmp_path / "d"), **changes), "training")


def test_files_with_byte_order_marks_and_windows_line_ends_are_read(tmp_path):
    root = toy.write(tmp_path / "d")
    toy.write_json(root / lerobot.CONVENTIONS, {"control_hz": 10})
    for path in (root / "meta/info.json", root / lerobot.CONVENTIONS):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b", ", b",\r\n"))
    assert len(toy.seen(lerobot.open_dataset(root, "training"))) == 15


def test_a_table_that_cannot_be_read_is_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = toy.write(tmp_path / "d", files=[[0, 1], [2, 3]])
    toy.edit(toy.data_file(root, 1), lambda rows: [rows.pop("action"), None][1])
    with pytest.raises(ValueError, match=r"file-001\.parquet has no columns \['action'\]"):
        lerobot.open_dataset(root, "training")
    toy.data_file(root, 1).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"file-001\.parquet cannot be read: .*remove it to leave its episodes out"):
        lerobot.open_dataset(root, "training")
    toy.edit(toy.data_file(root), lambda rows: [rows.pop("frame_index"), None][1])
    toy.data_file(root, 1).unlink()
    assert len(toy.seen(lerobot.open_dataset(root, "training", max_left_out_share=0.5))) == 5
    assert "rows are taken in the order in which they are stored" in caplog.text
