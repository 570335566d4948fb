"""Gated cross-attention: what a language decoder's layers read beside its sequence (Flamingo, arXiv:2204.14198)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attention import Attention
from robovlms_jax.nn.linear import Kernel
from robovlms_jax.nn.mlp import ACTIVATIONS, MLP
from robovlms_jax.nn.norms import LayerNorm


@dataclasses.dataclass(frozen=True)
class GatedConfig:
    """Cross-attention layers between those of a decoder; the defaults are OpenFlamingo's."""

    every: int
    """One stands before each layer whose number, counted from one, is a multiple of it."""
    num_heads: int = 8
    head_dim: int = 64
    mlp_ratio: int = 4
    """Width of the feed-forward blocks over the decoder's."""
    activation: str = "gelu"
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        for field in ("every", "num_heads", "head_dim", "mlp_ratio"):
            if getattr(self, field) < 1:
                raise ValueError(f"gated {field}={getattr(self, field)} must be at least 1.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"gated activation {self.activation!r} is unknown; known: {sorted(ACTIVATIONS)}.")

    def tiny(self) -> GatedConfig:
        """A shrunken twin for tests."""
        return dataclasses.replace(self, num_heads=3, head_dim=12, mlp_ratio=2)


class GatedCrossAttention(nn.Module):
    """x + tanh(gate) attention(norm(x), media), then x + tanh(gate) mlp(norm(x)); no biases. Gates begin closed."""

    config: GatedConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(
        self, x: jax.Array, media: jax.Array | None, keys: tuple[jax.Array, jax.Array] | None, mask: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Args:
          x: float[B, S, D]. media: float[B, M, E], or None with `keys`, what an earlier call made of them.
          mask: bool[B, S, M], True = may attend. Who may attend to nothing adds nothing.
        Returns:
          float[B, S, D], and new keys and values float[B, K, M, H] or None.
        """
        c = self.config

        def gate(name: str) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,))
            return jnp.tanh(self.param(name, init, (1,))).astype(x.dtype)

        attention = Attention(c.num_heads, c.head_dim, use_bias=False, kernel=self.kernel, name="attn")
        y, new = attention(LayerNorm(c.norm_epsilon, name="attn_norm")(x), media if keys is None else keys, mask=mask)
        x = x + gate("attn_gate") * jnp.where(mask.any(-1, keepdims=True), y, 0)
        mlp = MLP(c.mlp_ratio * x.shape[-1], c.activation, use_bias=False, kernel=self.kernel, name="mlp")
        return x + gate("mlp_gate") * mlp(LayerNorm(c.norm_epsilon, name="mlp_norm")(x)), new
