"""Protocols of many runs, with runs of a few lines: order, resuming, failures; which demonstrations are drawn."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robovlms_jax import ending
from robovlms_jax.data import base
from robovlms_jax.runs import run
from robovlms_jax.search import queue
from robovlms_jax.strategies import protocol, support
from robovlms_jax.training import guards
from tests.experiments.test_calvin_abcd import SMALL


@pytest.fixture
def started(monkeypatch):
    """Runs that are started: name, init_from and resume of each. A run's seed above 90 diverges; "stop" is stopped
    by Ctrl-C, "term" by another signal."""
    seen = []

    def train(name, config):
        seen.append((name, config.train.init_from, config.train.resume))
        output = protocol.pathlib.Path(config.train.output)
        (output / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
        if config.train.seed > 90:
            raise guards.DivergedError("the loss of step 3 is not finite")
        if name == "method stop" and not config.train.resume:
            raise KeyboardInterrupt
        if name == "method term" and not config.train.resume:
            return
        (output / "value").write_text(str(0.1 * config.train.seed))
        (output / "report.md").write_text("done")

    monkeypatch.setattr(run, "train", train)
    return seen


def job(method, seed, after=None):
    def config(base):
        return dataclasses.replace(
            SMALL, train=dataclasses.replace(SMALL.train, seed=seed, init_from=str(base or "")), rollouts=SMALL.rollouts
        )

    judge = lambda run: {"value": float((run / "value").read_text())}  # noqa: E731
    return protocol.Job({"method": method}, seed, config, judge, after)


def test_a_run_begins_with_the_policy_of_the_one_before_it_and_nothing_is_run_twice(tmp_path, started):
    jobs = [job("late", 3, after=1), job("base", 1)]
    trials = protocol.work(tmp_path, jobs, {"steps": 1})
    assert [trial.value for trial in trials] == [pytest.approx(0.3), pytest.approx(0.1)]
    assert started == [("method base", "", False), ("method late", str(protocol.run_of(tmp_path, 1)), False)]
    assert protocol.result(tmp_path, 0)["value"] == pytest.approx(0.3)
    protocol.work(tmp_path, jobs, {"steps": 1})
    assert len(started) == 2


def test_what_trains_nothing_judges_the_run_that_it_comes_after(tmp_path, started):
    again = dataclasses.replace(job("again", 0, after=0), config=None)
    trials = protocol.work(tmp_path, [job("base", 4), again], {})
    assert [trial.value for trial in trials] == [pytest.approx(0.4)] * 2 and len(started) == 1
    assert protocol.result(tmp_path, 1)["value"] == pytest.approx(0.4)


def test_a_run_that_diverges_is_recorded_with_those_that_would_begin_there_and_stops_no_other(tmp_path, started):
    trials = protocol.work(tmp_path, [job("bad", 91), job("child", 1, after=0), job("other", 2)], {})
    assert [trial.status for trial in trials] == ["failed", "failed", "done"]
    assert trials[0].reason == "the loss of step 3 is not finite" and "trial 0 failed" in trials[1].reason


def test_a_result_that_is_no_number_is_a_failure_with_its_reason(tmp_path, started):
    bad = dataclasses.replace(job("base", 1), judge=lambda run: {"value": math.nan})
    (trial,) = protocol.work(tmp_path, [bad], {})
    assert (trial.status, trial.value) == ("failed", None) and "nan" in trial.reason


@pytest.mark.parametrize(("method", "said"), [("stop", "Ctrl-C"), ("term", "a signal")])
def test_a_stopped_run_is_resumed_and_another_process_leaves_it_alone(tmp_path, started, monkeypatch, method, said):
    monkeypatch.setattr(queue, "BEAT", 0.05)
    jobs = [job(method, 1), job("other", 2)]
    with pytest.raises(KeyboardInterrupt) as stopped:
        protocol.work(tmp_path, jobs, {})
    assert ending.stopped_by(stopped.value) == said
    with queue.claimed(tmp_path, 0):
        assert [trial.status for trial in protocol.work(tmp_path, jobs, {})] == ["open", "done"]
    assert [trial.status for trial in protocol.work(tmp_path, jobs, {})] == ["done", "done"]
    assert started[-1] == (f"method {method}", "", True)


def test_what_begins_where_another_process_is_at_work_is_waited_for_and_shared(tmp_path, started, monkeypatch):
    monkeypatch.setattr(queue, "BEAT", 0.05)
    jobs = [job("base", 1), job("late", 3, after=0)]
    held = queue.claimed(tmp_path, 0)
    assert held.__enter__()
    with concurrent.futures.ThreadPoolExecutor() as threads:
        other = threads.submit(protocol.work, tmp_path, jobs, {})
        time.sleep(0.3)
        assert not other.done() and not started  # signs of life came, and it did not leave
        protocol.queue.write(tmp_path, queue.Trial(0, {"method": "base"}, 1, "done", 0.1))
        held.__exit__(None, None, None)
        assert [trial.status for trial in other.result(20)] == ["done", "done"]
    assert started == [("method late", str(protocol.run_of(tmp_path, 0)), False)]


def test_a_run_that_was_killed_in_its_first_checkpoint_begins_again(tmp_path, started):
    half = protocol.run_of(tmp_path, 0) / "checkpoints" / "150.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    (trial,) = protocol.work(tmp_path, [job("base", 1)], {})
    assert trial.status == "done" and started == [("method base", "", False)]


def test_results_of_other_settings_are_not_mixed(tmp_path, started):
    protocol.work(tmp_path, [job("a", 1)], {"steps": 1})
    with pytest.raises(ValueError, match="results of other settings: steps: 1 there, 2 here"):
        protocol.work(tmp_path, [job("a", 1)], {"steps": 2})


AVAILABLE = {"open": [(i, i + 5) for i in range(0, 100, 10)], "close": [(200, 210), (220, 230)]}


@given(st.integers(1, 10), st.integers(0, 50))
def test_a_draw_has_n_different_demonstrations_and_begins_with_the_smaller_draws(count, seed):
    drawn = support.draw(AVAILABLE, ["open"], count, seed)["open"]
    assert len(set(drawn)) == count and set(drawn) <= set(AVAILABLE["open"])
    assert all(drawn[:n] == support.draw(AVAILABLE, ["open"], n, seed)["open"] for n in range(1, count))
    assert drawn[:2] == support.draw(AVAILABLE, ["close", "open"], 2, seed)["open"][:count]
    assert set(support.draw(AVAILABLE, ["open"], 0, seed)["open"]) == set(AVAILABLE["open"])


def test_a_draw_names_the_task_that_is_missing_or_has_too_few():
    with pytest.raises(ValueError, match="did you mean 'close'"):
        support.draw(AVAILABLE, ["clos"], 1, 0)
    with pytest.raises(ValueError, match="3 demonstrations of 'close' are asked for, and there are 2"):
        support.draw(AVAILABLE, ["open", "close"], 3, 0)


def test_a_draw_is_a_file_that_the_data_reads(tmp_path):
    path = support.write(tmp_path / "lists" / "one.json", {"close": [(200, 210)]})
    episodes = [
        base.Episode(start, end, f"{task} it", task) for task, spans in AVAILABLE.items() for start, end in spans
    ]
    assert json.loads((tmp_path / "lists/one.json").read_text()) == {"close": [[200, 210]]}
    assert [e.start for e in base.select(episodes, episode_list=path)] == [200]
    assert support.by_task(episodes) == AVAILABLE
