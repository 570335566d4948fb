"""What a sensor reads, before any model: the description that datasets, policies and robots share. NumPy only."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Reading:
    """The readings of one sensor.

    name: under which they are found in `types.Inputs.sensors` and `interface.Observation.sensors`.
    kind: registered kind of sensor; joins its data half to its model half.
    field: the dataset's field that stores them (`data.base.Dataset.array`).
    shape: of the reading of one frame.
    past: how many readings before a frame's own its tokens are made of.
    no_return: put in place of single values that are not finite (a beam without echo); None: there may be none.
    any_rows: the first axis may have any length: missing rows are NaN, of too many, evenly spaced ones are kept.
    """

    name: str
    kind: str
    field: str
    shape: tuple[int, ...]
    past: int = 0
    no_return: float | None = None
    any_rows: bool = False

    @property
    def size(self) -> int:
        """Numbers of one reading."""
        return math.prod(self.shape)

    def zeros(self, batch: int, frames: int) -> np.ndarray:
        """float32[batch, past + frames, *shape], as `Inputs.sensors` holds the readings of so many frames."""
        return np.zeros((batch, self.past + frames, *self.shape), np.float32)

    def convert(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """n readings as a policy takes them.

        Args:
          values: numbers[n, ...] with the shape of a reading, axes of length 1 aside, or flat. A vector may be stored
            with more axes (the cells of a tactile array).
        Returns:
          float32[n, *shape]; bool[n], which of them there are: a reading that is NaN everywhere is none, and zero here;
          bool[n], which cannot be used: they have values that are not finite, and there is no `no_return`.
        Raises:
          ValueError: readings of another size, or with their axes in another order (a picture on its side).
        """
        values = np.asarray(values, np.float32)
        found = values.shape[1:]
        values = self._sized(values.reshape(len(values), -1))
        self._check_axes(found)
        flat = values.reshape(len(values), -1)
        present = ~np.isnan(flat).all(axis=1)
        finite = np.isfinite(values)
        bad = present & ~finite.reshape(len(values), -1).all(axis=1)
        if self.no_return is not None:
            values, bad = np.where(finite, values, np.float32(self.no_return)), np.zeros_like(bad)
        values = np.where(present.reshape(-1, *[1] * len(self.shape)), values, np.float32(0))
        return values, present, bad

    def _check_axes(self, found: tuple[int, ...]) -> None:
        """A picture on its side has the right size, and so have rows that were stored as columns."""
        skip = int(self.any_rows)
        wrong, expected = ([size for size in sizes[skip:] if size != 1] for sizes in (found, self.shape))
        is_flat = len(found) < 2 or (not skip and min(len(wrong), len(expected)) < 2)
        if not is_flat and wrong != expected:
            rows = ", any number of rows" if skip else ""
            raise ValueError(f"its shape is {list(found)}; expected {list(self.shape)}{rows}, or all in one axis.")

    def _sized(self, values: np.ndarray) -> np.ndarray:
        """float32[n, numbers] -> float32[n, *shape]."""
        numbers = values.shape[1]
        if not self.any_rows:
            if numbers != self.size:
                raise ValueError(f"it has {numbers} numbers per frame; expected {self.size}, shape {list(self.shape)}.")
            return values.reshape(-1, *self.shape)
        row = math.prod(self.shape[1:])
        if numbers % row:
            raise ValueError(f"it has {numbers} numbers per frame; expected rows of {row} each.")
        rows = values.reshape(-1, numbers // row, *self.shape[1:])
        if rows.shape[1] > self.shape[0]:
            return rows[:, np.linspace(0, rows.shape[1] - 1, self.shape[0]).round().astype(int)]
        missing = self.shape[0] - rows.shape[1]
        return np.pad(rows, ((0, 0), (0, missing), *[(0, 0)] * (rows.ndim - 2)), constant_values=np.nan)
