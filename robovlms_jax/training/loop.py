"""The training loop: draw a batch, step, log, evaluate, save. Everything it calls lives elsewhere."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.training.checkpoints import Checkpointer
from robovlms_jax.training.config import TrainConfig
from robovlms_jax.training.goodput import Goodput
from robovlms_jax.training.metrics import MetricWriter
from robovlms_jax.training.state import TrainState
from robovlms_jax.types import Batch

logger = logging.getLogger(__name__)

CORRUPT_GRACE = 1000
"""Unreadable segments are allowed as if at least this many had been seen, so that one early hit does not stop a run."""

UNEVEN_WAIT = 0.2
"""Processes whose shares of time spent waiting for data differ by more are named in the log."""


class CorruptDataError(RuntimeError):
    """More segments could not be read than data.max_corrupt_share allows."""


class LoaderError(RuntimeError):
    """What reads batches is gone."""


class DivergedError(RuntimeError):
    """Loss or gradient is not finite any more; the newest checkpoint on disk is from before."""


NONFINITE = "nonfinite.jsonl"
"""In a run's directory: one line for each batch whose loss or gradient was not finite. Of several hosts, each writes
the episodes it had read; all but the first put their number before the ending."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What the loop asks a configuration.

    max_corrupt_share: of the segments, that may be replaced before training stops.
    rollouts_every: steps between rollouts, 0: none but at the end. select_best: the best of them is kept in best/.
    """

    train: TrainConfig
    max_corrupt_share: float
    rollouts_every: int = 0
    select_best: bool = False


def fit(
    state: TrainState,
    batches: Iterator[Batch],
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Mapping[str, jax.Array]]],
    *,
    config: LoopConfig,
    mesh: Mesh,
    checkpointer: Checkpointer,
    data_state: Callable[[int], Mapping[str, Any]],
    writer: MetricWriter,
    evaluate: Callable[[TrainState], Mapping[str, float]],
    describe: Callable[[int], str],
    loader_rate: float | None = None,
    roll_out: Callable[[TrainState], Mapping[str, float]] | None = None,
    goodput: Goodput | None = None,
) -> tuple[TrainState, bool]:
    """Train from `state.step` to config.train.steps.

    Args:
      batches: endless, positioned at `state.step`; NumPy leaves, this host's share.
      data_state: step -> what a resumed run needs to draw that step's batch next.
      evaluate: numbers on the validation split, called every train.eval_every steps.
      describe: episode index -> words that name it.
      loader_rate: windows/s the loader can deliver, measured before, for the report of who waits for whom.
      roll_out: numbers of the policy in closed loop, called every config.rollouts_every steps; with
        config.select_best also at the end, and its "score" decides which checkpoint is kept in best/.
      goodput: gets to know where the time went; None: only the log and the writer do.
    Returns:
      The final state and whether all steps were made (False: stopped by SIGTERM, saved).
    Raises:
      CorruptDataError, DivergedError, LoaderError, checkpoints.UnwrittenError (by the next save).
    """
    train, start = config.train, int(state.step)
    corrupt = _CorruptCount(config.max_corrupt_share, describe)
    nonfinite = _Nonfinite(config.train, int(state.skipped), describe)
    goodput = Goodput() if goodput is None else goodput
    speed = _Speed(start, train.steps, train.batch_size, goodput)
    tracer = _Tracer(train, start)
    pending: list[
        _Made
    ] = []  # steps that may not have run yet; fetched together, so they are not waited for one by one
    history: list[Mapping[str, np.ndarray]] = []  # what was fetched since the last log
    with _Terminated() as terminated, goodput, tracer:
        for step in range(start + 1, train.steps + 1):
            tracer.before(step, pending)
            with goodput.spent_on("data"):
                batch = _next(batches, step)
            corrupt.add(batch)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, meshes.put_batch(batch, mesh))
            pending.append(_Made(step, np.array(batch.episode), metrics))
            last = step == train.steps
            log = step % train.log_every == 0 or last or step == start + 1
            save = step % train.checkpoint_every == 0 or last
            stop = terminated() if jax.process_count() == 1 or log else False
            if log or save or stop:
                made = jax.device_get(pending)
                pending.clear()
                history += [x.metrics for x in made]
                if nonfinite.check(made):
                    checkpointer.save(state, data_state(int(state.step)))
                    checkpointer.wait()
                    raise nonfinite.error(int(state.step))
            if log:
                checkpointer.check()
                values = _means(history)
                history.clear()
                values |= speed.log(step, values["loss"]) | corrupt.values() | nonfinite.values()
                writer.write(step, {f"train/{name}": value for name, value in values.items()})
                if step >= start + 2 * train.log_every and loader_rate:
                    _report_loader(loader_rate, values["windows_per_second"], train.batch_size)
                    loader_rate = None
            if save or stop:
                with goodput.spent_on("checkpoint"):
                    checkpointer.save(state, data_state(step))
            if stop:
                with goodput.spent_on("checkpoint"):
                    checkpointer.wait()
                logger.info("time: %s", goodput)
                logger.warning("stopped by SIGTERM after step %d; saved. Go on with --train.resume.", step)
                return state, False
            with goodput.spent_on("evaluation"):
                if train.eval_every and step % train.eval_every == 0 and not last:
                    writer.write(step, {f"validation/{name}": value for name, value in evaluate(state).items()})
                if roll_out is not None and _rolls_out(config, step, last):
                    values = roll_out(state)
                    writer.write(step, {f"rollouts/{name}": value for name, value in values.items()})
                    if config.select_best:
                        kept = checkpointer.offer_best(state, data_state(step), values["score"])
                        logger.info("rollouts score %.3f%s", values["score"], ", the best so far" if kept else "")
        with goodput.spent_on("checkpoint"):
            checkpointer.wait()
        writer.write(train.steps, {f"goodput/{phase}": share for phase, share in goodput.shares().items()})
        logger.info("time: %s", goodput)
    return state, True


def _next(batches: Iterator[Batch], step: int) -> Batch:
    try:
        return next(batches)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # the data's own errors say what they mean
            raise
        # Grain asks every second whether its workers live.
        raise LoaderError(
            f"no batch for step {step}: {error} If the machine ran out of memory, read with fewer data.num_workers (0: "
            "threads) or a smaller data.prefetch; then go on from the newest checkpoint with --train.resume."
        ) from error


class _Made(NamedTuple):
    """A step: the episodes int[B] of its batch, and its metrics."""

    step: int
    episodes: np.ndarray
    metrics: Mapping[str, Any]


def _rolls_out(config: LoopConfig, step: int, last: bool) -> bool:
    if last:  # the report rolls the chosen policy out anyway; to choose it, the last one must have a score too
        return config.select_best
    return config.rollouts_every > 0 and step % config.rollouts_every == 0


def _means(history: list[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Of the steps that changed something; of all where none did."""
    good = [x for x in history if not x["nonfinite"]] or history
    return {name: float(np.mean([x[name] for x in good])) for name in history[-1] if name != "nonfinite"}


