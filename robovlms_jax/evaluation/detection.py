"""Does a policy's uncertainty tell failed trials from successful ones, and how early?

The protocol of published detectors (SAFE, Gu et al. 2025, arXiv:2506.09937; FAIL-Detect, Xu et al. 2025,
arXiv:2503.08558): a score at every step, made of the uncertainty so far; a threshold that varies with time, calibrated
on successful trials (functional conformal prediction, one-sided band; Diana et al. 2023, arXiv:2106.01792); then AUROC,
rates of true and false alarms and the time of detection, on other trials.

Failed trials run to the step limit and successful ones end early, so time alone tells them apart in the end. Therefore
AUROC is also measured among trials that still run at a given step, and elapsed time is a score like the others, to be
beaten. NumPy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax.evaluation.rollout import TrialResult
from robovlms_jax.evaluation.rollout_metrics import Estimate, Rate
from robovlms_jax.policies import confidence

_RESAMPLES = 1000


def _maximum(values: np.ndarray) -> np.ndarray:
    return np.fmax.accumulate(np.r_[0.0, values])[1:]


def _mean(values: np.ndarray) -> np.ndarray:
    return _sum(values) / np.maximum(np.cumsum(~np.isnan(values)), 1)


def _sum(values: np.ndarray) -> np.ndarray:
    return np.cumsum(np.nan_to_num(values))


def _time(values: np.ndarray) -> np.ndarray:
    return np.arange(1.0, len(values) + 1)


SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "maximum": _maximum,
    "mean": _mean,
    "sum": _sum,
    "elapsed time": _time,
}
"""Name -> (uncertainty float[T] of a trial's steps, nan where none was said) -> score float[T] after each of them. An
unknown uncertainty changes no score; before the first, scores are 0, which no head's uncertainty falls below. The last
is the baseline that knows nothing of the policy."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One trial: uncertainty float[T] of each executed action, nan where none was said; how it ended, and at what."""

    uncertainty: np.ndarray
    failed: bool
    task: str = ""


@dataclasses.dataclass(frozen=True)
class Band:
    """A threshold that varies with time.

    threshold: float[T], after step 1, 2, ...; later steps have the last one's. Infinite where trials were too few.
    """

    threshold: np.ndarray

    def alarm(self, score: np.ndarray) -> int:
        """Steps gone by when float[T], a trial's score, is above the threshold for the first time; 0: never."""
        above = score > _at(self.threshold, len(score))
        return int(above.argmax()) + 1 if above.any() else 0


def band(shaping: Sequence[np.ndarray], calibrating: Sequence[np.ndarray], coverage: float) -> Band:
    """A threshold that a further successful trial never exceeds with a probability of at least `coverage`.

    Args:
      shaping: scores float[T_i] of successful trials, whose mean and deviation at each step give the band its shape.
        A trial that is over keeps its last score.
      calibrating: those of others, exchangeable with the further one, which say how wide it has to be.
    Raises:
      ValueError: there is no trial in `shaping`.
    """
    if not shaping:
        raise ValueError("no successful trial to shape the threshold with; roll out more trials.")
    length = max(map(len, shaping))
    held = np.stack([_at(score, length) for score in shaping])
    middle, width = held.mean(0), held.std(0)
    # Where all trials agree, as all do on time, the smallest excess would count as endless.
    width = np.maximum(width, 0.01 * width.max() or 1.0)
    excess = [((x - _at(middle, len(x))) / _at(width, len(x))).max() for x in calibrating]
    return Band(middle + confidence.quantile(np.array(excess), coverage) * width)


def _at(values: np.ndarray, length: int) -> np.ndarray:
    """The first `length` of values, the last one repeated where they are fewer."""
    return values[np.minimum(np.arange(length), len(values) - 1)]


def auroc(failed: np.ndarray, succeeded: np.ndarray) -> float:
    """Probability that a failed trial's score float[m] is above a successful one's float[n]; ties count half. 0.5 is
    chance. Raises ValueError where there are none of either."""
    if not len(failed) or not len(succeeded):
        which = "failed" if not len(failed) else "succeeded"
        raise ValueError(f"no trial {which}, so there is nothing to tell apart; AUROC needs trials of both kinds.")
    below = [np.searchsorted(np.sort(succeeded), failed, side) for side in ("left", "right")]
    return float(np.mean(below) / len(succeeded))


def auroc_interval(groups: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> Estimate:
    """`auroc` over pairs of the same group (failed, succeeded), and its 95 % interval: failed and successful trials of
    each group are resampled apart. Raises ValueError where no group has both."""
    groups = [(failed, succeeded) for failed, succeeded in groups if len(failed) and len(succeeded)]
    if not groups:
        raise ValueError("no group has failed and successful trials, so there is nothing to tell apart.")
    pairs, rng = [len(failed) * len(succeeded) for failed, succeeded in groups], np.random.default_rng(seed)

    def area(draw: Callable[[np.ndarray], np.ndarray]) -> float:
        areas = [auroc(draw(failed), draw(succeeded)) for failed, succeeded in groups]
        return float(np.average(areas, weights=pairs))

    draws = [area(lambda scores: rng.choice(scores, len(scores))) for _ in range(_RESAMPLES)]
    return Estimate(area(lambda scores: scores), *map(float, np.percentile(draws, (2.5, 97.5))))


def episodes(results: Sequence[TrialResult]) -> list[Episode]:
    """Each trial's first task. A rollout that repeats another to the last digit (same state, same task) counts once,
    or the threshold would be tested on what it was made of.

    Raises ValueError where a result has no uncertainty.
    """
    found: dict[Any, Episode] = {}
    for result in results:
        if not result.uncertainty:
            raise ValueError(
                f"the result of trial {result.index} has no uncertainty: the policy says none (policy.head.spread, "
                "or policy.head.num_samples of flow heads), or the trial was run by a version that did not keep it."
            )
        key = (result.tasks[0], result.instructions[0], result.uncertainty[0])
        found[key] = Episode(np.array(result.uncertainty[0], float), not result.success[0], result.tasks[0])
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Detected:
    """How one score did on trials that its threshold was not made of.

    auroc: name of a moment -> among the trials still running then; None: no trial failed, or none succeeded. "end" is
    over all trials at their ends, where length tells. within: the same over pairs of one task, whose difficulty then
    tells nothing. time: share of a failed trial gone by at its alarm, mean over
    those detected; None: there was no alarm in any. repeated: mean over random splits of the rates of true and false
    alarms; None: no split had such trials.
    """

    auroc: dict[str, Estimate | None]
    within: dict[str, Estimate | None]
    true_alarms: Rate
    false_alarms: Rate
    time: Estimate | None
    repeated: tuple[float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Measured:
    """calibrated: successful trials the threshold was made of. tested, failed: trials it was tested on, and how many of
    them failed. at: moment -> trials still running then. scores: name -> how it did."""

    coverage: float
    calibrated: int
    tested: int
    failed: int
    at: dict[str, int]
    scores: dict[str, Detected]


def measure(trials: Sequence[Episode], coverage: float, *, share: float, splits: int, seed: int) -> Measured:
    """Calibrates on some trials and tests on the others.

    Args:
      coverage: 1 - the rate of false alarms that is allowed.
      share: of the trials, for calibration; of these the failed ones are not used.
      splits: further random splits to average the rates over.
    Raises:
      ValueError: fewer than two successful trials to calibrate on, or no trial to test on.
    """
    rng = np.random.default_rng(seed)
    calibration, test = _split(trials, share, rng)
    lengths = [len(trial.uncertainty) for trial in calibration if not trial.failed]
    moments: dict[str, int | None] = {f"step {int(step)}": int(step) for step in np.percentile(lengths, (25, 50, 75))}
    moments["end"] = None
    others = [_split(trials, share, rng) for _ in range(splits)]
    scores = {}
    for name, score in SCORES.items():
        rates = [_alarms(*split, score, coverage) for split in others]
        alarms = _alarms(calibration, test, score, coverage)
        times = np.array([alarm / length for alarm, length, failed in alarms if failed and alarm])
        scores[name] = Detected(
            {moment: _auroc_at(test, score, step, within=False) for moment, step in moments.items()},
            {moment: _auroc_at(test, score, step, within=True) for moment, step in moments.items()},
            _rate(alarms, True),
            _rate(alarms, False),
            _mean_interval(times, seed) if len(times) else None,
            (_mean_rate(rates, True), _mean_rate(rates, False)),
        )
    at = {moment: sum(len(x.uncertainty) >= (step or 0) for x in test) for moment, step in moments.items()}
    return Measured(coverage, len(lengths), len(test), sum(x.failed for x in test), at, scores)


def _split(trials: Sequence[Episode], share: float, rng: np.random.Generator) -> tuple[list[Episode], list[Episode]]:
    order = [trials[i] for i in rng.permutation(len(trials))]
    count = round(share * len(order))
    calibration, test = order[:count], order[count:]
    good = sum(not trial.failed for trial in calibration)
    if good < 2 or not test:
        raise ValueError(
            f"of {len(trials)} trials {len(calibration)} are for calibration, {good} of which succeeded, and "
            f"{len(test)} for the test; needed are two successful ones and one to test on. Roll out more trials."
        )
    return calibration, test


def _alarms(
    calibration: Sequence[Episode], test: Sequence[Episode], score: Callable, coverage: float
) -> list[tuple[int, int, bool]]:
    """(step of the alarm or 0, steps, whether it failed) of each trial of the test."""
    good = [score(trial.uncertainty) for trial in calibration if not trial.failed]
    half = len(good) // 2
    threshold = band(good[:half], good[half:], coverage)
    return [(threshold.alarm(score(x.uncertainty)), len(x.uncertainty), x.failed) for x in test]


def _rate(alarms: Sequence[tuple[int, int, bool]], failed: bool) -> Rate:
    of_kind = [bool(alarm) for alarm, _, kind in alarms if kind == failed]
    return Rate(sum(of_kind), len(of_kind))


def _mean_rate(splits: Sequence[Sequence[tuple[int, int, bool]]], failed: bool) -> float | None:
    rates = [rate.value for alarms in splits if (rate := _rate(alarms, failed)).attempts]
    return float(np.mean(rates)) if rates else None


def _auroc_at(test: Sequence[Episode], score: Callable, step: int | None, *, within: bool) -> Estimate | None:
    """Among trials that still run at `step`, by their score then; step None: all, at their ends. within: over pairs of
    one task. None: there is no pair."""
    groups: dict[str, tuple[list[float], list[float]]] = {}
    for trial in test:
        if step is None or len(trial.uncertainty) >= step:
            kinds = groups.setdefault(trial.task if within else "", ([], []))
            kinds[not trial.failed].append(score(trial.uncertainty)[-1 if step is None else step - 1])
    pairs = [(np.array(failed), np.array(succeeded)) for failed, succeeded in groups.values() if failed and succeeded]
    return auroc_interval(pairs) if pairs else None


def _mean_interval(values: np.ndarray, seed: int) -> Estimate:
    draws = np.random.default_rng(seed).choice(values, (_RESAMPLES, len(values))).mean(1)
    return Estimate(float(values.mean()), *map(float, np.percentile(draws, (2.5, 97.5))))


def table(measured: Measured) -> str:
    """For people, in Markdown."""
    good = measured.tested - measured.failed
    lines = [
        f"{measured.calibrated} successful trials to calibrate on, at most {1 - measured.coverage:.0%} false alarms "
        f"promised; {measured.tested} others to test on, {measured.failed} of which failed."
    ]
    if not measured.failed or not good:
        which = "No trial of the test failed" if not measured.failed else "All trials of the test failed"
        lines.append(f"{which}: there is nothing to tell apart, and AUROC is not defined.")
    moments = [f"{moment} ({count} trials)" for moment, count in measured.at.items()]
    lines += _rows("AUROC", moments, {name: found.auroc.values() for name, found in measured.scores.items()})
    within = {name: found.within.values() for name, found in measured.scores.items()}
    lines += _rows("AUROC within tasks", moments, within)
    heads = ["failures alarmed", "successes alarmed", "share of the trial gone by", "the rates over random splits"]
    lines += _rows("alarms", heads, {name: _alarm_cells(found) for name, found in measured.scores.items()})
    return "\n".join(lines)


def _rows(title: str, heads: Sequence[str], cells: Mapping[str, Iterable[Any]]) -> list[str]:
    head = ["", f"| {title} | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 1)]
    return head + [f"| {name} | " + " | ".join(map(_shown, row)) + " |" for name, row in cells.items()]


def _alarm_cells(found: Detected) -> list[Any]:
    rates = [Estimate(x.value, *x.interval) if x.attempts else None for x in (found.true_alarms, found.false_alarms)]
    return [*rates, found.time, ", ".join("none" if mean is None else f"{mean:.2f}" for mean in found.repeated)]


def _shown(estimate: Estimate | str | None) -> str:
    if isinstance(estimate, str):
        return estimate
    return "none" if estimate is None else f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
