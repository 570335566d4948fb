"""Position encodings, computed from integer positions so that no table limits the sequence length."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def sinusoid(positions: jax.Array, width: int) -> jax.Array:
    """Fairseq's sinusoids as KOSMOS-2 uses them: [sin | cos] halves, token 0 at row 2 (pad_id = 1 is padding's row).

    Args:
      positions: int32[...], 0-based.
      width: D, even.
    Returns:
      float32[..., D].
    """
    half = width // 2
    # half - 1, not half: the last frequency is exactly 1 / 10000 (tensor2tensor's form, unlike Vaswani et al. 2017).
    frequency = np.exp(-np.log(10_000.0) / (half - 1) * np.arange(half)).astype(np.float32)
    angle = (positions[..., None] + 2) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
