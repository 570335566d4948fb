"""CLIP's text tower (Radford et al. 2021, arXiv:2103.00020): sentences as unit vectors, for the CLIP-norm loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attention import Attention
from robovlms_jax.nn.linear import Einsum, Embed
from robovlms_jax.nn.mlp import MLP
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.stack import scan_layers
from robovlms_jax.weights import rules


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Size of the tower; the defaults are ViT-L/14's."""

    vocab_size: int = 49_408
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12
    num_positions: int = 77
    """Longest sentence, in tokens."""
    projection_dim: int = 768
    """Width of what comes out."""
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5
    eos_id: int | None = None
    """A sentence is read off its first such token; None: off its largest id, which is CLIP's own end token (configs
    written before transformers 4.31 name a wrong one)."""


_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_positions": "max_position_embeddings",
    "activation": "hidden_act",
    "norm_epsilon": "layer_norm_eps",
}
"""Field -> its name in a config.json. ViT-L/14's own file leaves out what equals transformers' ViT-B/32 defaults."""

_DEFAULTS = ClipTextConfig(width=512, mlp_dim=2048, num_heads=8, projection_dim=512)
_WRONG_EOS = 2


def read(values: Mapping[str, Any]) -> ClipTextConfig:
    """A CLIP config.json -> configuration. Raises ValueError for another model's file."""
    if values.get("model_type") not in ("clip", "clip_text_model"):
        raise ValueError(f"config.json is of model_type {values.get('model_type')!r}; expected a CLIP directory.")
    text = values if values["model_type"] == "clip_text_model" else values.get("text_config") or {}
    found = {field: text[key] for field, key in _KEYS.items() if text.get(key) is not None}
    projection = values.get("projection_dim") or text.get("projection_dim") or _DEFAULTS.projection_dim
    eos_id = text.get("eos_token_id", _WRONG_EOS)
    eos_id = None if eos_id == _WRONG_EOS else eos_id
    return dataclasses.replace(_DEFAULTS, **found, projection_dim=projection, eos_id=eos_id)


class ClipTextLayer(nn.Module):
    """Pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ClipTextConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config
        attention = Attention(c.num_heads, c.width // c.num_heads, name="attn")
        x = x + attention(LayerNorm(c.norm_epsilon, name="attn_norm")(x), mask=mask)[0]
        return x + MLP(c.mlp_dim, c.activation, name="mlp")(LayerNorm(c.norm_epsilon, name="mlp_norm")(x))


class ClipText(nn.Module):
    """Token ids to sentence embeddings."""

    config: ClipTextConfig

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32[B, T], padded on the right behind the end token -> float32[B, E] of length 1."""
        c = self.config
        length = ids.shape[1]
        init = nn.with_logical_partitioning(nn.initializers.normal(0.01), ("position", "embed"))
        positions = self.param("positions", init, (c.num_positions, c.width))
        x = Embed(c.vocab_size, c.width, name="embed")(ids) + positions[:length]
        # causal: padding comes after everything that is read
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(ids), length, length))
        layer = ClipTextLayer(c, name="layers")
        x, _ = scan_layers(lambda layer, x, _: (layer(x, mask), None), layer, x, length=c.depth, remat="none")
        x = LayerNorm(c.norm_epsilon, name="final_norm")(x)
        end = jnp.argmax(ids if c.eos_id is None else ids == c.eos_id, axis=-1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)
        shape = (c.width, c.projection_dim)
        x = Einsum("BSD,DE->BSE", shape, ("embed", None), name="projection")(x)[:, 0].astype(jnp.float32)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


_LAYER = "text_model.encoder.layers.{layer}"
RULES = (
    rules.Rule("text_model.embeddings.token_embedding.weight", "embed/table"),
    rules.Rule("text_model.embeddings.position_embedding.weight", "positions"),
    rules.Ignore(r"text_model\.embeddings\.position_ids", "a constant range"),
    *rules.attention(f"{_LAYER}.self_attn", "layers/attn"),
    *rules.layer_norm(f"{_LAYER}.layer_norm1", "layers/attn_norm"),
    *rules.layer_norm(f"{_LAYER}.layer_norm2", "layers/mlp_norm"),
    *rules.linear(f"{_LAYER}.mlp.fc1", "layers/mlp/up"),
    *rules.linear(f"{_LAYER}.mlp.fc2", "layers/mlp/down"),
    *rules.layer_norm("text_model.final_layer_norm", "final_norm"),
    rules.Rule("text_projection.weight", "projection/kernel", "e d -> d e"),
    rules.Ignore(r"(vision_model|visual_projection)\..*", "images are not embedded here"),
    rules.Ignore(r"logit_scale", "of contrastive training"),
)
