"""Many PlayTables inside one jitted program: trials as arrays, and what every table is busy with.

A table that is done with its trial takes the next one by itself. Shapes are fixed: N trials of at most L tasks, B
tables, prompts of T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.control.execution import Execution
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.evaluation.rollout import Trial
from robovlms_jax.playtable import env
from robovlms_jax.playtable.mechanics import bodies, physics
from robovlms_jax.playtable.pictures import tiles
from robovlms_jax.playtable.scene import Scene, stack_scenes
from robovlms_jax.schema import require

EncodeText = Callable[[str], tuple[np.ndarray, np.ndarray]]
"""Instruction -> (int32[T], bool[T])."""

NAMES = tuple(tasks.TASKS)
_RESET_AT_ONCE = 64


@flax.struct.dataclass
class World:
    """What does not change while tables play: the tables there are, and the N trials.

    scenes, backdrops: leading axis, one for each kind of table. scene: int32[N], which of them.
    states: the trials' first states, leading axis N.
    tasks: int32[N, L], positions in `NAMES`; length: int32[N], how many of the L there are.
    text_ids, text_mask: int32[N, L, T], bool[N, L, T], the prompts. group: int32[N].
    """

    scenes: Scene
    backdrops: tiles.Backdrop
    scene: jax.Array
    states: bodies.State
    tasks: jax.Array
    length: jax.Array
    text_ids: jax.Array
    text_mask: jax.Array
    group: jax.Array

    OF_TRIALS: ClassVar = ("scene", "states", "tasks", "length", "text_ids", "text_mask", "group")
    """Fields whose leading axis are the trials."""

    @property
    def trials(self) -> int:
        """N."""
        return len(self.scene)

    def take(self, rows: np.ndarray, group: np.ndarray) -> World:
        """The trials int[M] `rows` of these, in this order, with groups int[M]."""
        chosen = {name: env.pick(getattr(self, name), rows) for name in self.OF_TRIALS if name != "group"}
        return self.replace(**chosen, group=jnp.asarray(group, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Play:
    """How tables are played; static, a change compiles anew.

    image_sizes: (camera, px of its square pictures) each.
    actions: executed of every predicted chunk.
    max_steps: control steps that a task may take.
    again: after the last trial follows the first; otherwise a table without a trial stands still.
    keep_states: outcomes have the states before and after every action.
    look_at_end: a table whose time is up is looked at once more, and nothing is executed, before it takes the next
      trial: what a value function needs to see of a trial that was cut off, not ended.
    platform: "cpu", "gpu" or "tpu", of the devices that play; pictures are made as is quickest there.
    """

    image_sizes: tuple[tuple[str, int], ...] = (("static", 200), ("wrist", 84))
    actions: int = 5
    max_steps: int = 160
    again: bool = False
    keep_states: bool = False
    look_at_end: bool = False
    platform: str = "cpu"

    def __post_init__(self):
        require(self.actions >= 1, f"actions={self.actions} must be at least 1.")
        require(self.max_steps >= 1, f"max_steps={self.max_steps} must be at least 1.")


def executed(execution: Execution, chunk: int) -> int:
    """How many actions of a chunk are executed before the policy looks again.

    Raises ValueError for a mode in which it is asked at every step and something is kept of what it said, and for
    attempts from another place.
    """
    require(
        not execution.retry.on,
        f"execution {execution.label!r} moves hands that get nowhere; tables on the device do not. Use the host's loop "
        "for it.",
    )
    require(
        execution.mode != "ensemble" and not execution.every_frame,
        f"execution {execution.label!r} asks the policy at every step and keeps what it said; tables on the device "
        "take modes first, chunk and receding, without every_frame. Use the host's loop for it.",
    )
    return {"first": 1, "chunk": chunk, "receding": min(execution.horizon, chunk)}[execution.mode]


@flax.struct.dataclass
class Tables:
    """What B tables are busy with.

    trial: int32[B], -1 = none is left. position: int32[B], which of its tasks. step: int32[B], control steps of the
      task so far. states: bodies. start: what the task's condition compares with. closing: bool[B], time is up, only a
      last look is due. fresh: bool[B], the policy has not been asked in this task. begun: int32[], trials taken so far.
    """

    trial: jax.Array
    position: jax.Array
    step: jax.Array
    states: bodies.State
    start: tasks.SceneInfo
    closing: jax.Array
    fresh: jax.Array
    begun: jax.Array


@flax.struct.dataclass
class Outcome:
    """What executing a chunk led to, [B] each.

    trial, position: int32, what it was a part of; trial -1: of nothing. step: int32, control steps of the task before
    it. steps: int32, control steps executed. success: bool, it did the task. over: bool, the task is over, done or not.
    looked: bool, nothing was to be executed: the last look at a task whose time was up.
    states: before the first and after each of the actions, leaves [B, E + 1, ...]; from `steps` on the last repeats.
      None: not kept.
    """

    trial: jax.Array
    position: jax.Array
    step: jax.Array
    steps: jax.Array
    success: jax.Array
    over: jax.Array
    looked: jax.Array
    states: bodies.State | None = None


def make_world(
    trials: Sequence[Trial], encode: EncodeText, static_size: int, states: bodies.State | None = None
) -> World:
    """Trials as arrays, their first states computed.

    Args:
      trials: PlayTable's: `start` has robot_obs and scene_obs, the label "scene" names the table.
      static_size: px of the static camera.
      states: the first states where they are known, leading axis N; then `start` is not read.
    Raises:
      ValueError: no trial, or one with an instruction that is too long or a table that there is not.
    """
    require(len(trials) > 0, "there are no trials to play.")
    names = [trial.labels["scene"] for trial in trials]
    kinds = sorted(set(names))
    scenes = stack_scenes(kinds)
    which = np.array([kinds.index(name) for name in names], np.int32)
    texts = {text: encode(text) for text in dict.fromkeys(text for trial in trials for text in trial.instructions)}
    most, longest = max(len(trial.tasks) for trial in trials), max(len(ids) for ids, _ in texts.values())
    numbers = np.zeros((len(trials), most), np.int32)
    pairs = next(iter(texts.values()))[0].shape[1:]  # of models that read the prompt twice
    ids = np.zeros((len(trials), most, longest, *pairs), np.int32)
    mask = np.zeros((len(trials), most, longest, *pairs), bool)
    for row, trial in enumerate(trials):
        for place in range(most):
            own = min(place, len(trial.tasks) - 1)  # behind the last task it is repeated, and never played
            numbers[row, place] = NAMES.index(trial.tasks[own])
            tokens, real = texts[trial.instructions[own]]
            ids[row, place, : len(tokens)], mask[row, place, : len(real)] = tokens, real
    length, group = np.array([len(trial.tasks) for trial in trials], np.int32), np.zeros(len(trials), np.int32)
    states = _first_states(scenes, which, trials) if states is None else jax.tree.map(jnp.asarray, states)
    return World(
        scenes,
        env.backdrops(scenes, static_size),
        jnp.asarray(which),
        states,
        *(jnp.asarray(x) for x in (numbers, length, ids, mask, group)),
    )


def _first_states(scenes: Scene, which: np.ndarray, trials: Sequence[Trial]) -> bodies.State:
    """By parts of one size, so that one program serves any number of trials."""
    parts = []
    for first in range(0, len(trials), _RESET_AT_ONCE):
        rows = np.minimum(np.arange(first, first + _RESET_AT_ONCE), len(trials) - 1)
        robot, scene = (np.stack([trials[row].start[name] for row in rows]) for name in ("robot_obs", "scene_obs"))
        parts.append(env.reset_batch(env.pick(scenes, which[rows]), robot, scene))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(trials)], *parts)


def begin(world: World, tables: int) -> Tables:
    """Before the first decision: table b plays trial b, where there is one."""
    trial = jnp.where(jnp.arange(tables) < world.trials, jnp.arange(tables), -1).astype(jnp.int32)
    zeros = jnp.zeros(tables, jnp.int32)
    states = env.pick(world.states, jnp.maximum(trial, 0))
    closing, fresh = jnp.zeros(tables, bool), jnp.ones(tables, bool)
    return Tables(trial, zeros, zeros, states, info(world, trial, states), closing, fresh, (trial >= 0).sum())


def scenes_of(world: World, trial: jax.Array) -> Scene:
    """Each table's own, leading axis B."""
    return env.pick(world.scenes, world.scene[jnp.maximum(trial, 0)])


