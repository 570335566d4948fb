"""The Q-Former of BLIP-2: learned queries that attend to each other and, in every second layer, to the image. Li et al.
2023, arXiv:2301.12597."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attention import Attention
from robovlms_jax.nn.decoder import DecoderConfig
from robovlms_jax.nn.linear import Dense, Kernel
from robovlms_jax.nn.mlp import ACTIVATIONS, MLP
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.stack import scan_layers
from robovlms_jax.weights import rules


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Size of a Q-Former: BERT's layers (Devlin et al. 2018), norms behind them. The defaults are BLIP-2's."""

    num_queries: int = 32
    """P, tokens per image."""
    width: int = 768
    depth: int = 12
    """Layers; the first of every two attends to the image, too."""
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: str = "gelu"
    norm_epsilon: float = 1e-12

    def __post_init__(self):
        if self.depth % 2 or self.width % self.num_heads:
            raise ValueError(
                f"Q-Former: depth={self.depth} must be even, and width={self.width} divide over "
                f"num_heads={self.num_heads}."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Q-Former activation {self.activation!r} is unknown; known: {sorted(ACTIVATIONS)}.")

    def build(self, text: DecoderConfig, kernel: Kernel) -> nn.Module:
        return QFormer(self, text, kernel)

    def tiny(self) -> QFormerConfig:
        return dataclasses.replace(self, num_queries=5, width=24, depth=4, num_heads=3, mlp_dim=36)


class Layer(nn.Module):
    """norm(x + attention(x)), with an image norm(x + attention to it), then norm(x + mlp(x))."""

    config: QFormerConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array, image: jax.Array | None = None) -> jax.Array:
        """float[B, Q, D], float[B, P', vision width] -> float[B, Q, D]."""
        c = self.config

        def added(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
            return LayerNorm(c.norm_epsilon, name=f"{name}_norm")(x + y)

        def attend(name: str, x: jax.Array, context: jax.Array | None) -> jax.Array:
            attention = Attention(c.num_heads, c.width // c.num_heads, kernel=self.kernel, name=name)
            return added(name, x, attention(x, context)[0])

        x = attend("attn", x, None)
        if image is not None:
            x = attend("cross_attn", x, image)
        return added("mlp", x, MLP(c.mlp_dim, c.activation, kernel=self.kernel, name="mlp")(x))


class Pair(nn.Module):
    """Two layers, of which the first sees the image: what repeats, and is scanned."""

    config: QFormerConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array, image: jax.Array) -> jax.Array:
        x = Layer(self.config, self.kernel, name="even")(x, image)
        return Layer(self.config, self.kernel, name="odd")(x)


class QFormer(nn.Module):
    """Queries through all layers, then a matrix into the decoder."""

    config: QFormerConfig
    text: DecoderConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """float[B, P', vision width] -> float[B, P, D]."""
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("queries", "embed"))
        x = self.param("queries", init, (c.num_queries, c.width)).astype(features.dtype)
        x = LayerNorm(c.norm_epsilon, name="query_norm")(jnp.broadcast_to(x, (len(features), *x.shape)))
        pair = Pair(c, self.kernel, name="layers")
        x, _ = scan_layers(lambda pair, x, _: (pair(x, features), None), pair, x, length=c.depth // 2, remat=False)
        return Dense(self.text.width, (None, "embed"), kernel=self.kernel, name="out")(x)


def make_rules(queries: str, source: str, out: str, target: str) -> rules.Rules:
    """Hugging Face's Q-Former -> QFormer. queries, source, out: names of its three parts."""
    rows: rules.Rules = (
        rules.Rule(queries, f"{target}/queries", "1 q d -> q d"),
        *rules.layer_norm(f"{source}.layernorm", f"{target}/query_norm"),
        *rules.linear(out, f"{target}/out"),
    )
    layer = f"{source}.encoder.layer.{{layer}}"
    for first, name in enumerate(("even", "odd")):
        here = f"{target}/layers/{name}"
        part = _bert_attention(f"{layer}.attention", f"{here}/attn")
        if name == "even":
            part += _bert_attention(f"{layer}.crossattention", f"{here}/cross_attn")
        part += rules.linear(f"{layer}.intermediate_query.dense", f"{here}/mlp/up")
        part += rules.linear(f"{layer}.output_query.dense", f"{here}/mlp/down")
        part += rules.layer_norm(f"{layer}.output_query.LayerNorm", f"{here}/mlp_norm")
        rows += rules.every(part, 2, first)
    return rows


def _bert_attention(source: str, target: str) -> rules.Rules:
    rows: rules.Rules = ()
    for theirs in ("query", "key", "value"):
        shapes = "(n h) d -> d n h", "(n h) -> n h"
        rows += rules.linear(f"{source}.attention.{theirs}", f"{target}/{theirs[0]}", *shapes)
    rows += rules.linear(f"{source}.output.dense", f"{target}/o", "d (n h) -> n h d")
    return rows + rules.layer_norm(f"{source}.output.LayerNorm", f"{target}_norm")
