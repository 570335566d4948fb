"""What tasks learned one after the other do to each other: transfer and forgetting as LIBERO counts them (Liu et al.
2023, arXiv:2306.03310, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Lifelong(NamedTuple):
    """forward: FWT, the area under the success curve while a task is learned, mean over tasks; higher is better.
    backward: NBT, negative backward transfer, what later tasks cost; lower is better, below 0 they helped; NaN with one
    task. area: AUC, of both together; higher is better."""

    forward: float
    backward: float
    area: float


def frozen_at_best(curve: Sequence[float]) -> np.ndarray:
    """float64[E]: a success curve whose values after its best one are that one, for the best checkpoint is kept."""
    values = np.array(curve, np.float64)
    best = int(np.argmax(values))
    values[best:] = values[best]
    return values


def measures(curves: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Lifelong:
    """FWT_k = mean_e c_kke;  NBT_k = mean_{q > k} (c_kk - c_qk);  AUC_k = (FWT_k + sum_{q > k} c_qk) / (K - k + 1).

    Args:
      curves: of each task in order, its success at equal distances while it is learned, from before the first step on.
      after: float[K, K], success on task k (column) after learning task q (row); what is above the diagonal is not
        read. On the diagonal stands what the kept policy solves.
    Raises:
      ValueError: their numbers of tasks differ.
    """
    matrix = np.array(after, np.float64)
    if matrix.shape != (len(curves), len(curves)):
        raise ValueError(f"{len(curves)} curves and a matrix of {matrix.shape}: expected a row and column per task.")
    count = len(curves)
    forward = [float(frozen_at_best(curve).mean()) for curve in curves]
    backward = [float((matrix[k, k] - matrix[k + 1 :, k]).mean()) for k in range(count - 1)]
    area = [(forward[k] + matrix[k + 1 :, k].sum()) / (count - k) for k in range(count)]
    return Lifelong(
        float(np.mean(forward)), float(np.mean(backward)) if backward else float("nan"), float(np.mean(area))
    )
