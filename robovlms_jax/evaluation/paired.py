"""Two policies on the same starts: which differences there are, how sure they are, how many trials a claim needs.

Trials are paired (same initial state, same sentence), so what counts are the trials that only one of the two solved.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from robovlms_jax.evaluation import blind, rollout_metrics
from robovlms_jax.evaluation.rollout_metrics import Estimate, Rate

_MOST_TRIALS = 20_000


def difference(pairs: Sequence[tuple[bool, bool]], confidence: float = 0.95) -> Estimate:
    """Success rate of the first policy minus that of the second, with the score interval of Tango (1998, Statistics in
    Medicine 17, 891-908), which keeps its level for few trials and for no discordant ones.

    Raises ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("no trials that both policies ran; nothing can be compared.")
    from scipy import optimize, stats  # takes most of a second to import

    found, total = blind.paired(pairs), len(pairs)
    wanted = stats.norm.ppf((1 + confidence) / 2)
    value = (found.first - found.second) / total

    def beyond(delta: float, side: float) -> float:
        return _score(found.first, found.second, total, delta) - side * wanted

    edge = 1 - 1e-12
    low = -1.0 if value <= -edge else optimize.brentq(beyond, -edge, value, args=(1.0,))
    high = 1.0 if value >= edge else optimize.brentq(beyond, value, edge, args=(-1.0,))
    return Estimate(value, float(low), float(high))


