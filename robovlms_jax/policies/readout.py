"""Which hidden states become the policy head's features."""

from __future__ import annotations

from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.types import Tokens


class Readout(Protocol):
    """What a step's sequence of hidden states has to say."""

    def queries(self) -> jax.Array | None:
        """float32[Q, D] that the backbone appends to every prompt, or None."""

    def __call__(self, hidden: jax.Array, tokens: Tokens) -> jax.Array:
        """float[..., S, D] and the tokens they come from, leaves [..., S] -> float[..., Q, D]."""


class ActionQuery(nn.Module):
    """Learned tokens appended to the prompt; their final hidden states are the features.

    Zero at the start like upstream's `action_token` (base_backbone.py), which the language model then scales and
    gives a position.
    """

    num_queries: int
    width: int

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("queries", "embed"))
        self.table = self.param("queries", init, (self.num_queries, self.width))

    def queries(self) -> jax.Array:
        return self.table

    def __call__(self, hidden: jax.Array, tokens: Tokens) -> jax.Array:
        return hidden[..., tokens.slot("query"), :]


class Pool(nn.Module):
    """Maxima over bins of a prompt's own tokens, in their order (upstream's `down_sample: pooling`).

    Bin i of Q covers tokens floor(i n / Q) ... ceil((i + 1) n / Q) - 1 of the n that are read, as torch's adaptive
    pooling does. n counts real tokens only; upstream pools over padding, too.

    Attributes:
      source: "all" tokens, the "text" between the first token and the last (bos and eos), or the images ("vision").
    """

    num_bins: int
    source: str

    def queries(self) -> None:
        return None

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


class ActionTokens(nn.Module):
    """Hidden states that predict action tokens, each of which lies in the "query" run: a token's predecessor.

    What precedes the first action token is whatever comes right before it in the prompt.
    """

    def queries(self) -> None:
        return None

    def __call__(self, hidden: jax.Array, tokens: Tokens) -> jax.Array:
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


def make(kind: str, *, num_queries: int, width: int, source: str, num_tokens: int, parallel: bool) -> Readout:
    """The readout of that kind.

    Args:
      num_queries: action queries, or bins of pooled tokens.
      source: tokens to pool.
      num_tokens: action tokens per step. parallel: they are all decoded at once, from placeholders.
    """
    if kind == "action_query":
        return ActionQuery(num_queries, width)
    if kind == "pool":
        return Pool(num_queries, source)
    return ActionQuery(num_tokens, width) if parallel else ActionTokens()
