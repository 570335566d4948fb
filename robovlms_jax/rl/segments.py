"""Rollouts kept as the states they went through, and segments of them, which people and rewards compare.

A file of rollouts is small (about 0.4 kB per control step): pictures of any size are made from it when somebody looks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from robovlms_jax import atomic, npz
from robovlms_jax.evaluation.rollout import Trial
from robovlms_jax.parallel import cpu
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.playtable import env
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.scene import stack_scenes
from robovlms_jax.policies.histories.base import where
from robovlms_jax.policies.vla import VLA, Carry
from robovlms_jax.rl import behaviours, objective, rollouts
from robovlms_jax.rl import tables as playing
from robovlms_jax.rl.config import BehaviourConfig
from robovlms_jax.schema import require
from robovlms_jax.types import Inputs

FILE = "rollouts.npz"
_VERSION = 1
_TEXTS = ("scenes", "tasks", "instructions")
_DRAWN = "drawn_"
_AT_ONCE = 8
"""Decisions between two looks at whether any trial is left."""


class Segment(NamedTuple):
    """Consecutive control steps of a rollout. start: its first state's place in the rollout."""

    rollout: int
    start: int


@dataclasses.dataclass(frozen=True)
class Decided:
    """What was drawn at every decision of R rollouts, rollout after rollout.

    every: control steps between two of them; a rollout's first is at its first state.
    drawn: field of what was drawn (`Behaviour.drawn`) -> [decisions, ...].
    units: `behaviours.units` of these; empty in files of versions that did not say so.
    """

    every: int
    drawn: Mapping[str, np.ndarray]
    units: str = ""


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """R rollouts of single tasks on PlayTable.

    scenes, tasks, instructions: R texts each. success: bool[R]. offsets: int64[R + 1]: rollout r has the states
      offsets[r] to offsets[r + 1] - 1, before its first control step to after its last one.
    states: NumPy leaves [offsets[R], ...].
    made: what they were made by, and how, as JSON (`runs.trying`); empty: nobody said.
    decided: None in files of versions that did not keep it.
    """

    scenes: tuple[str, ...]
    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    success: np.ndarray
    offsets: np.ndarray
    states: bodies.State
    made: str = ""
    decided: Decided | None = None

    def __len__(self) -> int:
        return len(self.tasks)

    def steps(self, rollout: int) -> int:
        """Control steps of a rollout."""
        return int(self.offsets[rollout + 1] - self.offsets[rollout]) - 1

    def decisions(self, every: int) -> np.ndarray:
        """int64[R], how many of `every` control steps each rollout has, the last perhaps of fewer."""
        return -(-(np.diff(self.offsets) - 1) // every)

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """Names of the tables there are."""
        return tuple(sorted(set(self.scenes)))

    def states_of(self, segment: Segment, steps: int, every: int = 1) -> bodies.State:
        """Every so many steps a state, the first and the last included; leaves [steps / every + 1, ...]."""
        first = self.offsets[segment.rollout] + segment.start
        return jax.tree.map(lambda x: x[first : first + steps + 1 : every], self.states)

    def has(self, segment: Segment, steps: int) -> bool:
        """Whether there is such a segment, of so many control steps."""
        return 0 <= segment.rollout < len(self) and 0 <= segment.start <= self.steps(segment.rollout) - steps

    def segments(self, steps: int, stride: int) -> list[Segment]:
        """All of `steps` control steps that begin `stride` apart, counted from a rollout's end, where it is decided."""
        return [
            Segment(rollout, start)
            for rollout in range(len(self))
            for start in range(self.steps(rollout) - steps, -1, -stride)
        ]

    def save(self, path: pathlib.Path) -> None:
        """One file, whole or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        leaves = {f"state_{field.name}": getattr(self.states, field.name) for field in dataclasses.fields(self.states)}
        texts = {name: np.array(getattr(self, name)) for name in _TEXTS}
        with atomic.replacing(path, durable=True) as file:
            numbers = {"version": _VERSION, "success": self.success, "offsets": self.offsets}
            if self.decided is not None:
                numbers |= {"every": self.decided.every, "units": np.array(self.decided.units)}
                leaves |= {f"{_DRAWN}{name}": x for name, x in self.decided.drawn.items()}
            np.savez_compressed(file, made=np.array(self.made), **numbers, **texts, **leaves)


def locate(path: str | pathlib.Path) -> pathlib.Path:
    """The file itself, or that of a folder. Raises FileNotFoundError."""
    path = pathlib.Path(path)
    found = path / FILE if path.is_dir() else path
    if not found.is_file():
        raise FileNotFoundError(f"{found} is not there; name a {FILE}, or a folder with one (experiments.label).")
    return found


def load(path: str | pathlib.Path) -> Rollouts:
    """What `Rollouts.save` wrote. Raises FileNotFoundError, ValueError that name the file."""
    path = locate(path)
    try:
        found = npz.read(path)
        require(int(found["version"]) == _VERSION, f"version {found['version']}, expected {_VERSION}")
        leaves = {field.name: found[f"state_{field.name}"] for field in dataclasses.fields(bodies.State)}
        texts = {name: tuple(found[name].tolist()) for name in _TEXTS}
        made = str(found.get("made", ""))
        drawn = {name.removeprefix(_DRAWN): x for name, x in found.items() if name.startswith(_DRAWN)}
        read = Rollouts(
            **texts,
            success=found["success"],
            offsets=found["offsets"],
            states=bodies.State(**leaves),
            made=made,
            decided=Decided(int(found["every"]), drawn, str(found.get("units", ""))) if "every" in found else None,
        )
        count = len(read.tasks)
        require(
            all(len(getattr(read, name)) == count for name in (*_TEXTS, "success"))
            and len(read.offsets) == count + 1
            and read.offsets[0] == 0
            and (np.diff(read.offsets) > 0).all()
            and all(len(x) == read.offsets[-1] for x in leaves.values()),
            f"{count} rollouts, {len(read.offsets)} offsets to {read.offsets[-1]}, and states that do not fit",
        )
        if read.decided is not None:
            decisions = read.decisions(read.decided.every).sum()
            require(
                all(len(x) == decisions for x in drawn.values()),
                f"{decisions} decisions, and draws of { {name: len(x) for name, x in drawn.items()} }",
            )
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is no file of rollouts ({type(error).__name__}: {error}); record it again."
        ) from error
    return read


def same(first: Rollouts, second: Rollouts) -> bool:
    """Whether two are of the same rollouts."""
    kept = [(each.tasks, each.scenes, each.offsets.tolist()) for each in (first, second)]
    leaves = zip(jax.tree.leaves(first.states), jax.tree.leaves(second.states), strict=True)
    return kept[0] == kept[1] and all(np.array_equal(a, b) for a, b in leaves)


def identity(path: str | pathlib.Path) -> str:
    """Checksum of a file of rollouts: answers about segments mean nothing without it."""
    return hashlib.sha256(locate(path).read_bytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Made by a policy


class Trying(NamedTuple):
    """How a policy is rolled out to be compared. tables: side by side."""

    behaviour: BehaviourConfig
    tables: int
    image_sizes: tuple[tuple[str, int], ...]
    actions: int
    max_steps: int


def by_chance(learner: objective.Learner) -> rollouts.Act:
    """The policy as it tries things out; keeps what it drew. Its parameters include those of the behaviour."""

    def act(params: Any, seen: Inputs, carry: Carry, active: jax.Array, key: jax.Array) -> tuple[Any, Carry, tuple]:
        features, context = learner.perceive(params, seen, carry, active)
        actions, drawn, head = learner.head(params, features, context.head, key)
        after = Carry(where(active, head, carry.head), context.history)
        return learner.model.config.normalizer.unnormalize(actions), after, drawn

    return act


def roll_out(
    model: VLA, params: Any, encode: playing.EncodeText, trials: Sequence[Trial], how: Trying, seed: int
) -> Rollouts:
    """Play each trial once, with chance in the actions, and keep all states and draws.

    Args:
      trials: of single tasks.
    Raises:
      ValueError: what tables on the device cannot do; says so.
    """
    rollouts.require_playable(model.config)
    behaviour = behaviours.make(model.config, how.behaviour)
    act = by_chance(objective.Learner(model, behaviour, ()))
    mesh = meshes.make_mesh((1, 1, 1), jax.local_devices()[:1])
    platform, place = meshes.platform(mesh), meshes.replicated(mesh)
    play = playing.Play(how.image_sizes, how.actions, how.max_steps, keep_states=True, platform=platform)
    params = jax.device_put({**params, objective.SCOPE: {"behaviour": behaviour.parameters()}}, place)
    world = jax.device_put(playing.make_world(trials, encode, dict(how.image_sizes)["static"]), place)
    run = jax.jit(
        functools.partial(rollouts.play, model, act, play, _AT_ONCE),
        out_shardings=place,
        compiler_options=cpu.options(env.STEP_KIND, platform),
    )
    game = jax.device_put(rollouts.begin(model, params, world, how.tables, jax.random.key(seed)), place)
    first = jax.device_get(world.states)
    paths: list[list[Any]] = [[jax.tree.map(lambda x, n=n: x[None, n], first)] for n in range(len(trials))]
    draws: list[list[Any]] = [[] for _ in trials]
    success, ended = np.zeros(len(trials), bool), 0
    while ended < len(trials):
        game, found = run(params, world, game)
        for trial, path, drawn, over, done in _pieces(*jax.device_get(found)):
            paths[trial].append(path)
            draws[trial].append(drawn)
            success[trial] |= done
            ended += over
    whole = [jax.tree.map(lambda *parts: np.concatenate(parts), *path) for path in paths]
    drawn = jax.tree.map(lambda *rows: np.stack(rows), *itertools.chain(*draws))
    fields = {field.name: getattr(drawn, field.name) for field in dataclasses.fields(drawn)}
    return Rollouts(
        tuple(str(trial.labels["scene"]) for trial in trials),
        tuple(trial.tasks[0] for trial in trials),
        tuple(trial.instructions[0] for trial in trials),
        success,
        np.cumsum([0, *(len(path.led) for path in whole)]),
        jax.tree.map(lambda *parts: np.concatenate(parts), *whole),
        decided=Decided(how.actions, fields, behaviours.units(model.config)),
    )


def _pieces(outcome: playing.Outcome, kept: Any) -> Iterator[tuple[int, bodies.State, Any, bool, bool]]:
    """(trial, the states that a decision led to, what was drawn, whether that was its end, in success) in the order of
    time."""
    for decision, table in np.argwhere(outcome.steps > 0):
        count = outcome.steps[decision, table]
        path = jax.tree.map(lambda x, at=(decision, table), n=count: x[at][1 : n + 1], outcome.states)
        drawn = jax.tree.map(lambda x, at=(decision, table): x[at], kept)
        over, done = (bool(x[decision, table]) for x in (outcome.over, outcome.success))
        yield int(outcome.trial[decision, table]), path, drawn, over, done


def pictures(found: Rollouts, segment: Segment, steps: int, every: int, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Camera "static" or "wrist" -> uint8[steps / every + 1, size, size, 3]. People look at them, so the fixed camera's
    have the whole table in them (`cameras.camera`)."""
    states = found.states_of(segment, steps, every)
    scenes, backdrops = _look(found.kinds, sizes["static"])
    which = np.full(len(states.led), found.kinds.index(found.scenes[segment.rollout]), np.int32)
    names = {"static": "people"}
    drawn = env.pictures(scenes, which, states, {names.get(x, x): size for x, size in sizes.items()}, backdrops)
    return {camera: drawn[names.get(camera, camera)] for camera in sizes}


@functools.lru_cache(4)
def _look(kinds: tuple[str, ...], size: int) -> tuple[Any, Any]:
    scenes = jax.device_get(stack_scenes(kinds))
    return scenes, jax.device_get(env.backdrops(scenes, size, "people"))
