"""Tensors in memory as a checkpoint that weights are converted from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class ArraySource:
    """Tensors already in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str = "arrays"):
        self.name = name
        self.shapes = {key: tuple(value.shape) for key, value in arrays.items()}
        self._arrays = arrays

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(self._arrays[name][index])
