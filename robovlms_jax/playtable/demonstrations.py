"""Chains of tasks that the scripted experts play on many tables at once, and the pictures of them.

A chain does each task in the state the one before it left, as a person would play; what counts as done is the task
checker's word. Recording them is `playtable.recording`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.actions import frames
from robovlms_jax.envs.calvin import task_chains, tasks, walking
from robovlms_jax.parallel import cpu
from robovlms_jax.playtable import env
from robovlms_jax.playtable.config import DemonstrationConfig
from robovlms_jax.playtable.experts import plans, waypoints
from robovlms_jax.playtable.mechanics import bodies, physics
from robovlms_jax.playtable.pictures import tiles
from robovlms_jax.playtable.scene import Scene, initial_obs, stack_scenes

HOLD_STEPS = 2
"""Steps recorded after a task is done, as CALVIN's segments have them."""
BLOCK = 10
"""Steps between two looks at who is done."""
KICK, KICK_STEPS = 0.6, 4
"""Largest disturbance (in units of actions) and how many steps it lasts."""
RENDER_FRAMES = 2048
"""Frames collected before they are rendered, on all cores."""
_PLAYED_FRAMES = 4 * RENDER_FRAMES  # of which few have pictures: so many may be lost when a recording is stopped


class Segment(NamedTuple):
    """One demonstrated task. images: camera -> uint8[n, size, size, 3]; arrays: CALVIN field -> float64[T, d]; shown:
    int[n], the frames that the pictures are of, None: all T."""

    task: str
    images: Mapping[str, np.ndarray]
    arrays: Mapping[str, np.ndarray]
    shown: np.ndarray | None = None


def shown_frames(length: int, apart: int, rng: np.random.Generator) -> np.ndarray | None:
    """Which of a demonstration's frames get pictures, int[n]: the first, and every `apart`-th from a random one on but
    for the last, which nothing is learned from. None: all, where apart is 1."""
    return None if apart == 1 else np.append(0, np.arange(1 + rng.integers(apart), length - 1, apart))


def rendered(tables: Iterable[Chain], renderer: Renderer) -> Iterator[tuple[int, list[Segment], int]]:
    """Of each chain, in the order in which they end: its number, its segments, and how many tasks were attempted.

    Pictures are made beside the simulation, which alone does not keep all cores busy.
    """
    ended: list[Chain] = []
    looking: concurrent.futures.Future | None = None
    renderer.scenes.stacked  # noqa: B018, both threads want them
    beside = concurrent.futures.ThreadPoolExecutor(1)
    try:
        beside.submit(renderer.compile)  # beside the simulation's programs; an error comes again with the first picture
        for chain in tables:
            ended.append(chain)
            demos = [demo for each in ended for demo in each.demos]
            shown, played = sum(demo.num_shown for demo in demos), sum(demo.length for demo in demos)
            if shown >= RENDER_FRAMES or played >= _PLAYED_FRAMES:
                before, looking = looking, beside.submit(renderer.segments, ended)
                ended = []
                yield from before.result() if before else ()
        yield from looking.result() if looking else ()
        yield from beside.submit(renderer.segments, ended).result()  # there, so that nothing is compiled twice at once
    finally:
        beside.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for a compiler


class Scenes:
    """All tables of a recording, made when first asked for: a finished recording needs none."""

    def __init__(self, names: Sequence[str]):
        self.names = names

    @functools.cached_property
    def stacked(self) -> Scene:
        """NumPy, because single rows are picked all the time."""
        return jax.device_get(stack_scenes(self.names))


class Steps(NamedTuple):
    """What is recorded of some steps: the states before them, `robot_obs` and `scene_obs` there, what the experts
    wanted, and whether their tasks are done after them."""

    states: bodies.State
    robot_obs: Any
    scene_obs: Any
    actions: Any
    done: Any


class Demo(NamedTuple):
    """One successful demonstration, not rendered yet. NumPy, leading axis T. shown: as `Segment` has it."""

    task: str
    steps: Steps
    shown: np.ndarray | None = None

    @property
    def length(self) -> int:
        return len(self.steps.actions)

    @property
    def num_shown(self) -> int:
        """Frames that get pictures."""
        return self.length if self.shown is None else len(self.shown)


