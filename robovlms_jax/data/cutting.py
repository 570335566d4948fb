"""A dataset's episodes, cut into segments."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import numpy as np
import tqdm

from robovlms_jax.control import robot as robots
from robovlms_jax.data import base, config, pairing, segments

logger = logging.getLogger(__name__)

_TRIED = 20  # episodes whose first frame is tried
_RATE = 10.0  # Hz, where a robot does not say
_MUCH = 0.6  # share of waiting steps that hardly a demonstration has
_NEVER = 1 << 40  # steps
_CLOSED = 0.02  # of the way of fingers in a demonstration: slower steps are their end


@dataclasses.dataclass(frozen=True)
class Cut:
    """How episodes are cut into segments.

    window, chunk, windows_per_segment: W, C, K.
    left_pad: whether windows may begin before their episode (see `segments`).
    goal_relabelling: mask what comes after a random later step, as upstream does; needs windows_per_segment 1.
    future_frames: F, frames after the segment's last one to read; 0: none.
    skip_still: steps at which nothing larger is asked of the robot (see `acts`) are left out of chunks; 0: none.
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

    Raises ValueError: no episode is long enough for one window, windows need pictures that were left out, or steps
    cannot be left out.
    """
    starts = None
    if not dataset.shows_all:
        if problem := config.needs_all_pictures(cut.window, cut.windows_per_segment, cut.future_frames):
            raise ValueError(f"{dataset.name} has frames without pictures: {problem}")
        starts = [np.flatnonzero(dataset.shown(np.arange(e.start, e.end))) for e in dataset.episodes]
    acting = _acting(dataset, cut) if cut.skip_still else None
    found = segments.Segments(
        np.array([(episode.start, episode.end) for episode in dataset.episodes]),
        window=cut.window,
        chunk=cut.chunk,
        windows_per_segment=cut.windows_per_segment,
        left_pad=cut.left_pad,
        starts=starts,
        acting=acting,
    )
    if len(found) == 0:
        longest = max((episode.end - episode.start for episode in dataset.episodes), default=0)
        raise ValueError(
            f"{dataset.name}: none of {len(dataset.episodes)} episodes is long enough for policy.window={cut.window}; "
            f"the longest has {longest} steps to learn from."
            + (
                f" Or nothing is asked of the robot in any by more than data.skip_still={cut.skip_still}."
                if cut.skip_still
                else ""
            )
        )
    return found


def _acting(dataset: base.Dataset, cut: Cut) -> list[np.ndarray]:
    """Of each episode the steps that do not wait, by `acts`; their share is logged."""
    if cut.window != 1:
        raise ValueError(
            f"data.skip_still={cut.skip_still} leaves steps out of chunks, which windows of several frames cannot do: "
            f"policy.window is {cut.window}, set it to 1, or skip_still to 0."
        )
    if getattr(dataset, "parts", ()):
        raise ValueError(
            f"{dataset.name} is a mixture, whose datasets' actions are brought to one scale, so that none is zero "
            "where a robot waits: set data.skip_still to 0, or name datasets one by one in data.further."
        )
    reading = tqdm.tqdm(dataset.episodes, desc="finding steps that wait", unit="episode", delay=1)
    found = [np.flatnonzero(acts(dataset, episode, cut.skip_still)) for episode in reading]
    steps = sum(episode.end - episode.start for episode in dataset.episodes)
    waiting = 1 - sum(map(len, found)) / max(steps, 1)
    logger.log(
        logging.WARNING if waiting > _MUCH else logging.INFO,
        *("%s: %.1f %% of %d steps wait, by data.skip_still=%g, and are left out of chunks%s", dataset.name),
        *(100 * waiting, steps, cut.skip_still),
        ": is its unit that of the actions?" if waiting > _MUCH else "",
    )
    return found


def acts(dataset: base.Dataset, episode: base.Episode, least: float) -> np.ndarray:
    """bool[L]: at which steps of an episode something is asked of the robot: a delta or velocity larger than `least`,
    another place by more than it, another gripper command; or fingers still do what they were told (for a tenth of a
    second and as long as they are measured to move, at most a second; not measured: for a third).

    An episode that cannot be read acts throughout; training reports it.
    """
    ids = np.arange(episode.start, episode.end)
    if len(ids) == 0:
        return np.zeros(0, bool)
    try:
        actions, opening = dataset.actions(ids), dataset.gripper_opening(ids)
    except base.CorruptFrameError:
        return np.ones(len(ids), bool)
    kinds = np.array([dimension.kind for dimension in dataset.robot.action])
    changes = np.abs(np.diff(actions, axis=0, prepend=actions[:1]))
    asked = np.where(np.isin(kinds, ["delta", "velocity"]), np.abs(actions), changes)
    commanded = (changes > 0)[:, kinds == "binary"].any(axis=1)
    rate = dataset.robot.rate_hz or _RATE
    found = ~(asked <= least)[:, kinds != "binary"].all(axis=1) | commanded | _fingers(commanded, opening, rate)
    found[0] |= "absolute" in kinds  # which it holds from its first step on
    return found


def _fingers(commanded: np.ndarray, opening: np.ndarray | None, rate: float) -> np.ndarray:
    """bool[L]: at which steps fingers are on their way after a command bool[L], by how far they are apart float[L]."""
    steps = np.arange(len(commanded))
    since = steps - np.maximum.accumulate(np.where(commanded, steps, -_NEVER))
    if opening is None or not np.isfinite(opening).all():
        return since < math.ceil(rate / 3)
    speed = np.abs(np.diff(opening, append=opening[-1:]))
    # At an episode's beginning they may be on their way by a command of before.
    lately = np.minimum(since, steps) < math.ceil(rate)
    return (since < math.ceil(rate / 10)) | (lately & (speed > _CLOSED * np.ptp(opening)))


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
