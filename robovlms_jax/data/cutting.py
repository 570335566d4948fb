"""A dataset's episodes, cut into segments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.data import base, config, pairing, segments

_TRIED = 20  # episodes whose first frame is tried


@dataclasses.dataclass(frozen=True)
class Cut:
    """How episodes are cut into segments.

    window, chunk, windows_per_segment: W, C, K.
    left_pad: whether windows may begin before their episode (see `segments`).
    goal_relabelling: mask what comes after a random later step, as upstream does; needs windows_per_segment 1.
    future_frames: F, frames after the segment's last one to read; 0: none.
    skip_still: windows at whose newest step nothing larger is asked of the robot are left out; 0: none.
    scene: numeric field of which numbers are wanted, of each window's newest frame, and which; None: none.
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
    skip_still: float = 0.0
    scene: tuple[str, tuple[int, ...]] | None = None


def segments_of(dataset: base.Dataset, cut: Cut) -> segments.Segments:
    """All segments of a dataset.

    Raises ValueError: no episode is long enough for one window, or windows need pictures that were left out.
    """
    starts = None
    if not dataset.shows_all:
        if problem := config.needs_all_pictures(cut.window, cut.windows_per_segment, cut.future_frames):
            raise ValueError(f"{dataset.name} has frames without pictures: {problem}")
        starts = [np.flatnonzero(dataset.shown(np.arange(e.start, e.end))) for e in dataset.episodes]
    if cut.skip_still:
        before = 0 if cut.left_pad else cut.window - 1
        every = [np.arange(e.end - e.start - before) for e in dataset.episodes] if starts is None else starts
        pairs = zip(dataset.episodes, every, strict=True)
        starts = [own[moves(dataset, episode, cut.skip_still)[own + before]] for episode, own in pairs]
    found = segments.Segments(
        np.array([(episode.start, episode.end) for episode in dataset.episodes]),
        window=cut.window,
        chunk=cut.chunk,
        windows_per_segment=cut.windows_per_segment,
        left_pad=cut.left_pad,
        starts=starts,
    )
    if len(found) == 0:
        longest = max((episode.end - episode.start for episode in dataset.episodes), default=0)
        raise ValueError(
            f"{dataset.name}: none of {len(dataset.episodes)} episodes is long enough for policy.window={cut.window}; "
            f"the longest has {longest} steps to learn from."
            + (f" Or nothing moves in any by more than data.skip_still={cut.skip_still}." if cut.skip_still else "")
        )
    return found


def moves(dataset: base.Dataset, episode: base.Episode, least: float) -> np.ndarray:
    """bool[L]: at which steps of an episode more than `least` is asked of the robot, or a gripper changes; the first is
    always one of them. An episode that cannot be read moves throughout; training reports it."""
    every = np.ones(episode.end - episode.start, bool)
    try:
        actions = dataset.actions(np.arange(episode.start, episode.end)) if len(every) > 1 else None
    except base.CorruptFrameError:
        actions = None
    if actions is None:
        return every
    kinds = np.array([dimension.kind for dimension in dataset.robot.action])
    changes = np.abs(np.diff(actions, axis=0, prepend=actions[:1]))
    asked = np.where(np.isin(kinds, ["delta", "velocity"]), np.abs(actions), changes)
    found = (asked > np.where(kinds == "binary", 0, least)).any(axis=1)
    found[0] = True
    return found


def moving_units(dataset: base.Dataset, cut: Cut) -> np.ndarray:
    """float32[D]: metres or radians that 1 means of each number of the state that `Cut.moving` names; empty without
    `Cut.ahead`. Raises ValueError: a unit is neither."""
    dimensions = [dataset.robot.state[number] for number in cut.moving if cut.ahead]
    units = [pairing.unit_scale(dimension.unit) for dimension in dimensions]
    unknown = [f"{d.name} ({d.unit or 'no unit'})" for d, unit in zip(dimensions, units, strict=True) if unit is None]
    if unknown:
        raise ValueError(
            f"{dataset.name}: policy.auxiliary.ahead is about metres and radians, which these numbers of the robot's "
            f"state are not: {', '.join(unknown)}. Describe their units, or set its loss_weight to 0."
        )
    if cut.ahead:
        _require_states(dataset, dimensions, cut.moving)
    return np.array(units, np.float32)


def _require_states(dataset: base.Dataset, wanted: Sequence[robots.Dimension], moving: Sequence[int]) -> None:
    """Raise ValueError where the dataset, or a part of a mixture, has no state to say movements by, or another."""
    for part in getattr(dataset, "parts", ()):
        state = part.dataset.robot.state
        own = [state[number] for number in moving if number < len(state)]
        if [(d.quantity, d.unit) for d in own] != [(d.quantity, d.unit) for d in wanted]:
            raise ValueError(
                f"{dataset.name}: policy.auxiliary.ahead learns how {', '.join(d.name for d in wanted)} move, and "
                f"{part.name} has {', '.join(d.name for d in own) or 'no such numbers'} in their place, or in other "
                "units. Leave the dataset out, or set its loss_weight to 0."
            )
    for episodes in _groups(dataset):
        for episode in episodes[:_TRIED]:
            try:
                dataset.proprio([episode.start])
            except base.CorruptFrameError:
                continue
            except ValueError as error:
                raise ValueError(
                    "policy.auxiliary.ahead learns from the robot's state, whether policy.proprio is enabled or not; "
                    f"set its loss_weight to 0 where it cannot be read: {error}"
                ) from error
            break


def _groups(dataset: base.Dataset) -> list[Sequence[base.Episode]]:
    """The episodes of each part of a mixture, or all."""
    ends = np.cumsum([group.num_episodes for group in dataset.groups] or [len(dataset.episodes)]).tolist()
    return [dataset.episodes[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def scene(dataset: base.Dataset, array: str, columns: tuple[int, ...], frame_ids: np.ndarray) -> np.ndarray:
    """float32[n, M] as `Cut.scene` asks for them. Raises CorruptFrameError: one of them is NaN or infinite."""
    found = dataset.array(array, frame_ids)
    if found.ndim != 2 or max(columns) >= found.shape[1]:
        places = np.asarray(frame_ids)[:3].tolist()
        raise base.CorruptFrameError(
            f"{dataset.name}, frames {places}: {array!r} has {list(found.shape[1:])} numbers of a frame, of which "
            f"{max(columns)} is asked for."
        )
    values = found[:, list(columns)]
    return base.require_finite(values, frame_ids, array, dataset.name)


def require_scene(dataset: base.Dataset, array: str, columns: tuple[int, ...]) -> None:
    """Raise ValueError where a dataset, or a part of a mixture, lacks the numbers that `Cut.scene` asks for. Frames
    that cannot be read are left to training, which reports them."""
    for episodes in _groups(dataset):
        for episode in episodes[:_TRIED]:
            try:
                numbers = dataset.array(array, [episode.start])  # names the fields that there are
            except base.CorruptFrameError:
                continue
            if numbers.ndim != 2 or max(columns) >= numbers.shape[1]:
                raise ValueError(
                    f"{dataset.name}: policy.auxiliary.scene asks for columns {list(columns)} of {array!r}, of which a "
                    f"frame has {list(numbers.shape[1:])} numbers."
                )
            break
