"""Hooks that end a run whose data cannot be read or whose loss is not finite any more."""

from __future__ import annotations

import logging
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from robovlms_jax import json_lines
from robovlms_jax.parallel import distributed
from robovlms_jax.training.config import TrainConfig
from robovlms_jax.training.loop import Hook, Step

logger = logging.getLogger(__name__)

CORRUPT_GRACE = 1000
"""Unreadable segments are allowed as if at least this many had been seen, so that one early hit does not stop a run."""

NONFINITE = "nonfinite.jsonl"
"""In a run's directory: one line for each batch whose loss or gradient was not finite. Of several hosts, each writes
the episodes it had read; all but the first put their number before the ending."""

Describe = Callable[[str, int], str]
"""Source and number of an episode -> words that name it."""


class CorruptDataError(RuntimeError):
    """More segments could not be read than data.max_corrupt_share allows."""


class DivergedError(RuntimeError):
    """Loss or gradient is not finite any more; the newest checkpoint on disk is from before."""


class CorruptGuard(Hook):
    """Counts and names segments that the loader had to replace. Raises CorruptDataError when they are too many.

    max_share: of all segments, that may be replaced. Sources whose batches do not tell (`corrupt`) have none.
    """

    def __init__(self, max_share: float, describe: Describe):
        self._max_share, self._describe = max_share, describe
        self._seen, self._bad = 0, 0
        self._named: set[tuple[str, int]] = set()

    def after(self, step: Step, metrics: Mapping[str, jax.Array]) -> None:
        for source, batch in step.batch.items():
            corrupt = np.asarray(getattr(batch, "corrupt", ()))
            self._seen += corrupt.size
            for episode in corrupt[corrupt >= 0].tolist():
                self._bad += 1
                if (source, episode) not in self._named:
                    self._named.add((source, episode))
                    logger.warning("unreadable episode replaced by another: %s", self._describe(source, episode))
        if self._bad > self._max_share * max(self._seen, CORRUPT_GRACE):
            names = "; ".join(self._describe(*episode) for episode in sorted(self._named)[:5])
            raise CorruptDataError(
                f"{self._bad} of {self._seen} segments could not be read, more than "
                f"data.max_corrupt_share={self._max_share}. "
                f"Episodes: {names}. Repair or exclude them, or raise the share."
            )

    def values(self) -> dict[str, float]:
        """For the log, the same on all processes."""
        return {"corrupt_segments": float(distributed.of_all(self._bad).sum())}


class Made(NamedTuple):
    """A step: the episodes int[B] of its batch by source, and its metrics."""

    step: int
    episodes: dict[str, np.ndarray]
    metrics: Mapping[str, Any]


class NonfiniteGuard(Hook):
    """Fetches the metrics of steps and writes down which batches had a loss or gradient that is not finite. When they
    are too many, the state is saved and DivergedError raised.

    Metrics are fetched when something is due, many together: waiting for each step would keep the devices from going
    on.

    Args:
      skipped: batches left out before this loop began.
      save: writes the state, and returns when it is on the disk.
    """

    def __init__(self, train: TrainConfig, skipped: int, describe: Describe, save: Callable[[Any], None]):
        self._limit = train.max_skipped if train.on_nonfinite == "skip" else skipped
        self._policy, self._count, self._describe, self._save = train.on_nonfinite, skipped, describe, save
        name = NONFINITE if jax.process_index() == 0 else f".{jax.process_index()}.".join(NONFINITE.split("."))
        self._path = pathlib.Path(train.output) / name
        self._words = ""
        self._pending: list[Made] = []
        self._fetched: list[Mapping[str, np.ndarray]] = []  # since `means` was last asked

    def after(self, step: Step, metrics: Mapping[str, jax.Array]) -> None:
        episodes = {name: np.array(x.episode) for name, x in step.batch.items() if hasattr(x, "episode")}
        self._pending.append(Made(step.number, episodes, metrics))
        if not (step.log or step.save or step.stop):
            return
        made = [Made(x.step, x.episodes, values) for x, values in self._fetch()]
        self._fetched += [x.metrics for x in made]
        for one in made:
            self._check(one)
        if self._count > self._limit:
            self._save(step.state)
            raise self._error(int(step.state.step))

    def means(self) -> dict[str, float]:
        """Mean metrics since the last call, of the steps that changed something; of all where none did."""
        good = [x for x in self._fetched if not x["nonfinite"]] or self._fetched
        values = {name: float(np.mean([x[name] for x in good])) for name in good[-1] if name != "nonfinite"}
        self._fetched.clear()
        return values

    def values(self) -> dict[str, float]:
        """For the log."""
        return {"skipped_steps": float(self._count)} if self._policy == "skip" else {}

    def _fetch(self) -> list[tuple[Made, Mapping[str, np.ndarray]]]:
        values = jax.device_get([x.metrics for x in self._pending])
        out = list(zip(self._pending, values, strict=True))
        self._pending = []
        return out

    def _check(self, made: Made) -> None:
        values = {name: float(value) for name, value in made.metrics.items()}
        # Once an aborted state is frozen, steps after the first bad one mean nothing.
        if not values["nonfinite"] or self._count > self._limit:
            return
        self._count += 1
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        names = [self._describe(s, e) for s, numbers in made.episodes.items() for e in np.unique(numbers).tolist()]
        self._words = f"step {made.step}: {bad} not finite"
        episodes = {source: numbers.tolist() for source, numbers in made.episodes.items()}
        line = {"step": made.step, "episodes": episodes if len(episodes) > 1 else next(iter(episodes.values()), [])}
        line |= {"names": names, "values": {name: str(x) for name, x in bad.items()}}  # JSON has no word for them
        self._path.parent.mkdir(parents=True, exist_ok=True)
        json_lines.append(self._path, line)
        logger.warning("%s; the batch is left out, its episodes are in %s", self._words, self._path)

    def _error(self, saved: int) -> DivergedError:
        skips = self._policy == "skip"
        many = f" {self._count} batches so far, more than train.max_skipped={self._limit}." if skips else ""
        return DivergedError(
            f"{self._words}.{many} The state after step {saved}, the last good one, is saved, and the batch's episodes "
            f"are in {self._path}. Resume with a lower optimizer.learning_rate, optimizer.clip_norm > 0, "
            "backbone.dtype=float32, or train.on_nonfinite=skip if the data are to blame."
        )
