"""Frames that a program makes, kept until they are packed."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from robovlms_jax.data import base, disk, packing, spool


def test_spooled_frames_come_back_packed(tmp_path):
    # Fails if rows or pictures of the spool's files are misplaced, or a field or camera is swapped with another.
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 200, 16 * 16 * 3).reshape(16, 16, 3)  # JPEG keeps what is smooth
    images = {"static": np.stack([(smooth + shift).astype(np.uint8) for shift in range(7)])}
    images["wrist"] = images["static"][:, :8, ::-2] // 2
    arrays = {"rel_actions": rng.normal(size=(7, 7)), "robot_obs": rng.normal(size=(7, 15))}
    form = {"static": (16, 16), "wrist": (8, 8)}, {"rel_actions": 7, "robot_obs": 15}
    frames = spool.Spool(tmp_path / "frames", *form)
    for part in (slice(0, 4), slice(4, 7)):
        frames.add(*({name: x[part] for name, x in each.items()} for each in (images, arrays)))
        frames = spool.Spool(tmp_path / "frames", *form)  # as in a program that goes on
    frames.episodes = (
        base.Episode(0, 3, "open the drawer", "open_drawer"),
        base.Episode(4, 6, "close it", "close_drawer"),
    )
    dataset = packing.pack(frames, tmp_path / "packed", frame_ids=np.arange(frames.num_frames), workers=1)
    assert dataset.episodes == frames.episodes
    for name, x in arrays.items():
        np.testing.assert_allclose(dataset.array(name, range(7)), x, rtol=1e-6)
    decoded = dataset.images(range(7), tuple(images))
    for camera, pictures in images.items():
        assert np.abs(decoded[camera].astype(int) - pictures).max() < 8
        again = [packing.encode_image("jpeg", 95, picture, "") for picture in pictures]
        assert dataset.encoded(range(7), camera) == again
    assert dataset.shows_all and dataset.meta["version"] == 1
    frames.delete()
    assert not list(tmp_path.glob("frames*"))


def test_rows_of_zeros_that_a_power_failure_leaves_are_no_frames_and_cost_none(tmp_path):
    """Fails if the last row, which says that pictures end at 0, has all of them cut off."""
    form = {"static": (8, 8)}, {"rel_actions": 1}
    frames = spool.Spool(tmp_path / "frames", *form)
    frames.add({"static": np.zeros((2, 8, 8, 3), np.uint8)}, {"rel_actions": np.ones((2, 1))})
    frames.add({"static": np.zeros((0, 8, 8, 3), np.uint8)}, {"rel_actions": np.ones((0, 1))})
    before = [frames.encoded(number) for number in range(2)]
    rows = tmp_path / "frames.rows"
    os.truncate(rows, 2 * rows.stat().st_size)
    frames = spool.Spool(tmp_path / "frames", *form)
    assert [frames.encoded(number) for number in range(frames.num_frames)] == before


def test_frames_without_pictures_are_kept_as_such(tmp_path):
    """Fails if pictures go to other frames, if a frame without one is taken for the rest of a power failure, if packing
    makes it a black picture, or if memory is kept for it."""
    form = {"static": (16, 16), "wrist": (8, 8)}, {"rel_actions": 7}
    frames = spool.Spool(tmp_path / "frames", *form)
    numbers = np.arange(63, dtype=np.float32).reshape(9, 7)
    pictures = {camera: np.full((2, *size, 3), 90, np.uint8) for camera, size in form[0].items()}
    for image in pictures.values():
        image[1] = 180
    with pytest.raises(ValueError, match="first frame has no picture"):
        frames.add(pictures, {"rel_actions": np.zeros((5, 7))}, np.array([1, 3]))
    frames.add(pictures, {"rel_actions": numbers[:5]}, np.array([0, 3]))
    frames.add(pictures, {"rel_actions": numbers[5:]}, np.array([1, 2]))
    frames = spool.Spool(tmp_path / "frames", *form)  # as in a program that goes on
    assert frames.num_frames == 9
    frames.episodes = (base.Episode(0, 4, "open the drawer", "open_drawer"), base.Episode(5, 8, "close it", "close"))
    dataset = packing.pack(frames, tmp_path / "packed", frame_ids=np.arange(9))
    shown = np.isin(np.arange(9), (0, 3, 6, 7))
    assert not dataset.shows_all
    np.testing.assert_array_equal(dataset.shown(range(9)), shown)
    np.testing.assert_array_equal(dataset.has_images(range(9), "wrist"), shown)
    np.testing.assert_array_equal(dataset.array("rel_actions", range(9)), numbers)
    dataset.keep_decoded(2 * 3 * (16 * 16 + 8 * 8))
    for _ in range(2):
        seen = dataset.images(range(9), dataset.cameras)
        for camera in dataset.cameras:
            expected = np.array([90, 0, 0, 180, 0, 0, 90, 180, 0])[:, None, None, None]
            assert np.abs(seen[camera].astype(int) - expected).max() < 3
    assert dataset.meta["version"] == 2  # readers of before would see black pictures
    with pytest.raises(ValueError, match=r"become black if they are encoded anew; keep how they are: jpeg of quality"):
        packing.pack(frames, tmp_path / "other", frame_ids=np.arange(9), codec="png")


def test_packing_asks_for_the_room_that_few_pictures_take_and_reads_some_of_each_shard_again(tmp_path, monkeypatch):
    """Fails if the size of the first frame, which always has a picture, stands for all of them, or if only frames
    without pictures are compared in the end."""
    frames = spool.Spool(tmp_path / "frames", {"static": (64, 64)}, {"rel_actions": 7})
    noise = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), np.uint8)
    frames.add({"static": noise}, {"rel_actions": np.zeros((60, 7))}, np.array([0, 31]))
    frames.episodes = (base.Episode(0, 59, "open the drawer", "open_drawer"),)
    size = (tmp_path / "frames").stat().st_size
    usage = disk.shutil.disk_usage(tmp_path)._replace(free=4 * size)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
    dataset = packing.pack(frames, tmp_path / "packed", frame_ids=np.arange(60))
    assert packing._ends(dataset, dataset.meta["shards"][0]) == [0, 59, 0, 31]
    monkeypatch.setattr(packing, "FRAMES_PER_SHARD", 40)  # a last shard without any picture
    assert len(packing.pack(frames, tmp_path / "shards", frame_ids=np.arange(60)).meta["shards"]) == 2
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=size // 4))
    with pytest.raises(OSError, match=r"are needed and .* are free; free space"):
        packing.pack(frames, tmp_path / "other", frame_ids=np.arange(60))


def test_a_frame_of_which_one_camera_has_a_picture_was_written_by_half(tmp_path):
    form = {"static": (8, 8), "wrist": (8, 8)}, {"rel_actions": 1}
    images = {camera: np.zeros((2, 8, 8, 3), np.uint8) for camera in form[0]}
    frames = spool.Spool(tmp_path / "frames", *form)
    frames.add(images, {"rel_actions": np.ones((2, 1))})
    rows = np.fromfile(tmp_path / "frames.rows", frames._row)
    rows["lengths"][1, 1] = 0
    rows.tofile(tmp_path / "frames.rows")
    assert spool.Spool(tmp_path / "frames", *form).num_frames == 1


@pytest.mark.parametrize(("file", "left"), [("frames", 2), ("frames.rows", 2), ("", 3)])
def test_a_spool_of_which_the_last_frame_was_written_by_half_goes_on_after_the_one_before(tmp_path, file, left):
    pictures = np.arange(3, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3) * 60
    numbers = np.arange(3.0)[:, None]
    form = {"static": (8, 8)}, {"rel_actions": 1}
    spool.Spool(tmp_path / "frames", *form).add({"static": pictures}, {"rel_actions": numbers})
    if file:
        os.truncate(tmp_path / file, (tmp_path / file).stat().st_size - 1)
    frames = spool.Spool(tmp_path / "frames", *form)
    assert frames.num_frames == left
    frames.add({"static": pictures[left - 3 :]}, {"rel_actions": numbers[left - 3 :]})
    for number in range(frames.num_frames):
        images, arrays = frames.frame(number)
        assert (
            np.abs(images["static"].astype(int) - 60 * (number % 3)).max() < 3 and arrays["rel_actions"] == number % 3
        )


def test_a_spool_that_was_read_is_read_anew_where_it_is_cut_and_sent_without_its_pictures(tmp_path):
    """Fails if what was read once stays: frames that are gone, or all pictures in every message to a process."""
    frames = spool.Spool(tmp_path / "frames", {"static": (64, 64)}, {"rel_actions": 1})
    frames.add({"static": np.zeros((40, 64, 64, 3), np.uint8)}, {"rel_actions": np.arange(40.0)[:, None]})
    assert frames.encoded(39)[1]["rel_actions"] == 39
    sent = pickle.dumps(frames)
    assert len(sent) < 2000 < (tmp_path / "frames").stat().st_size
    assert pickle.loads(sent).encoded(39) == frames.encoded(39)
    frames.truncate(3)
    with pytest.raises(IndexError):
        frames.encoded(39)
