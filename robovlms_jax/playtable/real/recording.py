"""Demonstrations by scripted experts in the real CALVIN simulator, in CALVIN's on-disk layout.

Experts play without pictures; only what the checker calls done is rendered, from the states that were kept. A policy
that acts before them (`leading`) sees what it asks for, and is not recorded. Each simulator is a process of its own, so
that all cores work. A recording that was stopped goes on when it is asked for again; a chain that is played once more
need not be the same to the last bit, as docs/calvin.md says of the simulator.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
import queue
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from robovlms_jax import bars
from robovlms_jax.envs import process
from robovlms_jax.envs.calvin import adapter, initial_states, stage, task_chains, tasks, version
from robovlms_jax.playtable import demonstrations, splits
from robovlms_jax.playtable.real import experts, geometry, leading
from robovlms_jax.schema import require
from robovlms_jax.training.directory import claim

log = logging.getLogger(__name__)

IMAGE_SIZE = (200, 84)
"""Pixels of static and wrist camera, those of calvin_env's configuration."""
_AT_REST, _LOOKS, _LOOK_AGAIN = 0.05, 3, 12
"""m/s below which a block rests; how often the experts plan a task at most, and the steps until they do so again."""
_LEAD_STEPS = 120
_TRIES = 3  # simulator processes that may die in one chain
_TIMEOUT_S = 600.0  # longest task, rendering included, on a busy machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealRecordConfig:
    """Demonstrations of what, on which tables of the real simulator, and where they go."""

    calvin_root: str
    """Checkout of mees/calvin or mees/calvin_env (docs/calvin.md)."""
    out: str
    """Directory to make; gets training/ and validation/."""
    episodes: int = 2000
    """Training chains."""
    validation_episodes: int = 100
    """Validation chains."""
    tasks: tuple[str, ...] = ()
    """Task ids to demonstrate; empty: all 34."""
    scenes: tuple[str, ...] = ("A", "B", "C")
    """Tables of the training split, "A" to "D"; chains take turns."""
    validation_scene: str = "D"
    """Table of the validation split."""
    chain_length: int = 5
    """Tasks per chain; a chain ends early when no task of the list is possible or the expert fails."""
    max_steps: int = 200
    """Control steps an expert may take for one task."""
    disturbance: float = 0.0
    """Share of the thirds of a second in which the hand is pushed off course, as on PlayTable."""
    start_spread: float = 0.0
    """Metres by which the hand is moved from CALVIN's resting pose before a chain begins, at most: so far along x, a
    quarter as far along y and z."""
    resample_blocks: bool = False
    """Chains begin with blocks anywhere in the range of training data, not where the benchmark's evaluation puts them:
    what is learned on D is then not tried from starts that demonstrations began with."""
    checkpoint: str = ""
    """A policy that acts first, of each task, so that experts take over where it has got to (DAgger): a run directory,
    one of its checkpoints/<step> folders, or hf://OWNER/NAME. Tasks that it does itself are not recorded."""
    policy_steps: int | None = None
    """Control steps that it acts for: a number between half of this and all, drawn for every task. None: 120."""
    weights: Literal["float32", "bfloat16", "int8", "w8a8"] | None = None
    """How the policy's parameters are kept, as in `load_policy`; None: in the type it computes in."""
    picture_every: int = 1
    """Training chains are rendered where tasks begin and at every so many steps, no more: that takes nearly all of the
    time, and neighbouring frames look alike. Needs pack; a policy larger than policy.window 1 needs 1."""
    pack: bool = False
    """Write the packed layout, which trains faster (data/README.md), instead of one npz per frame."""
    processes: int = 2
    """Chains played and rendered at the same time. A policy that acts first computes each of its looks for as many."""
    simulator_python: str = sys.executable
    """Interpreter for the simulator's processes, if this one lacks its packages."""
    seed: int = 0

    def __post_init__(self):
        for field in ("episodes", "validation_episodes", "chain_length", "max_steps", "processes", "picture_every"):
            require(getattr(self, field) >= 1, f"{field}={getattr(self, field)} must be at least 1.")
        require(0 <= self.disturbance <= 1, f"disturbance={self.disturbance} must lie in [0, 1].")
        require(0 <= self.start_spread <= 0.3, f"start_spread={self.start_spread} must lie in [0, 0.3] metres.")
        for field in ("policy_steps", "weights"):
            alone = getattr(self, field) is not None and not self.checkpoint
            require(not alone, f"{field} is about a policy that acts first; name its checkpoint, too.")
        require(self.lead_steps >= 1, f"policy_steps={self.policy_steps} must be at least 1.")
        splits.require_room(self.picture_every, pack=self.pack)
        require(bool(self.scenes), "scenes is empty; name at least one table.")
        unknown = sorted(set(self.tasks) - set(tasks.TASKS))
        require(not unknown, f"tasks has unknown {unknown}; known: {', '.join(tasks.TASKS)}.")
        unknown = sorted({*self.scenes, self.validation_scene} - set(initial_states.SCENES))
        require(not unknown, f"unknown scenes {unknown}; known: {', '.join(initial_states.SCENES)}.")
        require(
            bool(self.conditions),
            f"tasks: none of {', '.join(self.tasks)} is possible in an initial state; add tasks that lead to it.",
        )

    @property
    def lead_steps(self) -> int:
        """`policy_steps`, or what stands for None."""
        return _LEAD_STEPS if self.policy_steps is None else self.policy_steps

    @property
    def conditions(self) -> list[task_chains.Condition]:
        """The symbolic scenes that chains begin in: those in which a task of the list is possible."""
        every = task_chains.initial_conditions()
        return [condition for condition in every if possible(self.tasks, condition)]


