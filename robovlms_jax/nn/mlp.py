"""The feed-forward block."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

from robovlms_jax.nn.linear import Einsum, Lora
from robovlms_jax.nn.norms import LayerNorm


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": quick_gelu,
}
"""By the names Hugging Face configs use."""


class MLP(nn.Module):
    """down(activation(up(x))); with `inner_norm_epsilon` a LayerNorm before `down` (sub-LN, arXiv:2210.06423)."""

    mlp_dim: int
    activation: str
    inner_norm_epsilon: float | None = None
    lora: Lora = Lora()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, S, D] -> float[B, S, D]."""
        width = x.shape[-1]
        x = Einsum("BSD,DF->BSF", (width, self.mlp_dim), ("embed", "mlp"), use_bias=True, lora=self.lora, name="up")(x)
        x = ACTIVATIONS[self.activation](x)
        if self.inner_norm_epsilon is not None:
            x = LayerNorm(self.inner_norm_epsilon, name="inner_norm")(x)
        return Einsum(
            "BSF,FD->BSD", (self.mlp_dim, width), ("mlp", "embed"), use_bias=True, lora=self.lora, name="down"
        )(x)
