"""Record scripted demonstrations on PlayTable in CALVIN's on-disk layout, ready to train on.

    python -m experiments.record_playtable --episodes 2000 --out data/playtable

An episode is a chain of tasks, each done in the state the one before it left, as a person would play; every task that
the checker calls done is an annotated segment. Training scenes and validation scene differ, and so do their phrasings.
A recording that was stopped (killed, full disk) goes on when the same command is given again.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro

from robovlms_jax.config import DemonstrationConfig
from robovlms_jax.data import base, calvin, packing
from robovlms_jax.envs import tasks
from robovlms_jax.envs.playtable import env, experts, physics, render
from robovlms_jax.envs.playtable.scene import RANDOM, Scene, check_name, initial_obs, stack_scenes
from robovlms_jax.training.directory import LOCK, OWNER, claim

HOLD_STEPS = 2
"""Steps recorded after a task is done, as CALVIN's segments have them."""
BLOCK = 10
"""Steps between two looks at who is done."""
_JOURNAL = "recording.jsonl"
KICK, KICK_STEPS = 0.6, 4
"""Largest disturbance (in units of actions) and how many steps it lasts."""
RENDER_FRAMES = 2048
"""Frames collected before they are rendered, on all cores."""
PACK_FRAMES = 20_000
"""Fewer are packed by one process: more of them first import everything (two: 32 000 frames in 18 instead of 20 s,
16 000 in 12 instead of 11; two threads of one x86 core)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordConfig(DemonstrationConfig):
    """How many demonstrations, of what, where."""

    out: str
    """Directory to make; gets training/ and validation/."""
    episodes: int = 2000
    """Training chains."""
    pack: bool = False
    """Write the packed layout, which trains faster (data/README.md), instead of one npz per frame."""

    def __post_init__(self):
        super().__post_init__()
        if self.episodes < 1:
            raise ValueError(f"episodes={self.episodes} must be at least 1.")
        unknown = sorted(set(self.tasks) - set(tasks.TASKS))
        if unknown:
            raise ValueError(f"tasks has unknown {unknown}; known: {', '.join(tasks.TASKS)}.")
        if not self.scenes:
            raise ValueError("scenes is empty; name at least one table.")
        for name in (*self.scenes, self.validation_scene):
            check_name(name)

    @property
    def training_scenes(self) -> tuple[str, ...]:
        return (*self.scenes, *(f"{RANDOM}{i}" for i in range(self.random_scenes)))


class Segment(NamedTuple):
    """One demonstrated task. images: camera -> uint8[T, size, size, 3]; arrays: CALVIN field -> float64[T, d]."""

    task: str
    images: Mapping[str, np.ndarray]
    arrays: Mapping[str, np.ndarray]


def record(config: RecordConfig) -> dict[str, int]:
    """Write both splits. Returns demonstrations attempted, recorded and frames, for the report.

    What an interrupted call recorded stays: the same call goes on from there, also towards more episodes. A complete
    recording is left as it is.

    Raises:
      FileExistsError: `out` holds something else than a recording.
      ValueError: `out` holds a recording with other settings, or another process is recording there.
      OSError: `out` cannot be written, or the disk is full; what was recorded so far stays.
    """
    out = pathlib.Path(config.out)
    plan = (
        ("training", config.training_scenes, config.episodes, config.seed, False),
        ("validation", (config.validation_scene,), config.validation_episodes, config.seed + 1, True),
    )
    _require_ours(out)
    counts = {"attempted": 0, "recorded": 0, "frames": 0}
    # Both splits have all tables, so that they run the same compiled programs.
    names = tuple(dict.fromkeys((*config.training_scenes, config.validation_scene)))
    with claim(out):
        renderer = _Renderer(names, config.image_size)
        for split, scenes, episodes, seed, held_out in plan:
            writer = _Writer(_directory(out, split), _settings(config, split), held_out=held_out)
            missing = sorted(set(range(episodes)) - writer.numbers)
            if missing:
                frames = (_SpooledFrames if config.pack else _NpzFrames)(out / split, config)
                numbers = [names.index(name) for name in scenes]
                tables = _Tables(config, renderer.scenes, numbers, seed, missing)
                _record_split(writer, frames, split, tables, renderer)
            for name, count in writer.counts().items():
                counts[name] += count
    return counts


def _record_split(writer: _Writer, frames: _Frames, split: str, tables: _Tables, renderer: _Renderer) -> None:
    frames.discard(writer.num_frames)  # of a chain that was being written when a call before was stopped
    done = len(writer.numbers)
    try:
        with tqdm.tqdm(total=len(tables.numbers) + done, initial=done, unit="chain", desc=split) as bar:
            for number, segments, attempted in _rendered(tables, renderer):
                writer.write(number, segments, attempted, frames)
                bar.update()
        frames.finish(writer)
    except OSError as error:
        frames.discard(writer.num_frames)  # which also makes room
        with contextlib.suppress(OSError, RuntimeError):
            frames.abandon(writer)
        raise OSError(
            f"{error}. {tables.config.out} keeps the {len(writer.numbers)} chains of {split} recorded so far; make "
            "room, and the same command goes on from there."
        ) from error


def _directory(out: pathlib.Path, split: str) -> pathlib.Path:
    """Where a split's journal is: beside the frames, so that it does not disturb the packed layout's directory."""
    return out / "journal" / split


def _require_ours(out: pathlib.Path) -> None:
    """A new or empty directory, or a recording that was begun there."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a new directory.")
    if (
        out.exists()
        and any(path.name not in (LOCK, OWNER) for path in out.iterdir())
        and not (_directory(out, "training") / _JOURNAL).exists()
    ):
        raise FileExistsError(f"{out} is not empty and holds no recording to go on with; choose a new directory.")