def possible(names: Sequence[str], condition: task_chains.Condition) -> list[str]:
    """Which of the tasks (none: of all 34) can be asked for in a symbolic scene."""
    return [name for name in names or tasks.TASKS if len(task_chains.successors(condition, name)) == 1]


def record(config: RealRecordConfig, leader: leading.Leader | None = None) -> dict[str, int]:
    """Write both splits, and other words for their sentences. Returns demonstrations attempted, recorded and frames.

    Args:
      leader: the policy of `config.checkpoint`, which acts first (`runs.correcting.record_real` makes it).
    Raises:
      FileNotFoundError, ImportError: no checkout, or a package of the simulator is missing.
      FileExistsError: `out` holds something else than a recording.
      ValueError: `out` holds a recording with other settings, another process is recording there, or the checkpoint's
        policy is missing.
      OSError: `out` cannot be written, or the disk is full; what was recorded so far stays.
      EnvError: a simulator's process died again and again.
    """
    out = pathlib.Path(config.out)
    plan = (
        ("training", config.scenes, config.episodes, config.seed, False),
        ("validation", (config.validation_scene,), config.validation_episodes, config.seed + 1, True),
    )
    require(leader is not None or not config.checkpoint, f"no policy was made of checkpoint={config.checkpoint}.")
    splits.require_ours(out)
    texts = {split: _sentences(config.calvin_root, held_out=held_out) for split, *_, held_out in plan}
    counts: collections.Counter[str] = collections.Counter()
    with claim(out), stages(config, [*config.scenes, config.validation_scene], leader) as every:
        for split, scenes, episodes, seed, held_out in plan:
            settings = _settings(config, split, leader)
            journal = splits.Journal(splits.directory(out, split), settings, texts[split])
            splits.write_paraphrases(out, **texts)
            apart = 1 if held_out else config.picture_every
            chains = functools.partial(every.chains, scenes, seed, sentences=texts[split], apart=apart)

            def play(numbers: list[int], bar: bars.Bar, chains: Callable = chains) -> splits.Chains:
                return chains(numbers)

            splits.record(
                journal, out / split, episodes, IMAGE_SIZE, play, pack=config.pack, first="starting simulators"
            )
            counts.update(journal.counts())
    return dict(counts)


def _sentences(calvin_root: str, *, held_out: bool) -> Mapping[str, Sequence[str]]:
    """CALVIN's own annotations where the checkout has them: its training sentences; held out: its validation ones."""
    if not adapter.has_validation_instructions(calvin_root):
        log.warning(
            "calvin_root %s has no sentences of CALVIN (they come with github.com/mees/calvin): demonstrations are "
            "annotated in this project's own %s wordings.",
            *(calvin_root, "held-out" if held_out else "training"),
        )
        return splits.own_sentences(held_out=held_out)
    if held_out:
        return {task: (text,) for task, text in adapter.validation_instructions(calvin_root).items()}
    return adapter.training_instructions(calvin_root)


