"""Steps at which demonstrations wait (`data.skip_still`)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from robovlms_jax.control import robot
from robovlms_jax.data import base, calvin, cutting
from robovlms_jax.data.config import DataConfig
from tests.data.test_loading import SPANS, make_source


@pytest.fixture
def dataset(write_calvin) -> base.Dataset:
    return calvin.open_dataset(write_calvin(SPANS), "training")


def waits(dataset, monkeypatch, still, grips):
    """Actions of frame k: zero where k is in `still`, one otherwise; the gripper closes from frame `grips` on."""

    def actions(ids):
        found = np.ones((len(ids), 7), np.float32)
        found[np.isin(ids, still), :6] = 0.04
        found[:, 6] = np.where(np.asarray(ids) < grips, 1, -1)
        return found

    monkeypatch.setattr(dataset, "actions", actions)


@pytest.mark.parametrize(("window", "left_pad"), [(1, False), (3, False), (3, True)])
def test_windows_whose_newest_step_waits_are_left_out_and_chunks_stay_whole(dataset, monkeypatch, window, left_pad):
    """Fails if another step than the newest decides, a chunk loses its waiting steps, or a wait in which the gripper
    changes is left out."""
    still = [100, 103, 104, 105, 106, 121]
    waits(dataset, monkeypatch, still, grips=105)
    options = {"window": window, "windows_per_segment": 1, "left_pad": left_pad}
    every, few = (make_source(dataset, skip_still=least, **options) for least in (0, 0.05))
    newest = {
        name: [
            int(source.segments[k].step_ids[window - 1]) for k in range(len(source)) if source.segments[k].episode == 0
        ]
        for name, source in (("every", every), ("few", few))
    }
    # The first step of an episode has changed everything.
    assert newest["few"] == [frame for frame in newest["every"] if frame not in {103, 104, 106, 121}]
    batch = few.training_batch(np.array([newest["few"].index(102)]), np.zeros(1, np.uint32))
    np.testing.assert_allclose(batch.actions[0, window - 1 :, 0][:3], [1, 0.04, 0.04])
    assert few.content() != every.content() and "windows" not in every.content()


def test_absolute_actions_wait_where_they_stay_what_they_were(dataset, monkeypatch):
    """Fails if a target that is far from zero counts as motion, or one that is reached as a wait only at zero."""
    kinds = {"absolute": [True, False, True, False], "delta": [True, True, True, True], "velocity": [True] * 4}
    for kind, wanted in kinds.items():
        dimension = robot.Dimension("lift", "m", kind=kind)
        dataset.robot = dataclasses.replace(dataset.robot, action=(dimension,))
        monkeypatch.setattr(dataset, "actions", lambda ids: np.float32([[0.5], [0.52], [0.7], [0.68]]))
        assert cutting.moves(dataset, base.Episode(0, 4, "", ""), 0.05).tolist() == wanted


def test_an_episode_without_a_step_has_nothing_that_moves(dataset):
    assert cutting.moves(dataset, base.Episode(100, 100, "", ""), 0.05).tolist() == []


def test_an_episode_that_cannot_be_read_is_left_to_training(dataset, monkeypatch):
    def actions(ids):
        raise base.CorruptFrameError("cut off")

    monkeypatch.setattr(dataset, "actions", actions)
    assert len(make_source(dataset, window=1, windows_per_segment=1, skip_still=0.05)) == sum(b - a for a, b in SPANS)


def test_where_nothing_moves_it_is_said(dataset, monkeypatch):
    waits(dataset, monkeypatch, range(1000), grips=0)
    with pytest.raises(ValueError, match=r"Or nothing moves in any by more than data\.skip_still=0\.05"):
        make_source(dataset, window=3, windows_per_segment=1, skip_still=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"windows_per_segment": 4}, "leaves out single windows"), ({"skip_still": -1.0}, "must be finite")],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"skip_still": 0.05} | values)