@dataclasses.dataclass
class Chain:
    """What one table is busy with."""

    number: int
    scene: int
    rng: np.random.Generator
    """Its own, so that a chain is the same whatever is recorded beside it."""
    condition: task_chains.Condition
    offset: np.ndarray
    """float64[3], metres: where its hand begins, seen from the resting pose."""
    task: str = ""
    attempted: int = 0
    steps: int = 0
    """Recorded steps of the task under way."""
    done_at: int | None = None
    """The step of the task under way after which the checker called it done."""
    demos: list[Demo] = dataclasses.field(default_factory=list)
    blocks: list[Steps] = dataclasses.field(default_factory=list)
    """Of the task under way."""


class Tables:
    """Tables that play chains side by side. Iterating yields chains as they end.

    Every BLOCK steps a table whose task is over takes its next task, or its next chain, so none waits for the slowest.
    """

    def __init__(
        self, config: DemonstrationConfig, every: Scenes, scenes: Sequence[int], seed: int, numbers: Sequence[int]
    ):
        """every: all tables there are. scenes: which of them to play on. numbers: of the chains to play."""
        self.config, self.seed, self.numbers = config, seed, numbers
        self._every, self._scenes = every, scenes
        self._tasks = config.tasks or tuple(tasks.TASKS)
        self._waiting = collections.deque(numbers)
        self.watch: Callable[[int], None] = lambda steps: None
        """Called after every block with the control steps that the busy tables have made together."""

    def __iter__(self) -> Iterator[Chain]:
        busy = {table: chain for table in range(self.config.tables) if (chain := self._begin()) is not None}
        states = self._reset(busy, busy) if busy else None  # no task is possible where any chain begins
        running, made = None, 0
        fresh = dict(busy)
        while busy:
            if fresh:
                scenes = self._scenes_of(busy)
                running = self._plan(scenes, states, fresh, running)
            states, running, steps = advance(scenes, states, running, self._kicks(busy))
            made += BLOCK * len(busy)
            self.watch(made)
            fresh, ended, picks = {}, [], {}
            for table, chain in list(busy.items()):
                pick = self._book(chain, jax.tree.map(lambda x, t=table: x[:, t], steps))
                if pick is None:
                    continue
                if chain.task and self._choose(chain):
                    fresh[table], picks[table] = chain, pick
                else:
                    ended.append(chain)
                    following = self._begin()
                    if following is None:
                        del busy[table]
                    else:
                        busy[table] = fresh[table] = following
            if picks:  # go on where the recording ended, not where the block did
                states = _choose_steps(states, steps.states, picks, self.config.tables)
            started = {table: chain for table, chain in fresh.items() if table not in picks}
            if started:
                states = env.choose(_mask(started, self.config.tables), self._reset(busy, started), states)
            yield from ended

    def _scenes_of(self, busy: Mapping[int, Chain]) -> Scene:
        """One per table."""
        which = np.array([busy[t].scene if t in busy else 0 for t in range(self.config.tables)])
        return jax.device_put(env.pick(self._every.stacked, which))

    def _kicks(self, busy: Mapping[int, Chain]) -> np.ndarray:
        """float32[tables, 7]: what is added to the experts' actions at the beginning of this block."""
        kicks = np.zeros((self.config.tables, 7), np.float32)
        for table, chain in busy.items():
            direction, size = chain.rng.normal(size=6), chain.rng.uniform(0.0, KICK)
            if chain.rng.uniform() < self.config.disturbance:
                kicks[table, :6] = size * direction / np.linalg.norm(direction)
        return kicks

    def _begin(self) -> Chain | None:
        """The next chain with a first task; None when all have been begun."""
        while self._waiting:
            number = self._waiting.popleft()
            rng = np.random.default_rng([self.seed, number])
            conditions = task_chains.initial_conditions()
            scene = self._scenes[number % len(self._scenes)]
            offset = self.config.start_spread * np.array([1.0, 0.25, 0.25]) * rng.uniform(-1.0, 1.0, size=3)
            chain = Chain(number, scene, rng, conditions[rng.integers(len(conditions))], offset)
            if self._choose(chain):
                return chain
        return None

    def _choose(self, chain: Chain) -> bool:
        """Draw the chain's next task; False when it is complete or no task of the list is possible."""
        names = self._tasks if chain.attempted < self.config.chain_length else ()
        possible = [name for name in names if len(task_chains.successors(chain.condition, name)) == 1]
        if not possible:
            return False
        chain.task = possible[chain.rng.integers(len(possible))]
        chain.attempted += 1
        chain.steps, chain.done_at, chain.blocks = 0, None, []
        return True

    def _reset(self, busy: Mapping[int, Chain], fresh: Mapping[int, Chain]) -> bodies.State:
        starts = [np.zeros((self.config.tables, size), np.float32) for size in (env.ROBOT_OBS_DIM, env.SCENE_OBS_DIM)]
        for table in range(self.config.tables):
            # the others' states are not taken: in the middle of a chain a scene need not be one to begin in
            chain = fresh.get(table) or next(iter(fresh.values()))
            for rows, obs in zip(starts, initial_obs(chain.condition, self._every.names[chain.scene]), strict=True):
                rows[table] = obs
            starts[0][table, :3] += chain.offset
        return env.reset_batch(self._scenes_of(busy), *starts)

    def _plan(self, scenes: Scene, states: Any, fresh: Mapping[int, Chain], running: Any) -> Any:
        numbers, seeds = np.zeros(self.config.tables, np.int32), np.zeros(self.config.tables, np.uint32)
        for table, chain in fresh.items():
            numbers[table], seeds[table] = plans.TASKS.index(chain.task), chain.rng.integers(2**31)
        new = begin_tasks(scenes, states, numbers, seeds)
        return new if running is None else env.choose(_mask(fresh, self.config.tables), new, running)

    def _book(self, chain: Chain, steps: Steps) -> int | None:
        """Add a block to the chain's task. Returns the step of the block after which the task is over, None = goes on.

        A task that was not done leaves `chain.task` empty: the chain ends.
        """
        chain.blocks.append(steps)
        if chain.done_at is None and steps.done.any():
            chain.done_at = chain.steps + int(steps.done.argmax())
        before, chain.steps = chain.steps, chain.steps + len(steps.done)
        if chain.done_at is None or chain.done_at + HOLD_STEPS >= self.config.max_steps:
            if chain.steps < self.config.max_steps:
                return None
            chain.task = ""
            return len(steps.done)
        length = chain.done_at + HOLD_STEPS + 1
        if chain.steps < length:
            return None
        steps = jax.tree.map(lambda *parts: np.concatenate(parts)[:length], *chain.blocks)
        # Of its own: what is demonstrated does not depend on how much of it is seen.
        own = np.random.default_rng([self.seed, chain.number, chain.attempted])
        chain.demos.append(Demo(chain.task, steps, shown_frames(length, self.config.picture_every, own)))
        chain.condition = task_chains.successors(chain.condition, chain.task)[0]
        return length - before


