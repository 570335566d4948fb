"""What a policy may know of the robot itself: its state, and what it did."""

from __future__ import annotations

import numpy as np

from robovlms_jax.data import base
from robovlms_jax.data.sensors import base as sensors


@sensors.register("proprio")
class Proprio(sensors.Readings):
    """The state as `inputs.proprio` defines it; whether a dataset has it, it knows itself."""

    can_miss = False

    def require(self, dataset: base.Dataset) -> None:
        """Nothing: the first batch that needs it says what is missing, as the dataset words it."""

    def read(self, dataset: base.Dataset, frame_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return dataset.proprio(frame_ids), np.ones(len(frame_ids), bool)


@sensors.register("action_history")
class ActionHistory(sensors.Readings):
    """The action before each frame, dataset units; NaN where the episode had not begun."""

    can_miss = False
    is_observed = False

    def require(self, dataset: base.Dataset) -> None:
        """Nothing: every dataset has actions."""

    def read(self, dataset: base.Dataset, frame_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return dataset.actions(frame_ids), np.ones(len(frame_ids), bool)

    def fill(self, values: np.ndarray, mask: np.ndarray | None, dataset: base.Dataset, span: sensors.Span) -> None:
        before = span._replace(begin=span.begin - 1)
        super().fill(values, mask, dataset, before)
        ids = before.begin - self.reading.past + np.arange(values.shape[1])
        values[:] = np.where((ids >= span.start)[..., None], values, np.nan)
