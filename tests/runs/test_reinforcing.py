"""What a run of reinforcement measures, draws and refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import types

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from experiments import calvin_abcd, reinforce, scripted_presets
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.evaluation import blind, rollout
from robovlms_jax.parallel.config import MeshConfig
from robovlms_jax.rl import starts
from robovlms_jax.rl.config import BehaviourConfig, ReinforceConfig, UpdateConfig
from robovlms_jax.runs import reinforced, reinforcing

CONFIG = ReinforceConfig(
    checkpoint="x", tasks=("open_drawer", "turn_on_led"), scenes=("A", "B", "C"), unseen_scene="D", trials=6
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unseen_scene": "A"}, "unseen_scene='A' is one of"),
        ({"unseen_scene": "random-1", "random_scenes": 2}, "unseen_scene='random-1' is one of"),
        ({"random_scenes": 1_000_001}, "random_scenes=1000001 must lie in"),
        ({"update": UpdateConfig(hold_weight=1.0)}, "reinforce.others, which is empty"),
        ({"tables": 12, "update": UpdateConfig(method="grpo")}, "tables=12 is no multiple of reinforce.group=8"),
        ({"group": 1, "update": UpdateConfig(method="grpo")}, "group=1: update.method=grpo compares trials"),
        ({"others": ("open_drawer",)}, "others names .'open_drawer'."),
        ({"iterations": 0}, "iterations=0"),
        ({"tables": 3, "devices": 2}, "tables=3 do not divide over reinforce.devices=2"),
        ({"devices": 2, "mesh": MeshConfig(fsdp=3)}, "devices=2: mesh.data=-1 x mesh.fsdp=3 .* does not make the 2"),
        ({"mesh": MeshConfig(fsdp=2)}, "devices=1: .* as many --devices as it makes"),
        ({"tables": 3, "devices": 4, "mesh": MeshConfig(tensor=2)}, "devices=4 .by 2, mesh.tensor apart.; change one"),
        ({"held_out": 0.2}, "reinforce.held_out=0.2 has no effect with update.method=ppo: it is read with dpo"),
        ({"group": 4}, "reinforce.group=4 has no effect with update.method=ppo: it is read with grpo or dpo"),
        ({"update": UpdateConfig(beta=0.2)}, "update.beta=0.2 has no effect with update.method=ppo"),
        (
            {"update": UpdateConfig("grpo", trace=0.9), "tables": 8},
            "update.trace=0.9 .* update.method=grpo: .* ppo or awr",
        ),
        ({"update": UpdateConfig("dpo", minibatches=1), "decisions": 4}, "decisions=4 has no effect with .*=dpo"),
        (
            {"update": UpdateConfig("dpo", minibatches=1), "labels": "l", "pairs": 9},
            "pairs=9 .* beside reinforce.labels='l'",
        ),
        ({"update": UpdateConfig(reward_scale=0.2)}, "reward_scale=0.2 has no effect without reinforce.reward"),
        ({"start_spread": float("nan")}, "start_spread=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"image_size": (96, 0)}, "image_size=.96, 0."),
        ({"scenes": ("random-1000001",), "unseen_random_scenes": 2}, "scenes names .'random-1000001'., which"),
    ],
)
def test_impossible_runs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_devices_that_split_products_share_their_tables():
    """Three tables do for two devices, and a group of eight for four, where two of them play the same."""
    tensor = dataclasses.replace(CONFIG, tables=3, devices=2, mesh=MeshConfig(tensor=2))
    assert tensor.shards == 1
    grpo = {"update": UpdateConfig(method="grpo"), "tables": 16, "devices": 4}
    assert dataclasses.replace(CONFIG, mesh=MeshConfig(tensor=2), **grpo).shards == 2
    with pytest.raises(ValueError, match=r"tables=16 is no multiple of reinforce\.group=8 times reinforce\.devices=4;"):
        dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=2), **grpo)


def test_impossible_behaviours_are_refused():
    for changes in (
        {"spread": (0.0,)},
        {"correlation": 1.0},
        {"temperature": 0.0},
        {"floor": 0.0},
        {"flow_noise": 0.0},
        {"spread": (0.1, 0.02)},
        {"spread": (0.1, float("nan"))},
    ):
        with pytest.raises(ValueError, match=f"behaviour.{next(iter(changes))}"):
            BehaviourConfig(**changes)


def test_every_measurement_but_the_first_changes_one_thing():
    found = reinforced.measurements(dataclasses.replace(CONFIG, others=("close_drawer",)))
    assert list(found) == ["trained", "unseen_table", "unseen_phrasing", "unseen_start", "other_tasks"]
    known = found["trained"]
    assert [trial.labels["scene"] for trial in known] == ["A", "B", "C", "A", "B", "C"]
    assert len({(trial.tasks, trial.labels["scene"]) for trial in known}) == 6
    assert {trial.labels["scene"] for trial in found["unseen_table"]} == {"D"}
    assert [trial.tasks for trial in found["unseen_table"]] == [trial.tasks for trial in known]
    assert [trial.instructions for trial in found["unseen_table"]] == [trial.instructions for trial in known]
    for trial, same in zip(found["unseen_phrasing"], known, strict=True):
        np.testing.assert_array_equal(trial.start["scene_obs"], same.start["scene_obs"])
        assert trial.instructions[0] in tasks.TASKS[trial.tasks[0]].held_out
        assert trial.instructions != same.instructions
    hands = np.stack([trial.start["robot_obs"][:3] for trial in found["unseen_start"]])
    assert (hands.std(0) > 0.005).all()
    assert {trial.tasks for trial in found["other_tasks"]} == {("close_drawer",)}


def test_starts_are_a_function_of_their_seed_and_tasks_and_tables_take_turns():
    first, again, other = (
        starts.draw(("open_drawer", "turn_on_led"), ("A", "B"), 8, seed, spread=0.2) for seed in (0, 0, 1)
    )
    assert [(t.tasks[0], t.labels["scene"]) for t in first[:5]] == [
        *(("open_drawer", "A"), ("turn_on_led", "B"), ("open_drawer", "B"), ("turn_on_led", "A"), ("open_drawer", "A")),
    ]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.start["robot_obs"], b.start["robot_obs"])
    assert any((a.start["robot_obs"] != b.start["robot_obs"]).any() for a, b in zip(first, other, strict=True))
    with pytest.raises(ValueError, match=r"unknown \['fly'\]"):
        starts.draw(("fly",), ("A",), 1, 0)
    with pytest.raises(ValueError, match=r"\['stack_block'\] are possible in no initial state"):
        starts.draw(("stack_block",), ("A",), 1, 0)


@hypothesis.given(st.integers(1, 8), st.integers(1, 12))
def test_every_task_meets_every_table_before_a_pair_comes_again(tasks_of, tables_of):
    names, scenes = [f"t{i}" for i in range(tasks_of)], [f"s{i}" for i in range(tables_of)]
    pairs = [starts.turn(names, scenes, index) for index in range(tasks_of * tables_of)]
    assert len(set(pairs)) == len(pairs)
    assert len({scene for _, scene in pairs[:tables_of]}) == tables_of  # as many tables as there can be


def test_random_tables_are_learned_on_and_others_are_kept_for_measuring():
    config = dataclasses.replace(CONFIG, random_scenes=3, unseen_random_scenes=5)
    assert config.tables_to_learn_on == ("A", "B", "C", "random-0", "random-1", "random-2")
    found = reinforced.measurements(config)
    tables = {name: {trial.labels["scene"] for trial in trials} for name, trials in found.items()}
    assert tables["trained"] == tables["unseen_phrasing"] == tables["unseen_start"] == set(config.tables_to_learn_on)
    assert tables["unseen_random_tables"] == {f"random-{1_000_000 + i}" for i in range(5)}
    for trials in found.values():
        words = [trial.instructions for trial in trials if trial.tasks == ("open_drawer",)]
        assert len(set(words)) > 1  # phrasings take turns


def test_tasks_that_are_held_are_played_beside_those_that_are_trained():
    held = dataclasses.replace(CONFIG, others=("close_drawer",), update=UpdateConfig(hold_weight=1.0))
    assert held.played == (*CONFIG.tasks, "close_drawer")
    assert dataclasses.replace(held, update=UpdateConfig()).played == CONFIG.tasks


def test_all_measurements_are_played_as_one_and_told_apart_again():
    questions = reinforced.measurements(dataclasses.replace(CONFIG, trials=2))

    class Player:
        def results(self, params, trials):
            assert [trial.index for trial in trials] == list(range(8))
            for trial in reversed(trials):
                done = trial.tasks == ("open_drawer",)
                yield rollout.TrialResult(trial.index, trial.tasks, trial.instructions, (done,), (1,), trial.labels)

    found = reinforced.measure(Player(), None, questions)
    assert list(found) == list(questions)
    for name, results in found.items():
        assert [result.index for result in results] == [0, 1]
        assert [result.labels for result in results] == [trial.labels for trial in questions[name]]
        assert [result.success for result in results] == [(True,), (False,)]


class Pool:
    """Of ten trials; remembers what was taken."""

    trials = 10

    def take(self, rows, group):
        return rows.tolist(), group.tolist()


def test_an_iteration_draws_the_same_trials_whenever_it_is_reached():
    config = dataclasses.replace(CONFIG, tables=4)
    run = reinforcing.worlds(config, Pool(), 0)
    three = [next(run) for _ in range(3)]
    assert next(reinforcing.worlds(config, Pool(), 2)) == three[2] != three[1]
    assert sorted(three[0][0]) == list(range(10))


def test_trials_of_a_group_begin_in_the_same_state():
    config = dataclasses.replace(CONFIG, tables=6, group=3, update=UpdateConfig(method="grpo"))
    rows, group = next(reinforcing.worlds(config, Pool(), 0))
    assert group == [0, 0, 0, 1, 1, 1]
    assert rows[:3] == [rows[0]] * 3 and rows[3:] == [rows[3]] * 3 and rows[0] != rows[3]


def test_a_stopped_run_goes_on_with_its_own_settings_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(reinforcing.seals, "identity", lambda path: types.SimpleNamespace(label="step_1-abc"))
    with pytest.raises(ValueError, match=r"nothing to resume: there is no .*reinforce\.json"):
        reinforcing._settle(dataclasses.replace(CONFIG, resume=True), tmp_path)
    reinforcing._settle(CONFIG, tmp_path)
    with pytest.raises(ValueError, match="pass --resume"):
        reinforcing._settle(CONFIG, tmp_path)
    longer = dataclasses.replace(CONFIG, resume=True, iterations=99)
    reinforcing._settle(longer, tmp_path)
    with pytest.raises(ValueError, match=r"other settings .*seed"):
        reinforcing._settle(dataclasses.replace(longer, seed=1), tmp_path)
    elsewhere = dataclasses.replace(longer, out="moved/", checkpoint="by/another/path")
    reinforcing._settle(elsewhere, tmp_path)  # the policy's identity says that it is the same
    assert json.loads((tmp_path / "reinforce.json").read_text())["identity"] == "step_1-abc"


@pytest.mark.parametrize("left", ["learning", "before.json"])
def test_what_is_left_of_a_run_whose_settings_are_gone_is_not_taken_for_a_new_ones(tmp_path, monkeypatch, left):
    monkeypatch.setattr(reinforcing.seals, "identity", lambda path: types.SimpleNamespace(label="step_1-abc"))
    (tmp_path / left).mkdir()
    with pytest.raises(ValueError, match=rf"has {left} of a run whose settings \(reinforce.json\) are gone"):
        reinforcing._settle(CONFIG, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_a_run_that_an_earlier_version_began_goes_on(tmp_path, monkeypatch):
    """Its settings do not have what came later."""
    monkeypatch.setattr(reinforcing.seals, "identity", lambda path: types.SimpleNamespace(label="step_1-abc"))
    reinforcing._settle(CONFIG, tmp_path)
    path = tmp_path / "reinforce.json"
    settings = json.loads(path.read_text())
    del settings["labels"], settings["pairs"], settings["update"]["beta"]
    settings["held_out"] = settings["update"]["reward_scale"] = 0.3  # it was not refused where it has no effect
    path.write_text(json.dumps(settings))
    reinforcing._settle(dataclasses.replace(CONFIG, resume=True), tmp_path)
    with pytest.raises(ValueError, match=r"other settings .*trials"):
        reinforcing._settle(dataclasses.replace(CONFIG, resume=True, trials=7), tmp_path)


def test_a_run_by_a_persons_answers_goes_on_whatever_it_was_told_of_a_simulated_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(reinforcing.seals, "identity", lambda path: types.SimpleNamespace(label="step_1-abc"))
    config = dataclasses.replace(CONFIG, update=UpdateConfig("dpo", minibatches=1), labels="somewhere")
    reinforcing._settle(config, tmp_path)
    path = tmp_path / "reinforce.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pairs": 9, "group": 2}))  # an earlier version's
    reinforcing._settle(dataclasses.replace(config, resume=True), tmp_path)  # is not refused
    assert json.loads(path.read_text())["labels"] == "somewhere"


def test_a_run_that_was_killed_between_its_policy_and_its_report_writes_both(tmp_path, monkeypatch):
    monkeypatch.setattr(reinforcing.seals, "identity", lambda path: types.SimpleNamespace(label="step_1-abc"))
    policy, resumed = tmp_path / "checkpoints" / "0", dataclasses.replace(CONFIG, resume=True)
    policy.mkdir(parents=True)
    for config in (CONFIG, resumed):  # without settings of a reinforcement it is another program's
        with pytest.raises(ValueError, match="holds a policy already"):
            reinforcing._settle(config, tmp_path)
    policy.rmdir()
    policy.parent.rmdir()
    reinforcing._settle(CONFIG, tmp_path)
    policy.mkdir(parents=True)
    reinforcing._settle(resumed, tmp_path)
    assert not policy.parent.exists()
    for kept in (tmp_path / "report.md", policy / "train", tmp_path / "checkpoints" / "7"):
        policy.mkdir(parents=True, exist_ok=True)
        kept.mkdir()
        with pytest.raises(ValueError, match="holds a policy already"):
            reinforcing._settle(resumed, tmp_path)
        kept.rmdir()


def test_what_is_wrong_with_the_settings_is_said_before_anything_is_written(tmp_path, monkeypatch):
    """Otherwise the directory would belong to a run that nobody can go on with."""
    model = types.SimpleNamespace(config=types.SimpleNamespace(chunk=5))
    monkeypatch.setattr(reinforcing.load, "open_model", lambda *how, **more: (model, {}, None))
    monkeypatch.setattr(reinforcing.saved, "read_checkpoint", lambda path: (None, {}))
    monkeypatch.setattr(reinforcing.checkpoints, "locate", lambda path: path)
    monkeypatch.setattr(reinforcing, "_resolved", lambda config, experiment: config)
    monkeypatch.setattr(reinforcing.directory, "keep_programs", lambda choice: None)
    monkeypatch.setattr(reinforcing.rollouts, "Player", lambda *how: None)

    def refused(*how):
        raise ValueError("update.minibatches=3")

    monkeypatch.setattr(reinforcing, "_learner", refused)
    small = dataclasses.replace(CONFIG, out=str(tmp_path / "run"), pool=2, max_steps=9, horizon=5, image_size=(8, 8))
    for changes, message in (
        ({}, "update.minibatches=3"),
        ({"others": ("close_drawers",)}, "unknown task 'close_drawers'; known"),
        ({"scenes": ("A", "random-07")}, "unknown scene 'random-07'"),
    ):
        with pytest.raises(ValueError, match=message):
            reinforcing.run(dataclasses.replace(small, **changes))
        assert not [path for path in (tmp_path / "run").iterdir() if path.name != ".lock"]


def test_devices_that_are_not_there_are_named_before_a_checkpoint_is_read(tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint=str(tmp_path / "none"), out=str(tmp_path / "out"), tables=64)
    with pytest.raises(ValueError, match=r"reinforce\.devices=64, and this process has \d+; pass --devices"):
        reinforcing.run(dataclasses.replace(config, devices=64))
    with pytest.raises(OSError, match="none"):
        reinforcing.run(config)


def test_a_run_does_not_go_back(tmp_path, monkeypatch):
    position = {"iteration": 7, "env_steps": 1, "seconds": 1.0}
    made = types.SimpleNamespace(latest=28, restore=lambda state: (state, position))
    monkeypatch.setattr(reinforcing.checkpoints, "Checkpointer", lambda *how, **more: made)
    config, learner = dataclasses.replace(CONFIG, resume=True, iterations=6), types.SimpleNamespace(state=None)
    with pytest.raises(ValueError, match=r"iterations=6, and .* has made 7; give at least as many"):
        reinforcing._learn(config, tmp_path, learner, None, {})


def test_what_an_iteration_cannot_learn_from_is_said(caplog):
    trained = dataclasses.replace(calvin_abcd.PRESETS["playtable_fixtures"])
    config = dataclasses.replace(CONFIG, unseen_scene="A", scenes=("D",), decisions=4, horizon=5, max_steps=30)
    with caplog.at_level("INFO"):
        reinforcing._filled(config, trained)
    assert "unseen_scene A is a table that the checkpoint's demonstrations showed" in caplog.text
    assert "4 decisions a table, 20 control steps: of trials of 30" in caplog.text


def test_the_presets_are_complete():
    assert reinforce.PRESETS["grpo"].update.method == "grpo"
    assert all(not pattern.startswith("^rl/value") for pattern in reinforce.PRESETS["grpo"].trainable)
    paths = ("head/arm/kernel", "rl/behaviour/log_std", "rl/value/out/kernel")
    for name, preset in reinforce.PRESETS.items():  # rates of what is not trained are refused
        trained = [path for path in paths if any(re.search(pattern, path) for pattern in preset.trainable)]
        assert all(any(re.search(rate, path) for path in trained) for rate in preset.optimizer.rates), name
    fixtures, full = reinforce.PRESETS["fixtures"], reinforce.PRESETS["playtable_full"]
    assert {*fixtures.tasks, *fixtures.others} == set(scripted_presets.FIXTURE_TASKS)
    assert len(full.tasks) == 27 and not set(full.tasks) & {"stack_block", "place_in_drawer"}


def test_results_are_told_apart_by_task_and_table():
    after = [
        rollout.TrialResult(i, (task,), ("",), (done,), (9,), {"scene": scene})
        for i, (task, scene, done) in enumerate([("a", "A", True), ("b", "A", False), ("a", "B", True)])
    ]
    found = reinforced.compared([False, True, True], after)
    assert found["before"] == {"successes": 2, "attempts": 3} == found["after"]
    assert found["per_task"] == {"a": [1, 2, 2], "b": [1, 0, 1]}
    assert found["per_table"] == {"A": [1, 1, 2], "B": [1, 1, 1]}
    assert (found["paired"]["first"], found["paired"]["second"]) == (1, 1)
    assert reinforced._row("x", found).startswith("| x | 3 | 66.7% (")


def test_an_iteration_in_which_no_trial_ended_is_a_gap_and_no_failure():
    """Fails if the 0 of nothing is drawn as if all trials had failed."""
    rows = [{"step": i, "env_steps": i, "seconds": float(i), "success": 0.5 * i, "trials": 2 * i} for i in (0, 1)]
    curve = [reinforced._told(row) for row in rows]
    assert [axes.lines[0].get_xydata().tolist() for axes in reinforced._draw(curve).axes] == [[[1.0, 50.0]]] * 2
    assert [line.split(" | ")[-1] for line in reinforced._curve(curve)[-2:]] == ["- |", "50.0% |"]


def test_curves_are_drawn_against_control_steps_and_seconds():
    curve = [{"env_steps": 100 * i, "seconds": 7.0 * i, "success": 0.1 * i} for i in (1, 2)]
    found = {axes.get_xlabel(): axes.lines[0].get_xydata().tolist() for axes in reinforced._draw(curve).axes}
    assert found == {"control steps": [[100, 10], [200, 20]], "seconds of learning": [[7, 10], [14, 20]]}
    answers = [{"env_steps": 9, "seconds": 1.0, "preferred_taught": 0.9, "preferred_held_out": 0.6, "preferred": 0.8}]
    (axes,) = reinforced._draw(answers).axes  # of rollouts that were all made before
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 90]], [[1, 60]]]
    (axes,) = reinforced._draw([{"env_steps": 9, "seconds": 1.0, "preferred": 0.8}]).axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 80]]


def test_pairs_are_compared_by_what_only_one_policy_did():
    found = blind.paired([(True, True)] * 3 + [(False, True)] * 8 + [(True, False)] + [(False, False)] * 2)
    assert (found.both, found.first, found.second, found.neither) == (3, 1, 8, 2)
    np.testing.assert_allclose(found.p, 2 * (1 + 9) / 2**9)
