"""Which frames of a dataset are looked at, and reading numbers of frames that may be damaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import tqdm

from robovlms_jax.data import base

_GOLDEN = (math.sqrt(5) - 1) / 2
_ATTEMPTS = 20
"""Frames that are tried before a dataset counts as one without a field."""


def choose(episodes: Sequence[base.Episode], budget: int) -> list[np.ndarray]:
    """Frame ids of whole episodes, spread over the dataset, `budget` in all; the last one may be cut. An episode's last
    frame, which nothing is learned from, is left out."""
    chosen: dict[int, np.ndarray] = {}
    for number in _spread([e.end - e.start for e in episodes]):
        if budget <= 0:
            break
        episode = episodes[number]
        ids = np.arange(episode.start, min(episode.end, episode.start + budget))
        chosen[number] = ids
        budget -= len(ids)
    return [chosen[number] for number in sorted(chosen)]


def choose_pairs(
    episodes: Sequence[base.Episode], budget: int, shown: Callable[[np.ndarray], np.ndarray] | None = None
) -> list[np.ndarray]:
    """Two neighbouring frames each, from the start, the middle and the end of episodes; `budget` frames in all.

    shown: `Dataset.shown`, where some frames have no pictures: the two are then neighbours among those that have.
    """
    pairs = []
    for number in _spread([e.end - e.start - 1 for e in episodes])[: budget // 6 + bool(budget)]:
        ids = np.arange(episodes[number].start, episodes[number].end)
        ids = ids if shown is None else ids[shown(ids)]
        last = len(ids) - 2
        pairs += [(number, ids[first : first + 2]) for first in sorted({0, last // 2, last}) if last >= 0]
    pairs = pairs[: budget // 2]
    return [ids for _, ids in sorted(pairs, key=lambda pair: (pair[0], pair[1][0]))]


def _spread(lengths: Sequence[int]) -> list[int]:
    """Numbers of the episodes with a length above 0, ordered so that the first few are spread over all of them."""
    usable = [number for number, length in enumerate(lengths) if length > 0]
    return [usable[i] for i in np.argsort(np.arange(1, len(usable) + 1) * _GOLDEN % 1, kind="stable")]


def read_numbers(
    read: Callable[[np.ndarray], np.ndarray],
    runs: Sequence[np.ndarray],
    field: str,
    unreadable: dict[str, tuple[int, str]],
) -> list[np.ndarray] | None:
    """float64[n, d] of each run, NaN where a frame cannot be read (and noted in `unreadable`); None = no frame can."""
    values, bad, message, width = [], 0, "", 0
    for ids in tqdm.tqdm(runs, desc=f"reading {field}", unit="episode", delay=1):
        try:
            rows = [np.asarray(read(ids), np.float64)]
        except base.CorruptFrameError:
            rows = []
            for frame in ids:
                try:
                    rows.append(np.asarray(read(np.array([frame])), np.float64))
                except base.CorruptFrameError as error:
                    bad, message = bad + 1, message or str(error)
                    rows.append(np.full((1, width), np.nan))
        except ValueError as error:  # the dataset has no such field
            unreadable.setdefault(field, (0, str(error)))
            return None
        width = max(row.shape[1] for row in rows)
        values.append(rows)
    if bad:
        unreadable[field] = (bad, message)
    if width == 0:
        return None
    widen = np.full((1, width), np.nan)
    return [np.concatenate([row if row.shape[1] else widen for row in rows]) for rows in values]


def width_of(read: Callable[[np.ndarray], np.ndarray], runs: Sequence[np.ndarray]) -> int:
    """Numbers per frame that `read` gives; 0 where the dataset has no such field."""
    for ids in runs[:_ATTEMPTS]:
        try:
            return int(np.asarray(read(ids[:1])).shape[1])
        except base.CorruptFrameError:
            continue
        except ValueError:
            return 0
    return 0