def _mask(tables: Any, count: int) -> np.ndarray:
    """bool[count], True at the numbers in `tables`."""
    return np.isin(np.arange(count), list(tables))


def _choose_steps(after: bodies.State, block: bodies.State, picks: Mapping[int, int], tables: int) -> bodies.State:
    """The state after `picks[table]` steps of the block at those tables, after all steps elsewhere."""
    steps = np.array([picks.get(table, BLOCK) for table in range(tables)])
    inside = {table: step for table, step in picks.items() if step < BLOCK}
    picked = jax.tree.map(lambda x: x[np.minimum(steps, BLOCK - 1), np.arange(tables)], block)
    return env.choose(_mask(inside, tables), picked, after)


class _Task(NamedTuple):
    """What an expert on its way to a task carries from step to step."""

    number: Any
    plan: walking.Plan
    progress: waypoints.Progress
    start: tasks.SceneInfo


@functools.partial(cpu.jit, kind="tiny_run_once")  # compiled in 3.4 instead of 9 s
def begin_tasks(scenes: Scene, states: Any, numbers: Any, seeds: Any) -> _Task:
    def one(scene, state, number, seed):
        plan = plans.plan(scene, state, number, jax.random.key(seed))
        return _Task(number, plan, waypoints.begin(), physics.info(scene, state))

    return jax.vmap(one)(scenes, states, numbers, seeds)


@jax.jit
def _decide(scenes: Scene, states: Any, running: _Task, kicks: Any) -> tuple[Any, _Task, Any, Any]:
    """What the experts want, their progress, what they do when kicked, and robot_obs and scene_obs before it."""

    def one(scene, state, task, kick):
        action, progress = waypoints.act(task.plan, task.progress, state)
        obs = physics.robot_obs(state), physics.scene_obs(scene, state)
        return action, task._replace(progress=progress), jnp.clip(action + kick, -1.0, 1.0), obs

    return jax.vmap(one)(scenes, states, running, kicks)


