"""Failure detection: scores, thresholds, AUROC, and what is said of stored rollouts."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import calibrate
from robovlms_jax.control.execution import Execution
from robovlms_jax.control.interface import ActionChunk
from robovlms_jax.envs.vector import EnvPool
from robovlms_jax.evaluation import chains, detection, rollout
from robovlms_jax.evaluation.detection import Band, Episode
from robovlms_jax.evaluation.rollout import TrialResult
from robovlms_jax.training import seals
from tests.evaluation.toy_world import CRITERION, LineEnv, LinePolicy, trial

NAN = math.nan
RECEDING = Execution("receding", 2)


def walks(rng, count, drift=0.0):
    """Uncertainty of trials of unequal length, each with a level of its own."""
    return [np.abs(rng.normal(rng.exponential() + drift, 0.3, rng.integers(5, 30))) for _ in range(count)]


def trials(successes, failures, drift=2.0, seed=0):
    rng = np.random.default_rng(seed)
    good = [Episode(values, False) for values in walks(rng, successes)]
    return good + [Episode(np.r_[values, values, values], True) for values in walks(rng, failures, drift)]


# ---------------------------------------------------------------------------------------------------------------------
# Scores and AUROC


def test_scores_are_of_the_steps_so_far_and_an_unknown_one_changes_none():
    values = np.array([NAN, 2.0, 1.0, NAN, 6.0])
    expected = {"maximum": [0, 2, 2, 2, 6], "mean": [0, 2, 1.5, 1.5, 3], "sum": [0, 2, 3, 3, 9]}
    for name, scores in {**expected, "elapsed time": [1, 2, 3, 4, 5]}.items():
        np.testing.assert_allclose(detection.SCORES[name](values), scores, err_msg=name)


@pytest.mark.parametrize(
    ("failed", "succeeded", "expected"),
    [
        ([3, 4], [1, 2], 1.0),
        ([1, 2], [3, 4], 0.0),
        ([2], [1, 2, 3], 0.5),  # one below, one tie, one above
        ([1, 1], [1, 1, 1], 0.5),
        ([1, 3], [2, 2, 0], 2 / 3),
    ],
)
def test_auroc_is_the_share_of_ordered_pairs_and_ties_count_half(failed, succeeded, expected):
    assert detection.auroc(np.array(failed), np.array(succeeded)) == pytest.approx(expected)


def test_auroc_of_one_kind_is_refused_by_the_name_of_the_other():
    with pytest.raises(ValueError, match="no trial failed"):
        detection.auroc(np.array([]), np.array([1.0]))
    with pytest.raises(ValueError, match="no trial succeeded"):
        detection.auroc(np.array([1.0]), np.array([]))


def test_the_interval_of_auroc_is_as_wide_as_the_numbers_of_trials_allow():
    rng, failed, succeeded = np.random.default_rng(0), 50, 200
    found = detection.auroc_interval([(rng.normal(1, 1, failed), rng.normal(0, 1, succeeded))])
    area, squared = found.value, found.value**2  # Hanley and McNeil 1982
    one, other = area / (2 - area) - squared, 2 * squared / (1 + area) - squared
    variance = (area * (1 - area) + (failed - 1) * one + (succeeded - 1) * other) / (failed * succeeded)
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.25)


def test_within_tasks_only_trials_of_one_task_are_compared():
    hard, easy, all_won = (np.array([5.0]), np.array([6.0, 4.0])), (np.array([2.0]), np.array([1.0])), ([], [1.0])
    assert detection.auroc_interval([hard, easy, all_won]).value == pytest.approx((0.5 * 2 + 1.0) / 3)
    with pytest.raises(ValueError, match="no group has failed and successful"):
        detection.auroc_interval([all_won])


# ---------------------------------------------------------------------------------------------------------------------
# The threshold


def test_an_alarm_is_the_first_step_above_the_threshold_which_goes_on_after_its_end():
    band = Band(np.array([1.0, 2.0]))
    assert band.alarm(np.array([1.0, 2.0, 2.0])) == 0  # equal is not above
    assert band.alarm(np.array([1.0, 2.0, 2.0, 2.1, 1.0])) == 4
    assert band.alarm(np.array([1.5])) == 1


def test_a_band_by_hand_is_mean_plus_quantile_of_the_largest_excess_times_deviation():
    shaping = [np.array([0.0, 1.0]), np.array([2.0])]  # held: (0, 1) and (2, 2)
    calibrating = [np.array([1.0 + excess]) for excess in range(9)]
    np.testing.assert_allclose(detection.band(shaping, calibrating, 0.9).threshold, [1 + 8 * 1.0, 1.5 + 8 * 0.5])
    assert np.isinf(detection.band(shaping, calibrating[:8], 0.9).threshold).all()  # 8 are too few for 0.9
    with pytest.raises(ValueError, match="no successful trial"):
        detection.band([], calibrating, 0.9)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(list(detection.SCORES)), st.sampled_from([0.8, 0.9]))
def test_of_successful_trials_no_more_than_promised_have_an_alarm(seed, name, coverage):
    rng, score = np.random.default_rng(seed), detection.SCORES[name]
    quiet = []
    for _ in range(100):
        first, second, third = ([score(x) for x in walks(rng, count)] for count in (15, 39, 20))
        band = detection.band(first, second, coverage)
        quiet += [band.alarm(x) == 0 for x in third]
    # 100 calibrations: the deviation of a coverage is sqrt(c (1 - c) / 40) at most, beside that of 20 trials
    error = math.sqrt(coverage * (1 - coverage) * (1 / 40 + 1 / 20) / 100)
    assert np.mean(quiet) > coverage - 4.5 * error


# ---------------------------------------------------------------------------------------------------------------------
# The protocol


def test_failures_that_the_policy_is_less_sure_of_are_detected_and_others_are_not():
    sure = detection.measure(trials(160, 80, drift=4.0), 0.9, share=0.5, splits=2, seed=1)
    blind = detection.measure(trials(160, 80, drift=0.0), 0.9, share=0.5, splits=2, seed=1)
    assert sure.tested == 120 and sure.calibrated + sure.tested - sure.failed == 160
    first = next(iter(sure.scores["mean"].auroc))
    assert sure.scores["mean"].auroc[first].low > 0.9 and sure.scores["mean"].true_alarms.value > 0.7
    assert sure.scores["mean"].time.value < 0.5
    assert blind.scores["mean"].auroc[first].low < 0.5 < blind.scores["mean"].auroc[first].high


def test_length_alone_tells_at_the_end_but_not_among_trials_that_still_run():
    measured = detection.measure(trials(160, 80, drift=0.0), 0.9, share=0.5, splits=1, seed=1)
    found = measured.scores["elapsed time"].auroc
    assert found["end"].value > 0.85
    assert all(estimate.value == 0.5 for moment, estimate in found.items() if moment != "end" and estimate)


def test_that_nothing_failed_is_said_plainly():
    measured = detection.measure(trials(60, 0), 0.9, share=0.5, splits=2, seed=0)
    assert "No trial of the test failed" in detection.table(measured) and measured.scores["mean"].auroc["end"] is None
    json.dumps(dataclasses.asdict(measured), allow_nan=False)


def test_that_nothing_succeeded_leaves_nothing_to_calibrate_on():
    with pytest.raises(ValueError, match=r"0 of which succeeded.*Roll out more"):
        detection.measure(trials(0, 30), 0.9, share=0.5, splits=1, seed=0)


def test_a_rollout_that_repeats_another_counts_once_and_one_without_uncertainty_is_refused():
    results = [
        TrialResult(i, ("a",), ("do a",), (True,), (2,), uncertainty=((0.1, doubt),))
        for i, doubt in enumerate((0.2, 0.2, None))
    ]
    found = detection.episodes(results)
    assert len(found) == 2 and math.isnan(found[1].uncertainty[1])
    with pytest.raises(ValueError, match=r"trial 7 has no uncertainty.*policy\.head\.spread"):
        detection.episodes([TrialResult(7, ("a",), ("do a",), (True,), (2,))])


# ---------------------------------------------------------------------------------------------------------------------
# From rollouts to the report


class Doubtful(LinePolicy):
    """As unsure as its slot's step, and far more so where it fails."""

    def act(self, observations, slots):
        chunks = super().act(observations, slots)
        level = [1.0 if self.instructions[slot].startswith("go") else 5.0 for slot in slots]
        level = [x + float(seen.proprio[0]) / 100 for x, seen in zip(level, observations, strict=True)]
        return [ActionChunk(c.actions, x + np.arange(len(c.actions)) / 8) for c, x in zip(chunks, level, strict=True)]


