"""Self-attention over everything a window's steps have to say, then the two MLPs."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax

from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.stack import scan_layers
from robovlms_jax.policies.heads import base
from robovlms_jax.policies.heads.continuous import (
    Block,
    ContinuousHead,
    ContinuousHeadConfig,
    dense,
    step_attention,
    step_positions,
)


@dataclasses.dataclass(frozen=True)
class AttentionHeadConfig(ContinuousHeadConfig):
    """Self-attention and feed-forward layers in which queries of all steps meet, then an MLP each for arm and
    gripper."""

    hidden_size: int = 512
    """Of every token; the feed-forward layer is four times as wide."""
    num_layers: int = 1
    num_heads: int = 8
    dropout: float = 0.0
    """On attention weights and residual branches, in training."""


@base.register("attention", AttentionHeadConfig)
class AttentionHead(ContinuousHead):
    """A step's queries attend each other and those of earlier steps of the window; with one step, each other alone."""

    def setup(self):
        super().setup()
        config = self.config
        normal = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", "embed"))
        self.project = dense(config.hidden_size, self.kernel)
        self.step_table = self.param("steps", normal, (self.window, config.hidden_size))
        self.query_table = self.param("slots", normal, (self.num_queries, config.hidden_size))
        self.layers = Block(config.num_heads, "gelu", config.dropout, self.kernel)
        self.final_norm = LayerNorm(1e-5)

    def encode(self, features: jax.Array, mask: jax.Array) -> jax.Array:
        deterministic = not self.has_rng("dropout")
        batch, steps = mask.shape
        x = self.project(features) + self.query_table + self.step_table[step_positions(mask)][:, :, None]
        attend = step_attention(mask, self.num_queries)

        def layer(block, x, _):
            return block(x, attend, deterministic=deterministic), None

        x = x.reshape(batch, steps * self.num_queries, -1)
        x, _ = scan_layers(layer, self.layers, x, length=self.config.num_layers, remat="none")
        return self.final_norm(x).reshape(batch, steps, -1)
