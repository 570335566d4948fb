"""Action tokens one after the other: greedy decoding with a key-value cache, one compiled loop for any batch and chunk.

Shapes are static: the number of tokens is chunk times action dimensions, so there is no end token to wait for. Prompts
of different lengths may share a batch, because tokens are placed by position and not by slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attention import Cache
from robovlms_jax.policies import readout
from robovlms_jax.types import Tokens

if TYPE_CHECKING:
    from robovlms_jax.policies.stream import Seen
    from robovlms_jax.policies.vla import VLA


def generate(model: VLA, seen: Seen) -> tuple[jax.Array, Cache]:
    """Decode the newest step's action tokens.

    Each token is what the head chooses (`DiscreteHead.choose`): the most likely action id, or the most likely word of
    all, which goes on as a token like any other and is flagged when the head turns tokens into actions.

    Args:
      model: bound, autoregressive.
      seen: the prompt in its context, with a cache that has room for the tokens.
    Returns:
      logits float32[B, C * A, V] that each token was chosen from, and the cache with what the loop wrote behind the
      context.
    """

    def decode(model: VLA, state: tuple, place: jax.Array) -> tuple[tuple, jax.Array]:
        cache, logits = state
        words = model.backbone.embed_ids(model.head.choose(logits))  # [B, 1, D]
        positions = (seen.action_position + place)[:, None]
        token = Tokens(words, jnp.ones_like(positions, bool), positions, layout=(("query", 1),))
        hidden, new = model.backbone.decode(token, cache)
        return (cache.append(new), model.backbone.logits(hidden)), logits[:, 0]

    hidden = readout.last_of_prompt(seen.hidden, seen.tokens, seen.action_position[:, None])
    state = (seen.cache, model.backbone.logits(hidden))
    # The last token is chosen but not read again.
    loop = nn.scan(decode, variable_broadcast="params", split_rngs={"params": False})
    (cache, last), logits = loop(model, state, jnp.arange(model.num_tokens - 1))
    return jnp.concatenate([jnp.swapaxes(logits, 0, 1), last], axis=1), cache
