"""A dataset's episodes, cut into segments."""

from __future__ import annotations

import dataclasses

import numpy as np

from robovlms_jax.data import base, segments


@dataclasses.dataclass(frozen=True)
class Cut:
    """How episodes are cut into segments.

    window, chunk, windows_per_segment: W, C, K.
    left_pad: whether windows may begin before their episode (see `segments`).
    goal_relabelling: mask what comes after a random later step, as upstream does; needs windows_per_segment 1.
    future_frames: F, frames after the segment's last one to read; 0: none.
    ahead, moving: steps ahead to which movements are wanted, and of which numbers of the state; empty: none.
    """

    window: int
    chunk: int
    windows_per_segment: int
    left_pad: bool = False
    goal_relabelling: bool = False
    future_frames: int = 0
    ahead: tuple[int, ...] = ()
    moving: tuple[int, ...] = ()


def segments_of(dataset: base.Dataset, cut: Cut) -> segments.Segments:
    """All segments of a dataset.

    Raises ValueError: no episode is long enough for one window, or windows need pictures that were left out.
    """
    shown = None
    if not dataset.shows_all:
        shown = [dataset.shown(np.arange(episode.start, episode.end + 1)) for episode in dataset.episodes]
    found = segments.Segments(
        np.array([(episode.start, episode.end) for episode in dataset.episodes]),
        window=cut.window,
        chunk=cut.chunk,
        windows_per_segment=cut.windows_per_segment,
        left_pad=cut.left_pad,
        shown=shown,
    )
    some = f"{dataset.name} has pictures of some frames alone"
    if shown is not None and cut.future_frames:
        raise ValueError(
            f"{some}, and policy.auxiliary.forward predicts those that follow; switch it off, or record pictures of "
            "all (picture_every 1)."
        )
    longest = max((episode.end - episode.start for episode in dataset.episodes), default=0)
    if len(found) == 0 and shown is not None and longest >= cut.window:
        raise ValueError(
            f"{some}, and nowhere of policy.window={cut.window} that follow each other; set policy.window=1, or record "
            "pictures of all (picture_every 1)."
        )
    if shown is not None and 0 < found.num_windows < min(2, cut.windows_per_segment) * len(found):
        raise ValueError(
            f"{some}, and segments of data.windows_per_segment={cut.windows_per_segment} would carry "
            f"{found.num_windows / len(found):.2f} windows each; set data.windows_per_segment=1."
        )
    if len(found) == 0:
        raise ValueError(
            f"{dataset.name}: none of {len(dataset.episodes)} episodes is long enough for policy.window={cut.window}; "
            f"the longest has {longest} steps to learn from."
        )
    return found
