"""Sums over masked entries divided by an explicit count, so that micro-batches and devices add up to the batch's
mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
