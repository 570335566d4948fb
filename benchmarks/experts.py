"""How reliable PlayTable's scripted experts are.   python -m benchmarks.experts --trials 100 --chains 1000

Every task from random starts in every scene, then CALVIN's chains, nothing rendered; what is done is the task checker's
word. Prints JSON and, with `--markdown FILE`, writes a table. A trial is a list of tasks, each begun in the state the
last one left: a chain, or a single task; tasks that begin with a block in the hand are preceded by a lift, which only
counts by having to succeed. Tables whose trial is over are given the next one, so none waits for the slowest.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from benchmarks import expert_trials, machine
from robovlms_jax import cli
from robovlms_jax.envs.calvin import task_chains, tasks, walking
from robovlms_jax.evaluation import rollout_metrics
from robovlms_jax.evaluation.rollout import TrialResult
from robovlms_jax.parallel import cpu
from robovlms_jax.playtable import env
from robovlms_jax.playtable.experts import plans, waypoints
from robovlms_jax.playtable.mechanics import bodies, physics
from robovlms_jax.playtable.scene import (
    SCENES,
    Scene,
    stack_scenes,
)
from robovlms_jax.runs import logs

AIM_RATE, AIM_LENGTH = 0.95, 4.7
"""Success per task from random starts, and tasks in a row of the 1000 chains."""

_STRIDE = 16  # steps between two looks at who is done


@dataclasses.dataclass(frozen=True)
class Args:
    """Try the experts."""

    trials: int = 24
    """Per task, taking turns through the scenes; 0: none."""
    chains: int = 100
    """How many of CALVIN's 1000 chains (the first ones); 0: none."""
    chain_scene: str = "D"
    tasks: tuple[str, ...] = plans.TASKS
    """Which tasks to try from random starts."""
    scenes: tuple[str, ...] = SCENES
    """Tables of the random starts."""
    max_steps: int = plans.MAX_STEPS
    """Control steps an expert has for a task."""
    tables: int = 64
    """Simulated side by side."""
    seed: int = 0
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""
    markdown: pathlib.Path | None = None
    """Write a table to this file."""

    def __post_init__(self):
        if min(self.tables, self.max_steps) < 1 or min(self.trials, self.chains) < 0:
            raise ValueError(f"tables={self.tables}, max_steps={self.max_steps} must be at least 1, counts at least 0.")
        unknown = sorted({*self.scenes, self.chain_scene} - set(SCENES)) + sorted(set(self.tasks) - set(plans.TASKS))
        if unknown or not self.scenes:
            raise ValueError(f"{unknown} unknown; scenes: {', '.join(SCENES)}; tasks: {', '.join(plans.TASKS)}.")


def main(args: Args) -> None:
    """Print the result as JSON."""
    begin = time.perf_counter()
    result: dict[str, Any] = {}
    if args.trials:
        trials = expert_trials.random_trials(args.tasks, args.scenes, args.trials, args.seed)
        results = run(trials, args.max_steps, args.tables, args.seed)
        result["tasks"] = summarize_tasks(args.tasks, args.scenes, results)
    if args.chains:
        chains = task_chains.official_chains()[: args.chains]
        results = run(expert_trials.chain_trials(chains, args.chain_scene), args.max_steps, args.tables, args.seed)
        result["chains"] = summarize_chains(results) | {"scene": args.chain_scene}
    result["seconds"] = time.perf_counter() - begin
    hidden = ("out", "markdown", "tasks")
    result["settings"] = {name: value for name, value in dataclasses.asdict(args).items() if name not in hidden}
    machine.report(result, args.out)
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(result))


# ---------------------------------------------------------------------------------------------------------------------
# Running them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Attempts:
    """One task under way on each of B tables; `start` is the info it began with, `limit` the steps it may take."""

    which: jax.Array
    state: bodies.State
    number: jax.Array
    plan: walking.Plan
    progress: waypoints.Progress
    start: Any
    done: jax.Array
    steps: jax.Array
    limit: jax.Array


