"""Numbers from trial results, each with a 95 % confidence interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from robovlms_jax.evaluation.rollout import TrialResult

_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Rate:
    """Successes out of attempts."""

    successes: int
    attempts: int

    @property
    def value(self) -> float:
        """Share of successes; NaN without attempts."""
        return self.successes / self.attempts if self.attempts else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % score interval (Wilson 1927): honest at 0, at 1 and for few attempts."""
        if not self.attempts:
            return 0.0, 1.0
        from scipy import stats  # takes most of a second to import

        low, high = stats.binomtest(self.successes, self.attempts).proportion_ci(0.95, method="wilson")
        return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a set of trials says about a policy."""

    trials: int
    in_a_row: tuple[Rate, ...]
    """Trials with at least 1, 2, ... tasks solved in a row."""
    average_length: Estimate
    """Mean number of tasks solved in a row ("Avg. Len."), bootstrap interval over trials."""
    attempts: Rate
    """Over all attempted tasks of all trials."""
    per_task: Mapping[str, Rate]
    steps_per_success: float
    """Mean control steps of successful attempts; NaN without one."""
    steps_per_task: Mapping[str, float]
    """The same for each task that succeeded at least once."""
    partial: Mapping[str, float]
    """Means of the environment's partial scores, where it reports any."""
    restarts: int
    """How often an environment broke and its trial was repeated."""


def summarize(results: Sequence[TrialResult]) -> Summary:
    """Metrics of at least one result."""
    if not results:
        raise ValueError("no results to summarise.")
    scores = np.array([result.score for result in results])
    length = max(len(result.tasks) for result in results)
    outcomes: dict[str, list[tuple[bool, int]]] = {}
    for result in results:
        for task, success, steps in zip(result.tasks, result.success, result.steps):
            outcomes.setdefault(task, []).append((success, steps))
    steps = {task: [count for success, count in pairs if success] for task, pairs in outcomes.items()}
    every = [count for counts in steps.values() for count in counts]
    means = _score_means(scores, length, seed=0)
    names = sorted({name for result in results for name in result.partial})
    return Summary(
        trials=len(results),
        in_a_row=tuple(Rate(int((scores >= count).sum()), len(results)) for count in range(1, length + 1)),
        average_length=Estimate(float(scores.mean()), *percentiles(means)),
        attempts=Rate(len(every), sum(map(len, outcomes.values()))),
        per_task={task: Rate(len(steps[task]), len(pairs)) for task, pairs in sorted(outcomes.items())},
        steps_per_success=float(np.mean(every)) if every else math.nan,
        steps_per_task={task: float(np.mean(counts)) for task, counts in sorted(steps.items()) if counts},
        partial={name: float(np.mean([result.partial.get(name, 0.0) for result in results])) for name in names},
        restarts=sum(result.restarts for result in results),
    )


def generalisation_gap(seen: Sequence[TrialResult], unseen: Sequence[TrialResult]) -> Estimate:
    """Average length on seen minus on unseen conditions; positive = worse on unseen. Bootstrap interval over both."""
    scores = [np.array([result.score for result in results]) for results in (seen, unseen)]
    length = max(len(result.tasks) for result in (*seen, *unseen))
    differences = _score_means(scores[0], length, seed=0) - _score_means(scores[1], length, seed=1)
    return Estimate(float(scores[0].mean() - scores[1].mean()), *percentiles(differences))


def bootstrap_means(values: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """float[_RESAMPLES], means of resampled trials. Trials have few different values [K], each of them as often as
    `counts` int[K] says: the counts are what is resampled."""
    total = counts.sum()
    return np.random.default_rng(seed).multinomial(total, counts / total, size=_RESAMPLES) @ values / total


def _score_means(scores: np.ndarray, length: int, seed: int) -> np.ndarray:
    """`bootstrap_means` of tasks in a row, int[trials] in 0 to `length`."""
    return bootstrap_means(np.arange(length + 1), np.bincount(scores, minlength=length + 1), seed)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """Ends of the 95 % interval that bootstrapped means give."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
