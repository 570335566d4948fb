"""Which hidden states become the policy head's features."""

from __future__ import annotations

import flax.linen as nn
import jax

from robovlms_jax.types import Tokens


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
        """float32[Q, D]."""
        return self.table

    def __call__(self, hidden: jax.Array, tokens: Tokens) -> jax.Array:
        """float[B, G, S, D] -> float[B, G, Q, D]."""
        return hidden[..., tokens.slot("query"), :]
