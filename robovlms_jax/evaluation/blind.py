"""Trials on a real robot: which rollouts there are, in an order that hides who acts, and what their results say."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from robovlms_jax.evaluation.rollout_metrics import Rate

SETTINGS: Mapping[str, str] = {
    "seen": "scene and objects as in training",
    "unseen_object": "an object of this kind that training did not have",
    "background": "another table cover or wall",
    "distractors": "more objects on the table that nobody asks for",
    "instruction": "scene and objects as in training, asked in words that training did not have",
}
"""Li et al. 2024 (arXiv:2412.14058), section on real robots; five rollouts each. What the operator arranges."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """number: from 0, in the order of the session. scene: rollouts of one scene are compared with each other; the
    operator arranges it once for all policies. policy: which one acts, concealed."""

    number: int
    scene: int
    setting: str
    task: int
    instruction: str
    policy: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two policies on the same scenes. first, second: scenes that only this one solved; p: of the exact two-sided
    McNemar test, a sign test on the scenes that told them apart (McNemar 1947)."""

    both: int
    first: int
    second: int
    neither: int
    p: float


def schedule(
    instructions: Sequence[str],
    reworded: Sequence[str],
    settings: Sequence[str],
    rollouts: int,
    policies: int,
    seed: int,
) -> list[Rollout]:
    """All rollouts: settings in their order, since rearranging costs an operator most; within one, tasks take turns;
    on every scene all policies act, in an order drawn for it.

    Args:
      instructions: one per task; reworded: the same tasks in other words, for the setting `instruction`.
    Raises:
      ValueError: names the argument.
    """
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown or not settings or len(set(settings)) < len(settings):
        raise ValueError(f"settings={list(settings)}; expected some of {', '.join(SETTINGS)}, each once.")
    if not instructions or any(not text.strip() for text in (*instructions, *reworded)):
        raise ValueError("instructions: expected at least one task, and no empty sentence.")
    if "instruction" in settings and len(reworded) != len(instructions):
        raise ValueError(
            f"reworded has {len(reworded)} sentences for {len(instructions)} tasks; the setting `instruction` needs "
            "one for each."
        )
    if rollouts < 1 or policies < 1:
        raise ValueError(f"rollouts={rollouts} and policies={policies} must be at least 1.")
    rng, found = np.random.default_rng(seed), []
    places = itertools.product(settings, range(rollouts), range(len(instructions)))
    for scene, (setting, _, task) in enumerate(places):
        text = (reworded if setting == "instruction" else instructions)[task]
        for policy in rng.permutation(policies):
            found.append(Rollout(len(found), scene, setting, task, text, int(policy)))
    return found


def rates(rollouts: Iterable[Rollout], success: Mapping[int, bool]) -> dict[tuple[str, int], Rate]:
    """(setting or "all", policy) -> rate, of the rollouts that have a result."""
    counts: dict[tuple[str, int], list[bool]] = {}
    for rollout in rollouts:
        if rollout.number in success:
            for name in (rollout.setting, "all"):
                counts.setdefault((name, rollout.policy), []).append(success[rollout.number])
    return {key: Rate(sum(found), len(found)) for key, found in counts.items()}


def compare(rollouts: Iterable[Rollout], success: Mapping[int, bool], first: int, second: int) -> Comparison:
    """Two policies on the scenes where both have a result."""
    scenes: dict[int, dict[int, bool]] = {}
    for rollout in rollouts:
        if rollout.number in success:
            scenes.setdefault(rollout.scene, {})[rollout.policy] = success[rollout.number]
    return paired([(found[first], found[second]) for found in scenes.values() if {first, second} <= set(found)])


def paired(pairs: Sequence[tuple[bool, bool]]) -> Comparison:
    """Successes of the first and the second policy, scene by scene."""
    from scipy import stats  # takes most of a second to import

    ones, others = pairs.count((True, False)), pairs.count((False, True))
    p = stats.binomtest(ones, ones + others).pvalue if ones + others else 1.0
    return Comparison(pairs.count((True, True)), ones, others, pairs.count((False, False)), float(p))
