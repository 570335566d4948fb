"""The feed-forward block."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.linear import Einsum, Kernel
from robovlms_jax.nn.norms import LayerNorm


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """x times the share of a normal distribution below x (Hendrycks and Gimpel 2016, arXiv:1606.08415), as PyTorch has
    it. By erf: the erfc of `jax.nn.gelu` is two polynomials and an exponential where erf is one polynomial.

    Sixteen bits are computed in float32, and nothing but `x` is kept of it for the gradient."""
    if x.dtype.itemsize == 2:
        return jax.checkpoint(_gelu, prevent_cse=False)(x)
    return _gelu(x)


def _gelu(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""By the names Hugging Face configs use."""


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) when `is_gated` (Shazeer 2020, arXiv:2002.05202).

    With `inner_norm_epsilon` a LayerNorm before `down` (sub-LN, arXiv:2210.06423).
    """

    mlp_dim: int
    activation: str
    inner_norm_epsilon: float | None = None
    is_gated: bool = False
    use_bias: bool = True
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, S, D] -> float[B, S, D]."""
        width = x.shape[-1]
        wide = {
            "shape": (width, self.mlp_dim),
            "axes": ("embed", "mlp"),
            "use_bias": self.use_bias,
            "kernel": self.kernel,
        }
        up = Einsum("BSD,DF->BSF", **wide, name="up")(x)
        activation = ACTIVATIONS[self.activation]
        x = activation(Einsum("BSD,DF->BSF", **wide, name="gate")(x)) * up if self.is_gated else activation(up)
        if self.inner_norm_epsilon is not None:
            x = LayerNorm(self.inner_norm_epsilon, name="inner_norm")(x)
        shape, axes = (self.mlp_dim, width), ("mlp", "embed")
        return Einsum("BSF,FD->BSD", shape, axes, use_bias=self.use_bias, kernel=self.kernel, name="down")(x)
