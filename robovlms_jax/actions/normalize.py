"""Dataset units <-> [-1, 1]. Pure functions on NumPy or jax arrays; loss, serving and reports call the same ones.

Binary grippers, the columns `binary`, pass untouched in both directions; every other column is scaled. Bounds have one
number per scaled column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from robovlms_jax.actions import mu_law

if TYPE_CHECKING:
    from robovlms_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """What a policy was trained to predict: bounds, then optionally standardised, then optionally mu-law.

    The order is upstream's (`norm_action`, `regular_action`, `use_mu_law`). In the last two upstream spares the last
    time step instead of the gripper, and it never undoes the second; here `unnormalize` undoes all of them.
    """

    low: tuple[float, ...]
    """Per scaled dimension, in dataset units: mapped to -1."""
    high: tuple[float, ...]
    """Mapped to 1; what lies outside is clipped."""
    binary: tuple[int, ...]
    """Columns that are not scaled (`RobotSpec.binary`)."""
    mean: float = 0.0
    std: float | None = None
    """(x - mean) / std of the bounded numbers (upstream's adds 1e-6 to its std); None leaves it out."""
    mu: float = 0.0
    """> 0: mu-law with this mu at the end."""

    def normalize(self, actions: Array) -> Array:
        """float[..., A] in dataset units -> the same shape and dtype, as policies predict it."""
        actions = normalize(actions, self.low, self.high, self.binary)
        if self.std is not None:
            actions = standardize(actions, self.mean, self.std, self.binary)
        return actions if self.mu == 0 else _scaled(actions, mu_law.compress(actions, self.mu), self.binary)

    def unnormalize(self, actions: Array) -> Array:
        """Inverse of `normalize`, for actions inside the bounds."""
        if self.mu != 0:
            actions = _scaled(actions, mu_law.expand(actions, self.mu), self.binary)
        if self.std is not None:
            actions = unstandardize(actions, self.mean, self.std, self.binary)
        return unnormalize(actions, self.low, self.high, self.binary)


def normalize(actions: Array, low: ArrayLike, high: ArrayLike, binary: Sequence[int]) -> Array:
    """Clip to [low, high] and map to [-1, 1]; the columns `binary` pass untouched.

    At low = -0.65, high = 0.65 this is upstream's `norm_action`, clip(a, -0.65, 0.65) / 0.65.

    Args:
      actions: float[..., A] in dataset units.
      low, high: float[A - len(binary)], same units, low < high, for the other columns in their order.
    Returns:
      Same shape and dtype as `actions`.
    """
    xp = actions.__array_namespace__()
    low, high = _bounds(actions, low, high, binary)
    return _scaled(actions, 2 * (xp.clip(actions, low, high) - low) / (high - low) - 1, binary)


def unnormalize(actions: Array, low: ArrayLike, high: ArrayLike, binary: Sequence[int]) -> Array:
    """Inverse of `normalize` on [-1, 1]; larger values go beyond [low, high].

    Upstream scales the gripper along with the arm and thresholds it afterwards, which
    shuts it for good where high <= 0.5.
    """
    low, high = _bounds(actions, low, high, binary)
    return _scaled(actions, 0.5 * (actions + 1) * (high - low) + low, binary)


def standardize(actions: Array, mean: ArrayLike, std: ArrayLike, binary: Sequence[int]) -> Array:
    """(actions - mean) / std; the columns `binary` pass untouched.

    Args:
      actions: float[..., A].
      mean, std: a number, or float[A - len(binary)], in the actions' units; std > 0.
    """
    mean, std = _wide(actions, mean, 0, binary), _wide(actions, std, 1, binary)
    return _scaled(actions, (actions - mean) / std, binary)


def unstandardize(actions: Array, mean: ArrayLike, std: ArrayLike, binary: Sequence[int]) -> Array:
    """Inverse of `standardize`."""
    mean, std = _wide(actions, mean, 0, binary), _wide(actions, std, 1, binary)
    return _scaled(actions, actions * std + mean, binary)


def _is_scaled(actions: Array, binary: Sequence[int]) -> np.ndarray:
    """bool[A]."""
    return ~np.isin(np.arange(actions.shape[-1]), binary)


def _scaled(actions: Array, changed: Array, binary: Sequence[int]) -> Array:
    """`changed`, but for binary grippers: float[..., A] both.

    Chosen by column and not cut and joined again, so that XLA makes one loop of it and whatever comes next.
    """
    return actions.__array_namespace__().where(_is_scaled(actions, binary), changed, actions)


def _wide(actions: Array, value: ArrayLike, rest: float, binary: Sequence[int]) -> Array:
    """A number, or one per scaled dimension, as one per action dimension; `rest` for the others."""
    if np.ndim(value) == 0:
        return actions.__array_namespace__().asarray(value, dtype=actions.dtype)
    wide = np.full(actions.shape[-1], rest, actions.dtype)
    wide[_is_scaled(actions, binary)] = np.asarray(value, actions.dtype)
    return actions.__array_namespace__().asarray(wide)


def _bounds(actions: Array, low: ArrayLike, high: ArrayLike, binary: Sequence[int]) -> tuple[Array, Array]:
    """float[A] each; those of binary grippers are never used."""
    count = int(_is_scaled(actions, binary).sum())
    if np.shape(low) != (count,) or np.shape(high) != (count,):
        raise ValueError(
            f"low {np.shape(low)} and high {np.shape(high)} must be [{count}], one number for each of the actions' "
            f"{actions.shape[-1]} dimensions that is no binary gripper."
        )
    return _wide(actions, low, -1, binary), _wide(actions, high, 1, binary)
