"""Real-time chunking (Black et al. 2025, arXiv:2506.07339): how much of the chunk before a new one is to keep."""

from __future__ import annotations

import numpy as np


def weights(chunk: int, delay: int, left: int, schedule: str = "exp") -> np.ndarray:
    """float32[C]: 1 for the first `delay` steps, which are executed meanwhile; then falling to the last of the `left`
    steps that were planned before; 0 for the others.

    Step i of those between is c (e^c - 1) / (e - 1) with c = (left - i) / (left - delay + 1), or c itself with schedule
    "linear". Raises ValueError unless 0 <= delay <= left <= chunk.
    """
    if not 0 <= delay <= left <= chunk:
        raise ValueError(f"delay={delay} must be 0 ... {left}, the steps that are left, and these at most {chunk}.")
    steps = np.arange(chunk)
    falling = (left - steps) / (left - delay + 1)
    if schedule == "exp":
        falling = falling * np.expm1(falling) / np.expm1(1.0)
    return np.where(steps < delay, 1.0, np.where(steps < left, falling, 0.0)).astype(np.float32)
