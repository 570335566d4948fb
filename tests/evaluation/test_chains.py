"""The chain protocol: trials, result files, resuming, merging, metrics."""

from __future__ import annotations

import errno
import io
import json
import math
import pathlib
import sys

import numpy as np
import pytest

from robovlms_jax import bars
from robovlms_jax.control.execution import Execution
from robovlms_jax.envs import simpler
from robovlms_jax.envs.calvin import initial_states, task_chains, tasks
from robovlms_jax.envs.vector import EnvPool
from robovlms_jax.evaluation import chains, rollout_metrics
from robovlms_jax.evaluation.rollout import SuccessCriterion, TrialResult
from robovlms_jax.evaluation.rollout_metrics import Rate, summarize
from tests.evaluation.toy_world import CRITERION, LineEnv, LinePolicy, trial

TRIALS = [trial(index, 1, 2 + index % 9, scene="line") for index in range(12)]


def evaluate(directory, trials=TRIALS, env=None, **changes):
    share, play = changes.pop("share", chains.Share()), changes.pop("play", None)
    settings = chains.Settings(**{"policy_name": "toy", "criterion": CRITERION, **changes})
    return chains.evaluate(
        LinePolicy(), EnvPool([env or LineEnv()]), trials, directory, settings, share=share, play=play
    )


def result(index: int, score: int, length: int = 5, steps: int = 10) -> TrialResult:
    names = tuple(list(tasks.TASKS)[index % 7 : index % 7 + length])
    success = (True,) * score + (False,) * (score < length)
    return TrialResult(index, names, names, success, (steps,) * len(success))


# ---------------------------------------------------------------------------------------------------------------------
# Trials


def test_chains_become_trials():
    trials = chains.chain_trials(train_scenes=("A", "B", "C"))
    assert len(trials) == 1000
    first = trials[0]
    robot_obs, scene_obs = initial_states.initial_state(task_chains.official_chains()[0].condition)
    np.testing.assert_array_equal(first.start["scene_obs"], scene_obs)
    np.testing.assert_array_equal(first.start["robot_obs"], robot_obs)
    assert first.labels == {"scene": "D", "scene_seen": False, "phrasing": "training"}
    assert all(text in tasks.TASKS[name].phrasings for name, text in zip(first.tasks, first.instructions))
    # chains take turns through the phrasings
    asked = {text for t in trials for name, text in zip(t.tasks, t.instructions) if name == "open_drawer"}
    assert asked == set(tasks.TASKS["open_drawer"].phrasings)


def test_wording_and_scene_can_be_chosen():
    some = task_chains.official_chains()[:3]
    unseen = chains.chain_trials(some, scene="B", train_scenes=("B",), held_out=True)
    assert unseen[1].labels == {"scene": "B", "scene_seen": True, "phrasing": "held out"}
    assert all(text in tasks.TASKS[name].held_out for t in unseen for name, text in zip(t.tasks, t.instructions))
    np.testing.assert_array_equal(unseen[0].start["scene_obs"], initial_states.initial_state(some[0].condition, "B")[1])
    fixed = chains.chain_trials(some, sentences={name: f"do {name}" for name in tasks.TASKS})
    assert fixed[2].instructions == tuple(f"do {name}" for name in some[2].tasks)
    assert fixed[2].labels["phrasing"] == "benchmark"
    assert fixed[2].labels["scene_seen"] is None


def test_simpler_tasks_become_trials_judged_at_the_last_step():
    trials = chains.simpler_trials("widowx_stack_cube")
    assert [t.start for t in trials] == [{"layout": layout} for layout in range(24)]
    assert len(chains.simpler_trials("widowx_stack_cube", 50)) == 50
    criterion = chains.simpler_criterion("widowx_put_eggplant_in_basket")
    assert (criterion.max_steps, criterion.stop_at_success) == (120, False)
    assert chains.simpler_criterion("google_robot_move_near", latched=True).stop_at_success
    assert criterion.completed is simpler.completed_in_each


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_results_are_stored_as_they_come_and_read_back(tmp_path):
    evaluation = evaluate(tmp_path, execution=Execution("first"))
    assert [r.index for r in evaluation.results] == list(range(12))
    assert evaluation.setup == {
        **{"env": "Line", "policy": "toy", "execution": "first"},
        **{"max_steps": 10, "stop_at_success": True},
    }
    assert chains.load(tmp_path) == evaluation
    lines = (tmp_path / "results-000.jsonl").read_text().splitlines()
    assert len(lines) == 13
    assert json.loads(lines[1])["labels"] == {"scene": "line"}


