"""In which order segments come, which of them a process reads, and whether a run can go on with it.

Everything here works on integers: shuffling is global, and the data's position is the number of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import grain


class Part(NamedTuple):
    """Consecutive samples of a source that are drawn in an order of their own.

    count: how many. weight: relative rate at which they are drawn.
    """

    count: int
    weight: float


class Source(Protocol):
    """What can be drawn from at random: `samples.SegmentSource`, `vl.samples.PairSource`. Picklable."""

    def __len__(self) -> int: ...

    def parts(self) -> Sequence[Part]:
        """Of a mixture, its parts in order; empty: all samples are drawn alike."""
        ...

    def content(self) -> dict[str, Any]:
        """What, with the order, determines its batches, as JSON values."""
        ...

    def describe(self, index: int) -> str:
        """What a batch calls `episode` or `corrupt`, in words."""
        ...

    def training_batch(self, indices: np.ndarray, draws: np.ndarray) -> Any:
        """Samples int[B] as one batch; `draws` uint32[B] makes random choices."""
        ...

    def evaluation_batch(self, indices: np.ndarray) -> Any:
        """The same without random choices; the number -1 becomes a row that counts nowhere."""
        ...


def endless(source: Source, seed: int) -> grain.MapDataset[int]:
    """Endless numbers of samples. Of a mixture, each part's come in an order of its own, mixed by weight."""
    import grain  # what reads no batch need not wait for it

    parts = source.parts()
    if not parts:
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    ends = np.cumsum([part.count for part in parts])
    mixed = []
    for number, part in enumerate(parts):
        numbers = grain.MapDataset.range(int(ends[number] - part.count), int(ends[number]))
        mixed.append(numbers.seed((seed + number) % 2**32).shuffle().repeat())
    return mixed[0] if len(mixed) == 1 else grain.MapDataset.mix(mixed, [part.weight for part in parts])


def order_fingerprint(source: Source, *, segments_per_batch: int, seed: int) -> dict[str, Any]:
    """What, together with the step, determines every coming batch, as JSON values.

    The same on any number of processes, and for either layout of a dataset.
    """
    return {**source.content(), "segments_per_batch": segments_per_batch, "seed": seed}


def require_same_order(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare two `order_fingerprint`s. Raises ValueError that names what changed."""
    changed = [
        f"{key} was {saved.get(key)!r}, is {current.get(key)!r}"
        for key in {**saved, **current}
        if saved.get(key) != current.get(key)
    ]
    if changed:
        raise ValueError(
            f"the checkpoint's data order cannot be continued: {'; '.join(changed)}. Resume with the settings and the "
            "dataset it was made with, give up going on bit for bit with --train.allow_new_order, or start a new run "
            "in another train.output."
        )


def draw(seed: int, index: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segment numbers of batch `index` with a random number for each, the same wherever and whenever it is read."""
    return numbers, np.random.default_rng([seed, index]).integers(2**32, size=len(numbers), dtype=np.uint32)


def rows_of(process: tuple[int, int], segments_per_batch: int) -> slice:
    """The contiguous part of a batch that one process reads. process: its number, and how many there are."""
    process_index, process_count = process
    if segments_per_batch % process_count:
        raise ValueError(
            f"{segments_per_batch} segments per batch do not divide over {process_count} processes; "
            f"try {max(segments_per_batch // process_count, 1) * process_count}."
        )
    share = segments_per_batch // process_count
    return slice(process_index * share, (process_index + 1) * share)