def info(world: World, trial: jax.Array, states: bodies.State) -> tasks.SceneInfo:
    """What the task conditions read, [B, ...]."""
    return jax.vmap(physics.info)(scenes_of(world, trial), states)


def look(world: World, play: Play, tables: Tables) -> tuple[Mapping[str, jax.Array], jax.Array, tuple[Any, Any]]:
    """camera -> uint8[B, px, px, 3], robot_obs float32[B, 15], and the prompts int32[B, T], bool[B, T]."""
    return look_at(world, play, jnp.maximum(tables.trial, 0), tables.position, tables.states)


def look_at(
    world: World, play: Play, trial: jax.Array, position: jax.Array, states: bodies.State
) -> tuple[Mapping[str, jax.Array], jax.Array, tuple[Any, Any]]:
    """`look`, of any states: trial, position int32[B], whose task it is; states: leaves [B, ...]."""
    seen = (world.scenes, world.scene[trial], states)
    images = {
        camera: env.render_batch(*seen, camera, size, world.backdrops, play.platform)
        for camera, size in play.image_sizes
    }
    text = world.text_ids[trial, position], world.text_mask[trial, position]
    return images, jax.vmap(physics.robot_obs)(states), text


def execute(world: World, play: Play, tables: Tables, actions: jax.Array) -> tuple[Tables, Outcome]:
    """Execute the first actions of chunks float32[B, C, A] in dataset units, a table until its task is over; then it
    takes what comes next."""
    scenes, task = scenes_of(world, tables.trial), world.tasks[jnp.maximum(tables.trial, 0), tables.position]

    def step(carry: tuple, action: jax.Array) -> tuple[tuple, bodies.State | None]:
        states, success, over, steps = carry
        moves = ~over
        moved = env.choose(moves, physics.step_tables(scenes, states, action), states)
        now = jax.vmap(physics.info)(scenes, moved)
        done = jnp.take_along_axis(tasks.conditions(tables.start, now), task[:, None], axis=1)[:, 0]
        steps = steps + moves
        success = success | (moves & done)
        over = over | success | (tables.step + steps >= play.max_steps)
        return (moved, success, over, steps), moved if play.keep_states else None

    idle = (tables.trial < 0) | tables.closing
    zeros = jnp.zeros(len(idle), jnp.int32)
    chosen = jnp.moveaxis(actions[:, : play.actions], 1, 0)
    (states, success, over, steps), path = jax.lax.scan(
        step, (tables.states, jnp.zeros_like(idle), idle, zeros), chosen
    )
    looked = tables.closing & (tables.trial >= 0)
    ended = over & ~idle
    if play.keep_states:
        path = jax.tree.map(
            lambda first, then: jnp.concatenate([first[:, None], jnp.moveaxis(then, 0, 1)], axis=1), tables.states, path
        )
    outcome = Outcome(tables.trial, tables.position, tables.step, steps, success, ended, looked, path)
    cut = ended & ~success if play.look_at_end else jnp.zeros_like(ended)
    after = tables.replace(states=states, step=tables.step + steps, closing=cut, fresh=jnp.zeros_like(ended))
    return _go_on(world, play, after, success, (ended & ~cut) | looked), outcome


def _go_on(world: World, play: Play, tables: Tables, success: jax.Array, through: jax.Array) -> Tables:
    """Where bool[B] `through` with its task, a table takes the trial's next task if it did this one, and otherwise the
    next trial."""
    last = tables.position + 1 >= world.length[jnp.maximum(tables.trial, 0)]
    follows, leaves = through & success & ~last, through & (~success | last)
    number = tables.begun + jnp.cumsum(leaves) - 1
    following = number % world.trials if play.again else jnp.where(number < world.trials, number, -1)
    trial = jnp.where(leaves, following, tables.trial).astype(jnp.int32)
    states = env.choose(leaves & (trial >= 0), env.pick(world.states, jnp.maximum(trial, 0)), tables.states)
    position = jnp.where(leaves, 0, tables.position + follows)
    start = env.choose(through, info(world, trial, states), tables.start)
    step = jnp.where(through, 0, tables.step)
    begun = tables.begun + leaves.sum()
    return Tables(trial, position, step, states, start, tables.closing & ~through, through, begun)
