"""Losses per entry, and sums over masked entries divided by an explicit count, so that micro-batches and devices add
up to the batch's mean."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def masked_mean(values: jax.Array, mask: jax.Array, count: jax.Array) -> jax.Array:
    """Sum of `values` where `mask`, over `count` entries.

    Args:
      values: float[..., *rest]; trailing axes that `mask` lacks are averaged.
      mask: bool[...].
      count: float[], True entries of the whole batch that `mask` is a part of; 0 gives 0, not NaN.
    """
    values = values.reshape(*mask.shape, -1).mean(-1)
    # `where`, not a product: a masked entry may hold anything, and 0 * inf is NaN.
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(count, 1.0)


def huber(prediction: jax.Array, target: jax.Array, delta: float) -> jax.Array:
    """error^2 / 2 up to `delta`, delta * (|error| - delta / 2) beyond; upstream's arm loss at delta = 1."""
    return optax.losses.huber_loss(prediction, target, delta=delta)


def smooth_l1(prediction: jax.Array, target: jax.Array, beta: float) -> jax.Array:
    """torch's SmoothL1Loss(beta): huber / beta, so its slope is 1 beyond beta."""
    return huber(prediction, target, beta) / beta


def squared_error(prediction: jax.Array, target: jax.Array, _: float = 0.0) -> jax.Array:
    """error^2 (no half), as torch's MSELoss."""
    return jnp.square(prediction - target)


def gaussian(mean: jax.Array, log_scale: jax.Array, target: jax.Array) -> jax.Array:
    """Negative log-likelihood of `target` per entry, log s + (target - mean)^2 / (2 s^2), without log(2 pi) / 2."""
    return log_scale + 0.5 * jnp.square((target - mean) * jnp.exp(-log_scale))


REGRESSION: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "huber": huber,
    "smooth_l1": smooth_l1,
    "mse": squared_error,
}
"""By the names of `arm_loss`; (prediction, target, delta) -> one loss per entry."""


def binary_cross_entropy(logits: jax.Array, is_true: jax.Array) -> jax.Array:
    """BCE with logits, per entry."""
    return optax.losses.sigmoid_binary_cross_entropy(logits, is_true.astype(jnp.float32))


def token_cross_entropy(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Negative log-likelihood of each token, without label smoothing.

    Args:
      logits: float[..., V]. ids: int[...]; an id that no mask counts may lie outside [0, V).
    Returns:
      float32[...].
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, jnp.clip(ids, 0, logits.shape[-1] - 1)[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked
