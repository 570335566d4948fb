"""A run is a tuple of stages: each trains some parameters on some losses and some data for some steps."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from robovlms_jax.training import optimizer as optimizers
from robovlms_jax.training import trainable
from robovlms_jax.training.config import OptimizerConfig, TrainConfig

SEED_STEP = 104_729
"""A prime: the seeds of later stages' data orders are this far apart, so that those of other runs are not met."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """index, name: for messages. begin: steps of the run before it. seed: of its data order. Others: `StageConfig`."""

    index: int
    name: str
    begin: int
    steps: int
    trainable: tuple[str, ...]
    optimizer: OptimizerConfig
    weights: Mapping[str, float]
    sources: Mapping[str, float]
    seed: int

    @property
    def end(self) -> int:
        """Its last step, counted over the run."""
        return self.begin + self.steps

    @property
    def tx(self) -> Any:
        """The optax optimizer."""
        return optimizers.make_optimizer(self.optimizer, self.steps)

    @property
    def learning_rate(self) -> Any:
        """Update of this stage -> learning rate."""
        return optimizers.learning_rate(self.optimizer, self.steps)

    def position(self, step: int) -> dict[str, Any]:
        """Where in the run a checkpoint of `step` is, as JSON values."""
        return {"index": self.index, "name": self.name, "step": step - self.begin}


def plan(train: TrainConfig, optimizer: OptimizerConfig) -> tuple[Stage, ...]:
    """The stages of a run; without train.stages one, which is all of train.* and optimizer.*."""
    if not train.stages:
        sources = train.sources or {"robot": 1.0}
        return (Stage(0, "train", 0, train.steps, train.trainable, optimizer, {}, sources, train.seed),)
    out, begin = [], 0
    for index, configured in enumerate(train.stages):
        settings = {field: getattr(configured, field) for field in ("steps", "trainable", "weights", "sources")}
        settings |= {"optimizer": configured.optimizer or optimizer, "seed": (train.seed + SEED_STEP * index) % 2**32}
        out.append(Stage(index=index, name=configured.name or str(index + 1), begin=begin, **settings))
        begin += configured.steps
    return tuple(out)


def check(stages: Sequence[Stage], paths: Collection[str]) -> None:
    """Refuse stages that do not fit the model, before anything is compiled.

    Args:
      paths: of all parameters.
    Raises:
      ValueError: names the stage, what is wrong and what there is.
    """
    for stage in stages:
        with _naming(stage, several=len(stages) > 1):
            trainable.split(dict.fromkeys(paths), stage.trainable)


def require_reached(
    stage: Stage, loss: Callable[..., tuple[Any, Any]], params: Mapping[str, Any], batch: Any, *, several: bool
) -> None:
    """Refuse a stage with patterns by which nothing would learn (`trainable.require_reached`).

    Args:
      several: whether the run has other stages, so that the error names this one.
    """
    with _naming(stage, several=several):
        trainable.require_reached(loss, params, batch, stage.trainable)


@contextlib.contextmanager
def _naming(stage: Stage, *, several: bool) -> Iterator[None]:
    """Errors name the stage where there are several, or the one that train.stages has."""
    named = several or stage.name != "train"
    try:
        yield
    except ValueError as error:
        raise ValueError(f"train.stages, stage {stage.name!r}: {error}" if named else str(error)) from None


def remarks(stage: Stage, rows: Mapping[str, int]) -> list[str]:
    """What a stage's settings come to, where that is far from what they say: sentences for the log.

    Args:
      rows: of every batch, by source (`rows`).
    """
    said, total = [], sum(stage.sources.values())
    for source, count in rows.items():
        asked, got = stage.sources[source] / total, count / sum(rows.values())
        if not asked / 2 <= got <= 2 * asked:
            said.append(
                f"stage {stage.name}: {source} has {got:.1%} of every batch, and {asked:.1%} was asked for, which is "
                "less or more than whole segments allow; raise train.batch_size."
            )
    warmup = stage.optimizer.warmup_steps
    if warmup >= stage.steps:
        said.append(
            f"stage {stage.name}: optimizer.warmup_steps={warmup} is no less than its {stage.steps} steps, so the "
            f"learning rate never becomes {stage.optimizer.learning_rate:g}."
        )
    return said


def undrawn(stages: Sequence[Stage], sources: Collection[str]) -> list[str]:
    """Those of a run's `sources` that no stage draws from."""
    return sorted(set(sources) - {name for stage in stages for name, share in stage.sources.items() if share})


def rows(stage: Stage, total: int, multiple: int = 1) -> dict[str, int]:
    """Source -> rows of every batch, `total` together, in proportion to the stage's shares.

    Args:
      multiple: of which every source's rows must be one, so that they divide over devices and micro-batches.
    Raises:
      ValueError: a source would get none, or `total` is no multiple.
    """
    shares = {source: share for source, share in stage.sources.items() if share}
    units, rest = divmod(total, multiple)
    if rest or units < len(shares):
        raise ValueError(
            f"stage {stage.name!r}: {total} segments per batch cannot be shared among {sorted(shares)} in multiples of "
            f"{multiple} (devices that split the batch x train.accumulation); raise train.batch_size."
        )
    exact = {source: share / sum(shares.values()) * units for source, share in shares.items()}
    out = {source: max(int(x), 1) for source, x in exact.items()}
    while sum(out.values()) != units:  # one by one to, or from, whoever is furthest from its share
        step = 1 if sum(out.values()) < units else -1
        able = [source for source in out if step > 0 or out[source] > 1]
        out[max(able, key=lambda source: step * (exact[source] - out[source]))] += step
    return {source: count * multiple for source, count in out.items()}
