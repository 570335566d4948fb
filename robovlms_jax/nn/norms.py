"""Normalisation layers. Statistics and result are computed in float32, then cast back to the type of the input."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

NormKind = Literal["layer", "layer_no_bias", "rms", "rms_plus_one"]
NORMS: tuple[NormKind, ...] = ("layer", "layer_no_bias", "rms", "rms_plus_one")


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis (Ba et al. 2016)."""

    epsilon: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)), shape)
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon) * scale
        if self.use_bias:
            y += self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",)), shape)
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean of squares + epsilon) * scale over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

    With `plus_one` the stored scale is the distance from one, as Gemma has it.
    """

    epsilon: float
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros_init() if self.plus_one else nn.initializers.ones_init()
        scale = self.param("scale", nn.with_logical_partitioning(init, ("norm",)), (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * (scale + 1 if self.plus_one else scale)).astype(x.dtype)


def make_norm(kind: NormKind, epsilon: float, name: str | None = None) -> nn.Module:
    """The norm a tower's configuration names."""
    if kind in ("layer", "layer_no_bias"):
        return LayerNorm(epsilon, use_bias=kind == "layer", name=name)
    return RMSNorm(epsilon, plus_one=kind == "rms_plus_one", name=name)