@jax.jit
def _judge(scenes: Scene, states: Any, running: _Task) -> Any:
    """bool[tables]: whose task is done."""
    return jax.vmap(lambda scene, state, task: tasks.conditions(task.start, physics.info(scene, state))[task.number])(
        scenes, states, running
    )


def advance(scenes: Scene, states: Any, running: _Task, kicks: np.ndarray) -> tuple[Any, _Task, Steps]:
    """BLOCK expert steps on every table; leaves of the steps are NumPy [BLOCK, tables, ...].

    `kicks` float32[tables, 7] disturb the first KICK_STEPS of them; what is recorded is the action the expert wanted.
    A step is the program that rollouts run, too, so that it is compiled once.
    """
    steps = []
    for number in range(BLOCK):
        kicked = kicks if number < KICK_STEPS else np.zeros_like(kicks)
        wanted, running, actions, obs = _decide(scenes, states, running, kicked)
        after = env.step_batch(scenes, states, actions)
        steps.append(Steps(states, *obs, wanted, _judge(scenes, after, running)))
        states = after
    return states, running, jax.tree.map(lambda *parts: np.stack(parts), *jax.device_get(steps))


class Renderer:
    """Turns demonstrations into segments, on all cores."""

    def __init__(self, names: Sequence[str], image_size: tuple[int, int]):
        self.scenes = Scenes(names)
        self._sizes = dict(zip(("static", "wrist"), image_size, strict=True))

    @functools.cached_property
    def _backdrops(self) -> tiles.Backdrop:
        return jax.device_get(env.backdrops(self.scenes.stacked, self._sizes["static"]))

    def compile(self) -> None:
        """Have the programs ready that pictures are made by. On CPUs, where they do not depend on how many."""
        if cpu.default_platform() != "cpu":
            return
        names, starts = self.scenes.names[:1], [np.zeros((1, size)) for size in (env.ROBOT_OBS_DIM, env.SCENE_OBS_DIM)]
        shapes = jax.eval_shape(jax.vmap(physics.reset), stack_scenes(names), *starts)
        blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        env.pictures(self.scenes.stacked, np.zeros(1, np.int32), blank, self._sizes, self._backdrops)

    def segments(self, chains: list[Chain]) -> list[tuple[int, list[Segment], int]]:
        """Render all demonstrations of some chains together; what `rendered` yields of them."""
        demos = [(chain, demo) for chain in chains for demo in chain.demos]
        seen = iter(self._look(demos)) if demos else iter(())
        return [
            (chain.number, [self._segment(demo, next(seen)) for demo in chain.demos], chain.attempted)
            for chain in chains
        ]

    def _look(self, demos: list[tuple[Chain, Demo]]) -> Iterator[dict[str, np.ndarray]]:
        """Both pictures of each demonstration's states that get some."""
        lengths = [demo.num_shown for _, demo in demos]
        which = np.repeat([chain.scene for chain, _ in demos], lengths)
        rows = [slice(None) if demo.shown is None else demo.shown for _, demo in demos]
        states = jax.tree.map(
            lambda *parts: np.concatenate([x[row] for x, row in zip(parts, rows, strict=True)]),
            *(demo.steps.states for _, demo in demos),
        )
        images = env.pictures(self.scenes.stacked, which, states, self._sizes, self._backdrops)
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            yield {camera: pictures[end - length : end] for camera, pictures in images.items()}

    def _segment(self, demo: Demo, images: dict[str, np.ndarray]) -> Segment:
        robot, scene = (obs.astype(np.float64) for obs in (demo.steps.robot_obs, demo.steps.scene_obs))
        relative = demo.steps.actions.astype(np.float64)
        scaled = relative * np.array([*[frames.TRANSLATION_M] * 3, *[frames.ROTATION_RAD] * 3, 1.0])
        target = scaled + np.concatenate([robot[:, :6], np.zeros((demo.length, 1))], axis=1)
        arrays = {"rel_actions": relative, "actions": target, "robot_obs": robot, "scene_obs": scene}
        return Segment(demo.task, images, arrays, demo.shown)
