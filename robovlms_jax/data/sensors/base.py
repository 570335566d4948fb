"""The data half of a sensor: from the dataset's field to what `types.Inputs.sensors` holds.

Its model half, which makes tokens, is in `policies/sensors/`; both are registered under one kind. Most sensors need
none of their own here: `Readings` reads any numeric field.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from robovlms_jax.data import base
from robovlms_jax.inputs.sensors import Reading

logger = logging.getLogger(__name__)


class Span(NamedTuple):
    """Where segments lie, int64[n, 1] frame ids each.

    begin: of the first frame, were there frames enough before; start, end: the first and last frame of the episode.
    """

    begin: np.ndarray
    start: np.ndarray
    end: np.ndarray


class Readings:
    """Reads one numeric field. Frames before an episode have its first reading, frames after it its last.

    can_miss: whether there are frames without a reading, and so a mask.
    is_observed: whether a robot reports it; the others follow from what a policy did.
    """

    can_miss = True
    is_observed = True

    def __init__(self, reading: Reading):
        self.reading = reading

    @property
    def name(self) -> str:
        """The sensor's."""
        return self.reading.name

    def require(self, dataset: base.Dataset) -> None:
        """Raises ValueError where the dataset has no such field, or one of another size."""
        firsts = np.cumsum([0, *(group.num_episodes for group in dataset.groups)])[: max(len(dataset.groups), 1)]
        ids = np.array([dataset.episodes[first].start for first in firsts.tolist()])
        has = dataset.has_array(self.reading.field, ids)
        if not has.any():
            raise ValueError(
                f"{dataset.name}: no dataset of the mixture stores {self.reading.field!r}, which the sensor "
                f"{self.name!r} of policy.sensors reads."
            )
        if not has.all():
            lacking = [group.name for group, there in zip(dataset.groups, has.tolist(), strict=True) if not there]
            logger.warning(
                "%s: no %r in %s; there, the sensor %r is masked",
                *(dataset.name, self.reading.field, ", ".join(lacking), self.name),
            )
        with contextlib.suppress(base.CorruptFrameError):  # whoever reads the frame next counts it
            self.read(dataset, ids[has][:1])

    def read(self, dataset: base.Dataset, frame_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32[n, *shape] of frames int64[n], and bool[n]: whether there is a reading (else it is zero).

        Raises CorruptFrameError naming the frame and the field.
        """
        field = self.reading.field
        has = dataset.has_array(field, frame_ids)
        values, present = np.zeros((len(frame_ids), *self.reading.shape), np.float32), np.zeros(len(frame_ids), bool)
        if not has.any():
            return values, present
        stored = dataset.array(field, frame_ids[has])
        try:
            values[has], present[has], bad = self.reading.convert(stored)
        except ValueError as error:
            raise ValueError(
                f"{dataset.name}: {field!r}, which the sensor {self.name!r} of policy.sensors reads: {error}"
            ) from error
        if bad.any():
            raise base.CorruptFrameError(
                f"{dataset.name}: frame {frame_ids[has][bad][0]} has values of {field} that are not finite."
            )
        return values, present

    def allocate(self, size: int, frames: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Zeros float32[size, past + frames, *shape], and a mask bool[size, past + frames] where one is needed."""
        values = self.reading.zeros(size, frames)
        return values, np.zeros(values.shape[:2], bool) if self.can_miss else None

    def fill(self, values: np.ndarray, mask: np.ndarray | None, dataset: base.Dataset, span: Span) -> None:
        """Write the readings of n segments into arrays as `allocate` makes them. Raises CorruptFrameError."""
        ids = span.begin - self.reading.past + np.arange(values.shape[1])
        distinct, places = np.unique(np.clip(ids, span.start, span.end), return_inverse=True)
        read, present = self.read(dataset, distinct)
        places = places.reshape(ids.shape)
        values[:] = read[places]
        if mask is not None:
            mask[:] = present[places]

    def blank(self, values: np.ndarray, mask: np.ndarray | None) -> None:
        """Make a row [past + frames, ...] one without readings."""
        values[:] = 0
        if mask is not None:
            mask[:] = False


_KINDS: dict[str, type[Readings]] = {}


def register(kind: str) -> Callable[[type[Readings]], type[Readings]]:
    """Class decorator: the data half of this kind of sensor, where `Readings` is not."""

    def decorate(half: type[Readings]) -> type[Readings]:
        if kind in _KINDS:
            raise ValueError(f"sensor {kind!r} has a data half already: {_KINDS[kind].__name__}.")
        _KINDS[kind] = half
        return half

    return decorate


def make(reading: Reading) -> Readings:
    """The data half of a sensor."""
    return _KINDS.get(reading.kind, Readings)(reading)