def _settings(config: RecordConfig, split: str) -> dict[str, Any]:
    """What has to be the same for a recording to be continued. How long it is may change, unless it is packed."""
    skipped = {"out", "tables", "episodes", "validation_episodes"}
    skipped |= {"validation_scene"} if split == "training" else {"scenes", "random_scenes"}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in skipped}
    if config.pack:
        values["episodes"] = config.episodes if split == "training" else config.validation_episodes
    return json.loads(json.dumps(values))


def _rendered(tables: _Tables, renderer: _Renderer) -> Iterator[tuple[int, list[Segment], int]]:
    """Of each chain, in the order in which they end: its number, its segments, and how many tasks were attempted.

    Pictures are made beside the simulation, which alone does not keep all cores busy.
    """
    ended: list[_Chain] = []
    looking: concurrent.futures.Future | None = None
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        for chain in tables:
            ended.append(chain)
            if sum(demo.length for each in ended for demo in each.demos) >= RENDER_FRAMES:
                before, looking = looking, beside.submit(renderer.segments, ended)
                ended = []
                yield from before.result() if before else ()
        yield from looking.result() if looking else ()
        yield from renderer.segments(ended)


class _Scenes:
    """All tables of a recording, made when first asked for: a finished recording needs none."""

    def __init__(self, names: Sequence[str]):
        self.names = names

    @functools.cached_property
    def stacked(self) -> Scene:
        """NumPy, because single rows are picked all the time."""
        return jax.device_get(stack_scenes(self.names))


class _Steps(NamedTuple):
    """What is recorded of some steps: the states before them, `robot_obs` and `scene_obs` there, what the experts
    wanted, and whether their tasks are done after them."""

    states: physics.State
    robot_obs: Any
    scene_obs: Any
    actions: Any
    done: Any


class _Demo(NamedTuple):
    """One successful demonstration, not rendered yet. NumPy, leading axis T."""

    task: str
    steps: _Steps

    @property
    def length(self) -> int:
        return len(self.steps.actions)


@dataclasses.dataclass
class _Chain:
    """What one table is busy with."""

    number: int
    scene: int
    rng: np.random.Generator
    """Its own, so that a chain is the same whatever is recorded beside it."""
    condition: tasks.Condition
    offset: np.ndarray
    """float64[3], metres: where its hand begins, seen from the resting pose."""
    task: str = ""
    attempted: int = 0
    steps: int = 0
    """Recorded steps of the task under way."""
    done_at: int | None = None
    """The step of the task under way after which the checker called it done."""
    demos: list[_Demo] = dataclasses.field(default_factory=list)
    blocks: list[_Steps] = dataclasses.field(default_factory=list)
    """Of the task under way."""


