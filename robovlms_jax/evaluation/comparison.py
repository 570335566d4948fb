"""Several policies under several conditions: what the trials say about each, and about every two of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from robovlms_jax.evaluation import blind, chains, conditions, paired, rollout_metrics
from robovlms_jax.evaluation.rollout import TrialResult
from robovlms_jax.evaluation.rollout_metrics import Estimate, Summary

CLAIMS = (0.02, 0.05, 0.1, 0.2)
"""Differences of success rates whose price in trials the report names."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A policy and its results. name: for the eye; evaluations: condition -> results, the same conditions for all."""

    name: str
    evaluations: Mapping[str, chains.Evaluation]


@dataclasses.dataclass(frozen=True)
class Standing:
    """One policy under one condition. change: mean tasks in a row minus that of the usual condition, trial by trial;
    None for the usual one, and where that was not asked."""

    policy: str
    condition: str
    summary: Summary
    change: Estimate | None


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two policies on the same trials of one condition.

    at_least: a trial counts as solved with so many tasks in a row. counts: which of the two solved what; its p is
    McNemar's exact one. corrected: that p, for all such tests of the report together (Holm). rate: first minus second,
    with Tango's interval. length: the same of the mean number of tasks in a row. discordant: share of trials that only
    one of them solved. smallest: difference that so many trials find with 80 %, at this share of discordant trials.
    needed: trials that would find a difference as large as the one found with 80 %; None: there is none, or too small a
    one for 20 000 trials.
    """

    condition: str
    first: str
    second: str
    at_least: int
    counts: blind.Comparison
    corrected: float
    rate: Estimate
    length: Estimate
    discordant: float
    smallest: float | None
    needed: int | None

    @property
    def trials(self) -> int:
        return self.counts.both + self.counts.first + self.counts.second + self.counts.neither

    @property
    def told_apart(self) -> bool:
        """At the level of 5 % for all tests together."""
        return self.corrected < 0.05


def standings(entries: Sequence[Entry]) -> list[Standing]:
    """Condition by condition, in each policy by policy."""
    found = []
    for condition in entries[0].evaluations:
        for entry in entries:
            results = entry.evaluations[condition].results
            usual = entry.evaluations.get(conditions.USUAL)
            change = None
            if usual is not None and condition != conditions.USUAL:
                pairs = list(_both(results, usual.results))
                change = paired.mean_difference([one.score for one, _ in pairs], [other.score for _, other in pairs])
            found.append(Standing(entry.name, condition, rollout_metrics.summarize(results), change))
    return found


def differences(entries: Sequence[Entry]) -> list[Difference]:
    """Every two policies under every condition that is no ablation, and for chains by their first and by all tasks.

    Ablations are left out: who is better at what nobody asked says nothing, and every further test costs the others.
    """
    made = []
    for condition, first, second in _asked(entries):
        pairs = list(_both(first.evaluations[condition].results, second.evaluations[condition].results))
        length = max(len(one.tasks) for one, _ in pairs)
        mean = paired.mean_difference([one.score for one, _ in pairs], [other.score for _, other in pairs])
        for at_least in sorted({1, length}):
            solved = [(one.score >= at_least, other.score >= at_least) for one, other in pairs]
            counts = blind.paired(solved)
            discordant = (counts.first + counts.second) / len(solved)
            rate = paired.difference(solved)
            found = abs(rate.value)
            made.append(
                Difference(
                    condition=condition,
                    first=first.name,
                    second=second.name,
                    at_least=at_least,
                    counts=counts,
                    corrected=1.0,
                    rate=rate,
                    length=mean,
                    discordant=discordant,
                    smallest=paired.smallest_difference(len(solved), discordant) if discordant else None,
                    needed=paired.trials_needed(found, discordant) if found else None,
                )
            )
    corrected = paired.holm([each.counts.p for each in made])
    return [dataclasses.replace(each, corrected=p) for each, p in zip(made, corrected, strict=True)]


def selection(entries: Sequence[Entry]) -> paired.Selection | None:
    """What choosing the best by the usual condition's mean tasks in a row does; None: nothing to choose from."""
    if len(entries) < 2 or conditions.USUAL not in entries[0].evaluations:
        return None
    results = [{r.index: r.score for r in entry.evaluations[conditions.USUAL].results} for entry in entries]
    shared = sorted(set.intersection(*map(set, results)))
    return paired.selection(np.array([[each[i] for i in shared] for each in results])) if len(shared) >= 4 else None


def price(discordant: float) -> list[tuple[float, int | None]]:
    """(claimed difference, trials it needs) at a share of trials that only one of two policies solves."""
    return [(claim, paired.trials_needed(claim, max(discordant, claim))) for claim in CLAIMS]


def _asked(entries: Sequence[Entry]) -> list[tuple[str, Entry, Entry]]:
    names = [name for name in entries[0].evaluations if not conditions.CONDITIONS[name].ablation]
    return [(name, *pair) for name in names for pair in itertools.combinations(entries, 2)]


def _both(first: Sequence[TrialResult], second: Sequence[TrialResult]) -> list[tuple[TrialResult, TrialResult]]:
    """Results of trials that both sides ran, by number. Raises ValueError: trials of one number had other tasks."""
    others = {result.index: result for result in second}
    pairs = [(result, others[result.index]) for result in first if result.index in others]
    for one, other in pairs:
        if one.tasks != other.tasks:
            raise ValueError(f"trial {one.index} asked {one.tasks} on one side and {other.tasks} on the other.")
    if not pairs:
        raise ValueError("no trial was run by both sides; nothing can be compared.")
    return pairs