@jax.jit
def _begin(
    scenes: Scene, which: jax.Array, state: bodies.State, number: jax.Array, keys: jax.Array, limit: jax.Array
) -> _Attempts:
    def one(i, state, number, key, limit):
        scene = env.pick(scenes, i)
        plan, start = plans.plan(scene, state, number, key), physics.info(scene, state)
        return _Attempts(i, state, number, plan, waypoints.begin(), start, jnp.bool_(False), jnp.int32(0), limit)

    return jax.vmap(one)(which, state, number, keys, limit)


@functools.partial(cpu.jit, kind=env.STEP_KIND)
def _advance(scenes: Scene, attempts: _Attempts) -> _Attempts:
    """`_STRIDE` steps; a table stands still from the step at which its task is done."""
    here = jax.tree.map(lambda leaf: leaf[attempts.which], scenes)

    def is_done(scene: Scene, now: _Attempts) -> jax.Array:
        return tasks.conditions(now.start, physics.info(scene, now.state))[now.number]

    def step(_: int, now: _Attempts) -> _Attempts:
        actions, progress = jax.vmap(waypoints.act)(now.plan, now.progress, now.state)
        state = physics.step_tables(here, now.state, actions)
        then = dataclasses.replace(now, state=state, progress=progress, steps=now.steps + 1)
        then = dataclasses.replace(then, done=jax.vmap(is_done)(here, then))
        return env.choose(~now.done & (now.steps < now.limit), then, now)

    return jax.lax.fori_loop(0, _STRIDE, step, attempts)


def run(trials: Sequence[expert_trials.Trial], max_steps: int, tables: int, seed: int) -> list[TrialResult]:
    """Let the experts do all trials, `tables` at a time; results in the order of the trials."""
    scenes = stack_scenes(SCENES)
    tables = min(tables, len(trials))
    waiting = collections.deque(range(len(trials)))
    outcomes: list[list[tuple[bool, int]]] = [[] for _ in trials]
    slots: list[int | None] = [None] * tables
    attempts: _Attempts | None = None
    keys = functools.partial(jax.random.fold_in, jax.random.key(seed))
    drawn = 0
    with tqdm.tqdm(total=len(trials), unit="trial") as bar:
        while True:
            fresh = [slot for slot, trial in enumerate(slots) if trial is None][: len(waiting)]
            for slot in fresh:
                slots[slot] = waiting.popleft()
            live = np.array([trial is not None for trial in slots])
            if not live.any():
                break
            starting = fresh + ([] if attempts is None else _next_tasks(slots, attempts, fresh))
            if starting:
                doing = [trials[trial if trial is not None else 0] for trial in slots]
                which = np.array([trial.scene for trial in doing])
                number = np.array(
                    [t.tasks[len(outcomes[i]) if i is not None else 0] for t, i in zip(doing, slots)], np.int32
                )
                robot, table = (np.stack([trial[k] for trial in doing]).astype(np.float32) for k in (2, 3))
                state = env.reset_batch(env.pick(scenes, which), robot, table)
                is_fresh, begins = np.isin(np.arange(tables), fresh), np.isin(np.arange(tables), starting)
                if attempts is not None:
                    state = env.choose(is_fresh, state, attempts.state)
                limit = np.where(live, max_steps, 0).astype(np.int32)
                begun = _begin(scenes, which, state, number, jax.random.split(keys(drawn), tables), limit)
                attempts = begun if attempts is None else env.choose(begins | ~live, begun, attempts)
                drawn += 1
            attempts = _advance(scenes, attempts)
            done, steps = np.asarray(attempts.done), np.asarray(attempts.steps)
            for slot in np.flatnonzero(live & (done | (steps >= max_steps))):
                trial = slots[slot]
                outcomes[trial].append((bool(done[slot]), int(steps[slot])))
                if not done[slot] or len(outcomes[trial]) == len(trials[trial].tasks):
                    slots[slot] = None
                    bar.update()
    return [_result(i, trial, outcome) for i, (trial, outcome) in enumerate(zip(trials, outcomes))]


