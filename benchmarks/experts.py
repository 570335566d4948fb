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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from benchmarks import machine, starts
from robovlms_jax import cli
from robovlms_jax.envs.calvin import initial_states, task_chains, tasks
from robovlms_jax.evaluation import rollout_metrics
from robovlms_jax.evaluation.rollout import TrialResult
from robovlms_jax.playtable import env
from robovlms_jax.playtable.experts import plans, waypoints
from robovlms_jax.playtable.mechanics import bodies, contacts, physics, pushing
from robovlms_jax.playtable.scene import (
    BLOCKS,
    BUTTON,
    DRAWER,
    DRAWER_FLOOR_M,
    SCENES,
    SLIDER,
    SWITCH,
    Scene,
    stack_scenes,
)
from robovlms_jax.runs import logs

AIM_RATE, AIM_LENGTH = 0.95, 4.7
"""Success per task from random starts, and tasks in a row of the 1000 chains."""

_CANDIDATES = 32  # random starts to choose from
_STRIDE = 16  # steps between two looks at who is done
_LIFTS = tuple(plans.TASKS.index(f"lift_{color}_block_table") for color in BLOCKS)
_IN_HAND = ("place_in_slider", "place_in_drawer", "stack_block")


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


class Trial(NamedTuple):
    """Task numbers to do in a row in scene number `scene`, from robot_obs float[15] and scene_obs float[24]."""

    scene: int
    tasks: tuple[int, ...]
    robot_obs: np.ndarray
    scene_obs: np.ndarray


def main(args: Args) -> None:
    """Print the result as JSON."""
    begin = time.perf_counter()
    result: dict[str, Any] = {}
    if args.trials:
        trials = random_trials(args.tasks, args.scenes, args.trials, args.seed)
        result["tasks"] = summarize_tasks(args.tasks, trials, run(trials, args.max_steps, args.tables, args.seed))
    if args.chains:
        chains = task_chains.official_chains()[: args.chains]
        results = run(chain_trials(chains, args.chain_scene), args.max_steps, args.tables, args.seed)
        result["chains"] = summarize_chains(results) | {"scene": args.chain_scene}
    result["seconds"] = time.perf_counter() - begin
    hidden = ("out", "markdown", "tasks")
    result["settings"] = {name: value for name, value in dataclasses.asdict(args).items() if name not in hidden}
    machine.report(result, args.out)
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(result))


# ---------------------------------------------------------------------------------------------------------------------
# Trials


def chain_trials(chains: Sequence[task_chains.Chain], scene: str) -> list[Trial]:
    return [
        Trial(
            SCENES.index(scene),
            tuple(map(plans.TASKS.index, chain.tasks)),
            *initial_states.initial_state(chain.condition, scene),
        )
        for chain in chains
    ]


def random_trials(names: Sequence[str], scenes: Sequence[str], count: int, seed: int) -> list[Trial]:
    """`count` trials of each task, from states in which it is possible."""
    wanted = [(scenes[i % len(scenes)], name) for name in names for i in range(count)]
    which = np.array([SCENES.index(scene) for scene, _ in wanted])
    numbers = np.array([plans.TASKS.index(name) for _, name in wanted])
    keys = jax.random.split(jax.random.key(seed), len(wanted))
    robot, table, lead, found = map(np.asarray, _draw_all(stack_scenes(SCENES), which, numbers, keys))
    missing = sorted({wanted[i] for i in np.flatnonzero(~found)})
    if missing:
        raise RuntimeError(f"no start found in which these are possible: {missing}; try another seed.")
    leads = [(int(first),) if first >= 0 else () for first in lead]
    return [Trial(*row) for row in zip(which, ((*a, int(b)) for a, b in zip(leads, numbers)), robot, table)]


@jax.jit
def _draw_all(scenes: Scene, which: jax.Array, numbers: jax.Array, keys: jax.Array) -> tuple[jax.Array, ...]:
    def one(args):
        i, number, key = args
        return _draw(env.pick(scenes, i), number, key)

    return jax.lax.map(one, (which, numbers, keys))


