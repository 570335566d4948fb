"""Which hidden states become the policy head's features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.types import Tokens

Read = Callable[[jax.Array, Tokens], jax.Array]
"""Final hidden states float[..., S, D] and the tokens they come from, leaves [..., S] -> features float[..., Q, D]. No
parameters."""


class LearnedQueries(nn.Module):
    """Learned tokens appended to the prompt; their final hidden states are the features.

    Zero at the start like upstream's `action_token` (base_backbone.py), which the language model then scales and
    gives a position.
    """

    num_queries: int
    width: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """float32[Q, D]."""
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("queries", "embed"))
        return self.param("queries", init, (self.num_queries, self.width))


def read_queries(hidden: jax.Array, tokens: Tokens) -> jax.Array:
    """Hidden states of the "query" run: float[..., S, D] and the tokens they come from -> float[..., Q, D]."""
    return hidden[..., tokens.slot("query"), :]


@dataclasses.dataclass(frozen=True)
class Pool:
    """Maxima over bins of a prompt's own tokens, in their order (upstream's `down_sample: pooling`).

    Bin i of Q covers tokens floor(i n / Q) ... ceil((i + 1) n / Q) - 1 of the n that are read, as torch's adaptive
    pooling does. n counts real tokens only; upstream pools over padding, too.

    source: "all" tokens, the "text" between the first token and the last (bos and eos), or the images ("vision").
    """

    num_bins: int
    source: str

    def __call__(self, hidden: jax.Array, tokens: Tokens) -> jax.Array:
        chosen = self._chosen(tokens)
        total = chosen.sum(-1, keepdims=True)
        # In the order of positions, which need not be that of the slots.
        earlier = (tokens.positions[..., None, :] < tokens.positions[..., :, None]) & chosen[..., None, :]
        rank = earlier.sum(-1)
        bins = []
        for i in range(self.num_bins):
            first, end = i * total // self.num_bins, -(-(i + 1) * total // self.num_bins)
            inside = chosen & (rank >= first) & (rank < end)
            top = largest(hidden, inside)
            bins.append(jnp.where(total > 0, top, 0).astype(hidden.dtype))  # nothing to read: zeros, not -inf
        return jnp.stack(bins, axis=-2)

    def _chosen(self, tokens: Tokens) -> jax.Array:
        """bool[..., S]."""
        if self.source == "all":
            return tokens.mask
        wanted = ("image",) if self.source == "vision" else ("bos", "text")
        chosen = jnp.concatenate([jnp.full(length, run in wanted) for run, length in tokens.layout]) & tokens.mask
        if self.source == "vision":
            return chosen
        places = jnp.where(chosen, tokens.positions, -1)
        last = places.max(-1, keepdims=True)
        first = jnp.where(chosen, tokens.positions, jnp.iinfo(jnp.int32).max).min(-1, keepdims=True)
        return chosen & (tokens.positions > first) & (tokens.positions < last)


def read_action_tokens(hidden: jax.Array, tokens: Tokens) -> jax.Array:
    """Hidden states that predict the action tokens in the "query" run, each of which is a token's predecessor.

    What precedes the first action token is whatever comes right before it in the prompt.
    """
    query = tokens.slot("query")
    before = last_of_prompt(hidden, tokens, tokens.positions[..., query.start, None])
    return jnp.concatenate([before, hidden[..., query.start : query.stop - 1, :]], axis=-2)


def largest(x: jax.Array, among: jax.Array | None = None) -> jax.Array:
    """Per channel the maximum over slots: float[..., S, D] -> float[..., D]; the gradient goes to the first of equals.

    By index, not `max`: the gradient of `max` compares its argument with the maximum for equality, and a compiler that
    computes the argument a second time, rounded otherwise, finds none or several (wrong gradients, NaN).

    Args:
      among: bool[..., S], slots to look at; without any, the result is that of slot 0.
    """
    seen = x if among is None else jnp.where(among[..., None], x, -jnp.inf)
    slot = jax.lax.stop_gradient(seen).argmax(-2, keepdims=True)
    return jnp.take_along_axis(x, slot, axis=-2)[..., 0, :]


def last_of_prompt(hidden: jax.Array, tokens: Tokens, position: jax.Array) -> jax.Array:
    """Hidden state of the real token right before int32[..., 1] `position`: float[..., S, D] -> float[..., 1, D]."""
    slot = jnp.argmax((tokens.positions == position - 1) & tokens.mask, axis=-1)
    return jnp.take_along_axis(hidden, slot[..., None, None], axis=-2)


def make(kind: str, *, num_bins: int, source: str, parallel: bool) -> Read:
    """How features are read in a readout of that kind.

    Args:
      num_bins, source: of pooled tokens.
      parallel: action tokens are decoded all at once, from placeholders of their own.
    """
    if kind == "pool":
        return Pool(num_bins, source)
    return read_queries if kind == "action_query" or parallel else read_action_tokens
