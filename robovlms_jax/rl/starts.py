"""Where trials begin: drawn from a seed, for as many as are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from robovlms_jax.envs.calvin import task_chains, tasks
from robovlms_jax.evaluation.rollout import Trial
from robovlms_jax.playtable.scene import initial_obs
from robovlms_jax.schema import require


def draw(
    names: Sequence[str], scenes: Sequence[str], count: int, seed: int, *, spread: float = 0.0, held_out: bool = False
) -> list[Trial]:
    """Trials of single tasks; tasks and tables take turns, everything else is drawn.

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
    possible = {
        name: [c for c in task_chains.initial_conditions() if len(task_chains.successors(c, name)) == 1]
        for name in names
    }
    never = sorted(name for name, conditions in possible.items() if not conditions)
    require(
        not never, f"tasks {never} are possible in no initial state (they need a block in the hand); leave them out."
    )
    found = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        name, scene = names[index % len(names)], scenes[index // len(names) % len(scenes)]
        condition = possible[name][rng.integers(len(possible[name]))]
        robot_obs, scene_obs = initial_obs(condition, scene)
        robot_obs[:3] += spread * np.array([1.0, 0.25, 0.25]) * rng.uniform(-1.0, 1.0, size=3)
        words = tasks.instruction(name, held_out=held_out, variant=int(rng.integers(1000)))
        start = {"robot_obs": robot_obs, "scene_obs": scene_obs}
        labels = {"scene": scene, "phrasing": "held out" if held_out else "training"}
        found.append(Trial(index, start, (name,), (words,), labels))
    return found
