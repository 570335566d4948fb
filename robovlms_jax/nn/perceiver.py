"""Perceiver resampler: any number of image tokens become a fixed, small one (Alayrac et al. 2022, arXiv:2204.14198)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attention import attend
from robovlms_jax.nn.linear import Einsum, Kernel
from robovlms_jax.nn.mlp import ACTIVATIONS
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.stack import Remat, scan_layers


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Size of a resampler; the defaults are Flamingo's, and what upstream's `use_vision_resampler` builds."""

    num_latents: int = 64
    """Tokens that come out."""
    depth: int = 6
    num_heads: int = 8
    head_dim: int = 64
    mlp_ratio: int = 4
    """Width of the feed-forward blocks over the tokens' width."""
    activation: str = "gelu"
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        for field in ("num_latents", "depth", "num_heads", "head_dim", "mlp_ratio"):
            if getattr(self, field) < 1:
                raise ValueError(f"perceiver {field}={getattr(self, field)} must be at least 1.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"perceiver activation {self.activation!r} is unknown; known: {sorted(ACTIVATIONS)}.")

    def build(self, text: Any, kernel: Kernel) -> Perceiver:
        """As a backbone's connector (Flamingo's): its tokens keep the vision tower's width, whatever the decoder."""
        return Perceiver(self, kernel)

    def tiny(self) -> PerceiverConfig:
        """A shrunken twin for tests."""
        return dataclasses.replace(self, num_latents=3, depth=2, num_heads=2, head_dim=10, mlp_ratio=2)


class PerceiverLayer(nn.Module):
    """Latents attend to the tokens and to each other, then each goes through an MLP; both are added. No biases."""

    config: PerceiverConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, latents: jax.Array, tokens: jax.Array) -> jax.Array:
        """float[B, Q, D], float[B, P, D] -> float[B, Q, D]."""
        c, width = self.config, latents.shape[-1]

        def norm(name: str) -> LayerNorm:
            return LayerNorm(c.norm_epsilon, name=name)

        def project(equation: str, shape: tuple[int, ...], axes: tuple[str | None, ...], name: str) -> Einsum:
            return Einsum(equation, shape, axes, kernel=self.kernel, name=name)

        x = norm("latent_norm")(latents)
        context = jnp.concatenate([norm("token_norm")(tokens), x], axis=1)
        shape, axes = (width, c.num_heads, c.head_dim), ("embed", "heads", "head_dim")
        q = project("BSD,DNH->BSNH", shape, axes, "q")(x) * c.head_dim**-0.5
        # keys and values are one matrix in every published resampler
        shape, axes = (width, 2, c.num_heads, c.head_dim), ("embed", None, "heads", "head_dim")
        kv = project("BTD,DCNH->BTCNH", shape, axes, "kv")(context)
        key, value = jnp.moveaxis(kv, (2, 3), (0, 2))  # [B, N, T, H] each
        y = attend(q, [(key, value)])
        shape, axes = (c.num_heads, c.head_dim, width), ("heads", "head_dim", "embed")
        latents = latents + project("BSNH,NHD->BSD", shape, axes, "o")(y)

        hidden = c.mlp_ratio * width
        x = project("BSD,DF->BSF", (width, hidden), ("embed", "mlp"), "up")(norm("mlp_norm")(latents))
        return latents + project("BSF,FD->BSD", (hidden, width), ("mlp", "embed"), "down")(ACTIVATIONS[c.activation](x))


class Perceiver(nn.Module):
    """Learned latents gather what the tokens have to say, layer after layer; a norm at the end."""

    config: PerceiverConfig
    kernel: Kernel = Kernel()
    remat: Remat = "none"

    @nn.compact
    def __call__(self, tokens: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """float[B, P, D] -> float[B, Q, D], Q = `num_latents`. The type stays. Nothing in it is random."""
        c, width = self.config, tokens.shape[-1]
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("queries", "embed"))
        latents = self.param("latents", init, (c.num_latents, width)).astype(tokens.dtype)
        x = jnp.broadcast_to(latents, (tokens.shape[0], c.num_latents, width))
        layer = PerceiverLayer(c, self.kernel, name="layers")
        x, _ = scan_layers(lambda layer, x, _: (layer(x, tokens), None), layer, x, length=c.depth, remat=self.remat)
        return LayerNorm(c.norm_epsilon, name="final_norm")(x)
