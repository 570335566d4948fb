"""Batches of several sources at a time: a dictionary with one batch of each, every source in an order of its own."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

from robovlms_jax.data import loading, order

ROBOT = "robot"
"""The source that every run has."""


class SourceBatches:
    """Endless iterator of source -> batch. Call `close` after use."""

    def __init__(self, iterators: Mapping[str, Any]):
        self._iterators = dict(iterators)

    def __iter__(self) -> SourceBatches:
        return self

    def __next__(self) -> dict[str, Any]:
        return {source: next(batches) for source, batches in self._iterators.items()}

    def close(self) -> None:
        """Stop reading."""
        for batches in self._iterators.values():
            batches.close()


def train_batches(
    sources: Mapping[str, order.Source],
    rows: Mapping[str, int],
    *,
    seed: int,
    start_step: int = 0,
    **reading: Any,
) -> SourceBatches:
    """`loading.train_batches` of every source in `rows`; batches begin with those of step `start_step`, counted from
    0.

    Args:
      rows: source -> segments of each batch, over all processes.
      reading: processes, threads and workers, as `loading.train_batches` takes them; each source has its own.
    """
    return SourceBatches(
        {
            source: loading.train_batches(
                sources[source],
                segments_per_batch=count,
                seed=_seed_of(source, seed),
                start_step=start_step,
                **reading,
            )
            for source, count in rows.items()
        }
    )


def fingerprints(sources: Mapping[str, order.Source], rows: Mapping[str, int], seed: int) -> dict[str, dict[str, Any]]:
    """Source -> `order.order_fingerprint`, of what `train_batches` draws with the same arguments."""
    return {
        source: order.order_fingerprint(sources[source], segments_per_batch=count, seed=_seed_of(source, seed))
        for source, count in rows.items()
    }


def require_same_order(saved: Mapping[str, Any], current: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare `fingerprints`. Checkpoints of release 0.1 hold the robot's alone. Raises ValueError that names what
    changed, and in which source."""
    saved = {ROBOT: saved} if "episodes" in saved else saved
    if set(saved) != set(current):
        raise ValueError(
            f"the checkpoint's batches are of {sorted(saved)}, this run's of {sorted(current)}. Resume with the stages "
            "it was made with, or give up going on bit for bit with --train.allow_new_order."
        )
    for source, fingerprint in current.items():
        try:
            order.require_same_order(saved[source], fingerprint)
        except ValueError as error:
            raise ValueError(f"{source}: {error}" if len(current) > 1 else str(error)) from None


def _seed_of(source: str, seed: int) -> int:
    """Of a source's order: the robot's is the run's own, others follow from their name."""
    return seed if source == ROBOT else (seed + zlib.crc32(source.encode())) % 2**32
