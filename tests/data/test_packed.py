"""The packed layout as it is read: damage is named, and the bundled sample is whole."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest

from robovlms_jax.data import base, calvin, frame_index, packed, packing
from tests.data.test_packing import BOTH, REPOSITORY, SPANS, pack


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shard_00000.bin", lambda data: data[:-1], r"shard_00000\.bin has \d+ bytes, expected"),
        ("shard_00000.bin", None, r"shard_00000\.bin is missing"),
        ("meta.json", lambda data: data[:40], r"meta\.json cannot be read"),
        ("meta.json", lambda data: data.replace(b'"version": 1', b'"version": 9'), "has version 9, this code reads 1"),
        ("annotations.json", None, r"annotations\.json is missing"),
        ("index/offset.npy", lambda data: data[:100], r"offset\.npy cannot be read"),
        ("index/frame_id.npy", None, r"frame_id\.npy cannot be read"),
    ],
)
def test_a_damaged_split_is_named_on_opening(write_calvin, tmp_path, name, damage, message):
    pack(write_calvin(SPANS), tmp_path / "out")
    path = tmp_path / "out" / "training" / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        calvin.open_dataset(tmp_path / "out", "training")


@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_damaged_bytes_are_corrupt_frames(write_calvin, tmp_path, codec):
    dataset = pack(write_calvin(SPANS), tmp_path / "out", codec=codec)
    shard = tmp_path / "out" / "training" / "shard_00000.bin"
    offset, length = (np.load(shard.parent / "index" / f"{name}.npy") for name in ("offset", "length"))
    data = bytearray(shard.read_bytes())
    data[offset[4, 1] : offset[4, 1] + 2] = b"no"
    middle = offset[7, 0] + length[7, 0] // 2
    data[middle : offset[7, 0] + length[7, 0]] = bytes(offset[7, 0] + length[7, 0] - middle)
    shard.write_bytes(data)
    with pytest.raises(base.CorruptFrameError, match=rf"wrist image at byte {offset[4, 1]}: neither JPEG nor PNG"):
        dataset.images([103, 104], BOTH)
    dataset.images([104], ("static",))
    with pytest.raises(base.CorruptFrameError, match=rf"static image at byte {offset[7, 0]}"):
        dataset.images([107], BOTH)
    os.truncate(shard, int(offset[20, 0]))
    with pytest.raises(base.CorruptFrameError, match=r"shard_00000\.bin ends within the"):
        dataset.images([120], BOTH)


def test_an_image_of_another_size_is_refused():
    image = np.zeros((8, 8, 3), np.uint8)
    for codec in ("jpeg", "png"):
        data = packing.encode_image(codec, 95, image, "an image")
        for shape in ((9, 9, 3), (7, 7, 3), (4, 16, 3)):
            with pytest.raises(ValueError, match=r"expected \(|too small"):
                frame_index.decode_image(data, np.zeros(shape, np.uint8))


def test_the_bundled_sample_is_whole():
    for split, episodes, frames in (("training", 10, 364), ("validation", 3, 106)):
        dataset = calvin.open_dataset(REPOSITORY / "data" / "calvin_sample", split)
        assert len(dataset.episodes) == episodes
        assert dict(dataset.image_sizes) == {"static": (200, 200), "wrist": (84, 84)}
        images = dataset.images(dataset.frame_ids, BOTH)
        assert images["static"].shape == (frames, 200, 200, 3)
        assert all(image.std() > 20 for image in images["static"])
        actions = dataset.actions(dataset.frame_ids)
        assert np.abs(actions).max() <= 1
        assert set(actions[:, 6].tolist()) == {-1.0, 1.0}


def test_the_bundled_sample_is_what_was_recorded(shared_data):
    for split in ("training", "validation"):
        source = calvin.open_npz(shared_data / "calvin_sample", split)
        dataset = calvin.open_dataset(REPOSITORY / "data" / "calvin_sample", split)
        assert dataset.episodes == source.episodes
        assert json.loads((dataset.directory / "meta.json").read_text())["quality"] == 84
        packing.verify(dataset, source)
        for name in calvin.ARRAY_SIZES:
            np.testing.assert_array_equal(dataset.array(name, source.frame_ids), source.array(name, source.frame_ids))


@pytest.mark.parametrize(
    ("field", "width"), [("rel_actions", 6), ("robot_obs", 3), ("offset", 1)], ids=["actions", "state", "images"]
)
def test_a_field_of_another_width_is_named_with_its_file_and_what_was_expected(field, width, tmp_path):
    split = tmp_path / "training"
    shutil.copytree(REPOSITORY / "data" / "calvin_sample" / "training", split)
    path = split / "index" / f"{field}.npy"
    values = np.load(path)
    np.save(path, values[:, :width])
    expected = [len(values), values.shape[1]]
    with pytest.raises(ValueError, match=re.escape(f"{path}: {field} is ")) as error:
        packed.PackedDataset(split)
    assert f"[{len(values)}, {width}], expected numbers {expected}" in str(error.value)


@pytest.mark.parametrize("limit", [0, 7 * (40 * 40 + 24 * 24) * 3, 10**9])
def test_pictures_that_are_kept_in_memory_are_those_that_are_read(write_calvin, tmp_path, limit, monkeypatch):
    pack(write_calvin(SPANS), tmp_path / "out")
    plain, kept = (packed.PackedDataset(tmp_path / "out" / "training") for _ in range(2))
    kept.keep_decoded(limit)
    expected, rng = plain.images(plain.frame_ids, BOTH), np.random.default_rng(0)
    decoded = []
    real = frame_index.decode_image
    monkeypatch.setattr(frame_index, "decode_image", lambda data, out: (decoded.append(1), real(data, out)))
    for dataset in (kept, pickle.loads(pickle.dumps(kept))):
        for cameras in (("wrist",), BOTH, BOTH[::-1]):
            for _ in range(3):
                rows = rng.permutation(len(plain.frame_ids))
                found = dataset.images(plain.frame_ids[rows], cameras)
                for camera in cameras:
                    np.testing.assert_array_equal(found[camera], np.stack(expected[camera])[rows])
    total = len(plain.frame_ids)
    # Of 18 readings of all frames, 15 pictures of a frame each; kept ones are decoded once, and wrist's once again.
    seen = {0: 15, 10**9: 3}.get(limit)
    assert len(decoded) == 2 * total * seen if seen else 6 * total < len(decoded) < 30 * total, (len(decoded), total)


def test_a_picture_that_cannot_be_read_is_not_kept(write_calvin, tmp_path):
    dataset = pack(write_calvin(SPANS), tmp_path / "out")
    dataset.keep_decoded(10**9)
    shard = tmp_path / "out" / "training" / "shard_00000.bin"
    whole, offset = shard.read_bytes(), np.load(shard.parent / "index" / "offset.npy")
    shard.write_bytes(whole[: offset[4, 1]] + b"no" + whole[offset[4, 1] + 2 :])
    with pytest.raises(base.CorruptFrameError, match="wrist image at byte"):
        dataset.images([104], BOTH)
    shard.write_bytes(whole)
    plain = packed.PackedDataset(shard.parent)
    np.testing.assert_array_equal(dataset.images([104], BOTH)["wrist"], plain.images([104], BOTH)["wrist"])