def test_results_say_which_simulator_they_come_from_and_are_not_mixed(tmp_path):
    env = LineEnv()
    env.about = {"version": "797142c"}
    evaluation = evaluate(tmp_path, TRIALS[:2], env)
    assert evaluation.setup["simulator"] == {"version": "797142c"}
    assert json.loads((tmp_path / "results-000.jsonl").read_text().splitlines()[0])["setup"] == evaluation.setup
    env.about = {"version": "1431a46"}
    with pytest.raises(ValueError, match=r"another setup \(simulator: .*797142c.* there, .*1431a46.* here\)"):
        evaluate(tmp_path, TRIALS[:3], env)


def test_a_bar_stands_from_the_first_second_on_and_moves_before_a_trial_ends(tmp_path, caplog, capsys, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(bars, "EVERY_S", (0.0, 0.0))
    results = evaluate(tmp_path, TRIALS[:4])
    shown = [line.strip() for line in capsys.readouterr().err.split("\r") if line.strip()]
    assert "0/4" in shown[0]
    assert any("compiling" in line and "0/4" in line for line in shown)
    assert any("control step 1" in line and "0/4" in line for line in shown)
    assert any("3/4" in line and "tasks solved" in line for line in shown)
    assert "4/4" in shown[-1] and f", {sum(each.score for each in results.results)} tasks solved]" in shown[-1]
    (said,) = [record.getMessage() for record in caplog.records if "tasks in a row" in record.getMessage()]
    assert said.startswith("Line: 4 trials in ")


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path):
    whole = evaluate(tmp_path / "whole")

    def interrupt(env):
        if env.steps == 30:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "parts", env=LineEnv(fail=interrupt))
    kept = chains.load(tmp_path / "parts").results
    assert 0 < len(kept) < 12
    env = LineEnv()
    assert evaluate(tmp_path / "parts", env=env) == whole
    assert env.resets == 12 - len(kept)
    env = LineEnv()
    evaluate(tmp_path / "parts", env=env)
    assert env.resets == 0


@pytest.mark.parametrize("cut", [1, 30, 5000])
def test_a_torn_last_line_is_run_again(tmp_path, cut):
    whole = evaluate(tmp_path)
    path = tmp_path / "results-000.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-cut])  # cut = 5000 leaves half a header
    assert len(data) > 2 * cut or cut == 5000
    assert evaluate(tmp_path) == whole
    assert all(json.loads(line) for line in path.read_text().splitlines())
    if cut == 1:
        assert len(path.read_text().splitlines()) == 13


def test_a_damaged_line_is_named(tmp_path):
    evaluate(tmp_path)
    path = tmp_path / "results-000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[3] = lines[3][:20] + "\n"
    path.write_text("".join(lines))
    with pytest.raises(ValueError, match=r"results-000\.jsonl, line 4 is not a result .*Delete the line"):
        evaluate(tmp_path)


@pytest.mark.parametrize("change", [{"success": ["no"]}, {"success": [1]}, {"index": "3"}, {"index": True}])
def test_a_result_of_the_wrong_type_is_not_counted(change, tmp_path):
    evaluate(tmp_path)
    path = tmp_path / "results-000.jsonl"
    first, second, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, json.dumps(json.loads(second) | change), *others, ""]))
    with pytest.raises(ValueError, match=r"results-000\.jsonl, line 2 is not a result .*expected int and list of bool"):
        evaluate(tmp_path)


def test_processes_share_the_trials_and_their_files_add_up(tmp_path):
    whole = evaluate(tmp_path / "whole")
    for index in range(3):
        part = evaluate(tmp_path / "parts", share=chains.Share(index, 3))
    assert part == whole
    assert len(list((tmp_path / "parts").glob("results-*.jsonl"))) == 3
    # another number of processes finds everything done
    env = LineEnv()
    assert evaluate(tmp_path / "parts", env=env, share=chains.Share(1, 2)) == whole
    assert env.resets == 0
    with pytest.raises(ValueError, match="index=3"):
        evaluate(tmp_path / "parts", share=chains.Share(3, 3))


