"""The chain protocol: what is asked, and results that survive interruptions.

Results are one JSON line per trial, flushed as soon as the trial ends, in one file per process. Starting again skips
what any file of the directory already has; files of several processes add up by count.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax import bars, json_files, json_lines
from robovlms_jax.control.execution import BatchedPolicy, ExecutedBatch, Execution
from robovlms_jax.envs import simpler
from robovlms_jax.envs.calvin import initial_states, task_chains, tasks
from robovlms_jax.envs.vector import VectorEnv
from robovlms_jax.evaluation import rollout
from robovlms_jax.evaluation.rollout import Films, SuccessCriterion, Trial, TrialResult

log = logging.getLogger(__name__)


def chain_trials(
    chains: Sequence[task_chains.Chain] | None = None,
    *,
    scene: str = "D",
    train_scenes: Sequence[str] = (),
    held_out: bool = False,
    sentences: Mapping[str, str] | None = None,
) -> list[Trial]:
    """Chains as trials.

    Args:
      chains: a selection of `task_chains.official_chains()`; None: all 1000.
      scene: table the chains are run on; must be the one the environments were built with.
      train_scenes: scenes the policy was trained on, to tell seen from unseen; empty: unknown.
      held_out: ask in wording that training data never use; otherwise in the wording of training. The
        trials that ask a task take turns through its phrasings.
      sentences: task -> the one sentence to ask with instead, those of `adapter.validation_instructions`; results
        state the phrasing "benchmark".
    """
    trials = []
    asked: collections.Counter[str] = collections.Counter()
    for chain in task_chains.official_chains() if chains is None else chains:
        robot_obs, scene_obs = initial_states.initial_state(chain.condition, scene)
        if sentences is None:
            # By how often a task was asked, not by the chain's number: where tasks take turns, the numbers of one task
            # have a common factor with the count of its phrasings, and some are never asked.
            instructions = [tasks.instruction(task, held_out=held_out, variant=asked[task]) for task in chain.tasks]
            asked.update(chain.tasks)
        else:
            instructions = [sentences[task] for task in chain.tasks]
        labels = {
            "scene": scene,
            "scene_seen": scene in train_scenes if train_scenes else None,
            "phrasing": "benchmark" if sentences is not None else "held out" if held_out else "training",
        }
        start = {"robot_obs": robot_obs, "scene_obs": scene_obs}
        trials.append(Trial(chain.index, start, chain.tasks, tuple(instructions), labels))
    return trials


def single_tasks(names: Sequence[str], count: int) -> list[task_chains.Chain]:
    """`count` chains of one task (0: ten of each), tasks taking turns, each from an initial state it is possible in.

    Raises ValueError for a task that no initial state allows.
    """
    rng = np.random.default_rng(0)
    found = []
    for index, name in zip(range(count or 10 * len(names)), itertools.cycle(names)):
        possible = [c for c in task_chains.initial_conditions() if len(task_chains.successors(c, name)) == 1]
        if not possible:
            raise ValueError(
                f"{name} is possible in no initial state (it needs a block in the hand); evaluate chains instead."
            )
        found.append(task_chains.Chain(index, possible[rng.integers(len(possible))], (name,)))
    return found


def simpler_trials(task: str, count: int | None = None) -> list[Trial]:
    """`count` trials of a SimplerEnv task; None: each of its layouts once."""
    known = simpler.find_task(task)
    labels = {"scene": task}
    return [
        Trial(layout, {"layout": layout}, (task,), (known.instruction,), labels)
        for layout in range(known.layouts if count is None else count)
    ]


def simpler_criterion(task: str, *, latched: bool = False) -> SuccessCriterion:
    """The benchmark's own: success counts at the last step; `latched`: at any step, which ends the trial."""
    steps = simpler.find_task(task).max_steps
    return SuccessCriterion(max_steps=steps, completed=simpler.completed_in_each, stop_at_success=latched)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What results depend on besides environments and trials."""

    policy_name: str
    """Printed in reports, e.g. a checkpoint."""
    execution: Execution = Execution()
    criterion: SuccessCriterion = SuccessCriterion()
    conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """JSON values, what else results depend on (`filing`); with "checkpoint" among them, the policy's name is for the
    eye alone."""

    def setup(self, envs: VectorEnv) -> dict[str, Any]:
        """See `Evaluation.setup`."""
        setup = {
            "env": envs.name,
            "policy": self.policy_name,
            "execution": self.execution.label,
            "max_steps": self.criterion.max_steps,
            "stop_at_success": self.criterion.stop_at_success,
            **json.loads(json.dumps(self.conditions)),
        }
        return setup | ({"simulator": dict(envs.about)} if envs.about else {})


@dataclasses.dataclass(frozen=True)
class Share:
    """One of several processes that share the trials: each takes every `count`-th, from `index` on."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(f"index={self.index} must lie in [0, count={self.count}).")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results and what they are results of."""

    setup: Mapping[str, Any]
    """JSON values: at least `env`, `policy`, `execution`, `max_steps`, `stop_at_success`; `simulator` is what the
    environments say about themselves (`VectorEnv.about`), where they say anything."""
    results: tuple[TrialResult, ...]