class _Tables:
    """Tables that play chains side by side. Iterating yields chains as they end.

    Every BLOCK steps a table whose task is over takes its next task, or its next chain, so none waits for the slowest.
    """

    def __init__(self, config: RecordConfig, every: _Scenes, scenes: Sequence[int], seed: int, numbers: Sequence[int]):
        """every: all tables there are. scenes: which of them to play on. numbers: of the chains to play."""
        self.config, self.seed, self.numbers = config, seed, numbers
        self._every, self._scenes = every, scenes
        self._tasks = config.tasks or tuple(tasks.TASKS)
        self._waiting = collections.deque(numbers)

    def __iter__(self) -> Iterator[_Chain]:
        busy = {table: chain for table in range(self.config.tables) if (chain := self._begin()) is not None}
        states = self._reset(busy, busy)
        running = None
        fresh = dict(busy)
        while busy:
            if fresh:
                scenes = self._scenes_of(busy)
                running = self._plan(scenes, states, fresh, running)
            states, running, steps = _advance(scenes, states, running, self._kicks(busy))
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
                states = _where(started, self._reset(busy, started), states, self.config.tables)
            yield from ended

    def _scenes_of(self, busy: Mapping[int, _Chain]) -> Scene:
        """One per table."""
        which = np.array([busy[t].scene if t in busy else 0 for t in range(self.config.tables)])
        return jax.device_put(env.pick(self._every.stacked, which))

    def _kicks(self, busy: Mapping[int, _Chain]) -> np.ndarray:
        """float32[tables, 7]: what is added to the experts' actions at the beginning of this block."""
        kicks = np.zeros((self.config.tables, 7), np.float32)
        for table, chain in busy.items():
            direction, size = chain.rng.normal(size=6), chain.rng.uniform(0.0, KICK)
            if chain.rng.uniform() < self.config.disturbance:
                kicks[table, :6] = size * direction / np.linalg.norm(direction)
        return kicks

    def _begin(self) -> _Chain | None:
        """The next chain with a first task; None when all have been begun."""
        while self._waiting:
            number = self._waiting.popleft()
            rng = np.random.default_rng([self.seed, number])
            conditions = tasks.initial_conditions()
            scene = self._scenes[number % len(self._scenes)]
            offset = self.config.start_spread * np.array([1.0, 0.25, 0.25]) * rng.uniform(-1.0, 1.0, size=3)
            chain = _Chain(number, scene, rng, conditions[rng.integers(len(conditions))], offset)
            if self._choose(chain):
                return chain
        return None

    def _choose(self, chain: _Chain) -> bool:
        """Draw the chain's next task; False when it is complete or no task of the list is possible."""
        names = self._tasks if chain.attempted < self.config.chain_length else ()
        possible = [name for name in names if len(tasks.successors(chain.condition, name)) == 1]
        if not possible:
            return False
        chain.task = possible[chain.rng.integers(len(possible))]
        chain.attempted += 1
        chain.steps, chain.done_at, chain.blocks = 0, None, []
        return True

    def _reset(self, busy: Mapping[int, _Chain], fresh: Mapping[int, _Chain]) -> physics.State:
        starts = [np.zeros((self.config.tables, size), np.float32) for size in (env.ROBOT_OBS_DIM, env.SCENE_OBS_DIM)]
        for table in range(self.config.tables):
            chain = fresh.get(table) or busy.get(table) or next(iter(fresh.values()))
            for rows, obs in zip(starts, initial_obs(chain.condition, self._every.names[chain.scene]), strict=True):
                rows[table] = obs
            starts[0][table, :3] += chain.offset
        return env.reset_batch(self._scenes_of(busy), *starts)

    def _plan(self, scenes: Scene, states: Any, fresh: Mapping[int, _Chain], running: Any) -> Any:
        numbers, seeds = np.zeros(self.config.tables, np.int32), np.zeros(self.config.tables, np.uint32)
        for table, chain in fresh.items():
            numbers[table], seeds[table] = experts.TASKS.index(chain.task), chain.rng.integers(2**31)
        new = _begin_tasks(scenes, states, numbers, seeds)
        return new if running is None else _where(fresh, new, running, self.config.tables)

    def _book(self, chain: _Chain, steps: _Steps) -> int | None:
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
        chain.demos.append(_Demo(chain.task, steps))
        chain.condition = tasks.successors(chain.condition, chain.task)[0]
        return length - before