def test_a_trial_that_two_processes_ran_counts_once(tmp_path):
    whole = evaluate(tmp_path)
    (tmp_path / "results-001.jsonl").write_text((tmp_path / "results-000.jsonl").read_text())
    assert chains.load(tmp_path) == whole


def test_whoever_plays_by_itself_is_given_the_trials_that_are_left_and_its_results_are_stored(tmp_path):
    known = evaluate(tmp_path, trials=TRIALS[:4]).results
    asked = []

    def play(trials):
        asked.extend(trial.index for trial in trials)
        for each in trials:
            yield TrialResult(each.index, each.tasks, each.instructions, (False,), (3,), each.labels)

    found = evaluate(tmp_path, play=play).results
    assert asked == list(range(4, 12)) and found[:4] == known
    assert [x.steps for x in found[4:]] == [(3,)] * 8


def test_more_trials_can_be_added_and_fewer_be_asked_for(tmp_path):
    few = evaluate(tmp_path, TRIALS[:4])
    assert len(few.results) == 4
    assert len(evaluate(tmp_path, TRIALS).results) == 12
    assert evaluate(tmp_path, TRIALS[:4]) == few


def test_results_of_another_setup_are_not_mixed_in(tmp_path):
    evaluate(tmp_path)
    with pytest.raises(ValueError, match=r"another setup \(execution: 'chunk' there, 'receding 3' here\)"):
        evaluate(tmp_path, execution=Execution("receding", 3))
    with pytest.raises(ValueError, match=r"max_steps: 10 there, 9 here; policy: 'toy' there, 'other' here"):
        evaluate(tmp_path, policy_name="other", criterion=SuccessCriterion(max_steps=9, completed=CRITERION.completed))
    with pytest.raises(ValueError, match=r"result for trial 2 with other instructions: .*'go 4'.*'run 4'"):
        evaluate(tmp_path, [trial(2, 1, 4, instruction="run", scene="line")])


def test_a_full_disk_keeps_what_was_stored(tmp_path, monkeypatch):
    evaluate(tmp_path, TRIALS[:3])

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = pathlib.Path.open
    monkeypatch.setattr(
        pathlib.Path,
        "open",
        lambda self, mode="r", *rest, **more: Full(self, mode) if mode == "ab+" else opened(self, mode, *rest, **more),
    )
    with pytest.raises(OSError, match="No space left") as caught:
        evaluate(tmp_path)
    assert "Trial 3 could not be stored" in caught.value.__notes__[0]
    assert [r.index for r in chains.load(tmp_path).results] == [0, 1, 2]


def test_nothing_to_do_or_to_load_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no trials"):
        evaluate(tmp_path, [])
    with pytest.raises(FileNotFoundError, match="run the evaluation first"):
        chains.load(tmp_path)


def test_upstreams_layout():
    results = [result(0, 5), result(1, 0), result(2, 3), result(3, 3)]
    stored = json.loads(json.dumps(chains.upstream_results(results)))["null"]
    assert stored["avg_seq_len"] == 11 / 4
    assert stored["chain_sr"] == {"1": 0.75, "2": 0.75, "3": 0.75, "4": 0.25, "5": 0.25}
    # trial i starts at task i: the fourth task is tried in trials 0 to 3, and solved in 0, 2 and 3
    assert stored["task_info"][list(tasks.TASKS)[3]] == {"success": 3, "total": 3}
    assert sum(entry["total"] for entry in stored["task_info"].values()) == 5 + 1 + 4 + 4


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_a_summary_counts_what_happened():
    summary = summarize([result(0, 5, steps=10), result(1, 0, steps=99), result(2, 3, steps=20)])
    assert summary.trials == 3
    assert [rate.successes for rate in summary.in_a_row] == [2, 2, 2, 1, 1]
    assert summary.average_length.value == pytest.approx(8 / 3)
    assert summary.average_length.value == pytest.approx(sum(rate.value for rate in summary.in_a_row))
    assert summary.attempts == Rate(8, 5 + 1 + 4)
    assert summary.steps_per_success == pytest.approx((5 * 10 + 3 * 20) / 8)
    second = list(tasks.TASKS)[1]
    assert summary.per_task[second] == Rate(1, 2)
    assert summary.steps_per_task[second] == 10
    assert sum(rate.attempts for rate in summary.per_task.values()) == summary.attempts.attempts


