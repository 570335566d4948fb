"""The expert's drives as a dataset."""

from __future__ import annotations

import numpy as np
import pytest

from robovlms_jax.data import language, opening
from robovlms_jax.data.config import DataConfig
from robovlms_jax.driving import camera, instructions, recording, scenarios, world
from robovlms_jax.driving.config import RecordingConfig

FEW = RecordingConfig(episodes=8, validation_episodes=2, wordings=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("drives")
    counts = recording.record(FEW, path)
    assert counts["attempted"] == 10 and counts["recorded"] >= 9
    return path


def test_a_recording_is_a_dataset_of_this_robot(root):
    dataset = opening.open_split(DataConfig(root=str(root)), "training")
    assert dataset.robot == world.ROBOT and dataset.cameras == ("front",)
    first = dataset.episodes[0]
    assert first.instruction == instructions.CANONICAL[first.task] and len(first.rewordings) == 3
    ids = np.arange(first.start, first.end + 1)
    np.testing.assert_array_equal(dataset.proprio(ids)[0], np.zeros(3))
    assert dataset.actions(ids).shape == (len(ids), 3) and dataset.statistics.num_trajectories == len(dataset.episodes)
    assert np.abs(dataset.actions(ids)[-1]).max() < 0.1  # it stands at the cup
    picture = dataset.images([first.start], ["front"])["front"][0]
    drawn = camera.render(scenarios.draw(first.task, 0), scenarios.draw(first.task, 0).start[0])
    assert np.abs(picture.astype(int) - drawn).mean() < 4  # JPEG


def test_recording_again_changes_nothing_and_other_settings_are_refused(root):
    before = (root / "training/meta.json").read_bytes()
    recording.record(FEW, root)
    assert (root / "training/meta.json").read_bytes() == before
    with pytest.raises(ValueError, match="was packed with other settings"):
        recording.record(RecordingConfig(episodes=9, validation_episodes=2), root)


def test_training_draws_the_recordings_wordings_and_no_english_template(root):
    variation = language.read(str(root / language.PARAPHRASES))
    dataset = opening.open_split(DataConfig(root=str(root)), "training")
    sentences = language.every(dataset.episodes, variation)
    assert len(sentences) > 2 * len(dataset.episodes)
    assert not any(letter.isascii() and letter.isalpha() for sentence in sentences for letter in sentence)


def test_a_disturbed_base_is_recorded_with_what_the_expert_wanted():
    calm = recording.drive(RecordingConfig(episodes=4, disturbance=0.0), range(4))
    pushed = recording.drive(RecordingConfig(episodes=4, disturbance=1.0), range(4))
    for drives in (calm, pushed):
        for one in drives:
            assert np.linalg.norm(one.actions[:, :2], axis=1).max() <= 0.4 + 1e-6
    speed = [max(np.abs(np.diff(one.poses[:, 1])).max() for one in drives) for drives in (calm, pushed)]
    assert speed[1] > speed[0]
