"""What released RoboVLMs checkpoints were trained with and we do otherwise: the layout of padded prompts.

Upstream pads the prompts of a batch to the longest one, then inserts images and action queries by slot. For every
shorter prompt the queries therefore come after its last real token and its padding, and positions count the padding.
A prompt alone, as in control, has no padding and so the layout that we always have.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from robovlms_jax.types import Tokens


def padded_layout(tokens: Tokens, tail: int, *, count_padding: bool, queries_last: bool) -> Tokens:
    """The same tokens with positions as upstream's batches have them.

    Args:
      tokens: of `VLM.embed`: runs "bos", "image", "text", and behind them whatever comes before the prompt's end.
      tail: text tokens that the queries come before.
      count_padding: positions count padding, too.
      queries_last: queries come before the last `tail` slots of the padded prompt, not before its last real tokens.
    """
    runs = dict(tokens.layout)
    lead, num_image, text_length = runs["bos"], runs.get("image", 0), runs["bos"] + runs["text"]
    num_queries = tokens.positions.shape[1] - num_image - text_length
    mask = jnp.concatenate([tokens.mask[:, tokens.slot(run)] for run in ("bos", "text")], axis=1)
    slots = jnp.arange(text_length)
    counted = jnp.ones_like(mask) if count_padding else mask
    before = jnp.cumsum(counted, axis=1) - counted  # text tokens that count before each
    end = text_length if queries_last else jnp.max(jnp.where(mask, slots + 1, 0), axis=1, keepdims=True)
    anchor = jnp.maximum(end - tail, lead)  # the slot that queries come before; images precede it whatever the prompt
    text = before + jnp.where(slots >= lead, num_image, 0) + jnp.where(slots >= anchor, num_queries, 0)
    first = jnp.sum(jnp.where(slots < anchor, counted, False), axis=1, keepdims=True) + num_image

    def broadcast(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (mask.shape[0], x.shape[-1]))

    parts = [text[:, :lead], broadcast(lead + jnp.arange(num_image)), text[:, lead:], first + jnp.arange(num_queries)]
    return tokens.replace(positions=jnp.concatenate(parts, axis=1).astype(jnp.int32))
