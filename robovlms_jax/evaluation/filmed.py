"""Which trials' films are kept: failures first, chosen once outcomes are known."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from robovlms_jax.evaluation.rollout import Films, Recording, Trial


class FailuresFirst:
    """Films every trial and keeps `most` films: one failure of each task, then second ones, and so on; one place stays
    for a trial that was solved, where there is one and `most` is above 1. Solved trials are spread over all trials.

    What is kept depends on trials and outcomes alone, not on the order in which trials end. In memory there are never
    more than 2 x `most` films besides those of trials that run.
    """

    def __init__(self, trials: Sequence[Trial], most: int, every: int = 3):
        self._most = min(most, len(trials))
        self.films = Films([trial.index for trial in trials] if most else (), self._keep, every)
        """For `rollout.run`."""
        count = len(trials)
        # A trial's place among the solved ones: evenly spread ones before all others.
        spread = [trials[i * count // self._most].index for i in range(self._most)]
        others = [trial.index for trial in trials if trial.index not in spread]
        self._order = {index: place for place, index in enumerate([*spread, *others])}
        self._failures: dict[str, list[int]] = {}
        """Task -> indices of the trials that failed in it, sorted; of all, whether their films are kept or not."""
        self._failed: list[Recording] = []
        self._solved: list[Recording] = []

    def _keep(self, recording: Recording) -> None:
        index = recording.trial.index
        if recording.result.success[-1]:
            self._solved = sorted([*self._solved, recording], key=lambda x: self._order[x.trial.index])[: self._most]
            return
        bisect.insort(self._failures.setdefault(_failed_task(recording), []), index)
        self._failed = sorted([*self._failed, recording], key=self._place)[: self._most]

    def _place(self, recording: Recording) -> tuple[int, int]:
        """How many failures of the same task come before, and the trial's index. More failures only make it later, so
        that what is let go would not be kept in the end either."""
        index = recording.trial.index
        return self._failures[_failed_task(recording)].index(index), index

    def recordings(self) -> list[Recording]:
        """What is kept: failures, then solved trials, each in the order of trials."""
        solved = self._solved[: max(self._most - len(self._failed), min(1, self._most - 1))]
        failed = self._failed[: self._most - len(solved)]
        return [*sorted(failed, key=_index), *sorted(solved, key=_index)]


def _index(recording: Recording) -> int:
    return recording.trial.index


def _failed_task(recording: Recording) -> str:
    return recording.trial.tasks[len(recording.result.success) - 1]
