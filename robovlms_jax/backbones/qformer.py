"""The Q-Former of BLIP-2 (Li et al. 2023, arXiv:2301.12597): learned queries that attend to each other and, in every
second layer, to the image; InstructBLIP's (Dai et al. 2023, arXiv:2305.06500) to the instruction's words, too."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attention import Attention
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.nn.linear import Dense, Embed, Kernel
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
    vocab_size: int = 0
    """Words that the instruction may have; 0: it is not read (BLIP-2)."""
    max_positions: int = 512
    """Tokens that an instruction may have."""

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
        small = {"num_queries": 5, "width": 24, "depth": 4, "num_heads": 3, "mlp_dim": 36}
        if self.vocab_size:
            small |= {"vocab_size": 300, "max_positions": 300}
        return dataclasses.replace(self, **small)


class Layer(nn.Module):
    """norm(x + attention(x)), with an image norm(x + attention to it), then norm(x + mlp(x)).

    Words of an instruction, behind the queries, take part in the first, do not see the image, and have an MLP of their
    own.
    """

    config: QFormerConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, image: jax.Array | None = None) -> jax.Array:
        """float[B, S, D], bool[B, S, S] or None (all may attend), float[B, P', vision width] -> float[B, S, D]."""
        c = self.config

        def added(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
            return LayerNorm(c.norm_epsilon, name=f"{name}_norm")(x + y)

        def attend(name: str, x: jax.Array, context: jax.Array | None, mask: jax.Array | None) -> jax.Array:
            attention = Attention(c.num_heads, c.width // c.num_heads, kernel=self.kernel, name=name)
            return added(name, x, attention(x, context, mask=mask)[0])

        def feed(name: str, x: jax.Array) -> jax.Array:
            return added(name, x, MLP(c.mlp_dim, c.activation, kernel=self.kernel, name=name)(x))

        x = attend("attn", x, None, mask)
        queries, words = x[:, : c.num_queries], x[:, c.num_queries :]
        if image is not None:
            queries = attend("cross_attn", queries, image, None)
        queries = feed("mlp", queries)
        return jnp.concatenate([queries, feed("text_mlp", words)], axis=1) if c.vocab_size else queries


class Pair(nn.Module):
    """Two layers, of which the first sees the image: what repeats, and is scanned."""

    config: QFormerConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, image: jax.Array) -> jax.Array:
        x = Layer(self.config, self.kernel, name="even")(x, mask, image)
        return Layer(self.config, self.kernel, name="odd")(x, mask)


class QFormer(nn.Module):
    """Queries, and the instruction's words where they are read, through all layers; then a matrix that takes the
    queries into the decoder."""

    config: QFormerConfig
    text: DecoderConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(
        self,
        features: jax.Array,
        question: tuple[jax.Array, jax.Array] | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """float[B, P', vision width] -> float[B, P, D]; question: ids int32[B, U] and mask bool[B, U], where it is
        read."""
        c, mask = self.config, None
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("queries", "embed"))
        x = self.param("queries", init, (c.num_queries, c.width)).astype(features.dtype)
        x = jnp.broadcast_to(x, (len(features), *x.shape))
        if c.vocab_size:
            words, real = self._words(*question)
            x = jnp.concatenate([x, words.astype(x.dtype)], axis=1)
            real = jnp.pad(real, ((0, 0), (c.num_queries, 0)), constant_values=True)
            mask = jnp.broadcast_to(real[:, None], (*real.shape, real.shape[1]))
        x = LayerNorm(c.norm_epsilon, name="query_norm")(x)
        pair = Pair(c, self.kernel, name="layers")
        x, _ = scan_layers(
            lambda pair, x, _: (pair(x, mask, features), None), pair, x, length=c.depth // 2, remat="none"
        )
        return Dense(self.text.width, (None, "embed"), kernel=self.kernel, name="out")(x[:, : c.num_queries])

    def _words(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embeddings of the instruction with their positions, float[B, U, D]; and its mask."""
        c = self.config
        if ids.shape[1] > c.max_positions:
            raise ValueError(f"the instruction has {ids.shape[1]} slots, and the Q-Former reads {c.max_positions}.")
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", "embed"))
        places = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)  # of the real words, whichever side is padded
        positions = jnp.take(self.param("positions", init, (c.max_positions, c.width)), places, axis=0)
        return Embed(c.vocab_size, c.width, self.kernel, name="words")(ids) + positions, mask


def make_rules(queries: str, source: str, out: str, target: str, *, words: bool = False) -> rules.Rules:
    """Hugging Face's Q-Former -> QFormer. queries, source, out: names of its three parts. words: it reads the
    instruction, too."""
    embeddings = f"{source}.embeddings" if words else source
    rows: rules.Rules = (
        rules.Rule(queries, f"{target}/queries", "1 q d -> q d"),
        *rules.layer_norm(f"{embeddings}.layernorm", f"{target}/query_norm"),
        *rules.linear(out, f"{target}/out"),
    )
    blocks = {"mlp": "_query"}
    if words:
        blocks["text_mlp"] = ""
        rows += (
            rules.Rule(f"{embeddings}.word_embeddings.weight", f"{target}/words/table"),
            rules.Rule(f"{embeddings}.position_embeddings.weight", f"{target}/positions"),
            rules.Ignore(rf"{embeddings}\.position_ids", "a constant range"),
        )
    layer = f"{source}.encoder.layer.{{layer}}"
    for first, name in enumerate(("even", "odd")):
        here = f"{target}/layers/{name}"
        part = _bert_attention(f"{layer}.attention", f"{here}/attn")
        if name == "even":
            part += _bert_attention(f"{layer}.crossattention", f"{here}/cross_attn")
        for ours, theirs in blocks.items():
            part += rules.linear(f"{layer}.intermediate{theirs}.dense", f"{here}/{ours}/up")
            part += rules.linear(f"{layer}.output{theirs}.dense", f"{here}/{ours}/down")
            part += rules.layer_norm(f"{layer}.output{theirs}.LayerNorm", f"{here}/{ours}_norm")
        rows += rules.every(part, 2, first)
    return rows


def _bert_attention(source: str, target: str) -> rules.Rules:
    rows: rules.Rules = ()
    for theirs in ("query", "key", "value"):
        shapes = "(n h) d -> d n h", "(n h) -> n h"
        rows += rules.linear(f"{source}.attention.{theirs}", f"{target}/{theirs[0]}", *shapes)
    rows += rules.linear(f"{source}.output.dense", f"{target}/o", "d (n h) -> n h d")
    return rows + rules.layer_norm(f"{source}.output.LayerNorm", f"{target}_norm")
