"""Which pairs are worth asking about: at random, or where an ensemble of rewards disagrees most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from robovlms_jax.labeling.answers import Pair
from robovlms_jax.rl import preferences, progress
from robovlms_jax.rl.segments import Rollouts, Segment
from robovlms_jax.schema import require

CANDIDATES = 10
"""So many pairs are drawn for each that is asked about, if there is a reward that can choose."""


def draw(
    found: Rollouts,
    segments: Sequence[Segment],
    count: int,
    seed: int,
    reward: preferences.RewardModel | None = None,
    *,
    steps: int,
    every: int,
) -> list[Pair]:
    """Pairs of segments of the same task but of different rollouts, none twice; fewer than `count` where there are no
    more. Tasks take turns, as far as they have pairs.

    Args:
      reward: chooses those of ten times as many about which its members disagree most, the greatest first; None: they
        come as they are drawn.
      steps, every: of segments, see `progress.frames`.
    Raises:
      ValueError: no two segments can be compared.
    """
    rng = np.random.default_rng(seed)
    by_task: dict[str, list[Segment]] = {}
    for segment in segments:
        by_task.setdefault(found.tasks[segment.rollout], []).append(segment)
    by_task = {task: rows for task, rows in by_task.items() if len({x.rollout for x in rows}) > 1}
    require(
        len(by_task) > 0,
        f"no task has segments of {steps} control steps from two rollouts; record more rollouts, or shorter segments.",
    )
    drawn: dict[frozenset[Segment], Pair] = {}
    wanted = count * (1 if reward is None else CANDIDATES)
    for turn in range(20 * wanted + 100):  # a draw of a pair that is there already is lost, and the next task's turn
        if len(drawn) == wanted:
            break
        rows = list(by_task.values())[turn % len(by_task)]
        left, right = (rows[i] for i in rng.choice(len(rows), 2, replace=False))
        if left.rollout != right.rollout:
            drawn.setdefault(frozenset((left, right)), Pair(left, right))
    pairs = list(drawn.values())
    if reward is None:
        return pairs
    sides = (progress.frames(found, [pair[side] for pair in pairs], steps, every) for side in (0, 1))
    doubt = np.asarray(preferences.disagreement(reward, *sides))
    return [pairs[i] for i in np.argsort(-doubt, kind="stable")[:count]]
