"""In which order segments come, which of them a process reads, and whether a run can go on with it.

Everything here works on integers: shuffling is global, and the data's position is the number of the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from robovlms_jax.data import samples


def endless(source: samples.SegmentSource, seed: int) -> grain.MapDataset[int]:
    """Endless segment numbers. Of a mixture, each dataset's come in an order of its own, mixed by weight."""
    groups = source.dataset.groups
    if not groups:
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    counts, windows = source.segments.groups([group.num_episodes for group in groups])
    ends = np.cumsum(counts)
    parts, weights = [], []
    for number, group in enumerate(groups):
        if counts[number] == 0:
            raise ValueError(
                f"{source.dataset.name}: no episode of {group.name} is long enough for policy.window="
                f"{source.segments.window}; leave it out of the mixture or shorten the window."
            )
        numbers = grain.MapDataset.range(int(ends[number] - counts[number]), int(ends[number]))
        parts.append(numbers.seed((seed + number) % 2**32).shuffle().repeat())
        # Weights are of windows; segments are drawn, and those of short episodes carry fewer windows.
        weights.append(group.weight * counts[number] / windows[number])
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


def order_fingerprint(source: samples.SegmentSource, *, segments_per_batch: int, seed: int) -> dict[str, Any]:
    """What, together with the step, determines every coming batch, as JSON values.

    The same on any number of processes, and for either layout of a dataset.
    """
    episodes = source.dataset.episodes
    digest = hashlib.sha256(repr([(e.start, e.end, e.instruction, e.task) for e in episodes]).encode())
    more: dict[str, Any] = {}
    if source.dataset.groups:
        more["mixture"] = {group.name: [group.num_episodes, group.weight] for group in source.dataset.groups}
    if source.num_sentences != len({episode.instruction for episode in episodes}):
        more["sentences"] = source.num_sentences
    if source.segments.left_pad:
        more["left_pad"] = True
    return {
        **more,
        "episodes": f"{len(source.dataset.episodes)} with sha256 {digest.hexdigest()[:16]}",
        "window": source.segments.window,
        "chunk": source.segments.chunk,
        "windows_per_segment": source.segments.windows_per_segment,
        "segments_per_batch": segments_per_batch,
        "seed": seed,
    }


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
