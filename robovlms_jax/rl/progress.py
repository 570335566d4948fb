"""What a learned reward reads of a segment, and what a simulated person would say of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.envs.calvin import tasks
from robovlms_jax.playtable import env
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.scene import BUTTON, DRAWER, SLIDER, SWITCH, Scene, stack_scenes
from robovlms_jax.rl.segments import Rollouts, Segment
from robovlms_jax.schema import require

NAMES = tuple(tasks.TASKS)
MOVES = {
    "open_drawer": (DRAWER, 1),
    "close_drawer": (DRAWER, -1),
    "move_slider_left": (SLIDER, 1),
    "move_slider_right": (SLIDER, -1),
    "turn_on_lightbulb": (SWITCH, 1),
    "turn_off_lightbulb": (SWITCH, -1),
    "turn_on_led": (BUTTON, 1),
    "turn_off_led": (BUTTON, 1),
}
"""Tasks that move a mechanism by its handle: which, and which way."""
_AWAY = 7
"""Distances among `numbers`."""
_REACH_M = 0.3
"""So much nearer to the handle is worth as much as moving the mechanism all its way."""
_DONE = 2.0
"""What doing the task is worth beside."""
_EQUAL = 0.1
"""Differences that a simulated person does not see: 3 cm of the hand's way, a tenth of a mechanism's."""


def handles(scene: Scene, state: bodies.State) -> jax.Array:
    """float32[4, 3], m: where each mechanism's handle is now, in the order of `scene.JOINTS`."""
    at = scene.anchors
    closed = jnp.stack([at.slider_handle, at.drawer_handle, at.button_top, at.switch_handle])
    return closed + scene.joint_axis * state.mechanisms[:, None]


def numbers(scene: Scene, state: bodies.State) -> jax.Array:
    """float32[19] of a moment: how far the hand is from the four handles and three blocks (m), mechanisms (m), heights
    of the blocks (m), fingers, lamps."""
    things = jnp.concatenate([handles(scene, state), state.block_position]) - state.position
    rest = jnp.stack([state.width, state.command, state.held >= 0, state.led, bodies.bulb(state)])
    return jnp.concatenate([jnp.linalg.norm(things, axis=1), state.mechanisms, state.block_position[:, 2], rest])


def frame(before: jax.Array, after: jax.Array, task: jax.Array) -> jax.Array:
    """float32[..., F] of a decision, F = 60: the seven distances before it, how all `numbers` changed, and int32[...]
    the task's number in `NAMES`. Segments of several such frames are what answers are about.

    Where things are on the table is left out: with it, rewards learned rollouts by heart (docs/log.md).
    """
    return jnp.concatenate([before[..., :_AWAY], after - before, jax.nn.one_hot(task, len(NAMES))], axis=-1)


def frames(found: Rollouts, segments: Sequence[Segment], steps: int, every: int) -> np.ndarray:
    """float32[N, steps / every, F] of N segments."""
    require(steps % every == 0, f"segments of {steps} control steps do not divide into decisions of {every}.")
    known = _every(found)
    rows = np.array([found.offsets[x.rollout] + x.start for x in segments])[:, None] + np.arange(0, steps + 1, every)
    task = np.array([NAMES.index(found.tasks[x.rollout]) for x in segments])
    tasks_of = np.repeat(task[:, None], steps // every, axis=1)
    return np.asarray(frame(known[rows[:, :-1]], known[rows[:, 1:]], tasks_of))


def _every(found: Rollouts) -> np.ndarray:
    """`numbers` of all states, float32[states, 19]."""
    which = np.repeat([found.kinds.index(name) for name in found.scenes], np.diff(found.offsets))
    scenes = _lean(found.kinds)
    parts, size = [], 4096
    for first in range(0, len(which), size):
        rows = np.minimum(np.arange(first, first + size), len(which) - 1)  # one program serves any number
        parts.append(np.asarray(_numbers(env.pick(scenes, which[rows]), env.pick(found.states, rows))))
    return np.concatenate(parts)[: len(which)]


def lean(scenes: Scene) -> Scene:
    """Tables, leading axis K, without the grain of their wood, which is most of them and says nothing here."""
    return dataclasses.replace(scenes, grain=scenes.grain[:, :1, :1])


@functools.lru_cache(4)
def _lean(kinds: tuple[str, ...]) -> Scene:
    return lean(jax.device_get(stack_scenes(kinds)))


_numbers = jax.jit(jax.vmap(numbers))


def advance(found: Rollouts, segments: Sequence[Segment], steps: int | None) -> np.ndarray:
    """float64[N]: what a segment did for its task, in the eyes of a simulated person: how much nearer the hand came to
    the handle, how far the mechanism moved of what it can at this table, and whether the task was done.

    Args:
      steps: control steps of each; None: to its rollout's end.
    Raises:
      ValueError: a task that is none of `MOVES`.
    """
    unknown = sorted({found.tasks[x.rollout] for x in segments} - set(MOVES))
    require(
        not unknown,
        f"the simulated person knows tasks that move a mechanism by its handle ({', '.join(MOVES)}); these rollouts "
        f"have {unknown}, too. Ask a person (experiments.label), or leave them out.",
    )
    known, worth = _every(found), []
    ranges = dict(zip(found.kinds, np.asarray(_lean(found.kinds).joint_range, np.float64)))  # m, of each table's joints
    for segment in segments:
        joint, way = MOVES[found.tasks[segment.rollout]]
        first = found.offsets[segment.rollout] + segment.start
        last = segment.start + steps if steps is not None else found.steps(segment.rollout)
        ends = known[[first, first + last - segment.start]].astype(np.float64)
        away, at = ends[:, joint], ends[:, _AWAY + joint]
        moved = way * (at[1] - at[0]) / ranges[found.scenes[segment.rollout]][joint]
        done = found.success[segment.rollout] and last == found.steps(segment.rollout)
        worth.append((away[0] - away[1]) / _REACH_M + moved + _DONE * done)
    return np.array(worth)


def answers(first: np.ndarray, second: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """float32[N], of two `advance`: 1 where the first is larger, 0 where the second is, 0.5 where nobody would see a
    difference; a share `noise` of the clear ones is turned round."""
    better = (first > second) ^ (rng.uniform(size=len(first)) < noise)
    return np.where(np.abs(first - second) < _EQUAL, 0.5, better).astype(np.float32)