def rolled_out(directory, conditions, execution=RECEDING):
    asked = [trial(i, 2 + i % 3, instruction="stay" if i % 4 == 3 else "go") for i in range(60)]
    settings_ = chains.Settings("toy", execution, CRITERION, conditions)
    return chains.evaluate(Doubtful(chunk=3), EnvPool([LineEnv()]), asked, directory, settings_)


def test_the_uncertainty_of_each_executed_action_is_kept_and_comes_back_from_the_file(tmp_path):
    evaluation = rolled_out(tmp_path, {})
    assert evaluation.results[1].uncertainty == ((1.01, 1.135, 1.03),)  # rows 0 and 1 of a chunk, row 0 of the next
    assert all(len(x.uncertainty[0]) == x.steps[0] for x in evaluation.results)
    assert chains.load(tmp_path).results == evaluation.results


def test_what_is_averaged_in_an_ensemble_is_as_uncertain_as_its_parts(tmp_path):
    evaluation = rolled_out(tmp_path, {}, Execution("ensemble", decay=0.0))
    np.testing.assert_allclose(evaluation.results[0].uncertainty[0][:2], (1.0, (1.125 + 1.01) / 2), rtol=1e-4)


def test_results_of_versions_that_kept_no_uncertainty_are_read(tmp_path):
    rolled_out(tmp_path, {})
    (path,) = tmp_path.glob("results-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "uncertainty"}) + "\n" for r in rows))
    assert chains.load(tmp_path).results[0].uncertainty == ()


def test_the_command_measures_stored_rollouts_of_its_checkpoint_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate.checkpoints, "locate", lambda path: tmp_path)
    monkeypatch.setattr(calibrate.seals, "identity", lambda path: seals.Identity(7, "abc"))
    label = seals.Identity(7, "abc").label
    rolled_out(tmp_path / "own", {"checkpoint": label})
    text = calibrate.detect(calibrate.CalibrateConfig("run", rollouts=str(tmp_path / "own"), splits=3))
    stored = json.loads((tmp_path / "own" / "detection.json").read_text())
    assert stored["scores"]["mean"]["auroc"]["end"]["value"] == 1.0 and "| mean | " in text
    assert stored["scores"]["mean"]["within"]["end"]["value"] == 1.0
    rolled_out(tmp_path / "other", {"checkpoint": "another"})
    with pytest.raises(ValueError, match="has results of checkpoint another"):
        calibrate.detect(calibrate.CalibrateConfig("run", rollouts=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="not read with rollouts"):
        calibrate.CalibrateConfig("run", rollouts="x", num_samples=4)


def test_an_uncertainty_that_is_not_one_finite_number_per_action_is_refused_where_it_was_said():
    policy = Doubtful(chunk=3)
    policy.act = lambda seen, slots: [ActionChunk(np.ones((3, 7), np.float32), np.array([1.0, np.inf, 1.0]))]
    with pytest.raises(ValueError, match=r"trial 0, task 1 .*infinite value, expected a finite number for each"):
        list(rollout.run(policy, EnvPool([LineEnv()]), [trial(0, 1)], CRITERION))