def test_merging_by_count_equals_one_run():
    scores = np.random.default_rng(0).integers(0, 6, 50)
    results = [result(index, int(score)) for index, score in enumerate(scores)]
    uneven = summarize(results[:7] + results[7:])
    assert uneven == summarize(results)
    # averaging per-file averages, as upstream does, would be wrong here
    assert np.mean([scores[:7].mean(), scores[7:].mean()]) != pytest.approx(uneven.average_length.value)


@pytest.mark.parametrize(
    ("successes", "attempts", "low", "high"),
    # worked examples from Brown, Cai & DasGupta 2001 and by hand
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (0, 0, 0.0, 1.0),
        (950, 1000, 0.9347, 0.9618),
    ],
)
def test_wilson_intervals(successes, attempts, low, high):
    assert Rate(successes, attempts).interval == pytest.approx((low, high), abs=1e-4)


def test_the_bootstrap_interval_is_the_normal_one_for_many_trials():
    scores = np.random.default_rng(1).choice(6, 1000, p=[0.1, 0.1, 0.1, 0.2, 0.2, 0.3])
    estimate = summarize([result(index, int(score)) for index, score in enumerate(scores)]).average_length
    half = 1.96 * scores.std() / math.sqrt(len(scores))
    assert estimate.low == pytest.approx(scores.mean() - half, abs=0.01)
    assert estimate.high == pytest.approx(scores.mean() + half, abs=0.01)


def test_the_bootstrap_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(2)
    shares = np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.2])
    truth = shares @ np.arange(6)
    covered = 0
    for _ in range(100):
        estimate = summarize([result(0, int(score)) for score in generator.choice(6, 60, p=shares)]).average_length
        covered += estimate.low <= truth <= estimate.high
    assert 0.88 < covered / 100 < 0.99


def test_the_generalisation_gap_is_signed_and_knows_its_uncertainty():
    generator = np.random.default_rng(3)
    good = [result(index, int(score)) for index, score in enumerate(generator.choice([4, 5], 300))]
    poor = [result(index, int(score)) for index, score in enumerate(generator.choice([1, 2, 3], 300))]
    gap = rollout_metrics.generalisation_gap(good, poor)
    assert 2 < gap.low < gap.value < gap.high < 3
    none = rollout_metrics.generalisation_gap(good[:150], good[150:])
    assert none.low < 0 < none.high


def test_no_success_leaves_the_step_count_undefined():
    summary = summarize([result(0, 0)])
    assert math.isnan(summary.steps_per_success)
    assert summary.steps_per_task == {}
    with pytest.raises(ValueError, match="no results"):
        summarize([])


def test_every_phrasing_of_a_task_is_asked_whatever_tasks_take_turns():
    names = ("open_drawer", "close_drawer", "turn_on_led", "move_slider_right")  # four tasks, six phrasings each
    asked = {name: set() for name in names}
    for each in chains.chain_trials(chains.single_tasks(names, 24)):
        asked[each.tasks[0]].add(each.instructions[0])
    assert asked == {name: set(tasks.TASKS[name].phrasings) for name in names}


def test_single_tasks_start_where_they_are_possible():
    names = ("open_drawer", "turn_off_led", "push_red_block_left")
    drawn = chains.single_tasks(names, 7)
    assert [chain.tasks for chain in drawn] == [(names[i % 3],) for i in range(7)]
    for chain in drawn:
        assert len(task_chains.successors(chain.condition, chain.tasks[0])) == 1
    assert all(chain.condition["drawer"] == "closed" for chain in drawn[::3])
    assert len(chains.single_tasks(names, 0)) == 30
    with pytest.raises(ValueError, match="possible in no initial state"):
        chains.single_tasks(("place_in_drawer",), 1)
