"""Where trials of single tasks begin: at rest as CALVIN's do, or drawn from a seed; as many as are asked for."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Sequence

import numpy as np

from robovlms_jax.envs.calvin import task_chains, tasks
from robovlms_jax.evaluation import chains
from robovlms_jax.evaluation.rollout import Trial
from robovlms_jax.playtable.scene import initial_obs
from robovlms_jax.schema import require


def turn(names: Sequence[str], scenes: Sequence[str], index: int) -> tuple[str, str]:
    """Task and table of trial `index`: both take turns, so that as many tables as possible are used, and every task
    meets every table before a pair comes again."""
    common = math.gcd(len(names), len(scenes))
    shift = index // (len(names) * len(scenes) // common)  # without it, a task would meet every common-th table alone
    return names[index % len(names)], scenes[(index + shift % common) % len(scenes)]


@functools.cache
def _conditions(name: str) -> tuple[task_chains.Condition, ...]:
    """Initial states in which a task is possible, in one way."""
    return tuple(c for c in task_chains.initial_conditions() if len(task_chains.successors(c, name)) == 1)


def possible() -> tuple[str, ...]:
    """Tasks that can be the first that a table is asked for: those that need no block in the hand."""
    return tuple(name for name in tasks.TASKS if _conditions(name))


def resting(names: Sequence[str], scenes: Sequence[str], count: int, *, held_out: bool = False) -> list[Trial]:
    """Trials of single tasks whose hand rests where CALVIN's chains begin. The trials that ask a task take turns
    through its phrasings.

    Args:
      names: of the tasks. scenes: of the tables (`scene.make_scene`).
      held_out: ask in wordings that training data never use.
    Raises:
      ValueError: a task that is possible in no initial state.
    """
    found, asked = [], collections.Counter[str]()
    for chain in chains.single_tasks(names, count):
        name, scene = turn(names, scenes, chain.index)
        robot_obs, scene_obs = initial_obs(chain.condition, scene)
        words = tasks.instruction(name, held_out=held_out, variant=asked[name])
        asked[name] += 1
        found.append(_trial(chain.index, (robot_obs, scene_obs), name, words, scene, held_out))
    return found


def draw(
    names: Sequence[str], scenes: Sequence[str], count: int, seed: int, *, spread: float = 0.0, held_out: bool = False
) -> list[Trial]:
    """Trials of single tasks; tasks and tables take turns (`turn`), everything else is drawn.

    Args:
      names: of the tasks. scenes: of the tables (`scene.make_scene`).
      spread: metres by which the hand is moved from its resting place at most: so far along x, a quarter as far along y
        and z, as in demonstrations.
      held_out: ask in wordings that training data never use.
    Raises:
      ValueError: a task that is unknown, or possible in no initial state.
    """
    unknown = sorted(set(names) - set(tasks.TASKS))
    require(
        len(names) > 0 and not unknown, f"tasks={list(names)}: unknown {unknown}, or none; see envs/calvin/tasks.py."
    )
    conditions = {name: _conditions(name) for name in names}
    never = sorted(set(names) - set(possible()))
    require(
        not never, f"tasks {never} are possible in no initial state (they need a block in the hand); leave them out."
    )
    found = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        name, scene = turn(names, scenes, index)
        condition = conditions[name][rng.integers(len(conditions[name]))]
        robot_obs, scene_obs = initial_obs(condition, scene)
        robot_obs[:3] += spread * np.array([1.0, 0.25, 0.25]) * rng.uniform(-1.0, 1.0, size=3)
        words = tasks.instruction(name, held_out=held_out, variant=int(rng.integers(1000)))
        found.append(_trial(index, (robot_obs, scene_obs), name, words, scene, held_out))
    return found


def _trial(
    index: int, start: tuple[np.ndarray, np.ndarray], name: str, words: str, scene: str, held_out: bool
) -> Trial:
    labels = {"scene": scene, "phrasing": "held out" if held_out else "training"}
    return Trial(index, dict(zip(("robot_obs", "scene_obs"), start, strict=True)), (name,), (words,), labels)
