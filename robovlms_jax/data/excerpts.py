"""Parts of a dataset for statistics and reports: a sample of its actions, whole episodes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from robovlms_jax.data import base, sensors


class EpisodeArrays(NamedTuple):
    """The L = end - start steps of an episode that training learns from, in order.

    images: camera -> uint8[L, height, width, 3].
    actions: float32[L, A], dataset units.
    sensors: name -> float32[L, *shape] and bool[L], True = there is a reading.
    """

    images: Mapping[str, np.ndarray]
    actions: np.ndarray
    sensors: Mapping[str, tuple[np.ndarray, np.ndarray]]


def state_sample(dataset: base.Dataset, limit: int) -> np.ndarray:
    """States float32[n, P] of up to `limit` frames, evenly spaced; frames that cannot be read are left out."""
    readable = [np.zeros((0, len(dataset.robot.state)), np.float32)]
    for frame_id in _spread(dataset, limit):
        with contextlib.suppress(base.CorruptFrameError):
            readable.append(dataset.proprio([frame_id]))
    return np.concatenate(readable)


def _spread(dataset: base.Dataset, limit: int) -> np.ndarray:
    """Ids of up to `limit` frames, evenly spaced over those that are learned from."""
    frame_ids = np.unique(np.concatenate([np.arange(episode.start, episode.end) for episode in dataset.episodes]))
    return frame_ids[np.linspace(0, len(frame_ids) - 1, min(len(frame_ids), limit)).astype(int)]


def action_sample(dataset: base.Dataset, limit: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Actions of up to `limit` frames, evenly spaced over those that are learned from, and the openings there.

    Returns:
      float32[n, A] actions and float32[n], see `Dataset.gripper_opening`, or None where the dataset has none. Where a
      frame cannot be read, it is left out, and there are no openings.
    """
    chosen = _spread(dataset, limit)
    try:
        return dataset.actions(chosen), dataset.gripper_opening(chosen)
    except base.CorruptFrameError:
        readable = []
        for frame_id in chosen:
            with contextlib.suppress(base.CorruptFrameError):
                readable.append(dataset.actions([frame_id]))
        return np.concatenate(readable or [np.zeros((0, len(dataset.robot.action)), np.float32)]), None


def episode_arrays(
    dataset: base.Dataset, episode: base.Episode, cameras: Sequence[str], observed: Sequence[sensors.Readings] = ()
) -> EpisodeArrays:
    """A whole episode, for action curves and for feeding a policy frame by frame. Raises CorruptFrameError.

    observed: sensors to read; those that no robot reports are left out.
    """
    frame_ids = np.arange(episode.start, episode.end)
    readings = {sensor.name: sensor.read(dataset, frame_ids) for sensor in observed if sensor.is_observed}
    return EpisodeArrays(dataset.images(frame_ids, cameras), dataset.actions(frame_ids), readings)
