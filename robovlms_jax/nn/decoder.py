"""Language decoder: Magneto's form (Wang et al. 2022, arXiv:2210.06423), as in KOSMOS-2."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attention import Attention, Cache, causal_mask
from robovlms_jax.nn.linear import Embed, Lora
from robovlms_jax.nn.mlp import ACTIVATIONS, MLP
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.positions import sinusoid
from robovlms_jax.nn.stack import scan_layers


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Size of a language decoder."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    vocab_size: int
    activation: str
    norm_epsilon: float
    embed_scale: bool
    """Multiply embeddings (of text, images and queries alike) by sqrt(width)."""
    dropout: float = 0.0
    """On embeddings and on what attention and MLP add to the residual stream."""
    attention_dropout: float = 0.0
    """On attention weights."""

    def __post_init__(self):
        if self.width % self.num_heads or self.width % 2:
            raise ValueError(f"text width={self.width} must be even and divide over num_heads={self.num_heads}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"text activation {self.activation!r} is unknown; known: {sorted(ACTIVATIONS)}.")

    @property
    def head_dim(self) -> int:
        """H."""
        return self.width // self.num_heads

    def tiny(self) -> DecoderConfig:
        """A shrunken twin for tests: same switches, sizes that differ from each other so that swapped axes fail."""
        return dataclasses.replace(self, width=32, depth=3, mlp_dim=56, num_heads=4, vocab_size=128)


class Block(nn.Module):
    """Pre-norm layer with a second norm inside attention and MLP (sub-LN)."""

    config: DecoderConfig
    lora: Lora = Lora()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, mask: jax.Array, cache: tuple | None, start: jax.Array | int, deterministic: bool
    ):
        """float[B, S, D] -> float[B, S, D] and this layer's cache; the other arguments are those of `Attention`."""
        c = self.config
        drop = nn.Dropout(c.dropout, deterministic=deterministic)
        attention = Attention(
            c.num_heads,
            c.head_dim,
            inner_norm_epsilon=c.norm_epsilon,
            dropout=c.attention_dropout,
            lora=self.lora,
            name="attn",
        )
        normed = LayerNorm(c.norm_epsilon, name="attn_norm")(x)
        y, cache = attention(normed, mask=mask, cache=cache, start=start, deterministic=deterministic)
        x = x + drop(y)
        mlp = MLP(c.mlp_dim, c.activation, inner_norm_epsilon=c.norm_epsilon, lora=self.lora, name="mlp")
        return x + drop(mlp(LayerNorm(c.norm_epsilon, name="mlp_norm")(x))), cache


class Decoder(nn.Module):
    """Embeddings to hidden states, causal in `positions`."""

    config: DecoderConfig
    lora: Lora = Lora()
    remat: bool = False

    def setup(self):
        c = self.config
        self.embed = Embed(c.vocab_size, c.width)  # unscaled and without positions; those are added when decoding
        self.embed_drop = nn.Dropout(1 - (1 - c.dropout) ** 2)  # KOSMOS-2's published code drops them twice
        self.layers = Block(c, self.lora)
        self.final_norm = LayerNorm(c.norm_epsilon)

    def __call__(
        self,
        embeds: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        cache: Cache | None = None,
        *,
        group: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Cache | None]:
        """Decode, and extend the cache where there is one.

        Args:
          embeds: float[B, S, D] as `embed` gives them; its type is the type of computation.
          mask: bool[B, S], True = real token. positions: int32[B, S], 0-based place among the real tokens.
          group: int32[B, S] as in `types.Tokens`; only without a cache.
        Returns:
          float[B, S, D] after the final norm, and the cache.
        """
        c = self.config
        # Sum in float32: in bfloat16 the sinusoids would vanish beside the scaled embeddings.
        scale = math.sqrt(c.width) if c.embed_scale else 1.0
        x = (embeds.astype(jnp.float32) * scale + sinusoid(positions, c.width)).astype(embeds.dtype)
        x = self.embed_drop(x, deterministic=deterministic)
        if cache is None:
            attend, start, layers = causal_mask(positions, positions, mask, group), 0, None
        else:
            assert group is None, "a cache keeps no groups: decode private tokens apart and drop them afterwards"
            start, layers = cache.length, (cache.key, cache.value)
            cache = cache.extend(positions, mask)
            attend = causal_mask(positions, cache.positions, cache.mask)

        def step(block, x, layer):
            return block(x, mask=attend, cache=layer, start=start, deterministic=deterministic)

        x, layers = scan_layers(step, self.layers, x, layers, length=c.depth, remat=self.remat)
        if cache is not None:
            cache = cache.replace(key=layers[0], value=layers[1])
        return self.final_norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float[B, S, D] -> float32[B, S, V]."""
        return self.embed.logits(hidden)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """An empty cache of `length` slots."""
        c = self.config
        return Cache.create(c.depth, batch, length, c.num_heads, c.head_dim, dtype)
