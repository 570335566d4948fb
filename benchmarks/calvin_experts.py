"""How reliable the scripted experts are in the real CALVIN simulator.

    python -m benchmarks.calvin_experts --calvin_root calvin --trials 20 --chains 200

Every task from random initial conditions in every scene, then CALVIN's chains, nothing rendered; what is done is the
word of CALVIN's checker. A task that no initial condition allows (a block in the hand, in the drawer, on another) is
preceded by the shortest list of tasks that leads to it, which only counts by having to succeed. Prints JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from benchmarks import experts, machine
from robovlms_jax import cli
from robovlms_jax.envs import process
from robovlms_jax.envs.calvin import adapter, initial_states, task_chains, tasks, version
from robovlms_jax.evaluation.rollout import TrialResult
from robovlms_jax.playtable.real import recording
from robovlms_jax.runs import logs

log = logging.getLogger(__name__)

_LONGEST_LEAD = 3
_DRAWS = 5  # starts to try when what leads to a task fails


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Try the experts in the real simulator."""

    calvin_root: str
    """Checkout of mees/calvin or mees/calvin_env."""
    trials: int = 20
    """Per task and scene; 0: none."""
    chains: int = 100
    """How many of CALVIN's 1000 chains (the first ones); 0: none."""
    chain_scene: str = "D"
    tasks: tuple[str, ...] = tuple(tasks.TASKS)
    scenes: tuple[str, ...] = tuple(initial_states.SCENES)
    start_spread: float = 0.0
    """Metres by which the hand begins away from CALVIN's resting pose, at most."""
    max_steps: int = 360
    processes: int = 2
    simulator_python: str = sys.executable
    seed: int = 0
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""


class Start(NamedTuple):
    """A symbolic scene, and tasks that lead from it to where another is possible."""

    condition: task_chains.Condition
    lead: tuple[str, ...]


def leads(condition: task_chains.Condition, task: str, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The shortest lists of tasks, of at most _LONGEST_LEAD, after which `task` is possible; empty: there are none."""
    level: list[tuple[task_chains.Condition, tuple[str, ...]]] = [(condition, ())]
    for _ in range(_LONGEST_LEAD + 1):
        found = [lead for now, lead in level if len(task_chains.successors(now, task)) == 1]
        if found:
            return found
        following = (
            (after[0], (*lead, name))
            for now, lead in level
            for name in names
            if len(after := task_chains.successors(now, name)) == 1 and after[0] != now
        )
        level = list({tuple(now.values()): (now, lead) for now, lead in following}.values())
    return []


def draw(task: str, rng: np.random.Generator) -> Start:
    """A random start for a task; those that need no lead come first, so most tasks have none."""
    conditions = task_chains.initial_conditions()
    ready = [c for c in conditions if len(task_chains.successors(c, task)) == 1]
    if ready:
        return Start(ready[rng.integers(len(ready))], ())
    while True:
        condition = conditions[rng.integers(len(conditions))]
        if possible := leads(condition, task, tuple(tasks.TASKS)):
            return Start(condition, possible[rng.integers(len(possible))])


def single(every: recording.Stages, scene: str, task: str, number: int, args: Args) -> tuple[bool, int] | None:
    """(done, steps) of one task; None: what leads to it failed again and again."""
    rng = np.random.default_rng([args.seed, number])

    def use(env: process.ProcessEnv) -> tuple[bool, int] | None:
        for _ in range(_DRAWS):
            start = draw(task, rng)
            results = play(every, env, scene, (start.condition, (*start.lead, task)), rng, args.start_spread)
            if len(results) == len(start.lead) + 1:
                return results[-1]
        return None

    return every.with_stage(scene, use)


def play(
    every: recording.Stages,
    env: process.ProcessEnv,
    scene: str,
    chain: tuple[task_chains.Condition, Sequence[str]],
    rng: np.random.Generator,
    spread: float = 0.0,
) -> list[tuple[bool, int]]:
    """(done, steps) of the tasks of a chain up to the first that fails."""
    condition, names = chain
    offset = spread * np.array([1.0, 0.25, 0.25]) * rng.uniform(-1.0, 1.0, size=3)
    situation = recording.ask(env, "begin", *initial_states.initial_state(condition, scene), offset)
    results = []
    for name in names:
        played, situation = every.attempt(env, scene, situation, name, rng, hold=0)
        results.append((played.done, played.steps))
        if not played.done:
            break
    return results


def main(args: Args) -> None:
    """Print the result as JSON."""
    begin = time.perf_counter()
    config = recording.RealRecordConfig(
        calvin_root=args.calvin_root,
        out="nowhere",  # nothing is recorded
        max_steps=args.max_steps,
        processes=args.processes,
        simulator_python=args.simulator_python,
    )
    result: dict[str, Any] = {"calvin_env": version.commit(adapter.find_checkout(args.calvin_root))}
    with recording.stages(config, [*args.scenes, args.chain_scene]) as every:
        if args.trials:
            result["tasks"] = _tasks(every, args)
        if args.chains:
            result["chains"] = _chains(every, args) | {"scene": args.chain_scene}
    result["seconds"] = time.perf_counter() - begin
    hidden = ("out", "tasks", "calvin_root", "simulator_python")
    result["settings"] = {name: value for name, value in dataclasses.asdict(args).items() if name not in hidden}
    machine.report(result, args.out)


def _tasks(every: recording.Stages, args: Args) -> dict[str, Any]:
    wanted = list(itertools.product(args.scenes, args.tasks, range(args.trials)))
    found = every.side_by_side(lambda i: single(every, *wanted[i][:2], i, args), range(len(wanted)))
    outcomes = zip(wanted, tqdm.tqdm(found, total=len(wanted), unit="trial", mininterval=10))
    results = [
        TrialResult(i, (task,), (task,), (outcome[0],), (outcome[1],), {"scene": scene})
        for i, ((scene, task, _), outcome) in enumerate(outcomes)
        if outcome is not None
    ]
    return experts.summarize_tasks(args.tasks, args.scenes, results)


def _chains(every: recording.Stages, args: Args) -> dict[str, Any]:
    chains = task_chains.official_chains()[: args.chains]

    def one(i: int) -> TrialResult:
        rng = np.random.default_rng([args.seed, i])
        what = chains[i].condition, chains[i].tasks
        results = every.with_stage(args.chain_scene, lambda env: play(every, env, args.chain_scene, what, rng))
        done, steps = zip(*results)
        return TrialResult(i, chains[i].tasks, chains[i].tasks, done, steps, {})

    results = list(tqdm.tqdm(every.side_by_side(one, range(len(chains))), total=len(chains), mininterval=10))
    return experts.summarize_chains(results)


if __name__ == "__main__":
    logs.to_stderr()
    main(cli.read(Args, description=__doc__))