def _score(first: int, second: int, total: int, delta: float) -> float:
    """Tango's statistic of the hypothesis that the difference is `delta`; standard normal under it."""
    a = 2 * total
    b = -first - second + (2 * total - first + second) * delta
    c = -second * delta * (1 - delta)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (
        2 * a
    )  # of trials that the second alone solves, given delta
    variance = total * (2 * share + delta * (1 - delta))
    distance = first - second - total * delta
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def mean_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of paired differences, such as tasks in a row, with a 95 % bootstrap interval over trials."""
    differences = np.subtract(first, second).astype(float)
    if not len(differences):
        raise ValueError("no trials that both policies ran; nothing can be compared.")
    means = rollout_metrics.bootstrap_means(*np.unique(differences, return_counts=True), seed)
    return Estimate(float(differences.mean()), *rollout_metrics.percentiles(means))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values that hold for all tests of a table at once (Holm 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = np.zeros(len(p_values)), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min((len(p_values) - rank) * p_values[place], 1.0))
        adjusted[place] = largest
    return [float(p) for p in adjusted]


def power(trials: int, first: float, second: float, alpha: float = 0.05) -> float:
    """Probability that McNemar's exact two-sided test calls the two policies different, by enumeration.

    Args:
      first, second: probability that a trial is solved by the first, or by the second policy alone.
    """
    if min(first, second) < 0 or first + second > 1:
        raise ValueError(f"first={first} and second={second} are shares of all trials: at least 0, at most 1 together.")
    discordant = first + second
    if not discordant or trials < 1:
        return 0.0
    from scipy import stats

    spread = 10 + 9 * math.sqrt(trials * discordant * (1 - discordant))  # beyond it lies less than 1e-15
    middle = trials * discordant
    counts = np.arange(max(int(middle - spread), 0), min(int(middle + spread) + 1, trials) + 1)
    limit = _limits(alpha, 1024 << max(int(counts[-1]).bit_length() - 10, 0))[counts]
    share = first / discordant
    rejects = stats.binom.cdf(limit, counts, share) + stats.binom.cdf(limit, counts, 1 - share)
    return float(stats.binom.pmf(counts, trials, discordant) @ np.where(limit < 0, 0.0, np.minimum(rejects, 1.0)))


@functools.lru_cache(maxsize=8)
def _limits(alpha: float, size: int) -> np.ndarray:
    """For 0, 1, ... discordant trials, the largest number of the rarer kind at which the test rejects; -1: at none."""
    from scipy import stats

    counts = np.arange(size)
    limit = stats.binom.ppf(alpha / 2, counts, 0.5)
    return np.where(stats.binom.cdf(limit, counts, 0.5) > alpha / 2, limit - 1, limit)


def trials_needed(claimed: float, discordant: float, wanted: float = 0.8, alpha: float = 0.05) -> int | None:
    """Fewest trials with which McNemar's exact test finds a difference with probability `wanted`; None: more than
    20 000.

    Args:
      claimed: difference of the two success rates. discordant: share of trials that only one of the two solves, at
        least as large; what is claimed says nothing about it, so take it from a comparison.
    """
    if not 0 < claimed <= discordant <= 1:
        raise ValueError(f"claimed={claimed}, discordant={discordant}: expected 0 < claimed <= discordant <= 1.")
    first, second = (discordant + claimed) / 2, (discordant - claimed) / 2

    def enough(trials: int) -> bool:
        return power(trials, first, second, alpha) >= wanted

    # Close by doubling and halving; power goes up in saw teeth, about as long as the square root of the number and
    # lower and lower, so the first one is looked for from a little below.
    high = 4
    while not enough(high):
        if high == _MOST_TRIALS:
            return None
        high = min(2 * high, _MOST_TRIALS)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return next(trials for trials in range(max(high - min(6 * math.isqrt(high), 200), 1), high + 1) if enough(trials))


def smallest_difference(trials: int, discordant: float, wanted: float = 0.8, alpha: float = 0.05) -> float | None:
    """Smallest difference of two success rates that so many trials find with probability `wanted`, to 0.001; None: not
    even the largest that there can be."""
    steps = np.arange(1, int(1000 * discordant + 1e-9) + 1) / 1000

    def enough(claimed: float) -> bool:
        return power(trials, (discordant + claimed) / 2, max(discordant - claimed, 0.0) / 2, alpha) >= wanted

    if not len(steps) or not enough(steps[-1]):
        return None
    low, high = -1, len(steps) - 1
    while high - low > 1:  # power grows with the difference
        middle = (low + high) // 2
        low, high = (low, middle) if enough(steps[middle]) else (middle, high)
    return float(steps[high])


@dataclasses.dataclass(frozen=True)
class Selection:
    """What choosing the best of several checkpoints by a table does to the number printed beside it.

    chosen: place of the best on all trials. naive: its mean there, which the choice has flattered. chosen_on_half,
    half: chosen on one half of the trials, and its mean on the other, which the choice has not seen, with interval.
    optimism: by how much the chosen one's mean on the choosing half exceeds its mean on the other, over random halves.
    honest: its mean on the other half, over random halves. picked: how often each was chosen.
    """

    chosen: int
    naive: float
    chosen_on_half: int
    half: Estimate
    optimism: float
    honest: float
    picked: tuple[float, ...]


def selection(outcomes: np.ndarray, *, splits: int = 2000, seed: int = 0) -> Selection:
    """The bias of choosing, estimated by choosing on random halves of the trials and looking at the others.

    Half as many trials choose worse and flatter more than all of them, so `optimism` is an upper estimate for `naive`.

    Args:
      outcomes: float[checkpoints, trials], the same trials for all. Of equals the first is chosen.
    Raises ValueError: fewer than two checkpoints or four trials.
    """
    outcomes = np.asarray(outcomes, float)
    if outcomes.ndim != 2 or outcomes.shape[0] < 2 or outcomes.shape[1] < 4:
        raise ValueError(f"outcomes has shape {outcomes.shape}, expected at least 2 checkpoints and 4 trials.")
    count, trials = outcomes.shape
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(trials), (splits, 1)), axis=1)
    chooses = np.zeros((splits, trials), bool)
    np.put_along_axis(chooses, order[:, : trials // 2], True, axis=1)
    inside = outcomes @ chooses.T / chooses.sum(1)  # [checkpoints, splits]
    outside = outcomes @ ~chooses.T / (~chooses).sum(1)
    best = inside.argmax(0)
    rows = np.arange(splits)
    other = outcomes[best[0], ~chooses[0]]
    chosen = int(outcomes.mean(1).argmax())
    return Selection(
        chosen=chosen,
        naive=float(outcomes[chosen].mean()),
        chosen_on_half=int(best[0]),
        half=_mean(other),
        optimism=float((inside[best, rows] - outside[best, rows]).mean()),
        honest=float(outside[best, rows].mean()),
        picked=tuple(float(share) for share in np.bincount(best, minlength=count) / splits),
    )


def _mean(values: np.ndarray) -> Estimate:
    """With Wilson's interval where all are 0 or 1, else the bootstrap's."""
    if np.isin(values, (0, 1)).all():
        rate = Rate(int(values.sum()), len(values))
        return Estimate(rate.value, *rate.interval)
    return mean_difference(values, np.zeros(len(values)))