def _draw(scene: Scene, number: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
    """A start in which task `number` is possible: robot_obs, scene_obs, the lift to begin with (-1 none), and whether
    one was found."""
    first, *keys = jax.random.split(key, 1 + _CANDIDATES)
    robot, _ = starts.sample(scene, first)
    tables, lead, fits = jax.vmap(lambda key: _candidate(scene, number, robot, key))(jnp.stack(keys))
    best = jnp.argmax(fits)
    return robot, tables[best], lead[best], fits[best]


def _candidate(scene: Scene, number: jax.Array, robot: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
    """A random table, set up for the task as far as `starts.sample` leaves it to chance."""
    keys = jax.random.split(key, 4)
    _, table = starts.sample(scene, keys[0])
    ends = jnp.asarray(_MECHANISMS)[number]  # of slider, drawer, button and switch
    table = table.at[:4].set(jnp.where(jnp.isnan(ends), table[:4], ends * scene.joint_range))
    led = jnp.asarray(_LED)[number]
    table = table.at[5].set(jnp.where(jnp.isnan(led), table[5], led))

    blocks = table[6:].reshape(3, 6)[scene.block_slot]  # red, blue, pink
    # inside an open drawer, clear of the table's edge
    low, high = jnp.array([-0.1, -0.34]), jnp.array([0.1, -0.25])
    x, y = jax.random.uniform(keys[1], (2,), minval=low, maxval=high)
    spot = jnp.stack([x + scene.anchors.drawer_handle[0], y])
    in_drawer = jnp.asarray(_LIFTED_FROM_DRAWER)[number][:, None]
    there = jnp.concatenate([spot, jnp.array([DRAWER_FLOOR_M + 0.02]), blocks[0, 3:]])
    blocks = jnp.where(in_drawer, there, blocks)
    lower, upper = jax.random.permutation(keys[2], 3)[:2]
    stacked = number == plans.TASKS.index("unstack_block")
    on_top = blocks[lower].at[2].add(0.04).at[5].set(blocks[upper, 5])
    blocks = blocks.at[upper].set(jnp.where(stacked, on_top, blocks[upper]))
    table = table.at[6:].set(blocks[jnp.argsort(scene.block_slot)].reshape(-1))

    state = physics.reset(scene, robot, table)
    possible = starts.possible(scene, state)
    color = jax.random.randint(keys[3], (), 0, len(BLOCKS))
    lead = jnp.where(jnp.asarray(_FROM_HAND)[number], jnp.asarray(_LIFTS)[color], -1)
    others = jnp.arange(3) != color
    on_table = jnp.any(possible[jnp.asarray(_LIFTS)] & others)
    can = jnp.where(number == plans.TASKS.index("stack_block"), on_table, True)
    fits = jnp.where(lead >= 0, possible[lead] & can, possible[number] & _has_room(scene, state, number))
    fits &= ~stacked | (blocks[lower, 1] < 0)  # on the table: nobody stacks in the shelf
    return table, lead, fits & (pushing.touching(scene, state).depth.max() < contacts.TOLERANCE_M)


def _has_room(scene: Scene, state: bodies.State, number: jax.Array) -> jax.Array:
    """Is the way of a push free, and does it stay on the table? Other tasks: True."""
    way = jnp.asarray(_PUSHED)[number]  # [3], +1 right
    free = True
    for share in np.linspace(0.25, 1.0, 4):
        moved = dataclasses.replace(state, block_position=state.block_position.at[:, 0].add(share * 0.13 * way))
        free &= pushing.touching(scene, moved).depth[-3:].max() < contacts.TOLERANCE_M
        free &= jnp.all((way == 0) | (jnp.abs(moved.block_position[:, 0]) < 0.40))
    return free


def _setup() -> tuple[np.ndarray, ...]:
    """Per task number: where mechanisms [4] and LED are to begin (0 or 1 of their range; NaN leaves them), whether it
    begins with a block in the hand, the block lifted from the drawer bool[3], the block pushed int[3] (+1 right)."""
    count = len(plans.TASKS)
    mechanisms, led = np.full((count, 4), np.nan, np.float32), np.full(count, np.nan, np.float32)
    drawer, pushed = np.zeros((count, 3), bool), np.zeros((count, 3), np.int32)
    for name, (joint, end) in {
        "move_slider_left": (SLIDER, 0),
        "move_slider_right": (SLIDER, 1),
        "open_drawer": (DRAWER, 0),
        "close_drawer": (DRAWER, 1),
        "place_in_drawer": (DRAWER, 1),
        "push_into_drawer": (DRAWER, 1),
        "turn_on_lightbulb": (SWITCH, 0),
        "turn_off_lightbulb": (SWITCH, 1),
    }.items():
        mechanisms[plans.TASKS.index(name), joint] = end
    mechanisms[:, BUTTON] = 0
    for i, name in enumerate(plans.TASKS):
        verb, *words = name.split("_")
        if name.endswith("_led"):
            led[i] = words[0] == "off"
        elif words[0] in BLOCKS and words[-1] == "drawer":
            drawer[i, BLOCKS.index(words[0])], mechanisms[i, DRAWER] = True, 1
        elif verb == "push" and words[0] in BLOCKS:
            pushed[i, BLOCKS.index(words[0])] = 1 if words[-1] == "right" else -1
    return mechanisms, led, np.isin(plans.TASKS, _IN_HAND), drawer, pushed


_MECHANISMS, _LED, _FROM_HAND, _LIFTED_FROM_DRAWER, _PUSHED = _setup()


# ---------------------------------------------------------------------------------------------------------------------
# Running them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Attempts:
    """One task under way on each of B tables; `start` is the info it began with, `limit` the steps it may take."""

    which: jax.Array
    state: bodies.State
    number: jax.Array
    plan: waypoints.Plan
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


@jax.jit
def _advance(scenes: Scene, attempts: _Attempts) -> _Attempts:
    """`_STRIDE` steps; a table stands still from the step at which its task is done."""

    def one(now):
        scene = jax.tree.map(lambda leaf: leaf[now.which], scenes)

        def step(_, now):
            action, progress = waypoints.act(now.plan, now.progress, now.state)
            state = physics.step(scene, now.state, action)
            done = tasks.conditions(now.start, physics.info(scene, state))[now.number]
            then = dataclasses.replace(now, state=state, progress=progress, done=done, steps=now.steps + 1)
            goes_on = ~now.done & (now.steps < now.limit)
            return jax.tree.map(lambda a, b: jnp.where(goes_on, a, b), then, now)

        return jax.lax.fori_loop(0, _STRIDE, step, now)

    return jax.vmap(one)(attempts)


def run(trials: Sequence[Trial], max_steps: int, tables: int, seed: int) -> list[TrialResult]:
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


def _result(index: int, trial: Trial, outcome: Sequence[tuple[bool, int]]) -> TrialResult:
    names = tuple(plans.TASKS[number] for number in trial.tasks)
    success, steps = zip(*outcome)
    return TrialResult(index, names, names, success, steps, {"scene": SCENES[trial.scene]})


# ---------------------------------------------------------------------------------------------------------------------
# What came of it


def summarize_tasks(names: Sequence[str], trials: Sequence[Trial], results: Sequence[TrialResult]) -> dict[str, Any]:
    """Per task: attempts, successes, 95 % interval, mean steps of the successes, and successes by scene."""
    rows: dict[str, Any] = {}
    for name in names:
        mine = [r for r in results if r.tasks[-1] == name and len(r.success) == len(r.tasks)]
        rate = rollout_metrics.Rate(sum(r.success[-1] for r in mine), len(mine))
        scenes = sorted({SCENES[trial.scene] for trial in trials})
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
