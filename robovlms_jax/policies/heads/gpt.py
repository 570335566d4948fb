"""GPT-2 stack over the window's steps (upstream `GPTDecoder`, policy_head/base_policy.py and trajectory_gpt2.py)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax

from robovlms_jax.nn.linear import Dense
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.stack import scan_layers
from robovlms_jax.policies.heads import base
from robovlms_jax.policies.heads.continuous import (
    Block,
    ContinuousHead,
    ContinuousHeadConfig,
    step_attention,
    step_positions,
)


@dataclasses.dataclass(frozen=True)
class GPTHeadConfig(ContinuousHeadConfig):
    """Causal transformer over the window, then one MLP for the arm (tanh) and one for the gripper (logit)."""

    # One step is nothing to remember.
    histories: ClassVar[tuple[str, ...]] = ("interleaved", "policy_head")

    hidden_size: int = 1024
    """Per action query, as upstream has it."""
    num_layers: int = 8
    num_heads: int = 8
    dropout: float = 0.1
    """On embeddings, attention weights and residual branches, in training."""


@base.register("gpt", GPTHeadConfig)
class GPTHead(ContinuousHead):
    """Positions count a window's real steps from 0. A linear layer comes first where the widths differ."""

    def setup(self):
        super().setup()
        config, width = self.config, self.config.hidden_size * self.num_queries
        normal = nn.initializers.normal(0.02)
        self.project = None
        if self.feature_dim != config.hidden_size:
            self.project = Dense(width, ("embed", "hidden"), kernel=self.kernel)
        init = nn.with_logical_partitioning(normal, ("position", "embed"))
        self.positions = self.param("positions", init, (self.window, width))
        self.layers = Block(config.num_heads, "gelu_new", config.dropout, self.kernel)
        self.final_norm = LayerNorm(1e-5)
        self.drop = nn.Dropout(config.dropout)

    def encode(self, features: jax.Array, mask: jax.Array) -> jax.Array:
        deterministic = not self.has_rng("dropout")
        x = features.reshape(*features.shape[:2], -1)
        x = x if self.project is None else self.project(x)
        x = self.drop(x + self.positions[step_positions(mask)], deterministic=deterministic)
        attend = step_attention(mask)

        def step(block, x, _):
            return block(x, attend, deterministic=deterministic), None

        x, _ = scan_layers(step, self.layers, x, length=self.config.num_layers, remat="none")
        return self.final_norm(x)
