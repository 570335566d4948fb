"""Action tokens one after the other: greedy decoding with a key-value cache, one compiled loop for any batch and chunk.

Shapes are static: the number of tokens is chunk times action dimensions, so there is no end token to wait for. Prompts
of different lengths may share a batch, because tokens are placed by position and not by slot.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.backbones import base as backbones
from robovlms_jax.nn.attention import Cache
from robovlms_jax.policies import readout
from robovlms_jax.policies.histories.base import Context
from robovlms_jax.types import Tokens


def generate(
    vlm: backbones.VLM, choose: Callable[[jax.Array], jax.Array], context: Context, num_tokens: int
) -> tuple[jax.Array, Cache]:
    """Decode the newest step's action tokens.

    Args:
      vlm: bound.
      choose: logits float32[..., V] -> int32[...], the token that goes on (`DiscreteHead.choose`): the most likely
        action id, or the most likely word of all, which is flagged when the head turns tokens into actions.
      context: the prompt, with a cache that has room for `num_tokens`.
    Returns:
      logits float32[B, num_tokens, V] that each token was chosen from, and the cache with what the loop wrote behind
      the context.
    """

    def decode(vlm: backbones.VLM, state: tuple, place: jax.Array) -> tuple[tuple, jax.Array]:
        cache, logits = state
        words = vlm.embed_ids(choose(logits))  # [B, 1, D]
        positions = (context.action_position + place)[:, None]
        token = Tokens(words, jnp.ones_like(positions, bool), positions, layout=(("query", 1),), sees=sees)
        hidden, new = vlm.decode(token, cache)
        return (cache.append(new), vlm.logits(hidden)), logits[:, 0]

    # What the end of the prompt attends to beside the sequence.
    sees = None if context.tokens.sees is None else context.tokens.sees.max(1, keepdims=True)
    hidden = readout.last_of_prompt(context.hidden, context.tokens, context.action_position[:, None])
    state = (context.cache, vlm.logits(hidden))
    # The last token is chosen but not read again.
    loop = nn.scan(decode, variable_broadcast="params", split_rngs={"params": False})
    (cache, last), logits = loop(vlm, state, jnp.arange(num_tokens - 1))
    return jnp.concatenate([jnp.swapaxes(logits, 0, 1), last], axis=1), cache
