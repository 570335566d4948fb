"""A reward from a person's answers or a simulated one's, as a directory; what cannot be learned from is refused."""

from __future__ import annotations

import dataclasses
import types

import jax
import numpy as np
import pytest

from robovlms_jax.labeling import asking
from robovlms_jax.labeling.answers import FILE, Answers, Pair
from robovlms_jax.rl import config as rl_config
from robovlms_jax.rl import preferences, progress, rewards, segments
from robovlms_jax.rl.segments import Segment
from robovlms_jax.runs import reinforcing, rewarding
from tests.labeling.made_up import rollouts

FIT = preferences.RewardConfig(members=2, widths=(4,), steps=3, batch=8, held_out=0.3)


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """A folder with ten rollouts and seven answers, one of them "cannot say"."""
    folder = tmp_path_factory.mktemp("labels")
    rollouts((10,) * 10, ("open_drawer", "turn_on_led") * 5).save(folder / segments.FILE)
    about = {"rollouts": segments.identity(folder), "steps": 4, "every": 2}
    kept = Answers(folder / FILE, about)
    for number, answer in enumerate(("left", "skip", "right", "equal", "left", "left", "right")):
        kept.add(Pair(Segment(0, number), Segment(2, 1)), answer)
    return folder


def config(labels, **changes):
    return rewarding.RewardRunConfig(labels=str(labels), fit=FIT, steps=4, every=2, **changes)


def test_a_persons_answers_become_a_directory_that_gives_the_same_rewards(labels, tmp_path, monkeypatch):
    pairs, every, names = rewarding._answered(segments.load(labels), config(labels))
    np.testing.assert_array_equal(pairs.first_better, [1, 0, 0.5, 1, 1, 0])  # "cannot say" is left out
    assert (every, names, pairs.first.shape) == (2, ["open_drawer"], (6, 2, 60))
    params = {"out": {"kernel": np.ones((60, 1), np.float32)}}
    model = preferences.RewardModel(params, *(np.full(3, i, np.float32) for i in range(4)), (4,))
    monkeypatch.setattr(preferences, "fit", lambda *how: (model, {"accuracy": 0.5}))
    out, numbers = rewarding.learn(config(labels, out=str(tmp_path / "reward")))
    assert numbers == {"accuracy": 0.5}
    found = rewards.load(out)
    assert found.tasks == ("open_drawer",) and found.every == 2 and "6 answers of a person" in found.about["source"]
    jax.tree.map(np.testing.assert_array_equal, found.model, model)
    with pytest.raises(ValueError, match="holds a reward already"):
        rewarding.learn(config(labels, out=str(out)))
    before = rewards.identity(out)
    (out / rewards.ARRAYS).write_bytes(b"x")
    assert rewards.identity(out) != before
    with pytest.raises(ValueError, match="no reward that can be read"):
        rewards.load(out)
    broken = model.replace(center=np.full(3, np.nan, np.float32))
    rewards.save(tmp_path / "broken", rewards.Saved(broken, 2, found.about))
    with pytest.raises(ValueError, match=r"\['center'\] of reward.npz are not finite"):
        rewards.load(tmp_path / "broken")
    earlier = model.replace(scale=np.array([1, 1e-6, 1], np.float32))  # 1e-6: of a number that never changed
    rewards.save(tmp_path / "earlier", rewards.Saved(earlier, 2, found.about))
    np.testing.assert_array_equal(rewards.load(tmp_path / "earlier").model.scale, np.float32([1, 1e6, 1]))


def test_rewards_that_are_no_numbers_and_settings_that_cannot_be_are_refused(labels, tmp_path, monkeypatch):
    monkeypatch.setattr(preferences, "fit", lambda *how: (None, {"accuracy": 0.5, "loss": np.nan}))
    with pytest.raises(ValueError, match=r"did not become finite .* lower fit\.learning_rate"):
        rewarding.learn(config(labels, out=str(tmp_path / "reward")))
    assert not (tmp_path / "reward").exists()
    with pytest.raises(ValueError, match=r"fit\.choices=5 must be 0 or 34"):
        rewarding.RewardRunConfig(fit=dataclasses.replace(FIT, choices=5))
    for field, value in (("widths", (0,)), ("choices", -1), ("seed", -1)):
        with pytest.raises(ValueError, match=f"reward.{field}"):
            dataclasses.replace(FIT, **{field: value})


