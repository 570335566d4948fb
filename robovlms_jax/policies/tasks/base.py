"""The contract of tasks, and what all of them are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax

from robovlms_jax.policies.vla import VLA, Outputs
from robovlms_jax.types import Batch

Metrics = dict[str, jax.Array]


class Example(NamedTuple):
    """A robot's batch as tasks see it.

    batch: with frames as the model takes them (`objective.prepare`), those that follow the segment included.
    actions: float32[B * K, W, C, A], the normalised chunks of every window; one step instead of W with `video`.
    mask: bool[B * K, W, C], which of them count.
    count: float32[], entries that count in the whole batch, which this may be a micro-batch of.
    """

    batch: Batch
    actions: jax.Array
    mask: jax.Array
    count: jax.Array


class Task(Protocol):
    """One loss on a policy's outputs. Frozen and without parameters: these belong to the model.

    name: what a configuration, a log and a stage of training call it. weight: in the sum of all losses.
    metrics: that it writes, besides the head's.
    """

    name: str
    weight: float
    metrics: tuple[str, ...]

    def __call__(self, model: VLA, outputs: Outputs, example: Example) -> tuple[jax.Array, Metrics]:
        """The loss before its weight, and metrics.

        Args:
          model: bound to its parameters, for its heads.
          outputs: of the one forward pass.
        Returns:
          float32[] and float32[] each, all of them sums over `example.count`, so that micro-batches add up.
        """
        ...


def mean_over_actions(errors: jax.Array, example: Example) -> jax.Array:
    """Mean of errors float32[B * K] or [B * K, steps] in which a window (or step) weighs as many as its actions that
    count, float32[]."""
    entries = example.mask.sum(axis=tuple(range(errors.ndim, example.mask.ndim)))
    return (errors * entries).sum() / example.count


def require_known(tasks: tuple[Task, ...], weights: Mapping[str, float]) -> None:
    """Raise ValueError for a weight of what is none of the tasks."""
    known = [task.name for task in tasks]
    unknown = sorted(set(weights) - set(known))
    if unknown:
        raise ValueError(
            f"weights of {unknown}, which this policy does not learn; it learns {known}. Switch a task on under "
            "policy.auxiliary, or leave its weight out."
        )


def reweigh(tasks: tuple[Task, ...], weights: Mapping[str, float]) -> tuple[Task, ...]:
    """The tasks with the weights given by name; those of weight 0 are left out. Others stay as they are.

    Raises ValueError: a name that is none of them, or nothing left to learn.
    """
    require_known(tasks, weights)
    chosen = tuple(
        dataclasses.replace(task, weight=weights[task.name]) if task.name in weights else task for task in tasks
    )
    chosen = tuple(task for task in chosen if task.weight)
    if not chosen:
        raise ValueError(f"all tasks have weight 0 ({[task.name for task in tasks]}), so nothing would be learned.")
    return chosen
