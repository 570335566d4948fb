"""Calibration of a checkpoint: coverage by episode, and what is saved."""

from __future__ import annotations

import json
import math
import pathlib
import shutil

import numpy as np
import pytest

from experiments import calibrate
from robovlms_jax.control.interface import Observation
from robovlms_jax.load import load_policy
from robovlms_jax.policies.confidence import Calibration
from robovlms_jax.runs import calibrating, saved

ROOT = pathlib.Path(__file__).parents[2]
OLD = ROOT / "tests" / "compatibility" / "release_0_1" / "policy_head_lstm"


def episodes(count, seed=0, frames=30):
    """Frames of one episode resemble each other: each has its own level of error."""
    rng = np.random.default_rng(seed)
    level = rng.exponential(size=count)
    scores = level[:, None, None] * rng.uniform(0.5, 1.5, (count, frames, 2))
    scores[:, -1, 1] = np.nan  # the second step of the chunk is beyond the end
    return calibrating.Compared(scores.reshape(-1, 2), np.repeat(np.arange(count), frames), None)


def test_intervals_hold_what_they_say_of_unseen_episodes():
    calibration, measured = calibrating.calibrate(episodes(800), 0.9, splits=60)
    assert calibration.episodes == measured.episodes == 400
    np.testing.assert_allclose(measured.repeated, 0.9, atol=0.01)
    assert all(abs(share - 0.9) < 4 * math.hypot(0.015, error) for share, error in zip(measured.share, measured.error))


def test_frames_counted_as_if_they_were_episodes_would_hold_too_little_or_too_much():
    # Why the unit is the episode: the deviation between splits is that of few episodes, not of many frames.
    _, measured = calibrating.calibrate(episodes(40), 0.9, splits=60)
    assert min(measured.deviation) > 0.03


def test_too_few_episodes_give_no_interval_and_none_to_test_is_an_error():
    calibration, _ = calibrating.calibrate(episodes(10), 0.9, splits=1)
    assert calibration.quantiles == (math.inf, math.inf)
    with pytest.raises(ValueError, match="leaves none"):
        calibrating.calibrate(episodes(1), 0.9)


def test_a_calibration_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    before = Calibration((1.5,), 0.9, 30, scaled=True)
    saved.write_calibration(tmp_path, before, {})

    def killed(*args):
        raise OSError("power failure")

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(OSError, match="power"):
        saved.write_calibration(tmp_path, Calibration((2.5,), 0.8, 3, scaled=False), {})
    assert saved.read_calibration(tmp_path) == before


def test_a_calibration_comes_back_as_it_was_written(tmp_path):
    calibration = Calibration((1.5, math.inf), 0.9, 30, scaled=True)
    saved.write_calibration(tmp_path, calibration, {"measured": {}})
    assert saved.read_calibration(tmp_path) == calibration
    assert saved.read_calibration(tmp_path / "elsewhere") is None
    (tmp_path / saved.CALIBRATION).write_text(json.dumps({"coverage": 0.9}))
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration.*calibrate again"):
        saved.read_calibration(tmp_path)


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_release_is_calibrated_and_then_says_intervals(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    sample = str(ROOT / "data" / "calvin_sample")
    text = calibrate.calibrate(calibrate.CalibrateConfig(str(tmp_path / "run"), root=sample, coverage=0.5, splits=2))
    assert "50% intervals" in text
    policy = load_policy(tmp_path / "run")
    policy.reset("open the drawer")
    images = {camera: np.zeros((size, size, 3), np.uint8) for camera, size in (("static", 200), ("wrist", 84))}
    chunk = policy.act(Observation(images, np.zeros(15)))
    assert chunk.interval.shape == chunk.actions.shape and chunk.coverage == 0.5 and chunk.uncertainty is None
    assert (chunk.interval[:, :6] > 0).all()
