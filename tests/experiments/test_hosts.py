"""The main job as several real processes: what one process would have done, checkpoints for any number of devices.

Minutes of computing time each, hence slow; `tests/parallel` has the quick checks.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from robovlms_jax.training import checkpoints, seals
from tests.parallel import test_distributed

ROOT = pathlib.Path(__file__).resolve().parents[2]

PEER_TIMEOUT_S = 30

RUN = (
    *("-m", "experiments.calvin_abcd", "--preset", "sample"),
    *("--policy.window", "2", "--policy.head.hidden_size", "32", "--policy.head.trunk", "32"),
    *("--data.windows_per_segment", "2", "--data.num_workers", "0", "--train.batch_size", "16"),
    *("--train.log_every", "1", "--train.eval_every", "0", "--train.checkpoint_every", "2"),
    *("--evaluation.batches", "1", "--evaluation.episodes", "0", "--optimizer.warmup_steps", "0"),
    *("--distributed.peer_timeout_s", str(PEER_TIMEOUT_S)),
)

PLAYTABLE = (
    *("-m", "experiments.calvin_abcd", "--preset", "playtable_fixtures", "--train.batch_size", "8"),
    *("--train.log_every", "1", "--evaluation.batches", "1", "--evaluation.episodes", "0"),
    *("--demonstrations.episodes", "3", "--demonstrations.validation_episodes", "1"),
    *("--demonstrations.random_scenes", "4", "--demonstrations.image_size", "48", "32"),
    *("--rollouts.trials", "2", "--rollouts.tables", "2", "--rollouts.max_steps", "12", "--rollouts.films", "1"),
    *("--rollouts.image_size", "48", "32", "--rollouts.every", "2", "--rollouts.select", "best"),
)

pytestmark = pytest.mark.slow


def start(
    output: pathlib.Path, count: int, *flags: str, job: tuple[str, ...] = RUN, **environment: str
) -> list[subprocess.Popen]:
    """The main job as `count` processes on this machine; process i writes its messages to `output`.i.log."""
    address = f"localhost:{test_distributed.free_port()}"
    processes = []
    for index in range(count):
        join = ("--distributed.coordinator", address, "--distributed.num_processes", str(count))
        join = (*join, "--distributed.process_id", str(index)) if count > 1 else ()
        with log(output, index).open("w") as messages:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *job, "--train.output", str(output), *join, *flags],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                    stderr=messages,
                )
            )
    return processes


def log(output: pathlib.Path, index: int) -> pathlib.Path:
    return output.with_name(f"{output.name}.{index}.log")


def finish(output: pathlib.Path, processes: list[subprocess.Popen]) -> dict[int, float]:
    """Wait for all; step -> loss."""
    for index, process in enumerate(processes):
        assert process.wait(1200) == 0, log(output, index).read_text()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def assert_close(found: dict[int, float], expected: dict[int, float]) -> None:
    # float32, sums in another order: 5e-7 apart after six steps were measured.
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=2e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[int, float]:
    """Losses of one process, never interrupted."""
    output = tmp_path_factory.mktemp("runs") / "alone"
    return finish(output, start(output, 1, "--train.steps", "4"))


def test_two_processes_train_as_one(alone, tmp_path):
    # Each with its own rows. Fails if rows are read twice or not at all, or random draws differ between processes.
    output = tmp_path / "two"
    assert_close(finish(output, start(output, 2, "--train.steps", "4")), alone)
    assert (output / "report.md").exists()
    assert "step 4/4" in log(output, 0).read_text() and "step 4/4" not in log(output, 1).read_text()
    assert json.loads((output / "config.json").read_text())["distributed"]["coordinator"] == "auto"


def test_four_write_and_one_two_or_eight_devices_read(alone, tmp_path):
    # Parameters and moments split over four processes, then over none, two and eight devices of one process.
    output = tmp_path / "four"
    first = finish(output, start(output, 4, "--train.steps", "4", "--mesh.fsdp", "2"))
    assert_close(first, alone)
    shutil.rmtree(output / "checkpoints" / "4")
    for devices in (1, 2, 8):
        again = tmp_path / f"on_{devices}"
        shutil.copytree(output, again)
        flags = ("--train.steps", "4", "--train.resume", "--mesh.fsdp", str(devices))
        assert_close(finish(again, start(again, 1, *flags, JAX_NUM_CPU_DEVICES=str(devices))), alone)
        assert "resumed after step 2" in log(again, 0).read_text()
        assert seals.damage(again / "checkpoints" / "4") is None


def drawn(notes: pathlib.Path, processes: int) -> dict[int, list[str]]:
    """Step -> digests of the rows of its batch, joined over the processes."""
    rows: dict[int, list[str]] = {}
    for process in range(processes):
        for line in notes.with_name(f"{notes.name}.{process}").read_text().splitlines():
            noted = json.loads(line)
            rows.setdefault(noted["step"], []).extend(noted["rows"])
    return rows


def test_fewer_processes_go_on_with_the_same_rows_in_the_same_order(tmp_path):
    # Two processes of two devices each, then one process on another mesh from the same checkpoint: as a run that
    # lost a slice goes on. Batches are equal to the last bit, losses up to the order of sums.
    two, one, job = tmp_path / "two", tmp_path / "one", ("-m", "tests.experiments.noted", *RUN[2:])
    common = {"job": job, "JAX_NUM_CPU_DEVICES": "2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    flags = ("--train.steps", "4", "--mesh.fsdp", "2")
    before = finish(two, start(two, 2, *flags, NOTES=f"{two}.rows", **common))
    shutil.copytree(two, one)
    shutil.rmtree(one / "checkpoints" / "4")
    flags = ("--train.steps", "4", "--mesh.tensor", "2", "--train.resume")
    after = finish(one, start(one, 1, *flags, NOTES=f"{one}.rows", **common))
    assert "resumed after step 2" in log(one, 0).read_text()
    expected, found = drawn(tmp_path / "two.rows", 2), drawn(tmp_path / "one.rows", 1)
    assert sorted(expected) == [1, 2, 3, 4] and found == {step: expected[step] for step in (3, 4)}
    assert len({row for rows in expected.values() for row in rows}) == 4 * 8
    assert_close(after, before)


def test_two_close_the_loop_as_one(tmp_path):
    # The first process records and rolls out while the other waits; both train on the recording and agree on the best
    # state. Fails if both record, or one goes on before there is anything to read.
    data, two, one = tmp_path / "data", tmp_path / "two", tmp_path / "one"
    flags = ("--train.steps", "4", "--data.root", str(data))
    losses = finish(two, start(two, 2, *flags, job=PLAYTABLE))
    assert "demonstrations on PlayTable" in log(two, 0).read_text() and "chain" not in log(two, 1).read_text()
    assert (two / "report.md").exists() and list((two / "rollouts").glob("step_4-*/*/strips.png"))
    assert (two / "best" / "4").is_dir()  # all score 0: of equals the latest
    assert_close(losses, finish(one, start(one, 1, *flags, job=PLAYTABLE)))


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_dies_the_other_ends(tmp_path, victim):
    # Within the timeout that the configuration states and the ten seconds in which processes try to end together.
    output = tmp_path / "mortal"
    processes = start(output, 2, "--train.steps", "100000")
    try:
        deadline = time.monotonic() + 900
        while "step 3/" not in log(output, 0).read_text():
            assert all(process.poll() is None for process in processes), log(output, 0).read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        processes[victim].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        assert processes[1 - victim].wait(300) != 0
        assert time.monotonic() - begin < PEER_TIMEOUT_S + 30
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert seals.damage(checkpoints.locate(output)) is None


def test_a_mistake_of_all_is_told_by_all(tmp_path):
    # Not only by the first to notice, and without waiting for anybody.
    processes = start(tmp_path / "wrong", 2, "--train.batch_size", "6")
    begin = time.monotonic()
    for index, process in enumerate(processes):
        assert process.wait(300) == 1
        assert "does not divide over" in log(tmp_path / "wrong", index).read_text()
    assert time.monotonic() - begin < 240
