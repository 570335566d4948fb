"""Steps at which demonstrations wait (`data.skip_still`)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from robovlms_jax.control import robot
from robovlms_jax.data import base, calvin, cutting, segments
from robovlms_jax.data.config import DataConfig
from tests.data.test_loading import SPANS, make_source


@pytest.fixture
def dataset(write_calvin) -> base.Dataset:
    return calvin.open_dataset(write_calvin(SPANS), "training")


GRIPPING = {106, 107, 108}
"""Steps of a tenth of a second at 30 Hz."""


def waits(dataset, monkeypatch, still, grips, opening=(8.0,) * 100):
    """Actions of frame k: next to zero where k is in `still`, one otherwise; the gripper closes from frame `grips` on,
    and fingers are `opening` apart, from frame 100 on."""

    def actions(ids):
        found = np.ones((len(ids), 7), np.float32)
        found[np.isin(ids, still), :6] = 0.04
        found[:, 6] = np.where(np.asarray(ids) < grips, 1, -1)
        return found

    monkeypatch.setattr(dataset, "actions", actions)
    measured = None if opening is None else np.asarray(opening)
    monkeypatch.setattr(
        dataset,
        "gripper_opening",
        lambda ids: None if opening is None else measured[np.clip(ids - 100, 0, len(measured) - 1)],
    )


def test_chunks_go_on_over_waiting_steps_to_the_next_that_do_something(dataset, monkeypatch):
    """Fails if a chunk holds a step that waits, begins with one that came before its frame, reaches into the next
    episode, or if a picture other than the frame's own is shown."""
    still = [100, 103, 104, 106, *range(116, 122)]
    waits(dataset, monkeypatch, still, grips=106)
    every, few = (make_source(dataset, window=1, windows_per_segment=1, skip_still=least) for least in (0, 0.05))
    first = [few.segments[k] for k in range(len(few)) if few.segments[k].episode == 0]
    start, end = SPANS[0]
    acting = [frame for frame in range(start, end) if frame not in set(still) - GRIPPING]
    assert [int(segment.step_ids[0]) for segment in first] == list(range(start, acting[-1] + 1))
    for segment in first:
        expected = [frame for frame in acting if frame >= segment.step_ids[0]][: few.segments.chunk]
        assert segment.action_ids[segment.step_mask].tolist() == expected
        assert (segment.action_ids[~segment.step_mask] == end).all() and not segment.step_mask[len(expected) :].any()
    assert few.content() != every.content() and "acting" not in every.content()


def test_each_episode_keeps_its_own_steps(dataset):
    """Against a loop: fails if steps of one episode are counted from another's first."""
    rng = np.random.default_rng(0)
    spans = np.array([(0, 9), (9, 9), (4, 30), (30, 41)])
    acting = [np.flatnonzero(rng.random(end - start) < 0.4) for start, end in spans]
    acting[3] = np.zeros(0, np.int64)
    found = segments.Segments(spans, window=1, chunk=4, windows_per_segment=1, acting=acting)
    expected = [
        (episode, start + k, [start + step for step in steps[steps >= k]][:4])
        for episode, ((start, end), steps) in enumerate(zip(spans.tolist(), acting, strict=True))
        for k in range(end - start)
        if (steps >= k).any()
    ]
    taken = found.take(np.arange(len(found)))
    assert len(found) == len(expected)
    for k, (episode, frame, ids) in enumerate(expected):
        assert (taken.episode[k], taken.step_ids[k, 0]) == (episode, frame)
        assert taken.action_ids[k][taken.step_mask[k]].tolist() == ids


def test_absolute_actions_wait_where_they_stay_what_they_were(dataset, monkeypatch):
    """Fails if a target that is far from zero counts as motion, or one that is reached as a wait only at zero."""
    kinds = {"absolute": [True, False, True, False], "delta": [True, True, True, True], "velocity": [True] * 4}
    for kind, wanted in kinds.items():
        dimension = robot.Dimension("lift", "m", kind=kind)
        dataset.robot = dataclasses.replace(dataset.robot, action=(dimension,))
        monkeypatch.setattr(dataset, "gripper_opening", lambda ids: None)
        monkeypatch.setattr(dataset, "actions", lambda ids: np.float32([[0.5], [0.52], [0.7], [0.68]]))
        assert cutting.acts(dataset, base.Episode(0, 4, "", ""), 0.05).tolist() == wanted


def test_an_episode_without_a_step_has_nothing_that_moves(dataset):
    assert cutting.acts(dataset, base.Episode(100, 100, "", ""), 0.05).tolist() == []


def test_an_episode_that_cannot_be_read_is_left_to_training(dataset, monkeypatch):
    def actions(ids):
        raise base.CorruptFrameError("cut off")

    monkeypatch.setattr(dataset, "actions", actions)
    assert len(make_source(dataset, window=1, windows_per_segment=1, skip_still=0.05)) == sum(b - a for a, b in SPANS)


@pytest.mark.parametrize(
    ("opening", "wanted"),
    [
        # Fingers close from 8 to 5 cm in four steps; measured, that is how long they are on their way.
        ([8.0] * 5 + [7.5, 7, 6, 5] + [5.0] * 31, [4, 5, 6, 7]),
        # Measured, but they do not come together: a tenth of a second.
        ([8.0] * 40, [4, 5, 6]),
        # Not measured, or not by numbers: a third of a second.
        (None, range(4, 14)),
        ([np.nan] * 40, range(4, 14)),
        # On their way since before the episode.
        ([8.0, 7, 6, 5, 5] + [5.0] * 35, [0, 1, 2, 4, 5, 6]),
    ],
)
def test_fingers_on_their_way_are_no_wait(dataset, monkeypatch, opening, wanted):
    """Fails if the hand would be off before its fingers are closed, or hovers for what comes after."""
    waits(dataset, monkeypatch, range(1000), grips=104, opening=opening)
    assert np.flatnonzero(cutting.acts(dataset, base.Episode(100, 140, "", ""), 0.05)).tolist() == [*wanted]


def test_where_nothing_is_asked_it_is_said(dataset, monkeypatch, caplog):
    waits(dataset, monkeypatch, range(1000), grips=0)
    with pytest.raises(
        ValueError, match=r"Or nothing is asked of the robot in any by more than data\.skip_still=0\.05"
    ):
        make_source(dataset, window=1, windows_per_segment=1, skip_still=0.05)
    assert "100.0 % of" in caplog.text and "is its unit that of the actions?" in caplog.text


def test_windows_of_several_frames_and_mixtures_are_refused(dataset):
    with pytest.raises(ValueError, match=r"policy\.window is 3, set it to 1"):
        make_source(dataset, window=3, windows_per_segment=1, skip_still=0.05)
    dataset.parts = (object(),)
    with pytest.raises(ValueError, match=r"is a mixture, .* name datasets one by one"):
        make_source(dataset, window=1, windows_per_segment=1, skip_still=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windows_per_segment": 4}, "chunks of single windows"),
        ({"skip_still": -1.0}, "must be finite"),
        ({"windows_per_segment": 1, "compat_goal_relabelling": True}, "set one of them"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"skip_still": 0.05} | values)
