"""Hooks that say how training goes: lines in the log, metrics, traces."""

from __future__ import annotations

import datetime
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from robovlms_jax.parallel import distributed
from robovlms_jax.training.config import TrainConfig
from robovlms_jax.training.goodput import Goodput
from robovlms_jax.training.guards import CorruptGuard, NonfiniteGuard
from robovlms_jax.training.loop import Hook, Schedule, Step
from robovlms_jax.training.metrics import MetricWriter

logger = logging.getLogger(__name__)

UNEVEN_WAIT = 0.2
"""Processes whose shares of time spent waiting for data differ by more are named in the log."""


KEEPS_UP = 0.05
"""A loop that waits for its data for less of the time is not held up by the loader."""


class Clock(Hook):
    """Where the time goes: runs `goodput` while the loop does, and says so at the end."""

    def __init__(self, goodput: Goodput, writer: MetricWriter, schedule: Schedule):
        self._goodput, self._writer, self._schedule = goodput, writer, schedule

    def __enter__(self) -> Clock:
        self._goodput.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._goodput.__exit__(*exception)

    def finish(self, step: int, stopped: bool) -> None:
        if not stopped and step == self._schedule.end:
            self._writer.write(step, {f"goodput/{phase}": share for phase, share in self._goodput.shares().items()})
        logger.info("time in the training loop: %s", self._goodput)


class Log(Hook):
    """A line and metrics on the steps since the last one.

    loader_rate: windows/s that reading ahead brought, for the report of who waits for whom; None: no report.
    """

    def __init__(
        self,
        speed: Speed,
        writer: MetricWriter,
        corrupt: CorruptGuard,
        nonfinite: NonfiniteGuard,
        *,
        compare_at: int,
        loader_rate: float | None = None,
    ):
        self._speed, self._writer, self._corrupt, self._nonfinite = speed, writer, corrupt, nonfinite
        self._compare_at, self._loader_rate = compare_at, loader_rate

    def after(self, step: Step, metrics: Mapping[str, jax.Array]) -> None:
        if not step.log:
            return
        values = self._nonfinite.means()
        values |= self._speed.log(step.number, values["loss"]) | self._corrupt.values() | self._nonfinite.values()
        self._writer.write(step.number, {f"train/{name}": value for name, value in values.items()})
        if step.number >= self._compare_at and self._loader_rate:
            _report_loader(self._loader_rate, values, self._speed.batch_size)
            self._loader_rate = None


def _report_loader(loader: float, values: Mapping[str, float], batch_size: int) -> None:
    """Reading ahead may have been slower than reading is: beside a compiler, with nothing in memory yet."""
    eaten, waits = values["windows_per_second"], values["data_wait_share"]
    keeps_up = loader > 1.2 * eaten or waits < KEEPS_UP
    verdict = "the loader keeps up" if keeps_up else "the loader limits: raise data.num_threads or pack the dataset"
    logger.info(
        "reading ahead brought %.0f windows/s, the step eats %.0f (batch %d) and waits for data %.0f%% of the time: %s",
        *(loader, eaten, batch_size, 100 * waits, verdict),
    )


class Speed:
    """Speed, data wait and time left; compilation, evaluation and checkpoints do not count as training time."""

    def __init__(self, start: int, steps: int, batch_size: int, goodput: Goodput):
        self._start, self._steps, self.batch_size, self._goodput = start, steps, batch_size, goodput
        self._step, self._seconds = start, goodput.seconds()

    def log(self, step: int, loss: float) -> dict[str, float]:
        before, self._seconds = self._seconds, self._goodput.seconds()
        spent = {phase: seconds - before[phase] for phase, seconds in self._seconds.items()}
        first = self._step == self._start
        seconds = max(spent["step"] + spent["data"] + (spent["compile"] if first else 0.0), 1e-9)
        rate = (step - self._step) / seconds
        waits = distributed.of_all(
            min(spent["data"] / seconds, 1.0)
        )  # the others wait for the slowest inside their step
        values = {
            "steps_per_second": rate,
            "windows_per_second": rate * self.batch_size,
            "data_wait_share": float(waits.max()),
            "compilations": float(self._goodput.compilations),
            "goodput": self._goodput.shares()["step"],
        }
        if first:
            logger.info(
                "step %d/%d  loss %.4f  (first step, with compilation: %.1f s)", step, self._steps, loss, seconds
            )
        else:
            eta = datetime.timedelta(seconds=round((self._steps - step) / rate))
            logger.info(
                "step %d/%d  loss %.4f  %.2f steps/s  %.0f windows/s  waits for data %.0f%%  computes %.0f%%  eta %s",
                *(step, self._steps, loss, rate, rate * self.batch_size, 100 * values["data_wait_share"]),
                *(100 * values["goodput"], eta),
            )
            if waits.max() - waits.min() > UNEVEN_WAIT:
                logger.info(
                    "process %d waits %.0f%% of the time for its data, process %d %.0f%%: the slower one holds all up; "
                    "look at its disk and processors",
                    *(waits.argmax(), 100 * waits.max(), waits.argmin(), 100 * waits.min()),
                )
        self._step = step
        return values


class Profiler(Hook):
    """Traces train.profile steps, from the third on: the first compiles, the second still allocates."""

    def __init__(self, train: TrainConfig, start: int):
        self._directory = pathlib.Path(train.output) / "tensorboard"
        self._first, self._count, self._running = start + 3, train.profile, False
        self._newest: Any = None  # of a step that may still be running

    def before(self, step: int) -> None:
        if self._count and step == self._first:
            jax.block_until_ready(self._newest)
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif self._running and step == self._first + self._count:
            jax.block_until_ready(self._newest)
            self._stop()

    def after(self, step: Step, metrics: Mapping[str, jax.Array]) -> None:
        self._newest = metrics

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        logger.info("trace of %d steps: tensorboard --logdir %s", self._count, self._directory)

    def __exit__(self, *exception: object) -> None:
        if self._running:  # the run ended before, or with, the last step to trace
            self._stop()
