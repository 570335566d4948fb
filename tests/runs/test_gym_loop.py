"""Demonstrations and episodes in a Gymnasium environment, on the stand-in."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import numpy as np
import pytest

from experiments import gym as preset
from robovlms_jax import schema
from robovlms_jax.control.interface import ActionChunk
from robovlms_jax.data import calvin
from robovlms_jax.envs import gym_experts
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.runs import gym_loop
from robovlms_jax.runs.config import ExperimentConfig
from tests.envs import line_world
from tests.envs.line_world import LAYOUT, LINE

RECORD = gym_loop.RecordingConfig(
    "tests.envs.line_world:expert", episodes=3, validation_episodes=1, noise=0.05, max_steps=30
)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", line_world.gymnasium())


def test_demonstrations_are_recorded_once_and_hold_what_the_expert_wanted(tmp_path, caplog):
    root = str(tmp_path / "line")
    counts = gym_loop.record(LAYOUT, LINE, RECORD, root)
    assert counts["attempted"] == counts["recorded"] == 4
    dataset = calvin.open_dataset(root, "training")
    assert len(dataset.episodes) == 3 and dataset.robot == LINE and dataset.image_sizes == {"top": (6, 8)}
    for episode in dataset.episodes:
        ids = range(episode.start, episode.end + 1)
        place, goal = dataset.proprio(ids).T
        wanted = np.clip(goal - place, -0.5, 0.5)
        np.testing.assert_allclose(dataset.actions(ids)[:, 0], wanted, atol=1e-5)
        assert episode.instruction == "go to the goal"
        assert (np.abs(goal - place)[-3:] < 0.3).all()  # two frames after success
        assert np.abs(np.diff(place) - wanted[:-1]).max() > 1e-3  # pushed off its way
    caplog.set_level("INFO")
    assert gym_loop.record(LAYOUT, LINE, RECORD, root)["attempted"] == 0
    assert "holds demonstrations already" in caplog.text
    with pytest.raises(ValueError, match=r"holds demonstrations of other settings \(.*noise"):
        gym_loop.record(LAYOUT, LINE, dataclasses.replace(RECORD, noise=0.2), root)


def test_an_expert_takes_over_where_random_actions_have_brought_it(tmp_path):
    """One pose for all beginnings would say by the way that was gone where the expert goes."""
    begun = {}
    for wander in (0, 4):
        config = dataclasses.replace(RECORD, wander=wander, episodes=6)
        gym_loop.record(LAYOUT, LINE, config, str(tmp_path / str(wander)))
        dataset = calvin.open_dataset(str(tmp_path / str(wander)), "training")
        begun[wander] = np.array([dataset.proprio([episode.start])[0, 0] for episode in dataset.episodes])
        wanted = [dataset.actions([episode.start])[0, 0] for episode in dataset.episodes]
        np.testing.assert_allclose(wanted, np.clip(3 - begun[wander], -0.5, 0.5), atol=1e-5)  # never a random one
    usual = [np.random.default_rng(seed).uniform() for seed in range(6)]
    np.testing.assert_allclose(begun[0], usual, atol=1e-6)
    gone = np.abs(begun[4] - usual)
    assert (gone > 1e-3).sum() >= 4 and gone.max() > 0.3
    gym_loop.record(LAYOUT, LINE, dataclasses.replace(RECORD, wander=4, episodes=6), str(tmp_path / "4"))
    with pytest.raises(ValueError, match="holds demonstrations of other settings"):
        gym_loop.record(LAYOUT, LINE, dataclasses.replace(RECORD, episodes=6), str(tmp_path / "4"))


def test_a_recording_of_a_version_that_knew_no_wandering_is_still_its_own(tmp_path):
    gym_loop.record(LAYOUT, LINE, RECORD, str(tmp_path / "line"))
    assert "wander" not in json.loads((tmp_path / "line" / "recording.json").read_text())["recording"]


def test_a_recording_that_cannot_be_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nobody' cannot be found"):
        gym_loop.record(LAYOUT, LINE, dataclasses.replace(RECORD, expert="tests.envs.line_world:nobody"), str(tmp_path))
    with pytest.raises(ValueError, match="no episode of the expert succeeded"):
        gym_loop.record(LAYOUT, LINE, dataclasses.replace(RECORD, max_steps=2), str(tmp_path / "short"))
    with pytest.raises(ValueError, match="must be MODULE:FUNCTION"):
        gym_loop.RecordingConfig("expert", episodes=1)
    (tmp_path / "other" / "training").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a dataset that was not recorded here"):
        gym_loop.record(LAYOUT, LINE, RECORD, str(tmp_path / "other"))


class Pushes:
    """Goes right, or stands."""

    def __init__(self, push):
        self.robot, self.slots, self._push = LINE, 2, push
        bounds = {"action_low": (-1.0,), "action_high": (1.0,)}
        self.model = types.SimpleNamespace(config=PolicyConfig(robot=LINE, cameras=("top",), **bounds))

    def reset(self, slots, instructions): ...

    def act(self, observations, slots):
        return [ActionChunk(np.full((2, 1), self._push, np.float32))] * len(slots)


@pytest.mark.parametrize(
    ("push", "found"), [(0.4, "**3 of 3 episodes succeed**"), (0.0, "**0 of 3 episodes succeed**")]
)
def test_episodes_are_judged_by_the_environment_and_reported(tmp_path, push, found):
    config = gym_loop.TrialsConfig(count=3, max_steps=12, environments=2, films=1)
    text = gym_loop.evaluate(Pushes(push), LAYOUT, LINE, config, tmp_path, "step_0-abc")
    assert text.startswith(gym_loop.HEADING) and found in text
    page = next(tmp_path.rglob("rollouts.html"))
    assert page.relative_to(tmp_path).as_posix() in text and list(page.parent.glob("film_0000*"))
    assert "Gymnasium (Line-v0)" in page.with_suffix(".md").read_text()


def test_the_preset_describes_fetch_and_its_checkpoint_keeps_no_environment():
    config = preset.PRESETS["fetch_reach"]
    assert type(config.experiment) is ExperimentConfig
    assert schema.from_dict(ExperimentConfig, schema.to_dict(config.experiment), "") == config.experiment
    assert schema.from_dict(preset.GymConfig, schema.to_dict(config), "") == config
    assert len(preset.FETCH.action) == 4 and len(preset.FETCH.state) == 3
    action = gym_experts.fetch_reach({"desired_goal": np.ones(3), "achieved_goal": np.array([1.0, 1.05, 0.0])})
    assert action.tolist() == pytest.approx([0, -0.3, 0.6, 0])


def test_trials_that_cannot_move_the_robots_hand_end_before_anything_is_recorded(tmp_path, monkeypatch):
    def record(*arguments):
        raise AssertionError("recorded")

    config = preset.PRESETS["fetch_reach"]
    ticks = tuple(dataclasses.replace(x, unit="ticks") for x in preset.FETCH.action)
    policy = dataclasses.replace(config.policy, robot=dataclasses.replace(preset.FETCH, action=ticks))
    monkeypatch.setitem(preset.PRESETS, "fetch_reach", dataclasses.replace(config, policy=policy))
    monkeypatch.setattr(gym_loop, "record", record)
    with pytest.raises(SystemExit, match="dimension 'x' has unit 'ticks'"):
        preset.main(["--train.output", str(tmp_path / "run"), "--trials.execution.retry.after", "30"])
