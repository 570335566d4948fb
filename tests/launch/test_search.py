"""launch/search.sbatch: a search over the tasks of a job array, for which a few lines of shell stand."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from robovlms_jax.search import queue

ROOT = pathlib.Path(__file__).resolve().parents[2]


def submit(folder: pathlib.Path, *words: str, python: str, **environment: str) -> subprocess.Popen:
    """`sbatch WORDS`, whose FAKE_SLURM is `folder`."""
    path = f"{ROOT / 'tests/launch/bin'}:{os.environ['PATH']}"
    known = {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHON": python, "REAL_PYTHON": sys.executable}
    known |= {"FAKE_SLURM": str(folder), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(["sbatch", *words], cwd=ROOT, env={**os.environ, **known, **environment})


def children(pid: int) -> list[int]:
    return [int(word) for word in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lose(number: int, out: pathlib.Path) -> int:
    """What a lost node does: whoever works on a trial, and the run that it started, end at once. Returns whose."""
    worker = json.loads((queue.folder(out, number) / "claim.json").read_text())["pid"]
    for pid in (worker, *children(worker)):
        os.kill(pid, signal.SIGKILL)
    return worker


def steps(run: pathlib.Path, name: str) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if name in line]


def wait_for(path: pathlib.Path, process: subprocess.Popen, text: str = "") -> None:
    while not (path.exists() and (path.is_dir() or text in path.read_text())):
        assert process.poll() is None
        time.sleep(0.02)


def statuses(folder: pathlib.Path) -> list[str]:
    return sorted(path.read_text().strip() for path in folder.glob("status_*"))


def test_array_tasks_share_a_search_and_the_trial_of_one_that_is_lost_goes_on_in_the_other(tmp_path):
    out = tmp_path / "s"
    jobs = submit(tmp_path, "--array=0-1", "launch/search.sbatch", "--out", str(out), python="searching")
    wait_for(queue.folder(out, 1) / "run/waiting", jobs)
    lose(1, out)
    assert jobs.wait(60) == 0
    assert statuses(tmp_path) == ["0", "137"]
    found = queue.read(out)
    assert [(trial.number, trial.status) for trial in found] == [(number, "done") for number in range(4)]
    assert found[1].value == pytest.approx(0.2 / 3)
    for number in range(4):  # the second start of trial 1 began behind its checkpoint
        assert steps(queue.folder(out, number) / "run", "validation/loss") == [1, 2, 3]
        assert not (queue.folder(out, number) / "claim.json").exists()
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize(("status", "again"), [(130, ["requeue 8"]), (1, None), (0, None)])
def test_a_task_that_was_told_to_stop_goes_back_into_the_queue_and_a_mistake_does_not(tmp_path, status, again):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >"$FAKE_SLURM/called"\nexit {status}\n')
    python.chmod(0o755)
    words = ("--array=0-0", "launch/search.sbatch", "--space", "train.steps=1,2")
    assert submit(tmp_path, *words, python=str(python), IMAGE="i", MOUNTS="/data:/data").wait(20) == 0
    assert statuses(tmp_path) == [str(status)]
    assert (tmp_path / "called").read_text() == "-m experiments.search --space train.steps=1,2\n"
    assert "--container-image=i" in (tmp_path / "srun").read_text().split()
    asked = tmp_path / "scontrol"
    assert (asked.read_text().splitlines() if asked.exists() else None) == again


@pytest.mark.slow
def test_a_real_search_over_two_array_tasks_loses_one_in_a_trial_and_counts_nothing_twice(tmp_path):
    out = tmp_path / "s"
    fixed = (
        *("policy.window=1", "policy.chunk=2", "policy.head.num_layers=1", "policy.head.hidden_size=32"),
        *("policy.head.trunk=32", "data.windows_per_segment=1"),
        *("data.num_workers=0", "train.batch_size=8", "train.steps=16", "train.checkpoint_every=4"),
        *("train.log_every=1", "train.eval_every=0", "evaluation.batches=1", "evaluation.episodes=0"),
        *("optimizer.warmup_steps=0", f"train.compilation_cache={tmp_path / 'programs'}"),
    )
    words = ("--start", "sample", "--space", "optimizer.learning_rate=1e-3,3e-4", "--out", str(out), "--fixed")
    few = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    jobs = submit(tmp_path, "--array=0-1", "launch/search.sbatch", *words, *fixed, python=sys.executable, **few)
    run = queue.folder(out, 1) / "run"
    wait_for(run / "checkpoints/4", jobs)
    lose(1, out)
    assert jobs.wait(500) == 0
    assert statuses(tmp_path) == ["0", "137"]
    assert [trial.status for trial in queue.read(out)] == ["done"] * 2
    seen = steps(run, "train/loss")
    assert seen == list(range(1, 17)), "each step is written down once, those that were lost in the second start"
    assert "resumed after step" in (queue.folder(out, 1) / "log.txt").read_text()
    assert "2 done, 0 open, 0 failed" in (out / "report.md").read_text()
