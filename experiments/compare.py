"""Checkpoints against each other, and against what their numbers could hide: one page, with everything on it.

    python -m experiments.compare --checkpoints runs/a runs/b --out comparison
    python -m experiments.compare --checkpoints runs/a/checkpoints/* --out choice --conditions usual starts
    python -m experiments.compare --checkpoints robovlms_jax/demo/twin robovlms_jax/demo/twin --weights stored int8

All checkpoints run the same trials: as `evaluate` asks them, with blocks placed anew, with unseen, empty or wrong
sentences, with other cameras, light, surfaces and things on the table. Differences come with McNemar's exact test,
intervals and how many trials they would need; of several steps, with the bias of choosing the best.

Tasks, scene, pictures and execution are those of the checkpoints' own rollouts, unless flags say otherwise; checkpoints
that differ in them are refused. Results are kept trial by trial in OUT: the same command goes on where it was stopped,
and a further checkpoint adds to what is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from experiments import evaluate, evaluation_settings
from robovlms_jax import cli
from robovlms_jax.control.execution import Execution
from robovlms_jax.control.robot import CALVIN
from robovlms_jax.envs import looks, vector
from robovlms_jax.envs.calvin import adapter as calvin
from robovlms_jax.envs.calvin import task_chains
from robovlms_jax.envs.calvin import tasks as calvin_tasks
from robovlms_jax.evaluation import chains, comparison, conditions
from robovlms_jax.evaluation.report import comparison as comparison_report
from robovlms_jax.evaluation.rollout import SuccessCriterion
from robovlms_jax.playtable import appearance
from robovlms_jax.playtable.env import PlayTables
from robovlms_jax.runs import load, logs, played, robots
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import checkpoints, seals

log = logging.getLogger(__name__)

STORED = "stored"
"""Of `weights`: the type that the checkpoint computes in."""

OWN = ("tasks", "scene", "max_steps", "image_size", "execution")
"""Settings that a checkpoint's own run decides (`played.Played.asking`)."""


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Which checkpoints, where, and what is asked of them."""

    checkpoints: tuple[str, ...]
    """Run directories or checkpoints/<step> folders, two or more; one alone is only held against the conditions."""
    out: str = "comparison"
    """Where results and the page go: comparison.html, comparison.md, comparison.json."""
    env: Literal["playtable", "calvin"] = "playtable"
    """playtable: the embedded simulator (its numbers are not CALVIN's). calvin: a checkout of the real one."""
    conditions: tuple[str, ...] = ()
    """Of usual, starts, unseen, empty, shuffled, other_task, distractors, camera, lighting, texture. Empty: all that
    the simulator offers."""
    trials: int = 100
    """Of each condition: the first of CALVIN's 1000 chains, or of single tasks, taking turns."""
    tasks: tuple[str, ...] = ()
    """Single tasks instead of chains. Left out: those of the checkpoints' own rollouts."""
    ask_chains: bool = False
    """Ask chains although the checkpoints' own rollouts asked single tasks."""
    scene: Literal["A", "B", "C", "D"] = "D"
    max_steps: int = 360
    """Control steps per task."""
    execution: Execution = Execution()
    weights: tuple[str, ...] = ()
    """How the backbone's parameters are kept: for each checkpoint stored, float32, bfloat16, int8 or w8a8. Empty:
    stored, the type that each computes in."""
    seed: int = 0
    """Of the placed blocks and of the exchanged sentences."""
    processes: int = 16
    """Environments side by side: tables in one jitted call (playtable), or simulator processes (calvin)."""
    image_size: tuple[int, int] = (200, 84)
    """Pixels of playtable's static and wrist camera; what the training data had."""
    calvin_root: str = ""
    """Checkout of mees/calvin or mees/calvin_env (docs/calvin.md)."""
    simulator_python: str = sys.executable
    """Interpreter for the simulator's processes, if this one lacks its packages."""

    def __post_init__(self):
        if not self.checkpoints:
            raise ValueError("checkpoints names none; pass run directories or checkpoints/<step> folders.")
        for field in ("trials", "processes", "max_steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")
        known = (STORED, *get_args(load.Weights))
        if self.weights and len(self.weights) != len(self.checkpoints):
            raise ValueError(
                f"weights has {len(self.weights)} words for {len(self.checkpoints)} checkpoints; one for each."
            )
        unknown = {
            "weights": (sorted(set(self.weights) - set(known)), known),
            "conditions": (sorted(set(self.conditions) - set(conditions.CONDITIONS)), conditions.CONDITIONS),
            "tasks": (sorted(set(self.tasks) - set(calvin_tasks.TASKS)), calvin_tasks.TASKS),
        }
        for field, (names, allowed) in unknown.items():
            if names:
                raise ValueError(f"{field} has unknown {names}; known: {', '.join(allowed)}.")
        refused = {n: why for n in self.conditions if (why := conditions.offered(self.env)[n])}
        if refused:
            raise ValueError(f"env {self.env} has no condition {' '.join(refused)}: {'; '.join(refused.values())}.")
        if self.env == "calvin" and not self.calvin_root:
            raise ValueError("env calvin needs calvin_root, a checkout of mees/calvin_env (see docs/calvin.md).")
        if self.tasks and self.ask_chains:
            raise ValueError("ask_chains asks chains instead of single tasks, and tasks names some; leave one out.")


@dataclasses.dataclass(frozen=True)
class _Policy:
    """A checkpoint as it takes part. name: for the page. label: names its results, whatever path it lies under."""

    name: str
    label: str
    directory: pathlib.Path
    weights: load.Weights | None
    settings: ExperimentConfig


def compare(config: CompareConfig, typed: Sequence[str] = OWN) -> pathlib.Path:
    """Run what is missing and write the page; returns its path.

    Args:
      typed: names of the settings `OWN` that somebody chose, and in which checkpoints may therefore differ.
    """
    policies = _policies(config)
    _require_alike(policies, typed, config.env)
    offered = conditions.offered(config.env)
    names = [name for name in config.conditions or offered if not offered[name]]
    questions, out = _questions(config), pathlib.Path(config.out)
    entries: list[comparison.Entry] = []
    pictures: dict[str, np.ndarray] = {}
    with _Simulators(config) as simulators:
        for policy in policies:
            found = {}
            acting = None
            for name in names:
                trials = questions.trials(name, config.seed)
                envs = simulators.of(name, questions)
                if name not in pictures and name in (conditions.USUAL, *looks.KINDS):
                    envs.reset([0], [trials[0].start])
                    pictures[name] = envs.observe([0])[0].images["static"]
                if acting is None:
                    acting = load.load_batched_policy(policy.directory, simulators.size, weights=policy.weights)
                    acting.encode_text = conditions.silenced(acting.encode_text)
                log.info("%s, condition %s: %d trials", policy.name, name, len(trials))
                folder = out / "results" / policy.label / name
                found[name] = chains.evaluate(acting, envs, trials, folder, _settings(config, policy, name))
            entries.append(comparison.Entry(policy.name, found))
    return comparison_report.write_report(
        out, entries, left_out={n: why for n, why in offered.items() if why}, pictures=pictures, notes=_notes(config)
    )


def _policies(config: CompareConfig) -> list[_Policy]:
    """Raises FileNotFoundError, ValueError: what is no checkpoint; the same one twice in the same form."""
    found: list[_Policy] = []
    for place, path in enumerate(config.checkpoints):
        directory = checkpoints.locate(path)
        kept = config.weights[place] if config.weights else STORED
        label = seals.identity(directory).label + ("" if kept == STORED else f"-{kept}")
        name = f"{checkpoints.run_of(directory).name} {seals.identity(directory).step}"
        name += "" if kept == STORED else f" {kept}"
        for other in found:
            if other.label == label:
                raise ValueError(
                    f"checkpoints names the same policy twice: {path} and {other.directory} are both {label}. Leave "
                    "one out, or give them different weights."
                )
        weights = None if kept == STORED else kept
        found.append(_Policy(name, label, directory, weights, load.load_config(directory)))
    twice = {policy.name for policy in found if [other.name for other in found].count(policy.name) > 1}
    return [dataclasses.replace(p, name=f"{p.name} ({p.label})") if p.name in twice else p for p in found]


def _require_alike(policies: Sequence[_Policy], typed: Sequence[str], env: str = "playtable") -> None:
    """Raises ValueError: a robot, or a setting of the own rollouts that `env` reads, differs; names both."""
    first = policies[0]
    for other in policies:
        robots.require_same(other.settings.policy, CALVIN, f"{other.directory}: this simulator is driven as")
        robots.require_same(
            other.settings.policy, first.settings.policy.robot, f"{other.directory} does not go with {first.directory}:"
        )
        for field in played.of(first.settings).asking(env):
            here, there = (played.of(p.settings).asking(env)[field] for p in (first, other))
            if here != there and field not in typed:
                raise ValueError(
                    f"the checkpoints' own runs differ in {field}: {first.directory} has {_say(here)}, "
                    f"{other.directory} has {_say(there)}. Compare those of one kind, or say --{field} for all of them."
                )


def _say(value: Any) -> str:
    if isinstance(value, Execution):
        return value.label
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _questions(config: CompareConfig) -> conditions.Questions:
    asked = chains.single_tasks(config.tasks, config.trials) if config.tasks else task_chains.official_chains()
    settings = evaluation_settings.EvaluateConfig("", env=config.env, calvin_root=config.calvin_root)
    sentences = evaluate.benchmark_sentences(settings)
    return conditions.Questions(asked[: config.trials], config.scene, appearance.button_x_m(config.scene), sentences)


def _settings(config: CompareConfig, policy: _Policy, condition: str) -> chains.Settings:
    """What the stored results of one condition depend on."""
    protocol = {
        **{"condition": condition, "scene": config.scene, "tasks": list(config.tasks), "seed": config.seed},
        "execution": config.execution.conditions(),
    }
    depends = {"checkpoint": policy.label, "protocol": protocol}
    if config.env == "playtable":
        depends["image_size"] = list(config.image_size)
    judge = {"completed": calvin.completed_in_each} if config.env == "calvin" else {}
    criterion = SuccessCriterion(max_steps=config.max_steps, **judge)
    return chains.Settings(policy.name, config.execution, criterion, depends)


def _notes(config: CompareConfig) -> list[str]:
    asked = f"single tasks ({', '.join(config.tasks)})" if config.tasks else "CALVIN's chains"
    lines = [
        f"{config.trials} trials of every condition: {asked}, scene {config.scene}, at most {config.max_steps} steps "
        f"per task, execution {config.execution.label}, seed {config.seed}."
    ]
    if config.env == "playtable":
        lines.append("The embedded simulator: these are not CALVIN's numbers.")
    return lines


class _Simulators(contextlib.ExitStack):
    """Made when first asked for; of PlayTable one for each kind of look: usual pictures are then `evaluate`'s own."""

    def __init__(self, config: CompareConfig):
        super().__init__()
        self._config, self._made = config, {}
        self.size = min(config.processes, config.trials)

    def of(self, condition: str, questions: conditions.Questions) -> vector.VectorEnv:
        config = self._config
        kind = condition if config.env == "playtable" and condition in looks.KINDS else ""
        if kind not in self._made:
            sizes: Mapping[str, int] = dict(zip(("static", "wrist"), config.image_size, strict=True))
            if config.env == "playtable":
                known = questions.looks(kind) if kind else ()
                tables = PlayTables(config.scene, self.size, image_sizes=sizes, known_looks=known)
                self._made[kind] = tables
            else:
                asked = ("env", "scene", "calvin_root", "simulator_python")
                shared = {name: getattr(config, name) for name in asked} | {"processes": self.size}
                settings = evaluation_settings.EvaluateConfig(config.checkpoints[0], **shared)
                self._made[kind] = self.enter_context(evaluate.environments(settings))
        return self._made[kind]


def of_checkpoints(arguments: Sequence[str]) -> CompareConfig | type[CompareConfig]:
    """The settings that a command line starts from: what the first checkpoint's run says.

    Raises FileNotFoundError, ValueError: it cannot be read.
    """
    paths = list(_words_after(arguments, "checkpoints"))
    if not paths or {"--help", "-h"} & set(arguments):
        return CompareConfig
    run = load.load_config(paths[0])
    start = CompareConfig(tuple(paths))
    env = cli.value_of(arguments, "env") or start.env
    chosen = played.of(run).asking(env)
    if cli.names_flag(arguments, "ask_chains"):
        del chosen["tasks"]
    if env != "playtable":
        chosen["processes"] = 2
    elif run.rollouts.trials:
        chosen["processes"] = min(run.rollouts.tables, run.rollouts.trials)
    return dataclasses.replace(start, **chosen)


def _words_after(arguments: Sequence[str], flag: str) -> Iterator[str]:
    taking = False
    for argument in arguments:
        if argument.startswith("--"):
            taking = argument == f"--{flag}"
        elif taking:
            yield argument


def main() -> None:
    logs.to_stderr(absl=logging.ERROR)
    arguments = sys.argv[1:]
    try:
        start = of_checkpoints(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    config = cli.read(start, description=__doc__)
    typed = [n for n in OWN if cli.names_flag(arguments, n) or any(a.startswith(f"--{n}.") for a in arguments)]
    evaluate.reported(lambda: compare(config, typed + (["tasks"] if config.ask_chains else [])))


if __name__ == "__main__":
    main()
