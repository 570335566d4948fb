"""Hooks that look at the state: checkpoints, evaluation, rollouts; and all hooks of a run together."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from robovlms_jax.training import progress, stopping, watching
from robovlms_jax.training.checkpoints import Checkpointer
from robovlms_jax.training.config import TrainConfig
from robovlms_jax.training.goodput import Goodput
from robovlms_jax.training.guards import CorruptGuard, Describe, NonfiniteGuard
from robovlms_jax.training.loop import Hook, Schedule, Step
from robovlms_jax.training.metrics import MetricWriter
from robovlms_jax.training.state import TrainState

logger = logging.getLogger(__name__)

Numbers = Callable[[TrainState], Mapping[str, float]]


class Checkpoints(Hook):
    """Saves the state when it is due and before the loop ends.

    position: step -> what a resumed run needs to draw that step's batch next.
    """

    def __init__(self, checkpointer: Checkpointer, position: Callable[[int], Mapping[str, Any]], goodput: Goodput):
        self._checkpointer, self._position, self._goodput = checkpointer, position, goodput

    def after(self, step: Step, metrics: Mapping[str, jax.Array]) -> None:
        if step.log:
            self._checkpointer.check()
        if step.save or step.stop:
            with self._goodput.spent_on("checkpoint"):
                self._checkpointer.save(step.state, self._position(step.number))

    def finish(self, step: int, stopped: bool) -> None:
        with self._goodput.spent_on("checkpoint"):
            self._checkpointer.wait()

    def save_now(self, state: TrainState) -> None:
        """Save, and return when it is on the disk."""
        self._checkpointer.save(state, self._position(int(state.step)))
        self._checkpointer.wait()

    def offer_best(self, step: Step, score: float) -> bool:
        """See `Checkpointer.offer_best`."""
        return self._checkpointer.offer_best(step.state, self._position(step.number), score)


@dataclasses.dataclass(frozen=True)
class Ending:
    """What comes between two steps, after `checkpoints`, where a signal may end the run."""

    signal: stopping.StopSignal
    checkpoints: Checkpoints

    def unless_stopped(self, step: Step, what: str, numbers: Numbers) -> Mapping[str, float] | None:
        """`numbers` of the step's state; None: the signal came meanwhile, and the state is saved. Those of the run's
        last step, after which nothing resumes it, are made to their end."""
        if step.last:
            return numbers(step.state)
        found = self.signal.unless_it_came(step, what, lambda: numbers(step.state))
        if step.stop:
            self.checkpoints.save_now(step.state)
        return found


class Evaluation(Hook):
    """Numbers on the validation split, every `every` steps (0: never) but the run's last, when the report has them."""

    def __init__(self, evaluate: Numbers, every: int, ending: Ending, writer: MetricWriter, goodput: Goodput):
        self._evaluate, self._every, self._ending = evaluate, every, ending
        self._writer, self._goodput = writer, goodput

    def after(self, step: Step, metrics: Mapping[str, jax.Array]) -> None:
        if not self._every or step.number % self._every or step.last or step.stop:
            return
        with self._goodput.spent_on("evaluation"):
            values = self._ending.unless_stopped(step, "numbers on the validation split", self._evaluate)
        if values is not None:
            self._writer.write(step.number, {f"validation/{name}": value for name, value in values.items()})


@dataclasses.dataclass(frozen=True)
class Rollouts(Hook):
    """Numbers of the policy in closed loop, every `every` steps (0: never).

    best: where the checkpoint with the best "score" is kept; then the last step is rolled out, too. Without it, only
      the report does that.
    """

    roll_out: Numbers
    every: int
    best: Checkpoints | None
    ending: Ending
    writer: MetricWriter
    goodput: Goodput

    def after(self, step: Step, metrics: Mapping[str, jax.Array]) -> None:
        due = self.best is not None if step.last else self.every > 0 and step.number % self.every == 0
        if not due or step.stop:
            return
        with self.goodput.spent_on("evaluation"):
            values = self.ending.unless_stopped(step, "rollouts", self.roll_out)
            if values is None:
                return
            self.writer.write(step.number, {f"rollouts/{name}": value for name, value in values.items()})
            if self.best is not None:
                is_best = self.best.offer_best(step, values["score"])
                logger.info("rollouts score %.3f%s", values["score"], ", the best so far" if is_best else "")


@dataclasses.dataclass(frozen=True)
class Services:
    """What the hooks of a run work with.

    position: step -> what a resumed run needs to draw that step's batch next.
    describe: source and number of an episode -> words that name it.
    max_corrupt_share: of the segments, that may be replaced before training stops.
    loader_rate: windows/s that reading ahead brought, for the report of who waits for whom.
    evaluate: numbers on the validation split. roll_out: numbers in closed loop, asked every roll_out_every steps; with
      select_best also at the end, and its "score" decides which checkpoint is kept in best/.
    """

    train: TrainConfig
    checkpointer: Checkpointer
    position: Callable[[int], Mapping[str, Any]]
    writer: MetricWriter
    describe: Describe
    max_corrupt_share: float
    evaluate: Numbers
    roll_out: Numbers | None = None
    roll_out_every: int = 0
    select_best: bool = False
    loader_rate: float | None = None
    goodput: Goodput = dataclasses.field(default_factory=Goodput)

    def hooks(self, state: TrainState, schedule: Schedule) -> list[Hook]:
        """All of them, for a loop that begins with `state`."""
        train, start = self.train, int(state.step)
        checkpoints = Checkpoints(self.checkpointer, self.position, self.goodput)
        stop = stopping.StopSignal()
        ending = Ending(stop, checkpoints)
        corrupt = CorruptGuard(self.max_corrupt_share, self.describe)
        nonfinite = NonfiniteGuard(train, int(state.skipped), self.describe, checkpoints.save_now)
        speed = progress.Speed(start, schedule.end, train.batch_size, self.goodput)
        compare_at = start + 2 * train.log_every
        hooks = [
            progress.Clock(self.goodput, self.writer, schedule),
            watching.Watchdog(train.hang_timeout_s, self.goodput),
            progress.Profiler(train, start),
            corrupt,
            stop,
            nonfinite,  # before anything is saved
            progress.Log(speed, self.writer, corrupt, nonfinite, compare_at=compare_at, loader_rate=self.loader_rate),
            checkpoints,
            Evaluation(self.evaluate, train.eval_every, ending, self.writer, self.goodput),
        ]
        # Processes on CPUs often share their cores, so that one or the other is always slower.
        if jax.process_count() > 1 and jax.local_devices()[0].platform != "cpu":
            hooks.append(watching.Stragglers(watching.device_probe))
        if self.roll_out is not None:
            best = checkpoints if self.select_best else None
            hooks.append(Rollouts(self.roll_out, self.roll_out_every, best, ending, self.writer, self.goodput))
        return hooks

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; waiting for them counts as waiting for data."""
        while True:
            with self.goodput.spent_on("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