def _next_tasks(slots: Sequence[int | None], attempts: _Attempts, fresh: Iterable[int]) -> list[int]:
    """Tables that go on in the state they are in: their last task is done, their trial is not."""
    done = np.asarray(attempts.done)
    return [slot for slot, trial in enumerate(slots) if trial is not None and done[slot] and slot not in set(fresh)]


def _result(index: int, trial: expert_trials.Trial, outcome: Sequence[tuple[bool, int]]) -> TrialResult:
    names = tuple(plans.TASKS[number] for number in trial.tasks)
    success, steps = zip(*outcome)
    return TrialResult(index, names, names, success, steps, {"scene": SCENES[trial.scene]})


# ---------------------------------------------------------------------------------------------------------------------
# What came of it


def summarize_tasks(names: Sequence[str], scenes: Sequence[str], results: Sequence[TrialResult]) -> dict[str, Any]:
    """Per task: attempts, successes, 95 % interval, mean steps of the successes, and successes by scene."""
    rows: dict[str, Any] = {}
    for name in names:
        mine = [r for r in results if r.tasks[-1] == name and len(r.success) == len(r.tasks)]
        rate = rollout_metrics.Rate(sum(r.success[-1] for r in mine), len(mine))
        by_scene = {scene: [r.success[-1] for r in mine if r.labels["scene"] == scene] for scene in scenes}
        steps = [r.steps[-1] for r in mine if r.success[-1]]
        rows[name] = {
            "successes": rate.successes,
            "attempts": rate.attempts,
            "rate": rate.value,
            "interval": rate.interval,
            "mean_steps": float(np.mean(steps)) if steps else None,
            "by_scene": {scene: [sum(oks), len(oks)] for scene, oks in by_scene.items()},
        }
    return rows


def summarize_chains(results: Sequence[TrialResult]) -> dict[str, Any]:
    summary = rollout_metrics.summarize(results)
    return {
        "chains": summary.trials,
        "average_length": summary.average_length.value,
        "interval": [summary.average_length.low, summary.average_length.high],
        "in_a_row": [rate.value for rate in summary.in_a_row],
        "tasks": {name: [rate.successes, rate.attempts] for name, rate in summary.per_task.items()},
        "steps_per_success": summary.steps_per_success,
        "failed": {r.index: r.tasks[len(r.success) - 1] for r in results if not r.success[-1]},
    }


def markdown(result: dict[str, Any]) -> str:
    """One row per task, weak ones bold, and the chains' numbers below."""
    scenes = result["settings"]["scenes"]
    in_chains = result.get("chains", {}).get("tasks", {})
    head = [
        f"| task | solved | 95 % interval | {' | '.join(scenes)} | steps | in chains |",
        "|---" * (5 + len(scenes)) + "|",
    ]
    lines = head if "tasks" in result else []
    for name, row in result.get("tasks", {}).items():
        rate = f"{row['rate']:.1%}" if row["rate"] >= AIM_RATE else f"**{row['rate']:.1%}**"
        low, high = row["interval"]
        by_scene = " | ".join("{}/{}".format(*row["by_scene"][scene]) for scene in scenes)
        steps = "" if row["mean_steps"] is None else f"{row['mean_steps']:.0f}"
        chain = "{}/{}".format(*in_chains[name]) if name in in_chains else ""
        lines.append(f"| `{name}` | {rate} | {low:.1%} to {high:.1%} | {by_scene} | {steps} | {chain} |")
    if "chains" in result:
        chains = result["chains"]
        shares = ", ".join(f"{share:.1%}" for share in chains["in_a_row"])
        low, high = chains["interval"]
        lines += [
            "",
            f"{chains['chains']} chains in {chains['scene']}: {chains['average_length']:.3f} tasks in a row "
            f"(95 % interval {low:.3f} to {high:.3f}); at least 1 to 5: {shares}.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logs.to_stderr()
    main(cli.read(Args))