def _report_loader(loader: float, eaten: float, batch_size: int) -> None:
    verdict = (
        "the loader keeps up"
        if loader > 1.2 * eaten
        else "the loader limits: raise data.num_threads or pack the dataset"
    )
    logger.info("loader can feed %.0f windows/s, the step eats %.0f (batch %d): %s", loader, eaten, batch_size, verdict)


class _CorruptCount:
    """Counts and names segments that the loader had to replace."""

    def __init__(self, max_share: float, describe: Callable[[int], str]):
        self._max_share, self._describe = max_share, describe
        self._seen, self._bad, self._named = 0, 0, set()

    def add(self, batch: Batch) -> None:
        corrupt = np.asarray(batch.corrupt)
        self._seen += corrupt.size
        for episode in corrupt[corrupt >= 0].tolist():
            self._bad += 1
            if episode not in self._named:
                self._named.add(episode)
                logger.warning("unreadable episode replaced by another: %s", self._describe(episode))
        if self._bad > self._max_share * max(self._seen, CORRUPT_GRACE):
            names = "; ".join(self._describe(episode) for episode in sorted(self._named)[:5])
            raise CorruptDataError(
                f"{self._bad} of {self._seen} segments could not be read, more than "
                f"data.max_corrupt_share={self._max_share}. "
                f"Episodes: {names}. Repair or exclude them, or raise the share."
            )

    def values(self) -> dict[str, float]:
        return {"corrupt_segments": float(_of_processes(self._bad).sum())}


def _of_processes(value: float) -> np.ndarray:
    """[processes]: every process's value, on all; all call it at the same step."""
    return np.array([value]) if jax.process_count() == 1 else multihost_utils.process_allgather(np.array(value))


