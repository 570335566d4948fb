"""Experts take over where a policy has got to; what they do is a demonstration like any other."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from robovlms_jax.control.interface import ActionChunk
from robovlms_jax.data import packed
from robovlms_jax.demo import twin
from robovlms_jax.playtable.real import recording as real_recording
from robovlms_jax.playtable.scene import DRAWER
from robovlms_jax.rl import segments
from robovlms_jax.rl.config import BehaviourConfig
from robovlms_jax.runs import correcting, trying
from robovlms_jax.training import checkpoints, seals
from tests.envs.calvin import fake_stage
from tests.labeling.made_up import rollouts


def test_takeovers_are_drawn_from_all_steps_but_the_last_and_keep_where_the_task_began():
    found = rollouts((12, 7), ("open_drawer", "turn_on_led"))
    config = correcting.CorrectionConfig(takeovers=40, of="all")
    cases = correcting.cases(found, config)
    assert [case.task for case in cases] == ["open_drawer", "turn_on_led"] * 40
    assert [case.scene for case in cases] == [0, 1] * 40
    steps = np.array([case.state.position[0] for case in cases]) / 0.01  # these hands move 1 cm a step
    assert steps[::2].round().astype(int).min() == 0 and steps[::2].round().astype(int).max() == 11
    assert steps[1::2].round().astype(int).max() == 6
    assert all(case.begin.position[0] == 0 for case in cases)
    assert [case.state.position[0] for case in cases] == [c.state.position[0] for c in correcting.cases(found, config)]


def test_only_rollouts_that_failed_are_taken_over_unless_all_are_asked_for():
    found = rollouts((12, 7), ("open_drawer", "turn_on_led"))
    config = correcting.CorrectionConfig()
    one = dataclasses.replace(found, success=np.array([True, False]))
    assert [case.task for case in correcting.cases(one, config)] == ["turn_on_led"] * 4
    with pytest.raises(ValueError, match="nothing to correct"):
        correcting.cases(dataclasses.replace(found, success=np.array([True, True])), config)


def test_a_correction_without_a_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"correct\.checkpoint is empty"):
        correcting.record(correcting.CorrectionConfig(out=str(tmp_path / "out")))
    with pytest.raises(ValueError, match=r"correct\.takeovers=0"):
        correcting.CorrectionConfig(takeovers=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ("open_drawers",)}, r"unknown \['open_drawers'\]"),
        ({"scenes": ("A", "E")}, "unknown scene 'E'"),
        ({"behaviour": BehaviourConfig(spread=(0.1, 0.2))}, "behaviour.spread=.* has 2 numbers"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_a_recording_begins(tmp_path, wrong, message):
    """Otherwise its directory would belong to settings that nobody can go on with."""
    record, out = trying.TryingConfig(**wrong), tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        correcting.record(correcting.CorrectionConfig(checkpoint=str(twin.DIRECTORY), out=str(out), record=record))
    assert not out.exists()


def test_in_the_real_simulator_the_policy_that_is_named_leads(tmp_path, monkeypatch):
    class Ten:
        """Ten actions for each look, of which the twin's own rollouts executed five."""

        def __init__(self, directory, slots, weights):
            self.opened, self.looks = (directory, slots, weights), 0
            policies.append(self)

        def reset(self, slots, instructions):
            pass

        def act(self, observations, slots):
            self.looks += 1
            return [ActionChunk(np.tile([0.0] * 6 + [1.0], (10, 1)))]

    led, policies = [], []
    monkeypatch.setattr(real_recording, "record", lambda config, leader: led.append(leader) or {})
    monkeypatch.setattr(correcting.adapter, "find_checkout", lambda root: root)
    monkeypatch.setattr(correcting.load, "load_batched_policy", Ten)
    asked = real_recording.RealRecordConfig(
        calvin_root="calvin", out=str(tmp_path), checkpoint=str(twin.DIRECTORY), weights="int8", processes=3
    )
    for steps in (None, 1):
        assert correcting.record_real(dataclasses.replace(asked, policy_steps=steps)) == {}
    assert [leader.steps for leader in led] == [120, 1] and not policies  # nothing is loaded before it is asked
    directory = checkpoints.locate(twin.DIRECTORY)
    assert led[0].label == seals.identity(directory).label
    env, rng = fake_stage.FakeProcess(), np.random.default_rng(0)
    begun = real_recording.ask(env, "begin", fake_stage.ROBOT_OBS, fake_stage.SCENE_OBS, np.zeros(3))
    assert not led[0].lead(env, begun, "open_drawer", ["open it"], rng).done
    assert policies[0].opened == (directory, 3, "int8") and 12 <= policies[0].looks <= 24  # 60 to 120 steps
    with pytest.raises(FileNotFoundError, match="nowhere"):
        correcting.record_real(dataclasses.replace(asked, checkpoint="nowhere"))


@pytest.mark.slow
def test_experts_finish_what_the_policy_began_and_a_stopped_recording_goes_on(tmp_path):
    own = {"scenes": ("A",), "random_scenes": 1}
    how = trying.TryingConfig(tasks=("open_drawer",), count=3, tables=3, max_steps=40, **own)
    config = correcting.CorrectionConfig(
        checkpoint=str(twin.DIRECTORY), out=str(tmp_path / "out"), record=how, of="all"
    )
    counts = correcting.record(config)
    assert counts["attempted"] == 6 and counts["recorded"] >= 4
    found = segments.load(tmp_path / "out" / "journal" / "training")
    assert set(found.scenes) == {"A", "random-0"}
    data = packed.PackedDataset(tmp_path / "out" / "training")
    rows = [json.loads(line) for line in (tmp_path / "out/journal/training/recording.jsonl").read_text().splitlines()]
    done = [row["number"] for row in rows[1:] if row["segments"]]
    cases = correcting.cases(found, config)
    for number, episode in zip(done, data.episodes, strict=True):
        assert episode.task == "open_drawer"
        first, last = (data.array("scene_obs", [i])[0][DRAWER] for i in (episode.start, episode.end))
        assert last - cases[number].begin.mechanisms[DRAWER] > 0.1  # it is open in the end
        np.testing.assert_allclose(first, cases[number].state.mechanisms[DRAWER], atol=1e-6)
        hand = data.array("robot_obs", [episode.start])[0][:3]
        np.testing.assert_allclose(hand, cases[number].state.position, atol=1e-5)  # where the policy was
    assert correcting.record(config) == counts  # it is there already
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(ValueError, match="begun with other settings"):
        correcting.record(other)
