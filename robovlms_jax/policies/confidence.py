"""Split-conformal intervals: from how far predictions were off in episodes nobody trained on, how far they may be off.

The unit is the episode: frames of one are alike, so each lends one frame, drawn at random. Of episodes that are
exchangeable with those (same scenes, tasks and way of recording), the demonstrated action of a frame drawn at random
is then within the interval with a probability of at least `coverage` (Vovk et al. 2005; Lei et al. 2018,
arXiv:1604.04173).
Nothing is promised of a policy that acts for itself, of other scenes, or of a frame that was picked. NumPy only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from robovlms_jax.actions.normalize import Normalizer


def quantile(scores: np.ndarray, coverage: float) -> float:
    """The k-th smallest score, k = ceil((n + 1) coverage); infinity where k > n, for n scores are too few then."""
    # 1e-9: a product that ought to be whole must not be rounded up.
    k = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return float(np.sort(scores)[k - 1]) if k <= len(scores) else math.inf


def scores(predicted: np.ndarray, recorded: np.ndarray, scale: np.ndarray | None, columns: Sequence[int]) -> np.ndarray:
    """float[...] of float[..., A], in normalised units: the largest |predicted - recorded| / scale over `columns`, so
    that one quantile holds all numbers of an action at once. Without `scale`, 1."""
    errors = np.abs(predicted - recorded)
    errors = errors if scale is None else errors / scale
    return errors[..., list(columns)].max(-1)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was found out about one checkpoint.

    quantiles: of the scores, one per step of the chunk; infinite where episodes were too few. coverage: what they are
    for. episodes: how many lent a frame. scaled: whether scores are relative to the head's spread.
    """

    quantiles: tuple[float, ...]
    coverage: float
    episodes: int
    scaled: bool

    def __post_init__(self):
        if not 0 < self.coverage < 1 or not self.quantiles or min(self.quantiles) < 0:
            raise ValueError(
                f"calibration: coverage={self.coverage} must lie between 0 and 1, quantiles={self.quantiles} be 0 or "
                "more, one for each step of the chunk."
            )

    def interval(self, actions: np.ndarray, scale: np.ndarray | None, normalizer: Normalizer) -> np.ndarray:
        """Half widths float32[C, A] around actions float[C, A], both in the robot's units; 0 for binary grippers.

        scale: the head's, float[C, A]. Where numbers are not scaled linearly, the wider half counts. Raises ValueError
        where the head does not say what it was calibrated with.
        """
        if self.scaled != (scale is not None):
            raise ValueError(
                f"the checkpoint was calibrated {'with' if self.scaled else 'without'} a spread of its head, and now "
                f"has {'one' if scale is not None else 'none'}; calibrate it again (python -m experiments.calibrate)."
            )
        half = np.asarray(self.quantiles, np.float32)[:, None] * (np.ones_like(actions) if scale is None else scale)
        middle = normalizer.normalize(actions)
        ends = [normalizer.unnormalize(middle + sign * half) for sign in (-1, 1)]
        width = np.maximum(np.abs(ends[0] - actions), np.abs(ends[1] - actions)).astype(np.float32)
        width[:, list(normalizer.binary)] = 0
        return width