class _Nonfinite:
    """Which batches had a loss or gradient that is not finite: written down, counted, and too many at some point."""

    def __init__(self, train: TrainConfig, skipped: int, describe: Callable[[int], str]):
        self._limit = train.max_skipped if train.on_nonfinite == "skip" else skipped
        self._policy, self._count, self._describe = train.on_nonfinite, skipped, describe
        name = NONFINITE if jax.process_index() == 0 else f".{jax.process_index()}.".join(NONFINITE.split("."))
        self._path = pathlib.Path(train.output) / name
        self._words = ""

    def check(self, made: Sequence[_Made]) -> bool:
        """Look at more steps, in order. True: the run must end."""
        for step, episodes, metrics in made:
            values = {name: float(value) for name, value in metrics.items()}
            # Once an aborted state is frozen, steps after the first bad one mean nothing.
            if not values["nonfinite"] or self._count > self._limit:
                continue
            self._count += 1
            bad = {name: value for name, value in values.items() if not math.isfinite(value)}
            names = [self._describe(episode) for episode in np.unique(episodes).tolist()]
            self._words = f"step {step}: {bad} not finite"
            line = {"step": step, "episodes": episodes.tolist(), "names": names}
            line["values"] = {name: str(value) for name, value in bad.items()}  # JSON has no word for them
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            logger.warning("%s; the batch is left out, its episodes are in %s", self._words, self._path)
        return self._count > self._limit

    def error(self, saved: int) -> DivergedError:
        skips = self._policy == "skip"
        many = f" {self._count} batches so far, more than train.max_skipped={self._limit}." if skips else ""
        return DivergedError(
            f"{self._words}.{many} The state after step {saved}, the last good one, is saved, and the batch's episodes "
            f"are in {self._path}. Resume with a lower optimizer.learning_rate, optimizer.clip_norm > 0, "
            "backbone.dtype=float32, or train.on_nonfinite=skip if the data are to blame."
        )

    def values(self) -> dict[str, float]:
        return {"skipped_steps": float(self._count)} if self._policy == "skip" else {}


class _Speed:
    """Speed, data wait and time left; compilation, evaluation and checkpoints do not count as training time."""

    def __init__(self, start: int, steps: int, batch_size: int, goodput: Goodput):
        self._start, self._steps, self._batch_size, self._goodput = start, steps, batch_size, goodput
        self._step, self._seconds = start, goodput.seconds()

    def log(self, step: int, loss: float) -> dict[str, float]:
        before, self._seconds = self._seconds, self._goodput.seconds()
        spent = {phase: seconds - before[phase] for phase, seconds in self._seconds.items()}
        first = self._step == self._start
        seconds = max(spent["step"] + spent["data"] + (spent["compile"] if first else 0.0), 1e-9)
        rate = (step - self._step) / seconds
        waits = _of_processes(min(spent["data"] / seconds, 1.0))  # the others wait for the slowest inside their step
        values = {
            "steps_per_second": rate,
            "windows_per_second": rate * self._batch_size,
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
                "step %d/%d  loss %.4f  %.2f steps/s  %.0f windows/s  data wait %.0f%%  goodput %.0f%%  eta %s",
                *(step, self._steps, loss, rate, rate * self._batch_size, 100 * values["data_wait_share"]),
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


class _Tracer:
    """Context that traces train.profile steps, from the third on: the first compiles, the second still allocates."""

    def __init__(self, train: TrainConfig, start: int):
        self._directory = pathlib.Path(train.output) / "tensorboard"
        self._first, self._count, self._running = start + 3, train.profile, False

    def __enter__(self) -> None:
        pass

    def before(self, step: int, pending: Sequence[_Made]) -> None:
        """Called ahead of every step; `pending` are those that may still be running."""
        if self._count and step == self._first:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif self._running and step == self._first + self._count:
            jax.block_until_ready(pending)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        logger.info("trace of %d steps: tensorboard --logdir %s", self._count, self._directory)

    def __exit__(self, *exception: object) -> None:
        if self._running:  # the run ended before, or with, the last step to trace
            self._stop()


class _Terminated:
    """Context that turns SIGTERM into a question asked between steps; all hosts get the same answer."""

    def __enter__(self) -> Callable[[], bool]:
        self._flag = threading.Event()
        self._main = threading.current_thread() is threading.main_thread()
        if (
            self._main
        ):  # signals can only be handled there; elsewhere (tests, notebooks) runs simply cannot be terminated early
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._flag.set())
        return self._ask

    def _ask(self) -> bool:
        return bool(_of_processes(self._flag.is_set()).any())

    def __exit__(self, *exception: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)
