"""The files of launch/ that start a training run: under SLURM, which a few lines of shell stand for, and alone."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.parallel.test_distributed import free_port

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = "tests.launch.program"
AGAIN = 75
"""Status that asks a launcher to start the run again (EX_TEMPFAIL of sysexits.h)."""


def start(
    script: str,
    run: pathlib.Path,
    *arguments: str,
    program: str = PROGRAM,
    tasks: int = 2,
    terminal: int | None = None,
    **environment: str,
):
    """`launch/SCRIPT RUN PROGRAM ...` as a batch script of a job of two tasks. terminal: file descriptor of one that it
    is started from."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": str(tasks), "FAKE_SLURM": str(run.parent)}
    path = f"{ROOT / 'tests/launch/bin'}:{os.environ['PATH']}"
    known = {"PATH": path, "PYTHON": sys.executable, "JAX_COORDINATOR_PORT": str(free_port()), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        ["bash", f"launch/{script}", str(run), program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **slurm, **known, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: _begin(terminal),
    )


def _begin(terminal: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, the tests among them, may ignore it
    if terminal is not None:
        os.login_tty(terminal)


def ended(process: subprocess.Popen) -> int:
    out, _ = process.communicate(timeout=300)
    print(out)
    return process.returncode


def test_the_batch_file_makes_one_program_of_its_tasks_and_goes_on_until_the_report(tmp_path):
    # Real processes, which find each other by what srun tells them. Stopped before the report: back into the queue; the
    # second start resumes; with the report nothing is queued any more.
    run = tmp_path / "run"
    assert ended(start("slurm.sbatch", run)) == AGAIN
    assert [(run / f"joined_{index}").read_text() for index in (0, 1)] == ["0 of 2, sum 1\n", "1 of 2, sum 1\n"]
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert ended(start("slurm.sbatch", run)) == 0
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "joined_0", "joined_1", "report.md"]


def test_a_signal_before_the_end_asks_for_another_start(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "report.md").write_text("of an earlier, shorter part\n")
    process = start("train.sh", run, "--wait")
    while not (run / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == AGAIN


@pytest.mark.parametrize("from_terminal", [True, False])
def test_an_interrupt_reaches_the_run_once(tmp_path, from_terminal):
    # A second one would end a run unsaved. A terminal tells the shell and the run, others the shell alone.
    run, (keys, terminal) = tmp_path / "run", os.openpty()
    process = start("train.sh", run, "--count", terminal=terminal if from_terminal else None)
    while not (run / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.05)
    if from_terminal:
        os.write(keys, b"\x03")
    else:
        process.send_signal(signal.SIGINT)
    assert ended(process) == 130
    assert (run / "interrupts").read_text() == "1"
    os.close(keys)
    os.close(terminal)


def test_a_mistake_is_not_started_again(tmp_path):
    run = tmp_path / "run"
    assert ended(start("slurm.sbatch", run, "--status", "1")) == 1
    assert not (tmp_path / "scontrol").exists()


def test_unfinished_checkpoints_are_not_resumed_from(tmp_path):
    # Orbax renames a checkpoint when it is whole; a run that was killed before its first one begins anew.
    run = tmp_path / "run"
    (run / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    assert ended(start("train.sh", run, "--status", "1")) == 1
    assert "--train.resume" not in (run / "flags").read_text()
    (run / "checkpoints" / "2").mkdir()
    assert ended(start("train.sh", run, "--status", "1")) == 1
    assert (run / "flags").read_text().endswith(f"--train.output {run} --train.resume")


def test_the_image_goes_to_pyxis_with_its_mounts_or_not_at_all(tmp_path):
    run = tmp_path / "run"
    assert (
        ended(start("slurm.sbatch", run, "--status", "0", tasks=1, IMAGE="host#name:gpu", MOUNTS="/data:/data"))
        == AGAIN
    )
    options = (tmp_path / "srun").read_text().split()
    assert {"--container-image=host#name:gpu", "--container-mounts=/data:/data"} < set(options)
    (run / "flags").unlink()
    assert ended(start("slurm.sbatch", run, "--status", "1", tasks=1, IMAGE="host#name:gpu")) == 1
    assert not (run / "flags").exists()


@pytest.mark.slow
def test_the_batch_file_trains_two_processes_as_one_run(tmp_path):
    # The main job itself: with SIGTERM in the middle, then to its report.
    run = tmp_path / "run"
    flags = (
        *("--preset", "sample", "--policy.window", "2", "--policy.head.hidden_size", "32", "--policy.head.trunk", "32"),
        *("--data.windows_per_segment", "2", "--data.num_workers", "0", "--train.batch_size", "16"),
        *(
            "--train.log_every",
            "1",
            "--train.eval_every",
            "0",
            "--evaluation.batches",
            "1",
            "--evaluation.episodes",
            "0",
        ),
        *("--optimizer.warmup_steps", "0", "--train.steps", "12"),
    )
    process = start("slurm.sbatch", run, *flags, program="experiments.calvin_abcd", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    while not (run / "metrics.jsonl").exists() or "train/loss" not in (run / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)
    os.kill(
        int(subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "bin/srun"], text=True)), signal.SIGTERM
    )
    assert ended(process) == AGAIN
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert (
        ended(start("slurm.sbatch", run, *flags, program="experiments.calvin_abcd", JAX_DISABLE_MOST_OPTIMIZATIONS="1"))
        == 0
    )
    assert (run / "report.md").exists() and (run / "checkpoints" / "12").is_dir()
