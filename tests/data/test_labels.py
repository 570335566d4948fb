"""Numbers beside actions that auxiliary losses learn from: movements ahead, and the scene."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from robovlms_jax.control import robot
from robovlms_jax.data import base, calvin, loading
from tests.data.test_loading import SPANS, K, W, make_source, take


@pytest.fixture
def dataset(write_calvin) -> base.Dataset:
    return calvin.open_dataset(write_calvin(SPANS), "training")


@pytest.mark.parametrize("left_pad", [False, True])
def test_movements_are_those_from_each_windows_newest_step_to_later_ones_of_its_episode(
    dataset, frame_content, left_pad
):
    """Fails if a movement is another window's, goes beyond the episode's end, or is of other numbers of the state."""
    source = make_source(dataset, ahead=(2, 9), moving=(2, 0), left_pad=left_pad)

    def place(frame):
        return np.float32(frame_content(frame)["robot_obs"])[[2, 0]]

    for index in range(len(source)):
        sample = source[index]
        assert sample.ahead.shape == (K, 2, 2)
        start, end = SPANS[int(sample.episode)]
        for k in np.flatnonzero(sample.window_mask):
            newest = int(source.segments[index].step_ids[k + W - 1])
            assert start <= newest < end
            expected = [place(min(newest + offset, end)) - place(newest) for offset in (2, 9)]
            np.testing.assert_allclose(sample.ahead[k], expected, atol=1e-6)
    (batch,) = take(loading.evaluation_batches(source, segments_per_batch=len(source) + 1, num_threads=1, prefetch=1))
    assert batch.ahead.shape == (len(source) + 1, K, 2, 2) and not batch.ahead[-1].any()
    assert make_source(dataset)[0].ahead is None


def test_numbers_about_the_scene_are_those_of_each_windows_newest_frame(dataset, frame_content):
    source = make_source(dataset, scene=("scene_obs", (7, 2)))
    for index in range(len(source)):
        sample = source[index]
        for k in np.flatnonzero(sample.window_mask):
            newest = int(source.segments[index].step_ids[k + W - 1])
            expected = np.float32(frame_content(newest)["scene_obs"])[[7, 2]]
            np.testing.assert_array_equal(sample.scene[k], expected)
    with pytest.raises(ValueError, match=r"columns \[24\] of 'scene_obs', of which a frame has \[24\] numbers"):
        make_source(dataset, scene=("scene_obs", (24,)))
    with pytest.raises(ValueError, match="no 'object_state'"):
        make_source(dataset, scene=("object_state", (0,)))


def test_movements_are_in_metres_and_radians(dataset):
    """Fails if degrees are taken for radians, or a unit that nobody knows for metres."""
    plain = make_source(dataset, ahead=(3,), moving=(0, 4))[0].ahead
    units = {0: "mm", 4: "deg"}
    dataset.robot = dataclasses.replace(
        dataset.robot,
        state=tuple(dataclasses.replace(d, unit=units.get(n, d.unit)) for n, d in enumerate(dataset.robot.state)),
    )
    found = make_source(dataset, ahead=(3,), moving=(0, 4))[0].ahead
    np.testing.assert_allclose(found, plain * np.float32([1e-3, np.pi / 180]), rtol=1e-5)
    dataset.robot = dataclasses.replace(dataset.robot, state=(robot.Dimension("lift", "%", quantity="joint"),))
    with pytest.raises(ValueError, match=r"numbers of the robot's state are not: lift \(%\)\. Describe their units"):
        make_source(dataset, ahead=(3,), moving=(0,))
    assert make_source(dataset, moving=(0, 4))[0].ahead is None  # not asked for: nothing need be known


def test_a_scene_that_cannot_be_read_is_replaced_and_one_that_is_nan_is_named(dataset, monkeypatch):
    """Fails if a frame that is damaged ends a run before it begins, or NaN gets into a loss."""
    read = dataset.array

    def damaged(name, ids):
        values = read(name, ids)
        if name != "scene_obs":
            return values
        if 100 in list(ids):
            raise base.CorruptFrameError("frame 100 is cut off.")
        return np.where(np.asarray(ids)[:, None] == 112, np.nan, values)

    monkeypatch.setattr(dataset, "array", damaged)
    source = make_source(dataset, window=1, windows_per_segment=1, scene=("scene_obs", (7, 2)))
    batch = source.training_batch(np.array([0, 22 + 2]), np.zeros(2, np.uint32))
    assert batch.corrupt.tolist() == [0, 1] and np.isfinite(batch.scene).all()
    with pytest.raises(base.CorruptFrameError, match=r"frame 112 has scene_obs .*every value must be finite"):
        source[24]


def test_a_frame_with_fewer_numbers_of_the_scene_is_replaced(dataset, monkeypatch):
    """Fails if one short frame among many ends a run with an IndexError."""
    read = dataset.array

    def short(name, ids):
        values = read(name, ids)
        return values[:, :5] if name == "scene_obs" and 112 in list(ids) else values

    monkeypatch.setattr(dataset, "array", short)
    source = make_source(dataset, window=1, windows_per_segment=1, scene=("scene_obs", (7, 2)))
    with pytest.raises(
        base.CorruptFrameError, match=r"frames \[112\]: 'scene_obs' has \[5\] numbers of a frame, of which"
    ):
        source[24]
    assert source.training_batch(np.array([24]), np.zeros(1, np.uint32)).corrupt.tolist() == [1]


def test_movements_of_a_state_that_cannot_be_read_or_is_another_in_a_part_are_refused_at_once(dataset, monkeypatch):
    """Fails if that is found out in the first batch, or if joints are taken for places."""
    joints = tuple(robot.Dimension(f"joint_{k}", "rad", quantity="joint") for k in range(7))
    other = types.SimpleNamespace(robot=dataclasses.replace(dataset.robot, state=joints))
    monkeypatch.setattr(dataset, "parts", (types.SimpleNamespace(name="arm", dataset=other),), raising=False)
    with pytest.raises(ValueError, match=r"ahead learns how x, roll move, and arm has joint_0, joint_3 in their place"):
        make_source(dataset, ahead=(3,), moving=(0, 3))
    monkeypatch.undo()

    def proprio(ids):
        raise ValueError("it has joints.")

    monkeypatch.setattr(dataset, "proprio", proprio)
    make_source(dataset, moving=(0,))
    with pytest.raises(ValueError, match=r"policy\.auxiliary\.ahead learns from the robot's state.*it has joints"):
        make_source(dataset, ahead=(3,), moving=(0,))
