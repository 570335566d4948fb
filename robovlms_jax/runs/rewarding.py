"""A reward learned from answers, stored as a directory."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from typing import Any

import numpy as np

from robovlms_jax import schema
from robovlms_jax.labeling import answers, asking
from robovlms_jax.rl import preferences, progress, rewards, segments
from robovlms_jax.schema import require

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
@schema.checked("learn")
class RewardRunConfig:
    """What to learn a reward from."""

    labels: str = "runs/labels"
    """Folder of experiments.label: rollouts.npz and, of a person, answers.jsonl."""
    out: str = "runs/reward"
    """Directory to make."""
    simulated: int = 0
    """So many answers of a simulated person in place of the stored ones, for tasks that move a mechanism by its handle;
    0: those of answers.jsonl."""
    simulated_noise: float = 0.1
    """Share of these answers that is turned round."""
    steps: int = 50
    """Control steps of a segment (simulated; a person's answers say of how many they are)."""
    every: int = 5
    """Control steps of a frame, as `steps`; the horizon of the reinforcement that uses the reward."""
    fit: preferences.RewardConfig = preferences.RewardConfig(
        widths=(), choices=len(progress.NAMES), learning_rate=3e-3, decay=1.0
    )

    def __post_init__(self):
        require(self.simulated >= 0, f"simulated={self.simulated} must not be negative.")
        require(0 <= self.simulated_noise < 0.5, f"simulated_noise={self.simulated_noise} must lie in [0, 0.5).")
        require(
            self.fit.choices in (0, len(progress.NAMES)),
            f"fit.choices={self.fit.choices} must be 0 or {len(progress.NAMES)}: so many numbers of a frame say which "
            "task it is.",
        )
        require(self.steps >= 1 and self.every >= 1, "steps and every must be at least 1.")
        require(self.steps % self.every == 0, f"steps={self.steps} is no multiple of every={self.every}.")


def learn(config: RewardRunConfig) -> tuple[pathlib.Path, dict[str, float]]:
    """Returns the directory, and how well the reward gives held-out answers.

    Raises ValueError, OSError that say what is wrong with folders, answers or settings.
    """
    out = pathlib.Path(config.out)
    require(not (out / rewards.ABOUT).exists(), f"{out} holds a reward already; choose another --out, or delete it.")
    found = segments.load(config.labels)
    if config.simulated:
        every = config.every
        (pairs, held, true), names = _simulated(found, config)
        source = f"{len(pairs.first_better)} answers of a simulated person, {config.simulated_noise:.0%} turned round"
    else:
        pairs, every, names = _answered(found, config)
        held, true, source = None, None, f"{len(pairs.first_better)} answers of a person"
    unknown = sorted({*found.tasks} - {*names})
    if unknown:
        log.warning("no answer is about %s: the reward does not know these tasks", ", ".join(unknown))
    model, numbers = preferences.fit(pairs, config.fit, held)
    require(
        all(np.isfinite(x) for x in numbers.values()),
        f"the reward did not become finite ({numbers}); lower fit.learning_rate.",
    )
    if true is not None:
        numbers["accuracy_true"] = preferences.accuracy(model, true)
    about: dict[str, Any] = {"tasks": names, "source": source, "rollouts": segments.identity(config.labels)}
    about |= {"settings": schema.to_dict(config), "numbers": numbers}
    rewards.save(out, rewards.Saved(model, every, about))
    log.info("learned from %s: %s", source, ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    return out, numbers


def _answered(found: segments.Rollouts, config: RewardRunConfig) -> tuple[preferences.Pairs, int, list[str]]:
    """A person's answers, the control steps of a frame, and the tasks that they are about."""
    head, given = answers.of(config.labels, found, "let a simulated person answer (--simulated 2000)")
    sides = (
        progress.frames(found, [each.pair[side] for each in given], head["steps"], head["every"]) for side in (0, 1)
    )
    better = np.array([answers.FIRST_BETTER[each.answer] for each in given], np.float32)
    names = sorted({found.tasks[each.pair.left.rollout] for each in given})
    return preferences.Pairs(*sides, better), head["every"], names


def _simulated(
    found: segments.Rollouts, config: RewardRunConfig
) -> tuple[tuple[preferences.Pairs, preferences.Pairs, preferences.Pairs], list[str]]:
    """Pairs that teach; pairs that measure, of rollouts that do not teach; and these with what is true. And the tasks
    that those that teach are about."""
    rng = np.random.default_rng([config.fit.seed, 1])
    order = rng.permutation(len(found))
    share = int(len(found) * config.fit.held_out)
    require(
        share > 1,
        f"fit.held_out={config.fit.held_out} of {len(found)} rollouts are {share}, and pairs that measure are of two "
        "rollouts; record more of them (experiments.label --record.count), or raise the share.",
    )
    held = set(order[:share].tolist())
    every = found.segments(config.steps, max(config.steps // 2, 1))
    parts, names = [], list[str]()
    for rows, count in (
        ([x for x in every if x.rollout not in held], config.simulated),
        ([x for x in every if x.rollout in held], max(config.simulated // 4, 1)),
    ):
        how = {"steps": config.steps, "every": config.every}
        pairs = asking.draw(found, rows, count, config.fit.seed, **how)
        names = names or sorted({found.tasks[pair.left.rollout] for pair in pairs})
        sides = [[pair[side] for pair in pairs] for side in (0, 1)]
        worth = [progress.advance(found, side, config.steps) for side in sides]
        seen = [progress.frames(found, side, config.steps, config.every) for side in sides]
        for noise in (config.simulated_noise, 0.0):
            parts.append(preferences.Pairs(*seen, progress.answers(*worth, noise, rng)))
    teaching, _, noisy, true = parts
    return (teaching, noisy, true), names
