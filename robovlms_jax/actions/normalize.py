"""Dataset units <-> [-1, 1]. Pure functions on NumPy or jax arrays; loss, serving and reports call the same ones.

Whatever is done to the arm, the gripper, the last column, passes untouched in both directions.
"""

from __future__ import annotations

import dataclasses
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
    """Per arm dimension, in dataset units: mapped to -1."""
    high: tuple[float, ...]
    """Mapped to 1; what lies outside is clipped."""
    mean: float = 0.0
    std: float | None = None
    """(x - mean) / std of the bounded arm (upstream's adds 1e-6 to its std); None leaves it out."""
    mu: float = 0.0
    """> 0: mu-law with this mu at the end."""

    def normalize(self, actions: Array) -> Array:
        """float[..., A] in dataset units -> the same shape and dtype, as policies predict it."""
        actions = normalize(actions, self.low, self.high)
        if self.std is not None:
            actions = standardize(actions, self.mean, self.std)
        return actions if self.mu == 0 else _on_arm(actions, mu_law.compress(actions, self.mu))

    def unnormalize(self, actions: Array) -> Array:
        """Inverse of `normalize`, for actions inside the bounds."""
        if self.mu != 0:
            actions = _on_arm(actions, mu_law.expand(actions, self.mu))
        if self.std is not None:
            actions = unstandardize(actions, self.mean, self.std)
        return unnormalize(actions, self.low, self.high)


def normalize(actions: Array, low: ArrayLike, high: ArrayLike) -> Array:
    """Clip the arm to [low, high] and map it to [-1, 1]; the gripper, the last column, passes untouched.

    At low = -0.65, high = 0.65 this is upstream's `norm_action`, clip(a, -0.65, 0.65) / 0.65.

    Args:
      actions: float[..., A] in dataset units.
      low, high: float[A - 1], same units, low < high.
    Returns:
      Same shape and dtype as `actions`.
    """
    xp = actions.__array_namespace__()
    low, high = _bounds(actions, low, high)
    return _on_arm(actions, 2 * (xp.clip(actions, low, high) - low) / (high - low) - 1)


def unnormalize(actions: Array, low: ArrayLike, high: ArrayLike) -> Array:
    """Inverse of `normalize` on [-1, 1]; larger values go beyond [low, high]. The gripper passes untouched.

    Upstream scales the gripper along with the arm and thresholds it afterwards, which
    shuts it for good where high <= 0.5.
    """
    low, high = _bounds(actions, low, high)
    return _on_arm(actions, 0.5 * (actions + 1) * (high - low) + low)


def standardize(actions: Array, mean: ArrayLike, std: ArrayLike) -> Array:
    """(arm - mean) / std; the gripper passes untouched.

    Args:
      actions: float[..., A].
      mean, std: a number, or float[A - 1], in the actions' units; std > 0.
    """
    mean, std = _of_arm(actions, mean, 0), _of_arm(actions, std, 1)
    return _on_arm(actions, (actions - mean) / std)


def unstandardize(actions: Array, mean: ArrayLike, std: ArrayLike) -> Array:
    """Inverse of `standardize`."""
    mean, std = _of_arm(actions, mean, 0), _of_arm(actions, std, 1)
    return _on_arm(actions, actions * std + mean)


def binarize_gripper(gripper: Array) -> Array:
    """Gripper logits, or commands in [-1, 1], as decisions: exactly +1 (open) where > 0, else -1. Same dtype."""
    xp = gripper.__array_namespace__()
    return xp.where(gripper > 0, 1, -1).astype(gripper.dtype)


def _on_arm(actions: Array, changed: Array) -> Array:
    """`changed`, but for the gripper: float[..., A] both.

    Chosen by column and not cut and joined again, so that XLA makes one loop of it and whatever comes next.
    """
    xp = actions.__array_namespace__()
    return xp.where(np.arange(actions.shape[-1]) < actions.shape[-1] - 1, changed, actions)


def _of_arm(actions: Array, value: ArrayLike, gripper: float) -> Array:
    """A number, or one per arm dimension, as one per action dimension."""
    xp = actions.__array_namespace__()
    value = xp.asarray(value, dtype=actions.dtype)
    return value if value.ndim == 0 else xp.concat([value, xp.full(1, gripper, dtype=actions.dtype)])


def _bounds(actions: Array, low: ArrayLike, high: ArrayLike) -> tuple[Array, Array]:
    """float[A] each; the gripper's are never used."""
    arm = (actions.shape[-1] - 1,)
    if np.shape(low) != arm or np.shape(high) != arm:
        raise ValueError(
            f"low {np.shape(low)} and high {np.shape(high)} must be [{arm[0]}], one number per arm dimension of the "
            "actions."
        )
    return _of_arm(actions, low, -1), _of_arm(actions, high, 1)
