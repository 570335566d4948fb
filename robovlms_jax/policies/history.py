"""Where observed steps meet. A history is three reshapes around the backbone; see docs/style.md section 7."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.types import Inputs, Tokens


class History(Protocol):
    """Reshapes between a segment of G frames and the sequences a backbone decodes.

    shares_frames: a frame's features do not depend on the window it is in, so windows of one segment may share them.
    """

    shares_frames: bool

    def frames(self, inputs: Inputs) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        """-> images camera -> float[N, size, size, 3], text_ids int32[N, T], text_mask bool[N, T]."""

    def join(self, tokens: Tokens, batch: int) -> Tokens:
        """Tokens of N frames -> the sequences to decode."""

    def part(self, hidden: jax.Array, batch: int) -> jax.Array:
        """Decoded sequences -> float[B, G, S, D]."""


class PolicyHeadHistory:
    """Every frame is decoded alone; the policy head remembers (upstream's `post`)."""

    shares_frames = True

    def frames(self, inputs: Inputs) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        steps = inputs.step_mask.shape[1]
        images = {camera: x.reshape(-1, *x.shape[2:]) for camera, x in inputs.images.items()}
        return images, jnp.repeat(inputs.text_ids, steps, axis=0), jnp.repeat(inputs.text_mask, steps, axis=0)

    def join(self, tokens: Tokens, batch: int) -> Tokens:
        return tokens

    def part(self, hidden: jax.Array, batch: int) -> jax.Array:
        return hidden.reshape(batch, -1, *hidden.shape[1:])


HISTORIES: dict[str, type] = {"policy_head": PolicyHeadHistory}


def windows(x: jax.Array, window: int) -> jax.Array:
    """All windows of a segment: [B, G, ...] -> [B, K, W, ...] with K = G - W + 1; window k holds frames k .. k + W -
    1."""
    count = x.shape[1] - window + 1
    return x[:, np.arange(count)[:, None] + np.arange(window)]