def evaluate(
    policy: BatchedPolicy | None,
    envs: VectorEnv,
    trials: Sequence[Trial],
    directory: str | os.PathLike,
    settings: Settings,
    *,
    share: Share = Share(),
    films: Films | None = None,
    play: Callable[[Sequence[Trial]], Iterable[TrialResult]] | None = None,
) -> Evaluation:
    """Run those of `trials` that `directory` has no result of yet, and return what it has then.

    Args:
      trials: all trials of the evaluation, the same in every process.
      directory: one per environment, `settings` and set of trials; made if missing.
      share: which of them this process runs.
      play: plays trials by itself, with the results that this loop would have; then neither policy (None will do) nor
        films are asked for, and of `envs` only the name and what they are about.
    Raises:
      ValueError: the directory holds results of other settings or other trials, or a damaged file.
      See also `rollout.run`; what was finished before an error is kept.
    """
    if not trials:
        raise ValueError("no trials to evaluate.")
    setup = settings.setup(envs)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    done = {result.index: result for result in _stored(directory, setup)}
    for trial in trials:
        if trial.index in done:
            _check_same(trial, done[trial.index], directory)
    mine = [trial for trial in trials[share.index :: share.count] if trial.index not in done]
    if done:
        log.info("%s has %d results; %d trials to go in this process", directory, len(done), len(mine))

    if mine:
        begin, scores = time.monotonic(), []
        with bars.Bar(len(mine), "trial", "compiling simulator and policy", desc=envs.name) as bar:

            def watch(step: int) -> None:
                bar.say(f"control step {step}, {sum(scores)} tasks solved")  # no rate: what fails ends later

            if play is None:
                executed = ExecutedBatch(policy, settings.execution)
                results = rollout.run(executed, envs, mine, settings.criterion, films=films, watch=watch)
            else:
                results = iter(play(mine))
            for result in _append(directory / f"results-{share.index:03d}.jsonl", setup, results):
                scores.append(result.score)
                bar.update()
            bar.set_postfix_str(f"{sum(scores)} tasks solved", refresh=False)  # what the last trial did, too
        single = max((len(trial.tasks) for trial in mine), default=0) == 1
        found = f"{np.mean(scores):.0%} solved" if single else f"{np.mean(scores):.2f} tasks in a row"
        log.info("%s: %d trials in %d s, %s", envs.name, len(scores), time.monotonic() - begin, found)
    wanted = {trial.index for trial in trials}
    everything = load(directory)
    return dataclasses.replace(everything, results=tuple(r for r in everything.results if r.index in wanted))


