"""Searches with a run that is a short script: queue, resuming, failures, pruning and the report."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import search, search_settings
from robovlms_jax import bars, ending
from robovlms_jax.search import queue, report, space, trials, workers
from robovlms_jax.search.config import SearchConfig
from robovlms_jax.training import directory

SCRIPT = """
import json, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run = pathlib.Path(flags["--train.output"]); run.mkdir(parents=True, exist_ok=True)
rate, seed = float(flags["--rate"]), int(flags["--train.seed"])
with (run / "starts").open("a") as f: f.write("x")
if flags.get("--wait") and not (run / "checkpoints/1").exists():
    (run / "checkpoints/1").mkdir(parents=True)
    time.sleep(float(flags["--wait"]))
if rate > 1: sys.exit("error: the loss of step 3 is not finite")
for step in range(1, 4):
    with (run / "metrics.jsonl").open("a") as f:
        loss = abs(rate - 0.3) + 0.01 * seed + 1 / step
        f.write(json.dumps({"step": step, "train/loss": 9.0, "validation/loss": loss}) + "\\n")
    time.sleep(float(flags.get("--pace", 0)))
(run / "report.md").write_text("done")
"""


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    def command(config, trial, run):
        words = space.flags(space.fixed(config.fixed) | trial.setting)
        return [sys.executable, "-c", SCRIPT, *words, "--train.seed", str(trial.seed), "--train.output", str(run)]

    monkeypatch.setattr(trials, "command", command)
    monkeypatch.setattr(trials, "POLL", 0.02)
    monkeypatch.setattr(queue, "BEAT", 0.05)


def settings(tmp_path, **changes):
    return SearchConfig(**{"out": str(tmp_path / "s"), "space": ("rate=0.1,0.2,5",), **changes})


def test_a_grid_runs_every_setting_with_every_seed_and_a_failure_does_not_stop_it(tmp_path):
    config = settings(tmp_path, seeds=2)
    workers.work(config)
    found = queue.read(tmp_path / "s")
    assert [(x.setting["rate"], x.seed, x.status) for x in found] == [
        *(("0.1", 0, "done"), ("0.2", 0, "done"), ("5", 0, "failed")),
        *(("0.1", 1, "done"), ("0.2", 1, "done"), ("5", 1, "failed")),
    ]
    assert found[2].reason == "error: the loss of step 3 is not finite"
    assert found[1].value == pytest.approx(0.1 + 1 / 3)
    text = report.write(config).read_text()
    assert "4 done, 0 open, 2 failed" in text and "not finite" in text
    assert text.index("| 0.2 |") < text.index("| 0.1 |") and "real" in text and (tmp_path / "s/search.png").exists()
    workers.work(config)  # nothing is run again
    assert all(len((queue.folder(tmp_path / "s", i) / "run/starts").read_text()) == 1 for i in range(6))


def test_two_processes_share_the_trials(tmp_path):
    config = settings(tmp_path, space=("rate=0.1,0.2,0.3,0.4",), fixed=("pace=0.05",))
    both = [threading.Thread(target=workers.work, args=(config,)) for _ in range(2)]
    [thread.start() for thread in both]
    [thread.join() for thread in both]
    found = queue.read(tmp_path / "s")
    assert [x.status for x in found] == ["done"] * 4
    assert all(len((queue.folder(tmp_path / "s", i) / "run/starts").read_text()) == 1 for i in range(4))


def test_a_stopped_trial_stays_open_and_goes_on_with_the_next_start(tmp_path, monkeypatch):
    config = settings(tmp_path, space=("rate=0.1",), fixed=("wait=30",))

    def interrupt(seconds):
        if (queue.folder(tmp_path / "s", 0) / "run/checkpoints/1").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trials.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            workers.work(config)
    assert queue.read(tmp_path / "s")[0].status == "open"
    assert not (queue.folder(tmp_path / "s", 0) / "claim.json").exists()
    workers.work(config)
    assert queue.read(tmp_path / "s")[0].status == "done"


def test_a_stopped_search_ends_with_the_status_of_what_was_stopped_and_a_report(tmp_path, monkeypatch):
    def stopped(config):
        pathlib.Path(config.out).mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(search_settings, "devices", lambda: None)
    monkeypatch.setattr(workers, "work", stopped)
    monkeypatch.setattr(ending, "on_sigterm", lambda: None)
    monkeypatch.setattr(search.logs, "to_stderr", lambda: None)
    with pytest.raises(SystemExit) as end:
        search.main(["--start", "sample", "--space", "train.steps=1,2", "--out", str(tmp_path / "s")])
    assert end.value.code == ending.STATUS and (tmp_path / "s/report.md").exists()


def test_a_real_trial_resumes_where_it_has_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.undo()
    config, trial = settings(tmp_path, fixed=("policy.head.trunk=8 8",)), queue.Trial(0, {"train.steps": "3"}, 4)
    words = trials.command(config, trial, tmp_path)
    assert words[1:5] == ["-m", "experiments.calvin_abcd", "--preset", config.start] and "--train.resume" not in words
    assert words[5:] == [
        *("--distributed.coordinator", "none"),  # although srun may have started the search as one of several
        *("--policy.head.trunk", "8", "8", "--train.steps", "3", "--train.seed", "4", "--train.output", str(tmp_path)),
    ]
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    assert trials.command(config, trial, tmp_path)[-1] == "--train.resume"


def test_the_claim_of_a_dead_process_is_taken_over_and_a_living_ones_is_not(tmp_path):
    with queue.claimed(tmp_path, 0) as first:
        assert first
        with queue.claimed(tmp_path, 0) as second:
            assert not second
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    path = queue.folder(tmp_path, 0) / "claim.json"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": ended.pid}))
    with queue.claimed(tmp_path, 0) as taken:
        assert taken
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with queue.claimed(tmp_path, 0) as taken:
        assert not taken  # it gave a sign of life just now
    path.write_text(json.dumps({"host": socket.gethostname(), "namespace": "another container's", "pid": 2**22 + 1}))
    with queue.claimed(tmp_path, 0) as taken:
        assert not taken  # its number says nothing here
    os.utime(path, (time.time() - 2 * queue.SILENCE,) * 2)
    with queue.claimed(tmp_path, 0) as taken:
        assert taken


def test_a_claim_is_dead_where_another_process_has_its_number_or_it_waits_to_be_reaped(tmp_path):
    path = queue.folder(tmp_path, 0) / "claim.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": "1"}))
    with queue.claimed(tmp_path, 0) as taken:  # such as after a restart of the machine
        assert taken
    unreaped = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    unreaped.stdout.read()
    while pathlib.Path(f"/proc/{unreaped.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": unreaped.pid}))
    with queue.claimed(tmp_path, 0) as taken:
        assert taken
    unreaped.wait()


def test_a_run_that_a_killed_search_left_at_work_is_waited_for_and_judged_not_started_again(tmp_path):
    config = settings(tmp_path, space=("rate=0.1",))
    run = queue.folder(tmp_path / "s", 0) / "run"
    run.mkdir(parents=True)
    left = threading.Event()

    def at_work():
        with directory.claim(run):
            left.set()
            time.sleep(0.2)
            (run / "metrics.jsonl").write_text(json.dumps({"step": 3, "validation/loss": 0.5}))
            (run / "report.md").write_text("done")

    thread = threading.Thread(target=at_work)
    thread.start()
    left.wait()
    workers.work(config)
    thread.join()
    (found,) = queue.read(tmp_path / "s")
    assert (found.status, found.value) == ("done", 0.5) and not (run / "starts").exists()


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_what_another_process_had_begun_and_died_of_is_done_in_the_end(tmp_path, monkeypatch, sampler):
    if sampler == "random":
        pytest.importorskip("optuna", reason="not in environments without the extra search")
    config = settings(tmp_path, space=("rate=0.1,0.2",), sampler=sampler, trials=2 * (sampler == "random"))
    claim = queue.folder(tmp_path / "s", 0) / "claim.json"
    claim.parent.mkdir(parents=True)
    claim.write_text("{}")
    lives = iter([True])  # when it is looked at first
    monkeypatch.setattr(queue, "_is_dead", lambda path: not next(lives, False))
    workers.work(config)
    assert [x.status for x in queue.read(tmp_path / "s")] == ["done", "done"]


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_the_last_process_waits_for_a_sign_of_life_and_takes_over_where_none_comes(tmp_path, monkeypatch, sampler):
    if sampler == "random":
        pytest.importorskip("optuna", reason="not in environments without the extra search")
    monkeypatch.setattr(queue, "SILENCE", 0.5)
    config = settings(tmp_path, space=("rate=0.1,0.2",), sampler=sampler, trials=2 * (sampler == "random"))
    claim = queue.folder(tmp_path / "s", 1) / "claim.json"
    claim.parent.mkdir(parents=True)
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1}))  # its worker was killed just now
    workers.work(config)
    assert [x.status for x in queue.read(tmp_path / "s")] == ["done", "done"]


def test_a_trial_whose_worker_lives_is_left_to_it(tmp_path):
    config = settings(tmp_path, space=("rate=0.1,0.2",))
    with queue.claimed(tmp_path / "s", 1):
        workers.work(config)
    assert [(x.number, x.status) for x in queue.read(tmp_path / "s")] == [(0, "done")]


def test_a_trial_that_was_killed_is_recorded_with_the_signal(tmp_path, monkeypatch):
    killed = "import os, signal; print('step 7', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(trials, "command", lambda *_: [sys.executable, "-c", killed])
    workers.work(settings(tmp_path, space=("rate=0.1",)))
    (found,) = queue.read(tmp_path / "s")
    assert (found.status, found.reason) == ("failed", "ended by SIGKILL; step 7")


def test_another_search_in_the_same_folder_is_refused_by_what_differs(tmp_path):
    workers.work(settings(tmp_path, space=("rate=0.1",)))
    with pytest.raises(ValueError, match=r"holds results of other settings: .*rate=0.1.*Choose another --out"):
        workers.work(settings(tmp_path, space=("rate=0.2",)))


def test_a_sampler_proposes_settings_and_goes_on_after_a_stop(tmp_path):
    pytest.importorskip("optuna", reason="not in environments without the extra search")
    config = settings(tmp_path, space=("rate=0.01:1:log",), sampler="tpe", trials=4)
    workers.work(config)
    first = {x.number: x.setting for x in queue.read(tmp_path / "s")}
    assert len(first) == 4 and all(0.01 <= float(x["rate"]) <= 1 for x in first.values())
    workers.work(dataclasses.replace(config, trials=6))
    later = {x.number: x.setting for x in queue.read(tmp_path / "s")}
    assert len(later) == 6 and {number: later[number] for number in first} == first


def test_folders_of_one_name_do_not_answer_for_each_other_in_one_storage(tmp_path):
    pytest.importorskip("optuna", reason="not in environments without the extra search")
    storage = f"sqlite:///{tmp_path}/studies.db"
    one, other = (
        settings(tmp_path, out=str(tmp_path / place / "s"), space=("rate=0.1,0.2",), sampler="random", trials=1)
        for place in ("a", "b")
    )
    one, other = (dataclasses.replace(config, storage=storage) for config in (one, other))
    workers.work(one)
    workers.work(dataclasses.replace(one, trials=2))
    with pytest.raises(ValueError, match=r"studies.db has a study 's' by a search in another folder than .*/b/s"):
        workers.work(other)
    assert [x.status for x in queue.read(tmp_path / "a/s")] == ["done", "done"]


def test_pruning_ends_runs_that_are_worse_than_others_were(tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna", reason="not in environments without the extra search")
    seeded = functools.partial(optuna.samplers.RandomSampler, seed=0)  # else one run in 32 draws one rate only
    monkeypatch.setattr(optuna.samplers, "RandomSampler", seeded)
    config = settings(tmp_path, space=("rate=0.3,0.9",), sampler="random", trials=6, prune=True, fixed=("pace=0.3",))
    workers.work(config)
    found = queue.read(tmp_path / "s")
    assert {x.status for x in found if x.setting["rate"] == "0.3"} == {"done"}
    study = workers._study(config)
    states = {x.number: x.state for x in study.trials}
    for trial in found:
        expected = {"done": optuna.trial.TrialState.COMPLETE, "pruned": optuna.trial.TrialState.PRUNED}
        assert states[trial.number] == expected[trial.status]


@given(st.lists(st.lists(st.sampled_from(["1e-4", "2", "a b", "x"]), min_size=1, unique=True), min_size=1, max_size=4))
def test_a_grid_is_the_product_of_its_values(values):
    fields = space.read([f"f{i}=" + ",".join(some) for i, some in enumerate(values)])
    combinations = space.grid(fields)
    assert len(combinations) == np.prod([len(some) for some in values])
    assert len({tuple(x.items()) for x in combinations}) == len(combinations)
    assert all(x[f"f{i}"] in some for x in combinations for i, some in enumerate(values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate", "expected FIELD=VALUE"),
        ("rate=1,1", "there twice"),
        ("rate=2:1", "LOW below HIGH"),
        ("rate=0:1:log", "begins above 0"),
        ("rate=0.5:3:int", "LOW:HIGH"),
        ("rate=1e-5:inf", "LOW below HIGH"),
        ("rate=1e-4, 0.0001", "there twice"),
    ],
)
def test_a_space_that_says_nothing_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        space.read([text])


def test_names_of_the_hub_are_values_and_no_ranges():
    (field,) = space.read(["backbone.weights=hf://a/b,hf://c/d"])
    assert field == space.Values("backbone.weights", ("hf://a/b", "hf://c/d"))


def test_settings_that_cannot_work_are_refused_before_anything_runs(tmp_path, capsys, monkeypatch):
    base = ["--out", str(tmp_path / "s"), "--start", "sample"]
    monkeypatch.setattr(search_settings, "devices", lambda: 1)
    with pytest.raises(ValueError, match="more than once"):
        search.main([*base, "--space", "train.steps=1", "train.steps=2"])
    with pytest.raises(ValueError, match=r"both set \['train.steps'\]"):
        search.main([*base, "--space", "train.steps=1", "--fixed", "train.steps=2"])
    with pytest.raises(ValueError, match=r"'train.output'.*search.out"):
        search.main([*base, "--space", "train.output=1"])
    with pytest.raises(ValueError, match="no preset of calvin_abcd"):
        search.main([*base[:2], "--start", "nothing", "--space", "train.steps=1"])
    with pytest.raises(SystemExit):
        search.main([*base, "--space", "optimizer.learning_rat=1e-3"])
    assert "learning_rate" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a grid needs values"):
        search.main([*base, "--space", "optimizer.learning_rate=1e-5:1e-3"])
    assert not list(pathlib.Path(tmp_path).glob("s/trials/*/run"))


def make(values):
    return [
        queue.Trial(i, {"rate": name}, seed, "done", value)
        for i, (name, seed, value) in enumerate((n, s, v) for n, some in values.items() for s, v in enumerate(some))
    ]


def test_differences_are_judged_by_seed_and_one_run_tells_nothing():
    # Paired by seed: 0.01 apart in every seed is real although seeds differ by 1.
    ranked = report.rank(make({"a": [1.0, 2.0, 3.0], "b": [1.01, 2.011, 3.009], "c": [1.5, 1.8, 3.6]}), "minimize")
    assert [x.setting["rate"] for x in ranked] == ["a", "b", "c"]
    assert [x.noise for x in ranked] == [None, False, True]
    assert ranked[0].half_width == pytest.approx(4.302653 * 1.0 / 3**0.5, rel=1e-5)  # t of 2 degrees of freedom
    assert [x.setting["rate"] for x in report.rank(make({"a": [1.0], "b": [2.0]}), "maximize")] == ["b", "a"]
    assert report.rank(make({"a": [1.0], "b": [2.0]}), "minimize")[1].noise is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": [0.1, 0.12], "b": [0.11]}, "^1 of the others were run once"),
        ({"a": [0.1], "b": [0.12, 0.13, 0.14]}, "^The best setting was run once"),
        ({"a": [0.1], "b": [0.12]}, "^Every setting was run once"),
        ({"a": [0.1, 0.12]}, "^Only one setting"),
        ({"a": [0.1, 0.12], "b": [0.3, 0.32], "c": [0.2]}, "differs from 1 of the 2 others .* 1 of the others"),
    ],
)
def test_the_verdict_claims_nothing_of_settings_that_were_run_once(values, message):
    assert re.search(message, report._verdict(report.rank(make(values), "minimize")))


def test_a_setting_of_which_a_seed_failed_or_is_no_number_stands_last_and_says_so(tmp_path):
    trials = make({"a": [0.5, 0.6], "b": [0.9, math.nan], "c": [0.7, 0.8], "d": [0.95]})
    trials.append(queue.Trial(9, {"rate": "d", "step": "2"}, 1, "failed", reason="diverged"))
    ranked = report.rank(trials, "maximize")
    assert [(x.setting["rate"], x.failed) for x in ranked] == [("c", 0), ("a", 0), ("d", 1), ("b", 1)]
    text = "\n".join(report.ranking(tmp_path, trials, "success", "maximize"))
    assert "1, 1 failed" in text and "2 with a run that failed stand last" in text


def test_whoever_waits_for_a_trial_sees_its_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bars, "EVERY_S", (0.0, 0.0))
    workers.work(settings(tmp_path, space=("rate=0.1",), fixed=("pace=0.1",)))
    shown = capsys.readouterr().err.split("\r")
    assert any(line.startswith("trial 0: 00:0") and ", step 2, loss 9" in line for line in shown), shown