def _settings(config: RealRecordConfig, split: str, leader: leading.Leader | None) -> dict[str, Any]:
    """What has to be the same for a recording to be continued. How long it is may change, unless it is packed."""
    skipped = {"out", "processes", "episodes", "validation_episodes", "calvin_root", "simulator_python"}
    skipped.add("validation_scene" if split == "training" else "scenes")
    if not config.resample_blocks:  # recordings begun before it could be chosen go on
        skipped.add("resample_blocks")
    if split == "validation" or config.picture_every == 1:
        skipped.add("picture_every")
    if leader is None:
        skipped |= {"checkpoint", "policy_steps", "weights"}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in skipped}
    if leader is not None:
        values |= {"checkpoint": leader.label, "policy_steps": leader.steps}
    values["simulator"] = version.commit(adapter.find_checkout(config.calvin_root))
    values["sentences"] = "calvin" if adapter.has_validation_instructions(config.calvin_root) else "own"
    if config.pack:
        values["episodes"] = config.episodes if split == "training" else config.validation_episodes
    return json.loads(json.dumps(values))


@contextlib.contextmanager
def stages(config: RealRecordConfig, scenes: Sequence[str], leader: leading.Leader | None = None) -> Iterator[Stages]:
    """The simulators that a recording needs; their processes end with the block."""
    found = {scene: geometry.read(config.calvin_root, scene) for scene in dict.fromkeys(scenes)}
    every = Stages(config, found, functools.partial(_start, config), leader)
    try:
        yield every
    finally:
        every.close()


def _start(config: RealRecordConfig, scene: str) -> process.ProcessEnv:
    env = process.ProcessEnv(
        "robovlms_jax.envs.calvin.stage:Stage",
        {"calvin_root": config.calvin_root, "scene": scene},
        python=config.simulator_python,
        timeout_s=_TIMEOUT_S,
    )
    version.warn(adapter.find_checkout(config.calvin_root), env.about)
    return env