def load(directory: str | os.PathLike) -> Evaluation:
    """All results in a directory, in order of trials; a trial that two processes ran counts once."""
    directory = pathlib.Path(directory)
    paths = sorted(directory.glob("results-*.jsonl"))
    setups = [setup for path in paths if (setup := _read(path)[0]) is not None]
    if not setups:
        raise FileNotFoundError(f"no results-*.jsonl with results in {directory}; run the evaluation first.")
    return Evaluation(setups[0], tuple(_stored(directory, setups[0])))


def read_setup(path: pathlib.Path) -> dict[str, Any] | None:
    """What the results in a file are results of; None: it holds none. Raises ValueError: the file is damaged."""
    return _read(path)[0]


def upstream_results(results: Sequence[TrialResult]) -> dict[str, Any]:
    """The same numbers in the layout of upstream's `results_calvin_*.json`."""
    length = max(len(result.tasks) for result in results)
    scores = [result.score for result in results]
    success: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    for result in results:
        total.update(result.tasks[: len(result.success)])
        success.update(task for task, done in zip(result.tasks, result.success) if done)
    return {
        "null": {  # upstream stores under the training epoch, which its evaluation does not know
            "avg_seq_len": sum(scores) / len(scores),
            "chain_sr": {
                str(count): sum(score >= count for score in scores) / len(scores) for count in range(1, length + 1)
            },
            "task_info": {task: {"success": success[task], "total": total[task]} for task in total},
        }
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _stored(directory: pathlib.Path, setup: Mapping[str, Any]) -> list[TrialResult]:
    """Results in the directory, which must all be of this setup."""
    found: dict[int, TrialResult] = {}
    for path in sorted(directory.glob("results-*.jsonl")):
        theirs, results = _read(path)
        if theirs is None:
            continue
        eye = {"policy"} if "checkpoint" in setup else set()
        differing = json_files.differences(theirs, setup, sorted({*theirs, *setup} - eye))
        if differing:
            raise ValueError(f"{path} has results of another setup ({differing}); use one directory for each.")
        for result in results:
            found.setdefault(result.index, result)
    return [found[index] for index in sorted(found)]


def _read(path: pathlib.Path) -> tuple[dict[str, Any] | None, list[TrialResult]]:
    """Setup and results of one file."""
    rows = json_lines.read(
        path,
        lambda number, row: row["setup"] if number == 1 else _from_json(row),
        expected="a result",
        remedy="Delete the line to run that trial again, or the file to run all of its trials again.",
    )
    return (rows[0], rows[1:]) if rows else (None, [])


def _append(path: pathlib.Path, setup: Mapping[str, Any], results: Iterator[TrialResult]) -> Iterator[TrialResult]:
    """Pass results on, each after it is in the file."""
    if _read(path)[0] is None:
        json_lines.append(path, {"setup": dict(setup)})
    for result in results:
        try:
            json_lines.append(path, dataclasses.asdict(result))
        except OSError as error:
            error.add_note(f"Trial {result.index} could not be stored in {path}; results before it are kept.")
            raise
        yield result


def _from_json(row: Mapping[str, Any]) -> TrialResult:
    older = {"uncertainty": ()}
    values = {field.name: (older | row)[field.name] for field in dataclasses.fields(TrialResult)}
    values["uncertainty"] = tuple(map(tuple, values["uncertainty"]))
    if type(values["index"]) is not int or any(type(solved) is not bool for solved in values["success"]):
        raise TypeError(f"index={values['index']!r}, success={values['success']!r}: expected int and list of bool")
    return TrialResult(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def _check_same(trial: Trial, result: TrialResult, directory: pathlib.Path) -> None:
    expected = (trial.tasks, trial.instructions, dict(trial.labels))
    stored = (result.tasks, result.instructions, dict(result.labels))
    for name, here, there in zip(("tasks", "instructions", "labels"), expected, stored):
        if here != there:
            raise ValueError(
                f"{directory} has a result for trial {trial.index} with other {name}: {there} there, {here} here; use "
                "one directory for each set of trials."
            )