def test_a_simulated_person_is_measured_on_rollouts_that_taught_nothing(labels, monkeypatch):
    found, draw, drawn = segments.load(labels), asking.draw, []

    def watched(found, rows, *how, **more):
        drawn.append(rows)
        return draw(found, rows, *how, **more)

    monkeypatch.setattr(asking, "draw", watched)
    (teaching, noisy, true), names = rewarding._simulated(found, config(labels, simulated=20))
    assert names == ["open_drawer", "turn_on_led"]
    assert len(teaching.first_better) > len(noisy.first_better) == len(true.first_better) > 0
    np.testing.assert_array_equal(noisy.first, true.first)
    taught, measured = ({x.rollout for x in rows} for rows in drawn)
    assert len(measured) == 3 and not taught & measured


def test_too_few_rollouts_to_measure_on_are_named(tmp_path):
    rollouts((10,) * 4, ("open_drawer",) * 4).save(tmp_path / segments.FILE)
    with pytest.raises(ValueError, match=r"fit\.held_out=0\.3 of 4 rollouts are 1, and pairs that measure are of two"):
        rewarding.learn(config(tmp_path, simulated=20, out=str(tmp_path / "out")))


def test_a_task_without_pairs_is_one_that_the_reward_does_not_know(tmp_path, monkeypatch, caplog):
    """One rollout alone has nothing to be compared with."""
    rollouts((10,) * 9, ("open_drawer",) * 8 + ("turn_on_led",)).save(tmp_path / segments.FILE)
    monkeypatch.setattr(preferences, "fit", lambda *how: (None, {"accuracy": 0.5}))
    monkeypatch.setattr(preferences, "accuracy", lambda *how: 0.5)
    kept = []
    monkeypatch.setattr(rewards, "save", lambda out, saved: kept.append(saved))
    rewarding.learn(config(tmp_path, simulated=20, out=str(tmp_path / "out")))
    assert kept[0].tasks == ("open_drawer",)
    assert "no answer is about turn_on_led" in caplog.text


def test_answers_about_other_rollouts_or_none_are_refused(labels, tmp_path):
    rollouts((9,) * 4).save(tmp_path / segments.FILE)
    with pytest.raises(ValueError, match="has no answers; give some"):
        rewarding.learn(config(tmp_path, out=str(tmp_path / "out")))
    Answers(tmp_path / FILE, {"rollouts": segments.identity(tmp_path), "steps": 4, "every": 2})
    with pytest.raises(ValueError, match="has no answers; give some"):
        rewarding.learn(config(tmp_path, out=str(tmp_path / "out")))
    (tmp_path / FILE).write_bytes((labels / FILE).read_bytes())
    with pytest.raises(ValueError, match="is about other rollouts"):
        rewarding.learn(config(tmp_path, out=str(tmp_path / "out")))
    with pytest.raises(FileNotFoundError, match=r"experiments\.label"):
        rewarding.learn(config(tmp_path / "nothing"))


def test_a_reward_about_other_tasks_or_decisions_is_refused_by_the_reinforcement(labels, monkeypatch):
    saved = types.SimpleNamespace(tasks=("open_drawer",), every=5, model="model")
    monkeypatch.setattr(rewards, "load", lambda path: saved)
    asked = rl_config.ReinforceConfig(checkpoint="x", tasks=("open_drawer",), horizon=5, reward="r")
    assert reinforcing._reward(asked, 10) == "model"
    assert reinforcing._reward(dataclasses.replace(asked, reward=""), 10) is None
    with pytest.raises(ValueError, match=r"not about \['turn_on_led'\]"):
        reinforcing._reward(dataclasses.replace(asked, tasks=("open_drawer", "turn_on_led")), 10)
    with pytest.raises(ValueError, match="pass --horizon 5"):
        reinforcing._reward(dataclasses.replace(asked, horizon=4), 10)


def test_a_frame_is_what_was_before_what_changed_and_which_task_it_is():
    before, after = np.arange(19.0, dtype=np.float32), np.full(19, 2.0, np.float32)
    read = np.asarray(progress.frame(before, after, np.int32(3)))
    np.testing.assert_array_equal(read[:7], before[:7])
    np.testing.assert_array_equal(read[7:26], after - before)
    assert read[26 + 3] == 1 == read[26:].sum()