class Stages:
    """Simulators on which experts play chains side by side.

    Args:
      geometries: by scene. start: makes the simulator of a scene (a `ProcessEnv` of `stage.Stage`). leader: acts first.
    """

    def __init__(
        self,
        config: RealRecordConfig,
        geometries: Mapping[str, geometry.Geometry],
        start: Callable[[str], process.ProcessEnv],
        leader: leading.Leader | None = None,
    ):
        self.config, self._geometries, self._start, self._leader = config, geometries, start, leader
        self._conditions = config.conditions
        self._free: queue.SimpleQueue[dict[str, process.ProcessEnv]] = queue.SimpleQueue()
        self._every: list[dict[str, process.ProcessEnv]] = [{} for _ in range(config.processes)]
        for own in self._every:
            self._free.put(own)

    def close(self) -> None:
        """End all processes."""
        for own in self._every:
            for env in own.values():
                env.close()

    def chains(
        self, scenes: Sequence[str], seed: int, numbers: Sequence[int], sentences: Mapping, apart: int = 1
    ) -> Iterator[tuple[int, list[demonstrations.Segment], int]]:
        """Of each chain, in the order of `numbers`: its number, its segments, and how many tasks were attempted.

        sentences: by task. apart: steps from one picture to the next.
        """

        def play(number: int) -> tuple[int, list[demonstrations.Segment], int]:
            scene = scenes[number % len(scenes)]
            return number, *self.with_stage(
                scene, lambda env: self._chain(env, scene, np.random.default_rng([seed, number]), sentences, apart)
            )

        yield from self.side_by_side(play, numbers)

    def side_by_side(self, play: Callable[[int], Any], numbers: Sequence[int]) -> Iterator[Any]:
        """`play(number)` of every number, in their order, as many at a time as there are simulators."""
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(self.config.processes) as pool:
            try:
                for number in numbers:
                    waiting.append(pool.submit(play, number))
                    if len(waiting) > 2 * self.config.processes:  # what waits to be written takes memory
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def with_stage(self, scene: str, use: Callable[[process.ProcessEnv], Any]) -> Any:
        """`use` on a free simulator of a scene; once more on a new one where its process dies."""
        own = self._free.get()
        try:
            for attempt in range(_TRIES):
                try:
                    if scene not in own:
                        own[scene] = self._start(scene)
                    return use(own[scene])
                except process.EnvError as error:
                    log.warning("scene %s: the simulator broke and is started again: %s", scene, error)
                    if env := own.pop(scene, None):
                        env.close()
                    if attempt + 1 == _TRIES:
                        raise
        finally:
            self._free.put(own)

    def attempt(
        self,
        env: process.ProcessEnv,
        scene: str,
        situation: Mapping[str, Any],
        task: str,
        rng: np.random.Generator,
        *,
        hold: int = demonstrations.HOLD_STEPS,
        start: Mapping[str, Any] | None = None,
    ) -> tuple[stage.Played, Mapping[str, Any]]:
        """One task from a situation; what was played, `hold` steps after its end included, and the situation then.
        start: the situation in which the task began, if that was before.

        Where a block still moves, the plan is made again a little later: the hand rises meanwhile.
        """
        limit, start = self.config.max_steps, start or situation
        kicks = _kicks(self.config.disturbance, limit + hold, rng)
        parts: list[stage.Played] = []
        for look in range(_LOOKS):
            moving = np.abs(situation["block_velocity"][:, :3]).max() > _AT_REST
            last = not moving or look + 1 == _LOOKS
            route = experts.plan(self._geometries[scene], situation, task, int(rng.integers(2**31)))
            left = max(limit - sum(part.steps for part in parts), 1)
            steps = left if last else min(_LOOK_AGAIN, left)
            played, situation = ask(env, "play", task, route, kicks, steps, hold, start)
            parts.append(played)
            if last or played.done:
                break
        return stage.Played.join(parts), situation

    def _chain(
        self,
        env: process.ProcessEnv,
        scene: str,
        rng: np.random.Generator,
        sentences: Mapping[str, Sequence[str]],
        apart: int,
    ) -> tuple[list[demonstrations.Segment], int]:
        condition = self._conditions[rng.integers(len(self._conditions))]
        offset = self.config.start_spread * np.array([1.0, 0.25, 0.25]) * rng.uniform(-1.0, 1.0, size=3)
        if self.config.resample_blocks:
            state = initial_states.resampled(condition, scene, rng)
        else:
            state = initial_states.initial_state(condition, scene)
        situation = ask(env, "begin", *state, offset)
        segments: list[demonstrations.Segment] = []
        attempted = 0
        for _ in range(self.config.chain_length):
            names = possible(self.config.tasks, condition)
            if not names:
                break
            task, start = names[rng.integers(len(names))], situation
            condition = task_chains.successors(condition, task)[0]
            if self._leader is not None:
                done, situation = self._leader.lead(env, start, task, sentences[task], rng)
                if done:
                    continue
            attempted += 1
            played, situation = self.attempt(env, scene, situation, task, rng, start=start)
            if not played.done:
                break
            segments.append(demonstrations.Segment(task, {}, _arrays(played)))
            segments[-1].arrays["bodies"] = played.bodies
        return [_rendered(env, segment, apart, rng) for segment in segments], attempted


def ask(env: process.ProcessEnv, method: str, *args: Any) -> Any:
    """A method of `stage.Stage` in its process."""
    env.send(method, *args)
    return env.receive()


def _rendered(
    env: process.ProcessEnv, segment: demonstrations.Segment, apart: int, rng: np.random.Generator
) -> demonstrations.Segment:
    arrays = dict(segment.arrays)
    shown = demonstrations.shown_frames(len(bodies := arrays.pop("bodies")), apart, rng)
    images = ask(env, "render", bodies if shown is None else bodies[shown])
    return demonstrations.Segment(segment.task, images, arrays, shown)


def _arrays(played: stage.Played) -> dict[str, np.ndarray]:
    """CALVIN's fields of a demonstration, float64[T, d]."""
    return {
        "rel_actions": played.wanted,
        "actions": played.targets,
        "robot_obs": played.robot_obs,
        "scene_obs": played.scene_obs,
    }


def _kicks(share: float, steps: int, rng: np.random.Generator) -> np.ndarray:
    """float64[M, 7], as PlayTable's: what is added to actions at the beginning of each third of a second."""
    count = -(-steps // stage.KICK_EVERY)
    directions, sizes = rng.normal(size=(count, 6)), rng.uniform(0.0, demonstrations.KICK, size=(count, 1))
    kicked = rng.uniform(size=(count, 1)) < share
    kicks = kicked * sizes * directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    return np.concatenate([kicks, np.zeros((count, 1))], axis=-1)
