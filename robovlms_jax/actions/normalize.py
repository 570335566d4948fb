"""Dataset units <-> [-1, 1]. Pure functions on NumPy or jax arrays; loss, serving and reports call the same ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from robovlms_jax.types import Array


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
    arm = 2 * (xp.clip(actions[..., :-1], low, high) - low) / (high - low) - 1
    return xp.concat([arm, actions[..., -1:]], axis=-1)


def unnormalize(actions: Array, low: ArrayLike, high: ArrayLike) -> Array:
    """Inverse of `normalize` on [-1, 1]; larger values go beyond [low, high]. The gripper passes untouched.

    Upstream scales the gripper along with the arm and thresholds it afterwards, which
    shuts it for good where high <= 0.5.
    """
    xp = actions.__array_namespace__()
    low, high = _bounds(actions, low, high)
    arm = 0.5 * (actions[..., :-1] + 1) * (high - low) + low
    return xp.concat([arm, actions[..., -1:]], axis=-1)


def binarize_gripper(gripper: Array) -> Array:
    """Gripper logits, or commands in [-1, 1], as decisions: exactly +1 (open) where > 0, else -1. Same dtype."""
    xp = gripper.__array_namespace__()
    return xp.where(gripper > 0, 1, -1).astype(gripper.dtype)


def _bounds(actions: Array, low: ArrayLike, high: ArrayLike) -> tuple[Array, Array]:
    xp = actions.__array_namespace__()
    low, high = xp.asarray(low, dtype=actions.dtype), xp.asarray(high, dtype=actions.dtype)
    arm = actions.shape[-1] - 1
    if low.shape != (arm,) or high.shape != (arm,):
        raise ValueError(
            f"low {low.shape} and high {high.shape} must be [{arm}], one number per arm dimension of the actions."
        )
    return low, high