def _where(chosen: Any, new: Any, old: Any, tables: int) -> Any:
    """Rows of `new` at the chosen tables, of `old` elsewhere."""
    take = np.isin(np.arange(tables), list(chosen))
    return jax.tree.map(lambda a, b: jnp.where(take.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _choose_steps(after: physics.State, block: physics.State, picks: Mapping[int, int], tables: int) -> physics.State:
    """The state after `picks[table]` steps of the block at those tables, after all steps elsewhere."""
    steps = np.array([picks.get(table, BLOCK) for table in range(tables)])
    inside = {table: step for table, step in picks.items() if step < BLOCK}
    picked = jax.tree.map(lambda x: x[np.minimum(steps, BLOCK - 1), np.arange(tables)], block)
    return _where(inside, picked, after, tables)


class _Task(NamedTuple):
    """What an expert on its way to a task carries from step to step."""

    number: Any
    plan: experts.Plan
    progress: experts.Progress
    start: tasks.SceneInfo


@jax.jit
def _begin_tasks(scenes: Scene, states: Any, numbers: Any, seeds: Any) -> _Task:
    def one(scene, state, number, seed):
        plan = experts.plan(scene, state, number, jax.random.key(seed))
        return _Task(number, plan, experts.begin(), physics.info(scene, state))

    return jax.vmap(one)(scenes, states, numbers, seeds)


@jax.jit
def _decide(scenes: Scene, states: Any, running: _Task, kicks: Any) -> tuple[Any, _Task, Any, Any]:
    """What the experts want, their progress, what they do when kicked, and robot_obs and scene_obs before it."""

    def one(scene, state, task, kick):
        action, progress = experts.act(task.plan, task.progress, state)
        obs = physics.robot_obs(state), physics.scene_obs(scene, state)
        return action, task._replace(progress=progress), jnp.clip(action + kick, -1.0, 1.0), obs

    return jax.vmap(one)(scenes, states, running, kicks)


@jax.jit
def _judge(scenes: Scene, states: Any, running: _Task) -> Any:
    """bool[tables]: whose task is done."""
    return jax.vmap(lambda scene, state, task: tasks.conditions(task.start, physics.info(scene, state))[task.number])(
        scenes, states, running
    )


def _advance(scenes: Scene, states: Any, running: _Task, kicks: np.ndarray) -> tuple[Any, _Task, _Steps]:
    """BLOCK expert steps on every table; leaves of the steps are NumPy [BLOCK, tables, ...].

    `kicks` float32[tables, 7] disturb the first KICK_STEPS of them; what is recorded is the action the expert wanted.
    A step is the program that rollouts run, too, so that it is compiled once.
    """
    steps = []
    for number in range(BLOCK):
        kicked = kicks if number < KICK_STEPS else np.zeros_like(kicks)
        wanted, running, actions, obs = _decide(scenes, states, running, kicked)
        after = env.step_batch(scenes, states, actions)
        steps.append(_Steps(states, *obs, wanted, _judge(scenes, after, running)))
        states = after
    return states, running, jax.tree.map(lambda *parts: np.stack(parts), *jax.device_get(steps))


class _Renderer:
    """Turns demonstrations into segments, on all cores."""

    def __init__(self, names: Sequence[str], image_size: tuple[int, int]):
        self.scenes = _Scenes(names)
        self._sizes = dict(zip(("static", "wrist"), image_size, strict=True))

    @functools.cached_property
    def _backdrops(self) -> render.Backdrop:
        return jax.device_get(env.backdrops(self.scenes.stacked, self._sizes["static"]))

    def segments(self, chains: list[_Chain]) -> list[tuple[int, list[Segment], int]]:
        """Render all demonstrations of some chains together; what `_rendered` yields of them."""
        demos = [(chain, demo) for chain in chains for demo in chain.demos]
        seen = iter(self._look(demos)) if demos else iter(())
        return [
            (chain.number, [self._segment(demo, next(seen)) for demo in chain.demos], chain.attempted)
            for chain in chains
        ]

    def _look(self, demos: list[tuple[_Chain, _Demo]]) -> Iterator[dict[str, np.ndarray]]:
        """Both pictures of each demonstration's states."""
        lengths = [demo.length for _, demo in demos]
        which = np.repeat([chain.scene for chain, _ in demos], lengths)
        states = jax.tree.map(lambda *parts: np.concatenate(parts), *(demo.steps.states for _, demo in demos))
        images = env.pictures(self.scenes.stacked, which, states, self._sizes, self._backdrops)
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            yield {camera: pictures[end - length : end] for camera, pictures in images.items()}

    def _segment(self, demo: _Demo, images: dict[str, np.ndarray]) -> Segment:
        robot, scene = (obs.astype(np.float64) for obs in (demo.steps.robot_obs, demo.steps.scene_obs))
        relative = demo.steps.actions.astype(np.float64)
        scaled = relative * np.array([*[physics.TRANSLATION_M] * 3, *[physics.ROTATION_RAD] * 3, 1.0])
        target = scaled + np.concatenate([robot[:, :6], np.zeros((demo.length, 1))], axis=1)
        arrays = {"rel_actions": relative, "actions": target, "robot_obs": robot, "scene_obs": scene}
        return Segment(demo.task, images, arrays)


class _Writer:
    """One split's journal: a line per finished chain. What describes the frames is made from it, so whenever
    recording stops, it can go on after the last line.

    Raises:
      ValueError: the journal was begun with other settings, or is damaged.
    """

    def __init__(self, directory: pathlib.Path, settings: Mapping[str, Any], *, held_out: bool):
        directory.mkdir(parents=True, exist_ok=True)
        self._journal, self._held_out = directory / _JOURNAL, held_out
        self.chains: list[dict[str, Any]] = []
        text = self._journal.read_bytes() if self._journal.exists() else b""
        complete = text[: text.rfind(b"\n") + 1]  # without a line that was being written
        if complete:
            self.chains = self._read(complete.decode(), settings)
            if len(complete) < len(text):
                self._journal.write_bytes(complete)
        else:
            self._journal.write_text(json.dumps({"settings": settings}) + "\n")

    @property
    def numbers(self) -> set[int]:
        """Of the finished chains."""
        return {chain["number"] for chain in self.chains}

    @property
    def num_frames(self) -> int:
        return sum(chain["frames"] for chain in self.chains)

    def episodes(self) -> list[base.Episode]:
        rows = [segment for chain in self.chains for segment in chain["segments"]]
        return [base.Episode(*row["span"], row["text"], row["task"]) for row in rows]

    def counts(self) -> dict[str, int]:
        attempted = sum(chain["attempted"] for chain in self.chains)
        return {"attempted": attempted, "recorded": len(self.episodes()), "frames": self.num_frames}

    def write(self, number: int, segments: Sequence[Segment], attempted: int, frames: _Frames) -> None:
        """One chain's segments, one session: first its frames, then its line."""
        frame, written = self.num_frames, []
        texts = sum(len(chain["segments"]) for chain in self.chains)
        for segment in segments:
            frames.save(frame, segment)
            last = frame + len(segment.arrays["rel_actions"]) - 1
            text = tasks.instruction(segment.task, held_out=self._held_out, variant=texts + len(written))
            written.append({"span": [frame, last], "task": segment.task, "text": text})
            frame = last + 1
        row = {"number": number, "frames": frame - self.num_frames, "attempted": attempted, "segments": written}
        try:
            with self._journal.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:
            text = self._journal.read_bytes()
            os.truncate(self._journal, text.rfind(b"\n") + 1)
            raise
        self.chains.append(row)

    def _read(self, text: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            first, *rows = map(json.loads, text.splitlines())
            theirs = first["settings"]
            if not all({"number", "frames", "attempted", "segments"} <= set(row) for row in rows):
                raise KeyError("a chain's line lacks a field")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._journal} is damaged ({error}); record into a new directory.") from error
        differing = sorted(key for key in {*theirs, *settings} if theirs.get(key) != settings.get(key))
        if differing:
            changes = ", ".join(f"{key}: {theirs.get(key)} there, {settings.get(key)} here" for key in differing)
            raise ValueError(
                f"{self._journal.parent} was begun with other settings ({changes}); use a new directory, or delete it."
            )
        return rows


class _Frames(Protocol):
    """Where frames go until they are all there."""

    def discard(self, first: int) -> None:
        """Forget frames from number `first` on."""

    def save(self, first: int, segment: Segment) -> None:
        """Write the frames of a segment; the first has number `first`."""

    def finish(self, writer: _Writer) -> None:
        """Write what describes the frames."""

    def abandon(self, writer: _Writer) -> None:
        """Leave behind what can be used of an unfinished recording."""


def _require_success(writer: _Writer, directory: pathlib.Path) -> None:
    if not writer.num_frames:
        raise RuntimeError(f"{directory}: no demonstration succeeded; raise max_steps or choose other tasks.")


class _NpzFrames:
    """CALVIN's layout: one npz per frame, spans of sessions, language annotations."""

    def __init__(self, directory: pathlib.Path, config: RecordConfig):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    def discard(self, first: int) -> None:
        for path in self._directory.glob("episode_*.npz"):
            if int(path.stem.removeprefix("episode_")) >= first:
                path.unlink()

    def save(self, first: int, segment: Segment) -> None:
        for t in range(len(segment.arrays["rel_actions"])):
            np.savez(
                self._directory / f"episode_{first + t:07d}.npz",
                rgb_static=segment.images["static"][t],
                rgb_gripper=segment.images["wrist"][t],
                **{name: x[t] for name, x in segment.arrays.items()},
            )

    def abandon(self, writer: _Writer) -> None:
        self.finish(writer)

    def finish(self, writer: _Writer) -> None:
        _require_success(writer, self._directory)
        episodes = writer.episodes()
        annotations = {
            "language": {
                "ann": [episode.instruction for episode in episodes],
                "task": [episode.task for episode in episodes],
                "emb": np.zeros((len(episodes), 1, 384), np.float32),
            },
            "info": {"episodes": [], "indx": [(episode.start, episode.end) for episode in episodes]},
        }
        lengths = np.array([chain["frames"] for chain in writer.chains if chain["frames"]])
        ends = np.cumsum(lengths)
        (self._directory / "lang_annotations").mkdir(exist_ok=True)
        np.save(self._directory / "lang_annotations" / "auto_lang_ann.npy", annotations, allow_pickle=True)
        np.save(self._directory / "ep_start_end_ids.npy", np.stack([ends - lengths, ends - 1], axis=1))
        np.save(self._directory / "ep_lens.npy", lengths)


class _SpooledFrames:
    """The packed layout, by way of one file of raw frames."""

    def __init__(self, directory: pathlib.Path, config: RecordConfig):
        sizes = {camera: (size, size) for camera, size in zip(("static", "wrist"), config.image_size, strict=True)}
        widths = {name: calvin.ARRAY_SIZES[name] for name in ("rel_actions", "actions", "robot_obs", "scene_obs")}
        self._directory = directory
        self._spool = packing.Spool(directory.with_name(f"{directory.name}.raw"), sizes, widths)

    def discard(self, first: int) -> None:
        self._spool.truncate(first)

    def save(self, first: int, segment: Segment) -> None:
        self._spool.add(segment.images, segment.arrays)

    def abandon(self, writer: _Writer) -> None:
        pass  # the file of raw frames stays

    def finish(self, writer: _Writer) -> None:
        _require_success(writer, self._directory)
        self._spool.episodes = tuple(writer.episodes())
        numbers = np.arange(self._spool.num_frames)
        workers = (os.cpu_count() or 1) if len(numbers) > PACK_FRAMES else 1
        packing.pack(self._spool, self._directory, frame_ids=numbers, workers=workers)
        self._spool.delete()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = tyro.cli(Annotated[RecordConfig, tyro.conf.AvoidSubcommands], description=__doc__)
    try:
        counts = record(config)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    logging.info(
        "recorded %(recorded)d of %(attempted)d demonstrations, %(frames)d frames, in %(out)s",
        counts | {"out": config.out},
    )


if __name__ == "__main__":
    main()
