"""A protocol: training runs, some of which begin where others ended, each judged when it has ended.

Every job is a trial of `search.queue`: a directory with an ordinary run in it, taken by one process at a time, resumed
by the same command. A job whose policy begins as another's is taken after that one; a run that diverges is recorded,
with the jobs that would have begun there, and stops nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from robovlms_jax import ending, json_files
from robovlms_jax.evaluation import chains, rollout_metrics
from robovlms_jax.evaluation.report import offline, tables
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.search import queue

logger = logging.getLogger(__name__)

Result = Mapping[str, Any]
"""What was found of a run, as JSON values; "value" is the number by which settings are compared."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a protocol.

    setting: what is compared, column -> value, for the report. seed: which draw of it. config: called when it is due,
      with `after`'s run directory, which then holds its policy; what it returns is trained in a directory of its own.
      None: nothing is trained, and `after`'s run is judged once more.
    judge: the finished run's directory -> what was found.
    after: number of the job that it begins with; None: a run directory that is there already, or nothing.
    compared: whether it is a row of the report; False for what others begin with.
    """

    setting: Mapping[str, str]
    seed: int
    config: Callable[[pathlib.Path | None], ExperimentConfig] | None
    judge: Callable[[pathlib.Path], Result]
    after: int | None = None
    compared: bool = True


def work(out: pathlib.Path, jobs: Sequence[Job], settings: Mapping[str, Any]) -> list[queue.Trial]:
    """Do what is left of a protocol; returns all its trials, those that others work on among them, still open. What
    begins with a trial that another process works on is waited for.

    Args:
      settings: everything that results depend on, as JSON values; a later call must have the same.
    Raises:
      ValueError: other settings, or what a run raises.
      KeyboardInterrupt: a run was stopped; the same call goes on with it.
    """
    queue.agree(out, "protocol.json", settings)
    trials = [queue.Trial(number, dict(job.setting), job.seed) for number, job in enumerate(jobs)]
    while True:
        for number, job in enumerate(jobs):
            if trials[number].status == "open":
                trials[number] = _take(out, trials, job, number)
        due = {number: _is_due(trials, jobs[number]) for number, trial in enumerate(trials) if trial.status == "open"}
        held = [number for number, now in due.items() if now]
        if not queue.left_behind(out, held, until_free=len(held) < len(due)):
            return trials


def _is_due(trials: Sequence[queue.Trial], job: Job) -> bool:
    """Whether the trial that it begins with has ended."""
    return job.after is None or trials[job.after].status != "open"


def run_of(out: pathlib.Path, number: int) -> pathlib.Path:
    """Directory of a job's run."""
    return queue.folder(out, number) / "run"


def result(out: pathlib.Path, number: int) -> Result:
    """What was found of a job that is done."""
    return json_files.read_object(queue.folder(out, number) / "result.json", "a run's result")


def _take(out: pathlib.Path, trials: Sequence[queue.Trial], job: Job, number: int) -> queue.Trial:
    """The trial as it is afterwards: untouched where another process has it, or what it begins with is not there."""
    trial, first = trials[number], None if job.after is None else trials[job.after]
    if not _is_due(trials, job):
        return trial
    with queue.claimed(out, number) as ours:
        if not ours:
            return trial
        path = queue.folder(out, number) / "trial.json"
        if path.exists():
            trial = queue.read_one(path)
        if trial.status != "open":
            return trial
        if first is not None and first.status != "done":
            trial = dataclasses.replace(trial, status="failed", reason=f"trial {job.after} failed, where it begins")
        else:
            queue.write(out, trial)
            trial = _run(out, trial, job)
        queue.write(out, trial)
        return trial


def _run(out: pathlib.Path, trial: queue.Trial, job: Job) -> queue.Trial:
    from robovlms_jax.runs import run  # takes longer than all that --help of a protocol's program needs
    from robovlms_jax.training import checkpoints, guards

    directory = run_of(out, trial.number)
    name = ", ".join(f"{field} {value}" for field, value in trial.setting.items())
    logger.info("trial %d: %s, draw %d", trial.number, name, trial.seed)
    begin = time.monotonic()
    if job.config is None:
        directory = run_of(out, job.after)
    elif not (directory / "report.md").exists():
        config = job.config(None if job.after is None else run_of(out, job.after))
        train = dataclasses.replace(config.train, output=str(directory), resume=checkpoints.begun(directory))
        try:
            run.train(name, dataclasses.replace(config, train=train))
        except guards.DivergedError as error:
            return dataclasses.replace(trial, status="failed", reason=queue.reason(str(error)))
        if not (directory / "report.md").exists():
            raise ending.Terminated  # the run is saved
    found = job.judge(directory)
    if not math.isfinite(float(found["value"])):
        return dataclasses.replace(trial, status="failed", reason=f"its result is {found['value']}, no finite number")
    jax.clear_caches()  # the programs of all runs do not fit into memory together
    tables.write_json(queue.folder(out, trial.number) / "result.json", found)
    seconds = trial.seconds + time.monotonic() - begin
    trial = dataclasses.replace(trial, status="done", value=float(found["value"]), seconds=seconds)
    logger.info("trial %d: %.3f (%.0f s)", trial.number, trial.value, trial.seconds)
    return trial


def rollouts(directory: pathlib.Path) -> dict[str, Any]:
    """Success in the rollouts that a run ended with (rollouts.trials): "value" over all, and "tasks", by task."""
    files = sorted((directory / "rollouts").rglob("results-*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"{directory} has no results of rollouts; set rollouts.trials above 0.")
    return success(files[-1].parent)


def success(directory: pathlib.Path) -> dict[str, Any]:
    """The same of a directory of stored results."""
    summary = rollout_metrics.summarize(chains.load(directory).results)
    return {
        "value": summary.attempts.value,
        "successes": summary.attempts.successes,
        "trials": summary.attempts.attempts,
        "tasks": {name: rate.value for name, rate in summary.per_task.items()},
    }


def loss(directory: pathlib.Path) -> dict[str, Any]:
    """ "value": the run's last loss on its validation split, where there is no simulator to ask."""
    _, values = offline.read_metrics(directory / "metrics.jsonl")["validation/loss"]
    return {"value": float(values[-1])}
