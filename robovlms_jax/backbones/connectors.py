"""Connectors of more than one family: image features -> embeddings of the language decoder."""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.nn.linear import Dense, Kernel
from robovlms_jax.nn.mlp import ACTIVATIONS
from robovlms_jax.nn.norms import NormKind, make_norm


@dataclasses.dataclass(frozen=True)
class LinearConnectorConfig:
    """One matrix."""

    use_bias: bool = True
    shuffle: int = 1
    """Squares of shuffle x shuffle neighbouring patches become one token, their channels side by side, row by row."""

    def build(self, text: DecoderConfig, kernel: Kernel) -> nn.Module:
        return LinearConnector(self, text, kernel)

    def tiny(self) -> LinearConnectorConfig:
        return dataclasses.replace(self, shuffle=min(self.shuffle, 2))


@dataclasses.dataclass(frozen=True)
class MLPConnectorConfig:
    """Two matrices, biased, with an activation between."""

    mlp_dim: int | Literal["gathered"] | None = None
    """Width between them; None = the decoder's; gathered: that of what the first reads."""
    activation: str = "gelu"
    views: int = 1
    """Copies of the features side by side, where the model was made for those of several crops (MoonDream2)."""
    shuffle: int = 1
    """Squares of shuffle x shuffle neighbouring patches become one token first, as in `LinearConnectorConfig`."""
    norm: NormKind | None = None
    """A norm before all that."""
    norm_gathered: bool = False
    """The norm is on the squares instead of the patches."""
    norm_epsilon: float = 1e-6

    def build(self, text: DecoderConfig, kernel: Kernel) -> nn.Module:
        return MLPConnector(self, text, kernel)

    def tiny(self) -> MLPConnectorConfig:
        return dataclasses.replace(self, mlp_dim=20) if isinstance(self.mlp_dim, int) else self


@dataclasses.dataclass(frozen=True)
class PoolConnectorConfig:
    """Means of neighbouring patches, a norm, one matrix (Gemma 3)."""

    tokens: int = 256
    """P, tokens per image: a square number."""
    norm: NormKind = "rms_plus_one"
    norm_epsilon: float = 1e-6

    def build(self, text: DecoderConfig, kernel: Kernel) -> nn.Module:
        return PoolConnector(self, text, kernel)

    def tiny(self) -> PoolConnectorConfig:
        return dataclasses.replace(self, tokens=4)


class LinearConnector(nn.Module):
    """Matrix, after gathering neighbouring patches. The decoder's scale of embeddings is divided out beforehand."""

    config: LinearConnectorConfig
    text: DecoderConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """float[B, P', vision width] -> float[B, P' / shuffle^2, D]."""
        x = gather_squares(features, self.config.shuffle)
        x = Dense(self.text.width, (None, "embed"), self.config.use_bias, kernel=self.kernel, name="dense")(x)
        return _unscaled(x, self.text)


class MLPConnector(nn.Module):
    """out(activation(hidden(x))), x what the patches are gathered to."""

    config: MLPConnectorConfig
    text: DecoderConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """float[B, P', vision width] -> float[B, P' / shuffle^2, D]."""
        c, x = self.config, features
        if c.norm_gathered:
            x = gather_squares(x, c.shuffle)
        if c.norm is not None:
            x = make_norm(c.norm, c.norm_epsilon, name="norm")(x)
        if not c.norm_gathered:
            x = gather_squares(x, c.shuffle)
        x = jnp.concatenate([x] * c.views, axis=-1)
        axes, width = (None, "embed"), x.shape[-1] if c.mlp_dim == "gathered" else c.mlp_dim or self.text.width
        x = Dense(width, axes, kernel=self.kernel, name="hidden")(x)
        return Dense(self.text.width, axes, kernel=self.kernel, name="out")(ACTIVATIONS[c.activation](x))


class PoolConnector(nn.Module):
    """Mean, norm, matrix. The decoder's scale of embeddings is divided out beforehand."""

    config: PoolConnectorConfig
    text: DecoderConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """float[B, P', vision width] -> float[B, P, D]."""
        c, (batch, patches, width) = self.config, features.shape
        side = int((patches / c.tokens) ** 0.5)
        x = gather_squares(features, side).reshape(batch, -1, side * side, width).mean(2)
        x = make_norm(c.norm, c.norm_epsilon, name="norm")(x)
        x = Dense(self.text.width, (None, "embed"), use_bias=False, kernel=self.kernel, name="dense")(x)
        return _unscaled(x, self.text)


def _unscaled(x: jax.Array, text: DecoderConfig) -> jax.Array:
    """Gemma's image features enter the decoder as they are, while all embeddings are scaled there."""
    return x * text.width**-0.5 if text.embed_scale else x


def gather_squares(x: jax.Array, side: int) -> jax.Array:
    """Pixel shuffle (Shi et al. 2016, backwards): a square grid float[B, P, E] -> float[B, P / side^2, side^2 E]."""
    if side == 1:
        return x
    batch, patches, width = x.shape
    grid = int(patches**0.5) // side
    x = x.reshape(batch, grid, side, grid, side, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, grid * grid, side * side * width)
