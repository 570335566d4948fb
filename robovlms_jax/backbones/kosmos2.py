"""KOSMOS-2: CLIP-L, 64 attended latents, Magneto decoder. Peng et al. 2023, arXiv:2306.14824."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.backbones import base, hf_config, registry, sections
from robovlms_jax.nn.attention import Attention
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.nn.linear import Dense, Kernel
from robovlms_jax.weights import rules


@dataclasses.dataclass(frozen=True)
class LatentConnectorConfig:
    """Pools image features into a fixed number of learned latents."""

    num_latents: int = 64
    """P, tokens per image."""

    def build(self, text: DecoderConfig, kernel: Kernel) -> nn.Module:
        return LatentConnector(self.num_latents, text, kernel)

    def tiny(self) -> LatentConnectorConfig:
        return LatentConnectorConfig(num_latents=6)


class LatentConnector(nn.Module):
    """Unit-length features, one dense layer, and one attention from the latents to features and latents."""

    num_latents: int
    text: DecoderConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """float[B, P', vision width] -> float[B, P, D]."""
        width = self.text.width
        x = features.astype(jnp.float32)
        x = (x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))).astype(features.dtype)
        x = Dense(width, (None, "embed"), kernel=self.kernel, name="dense")(x)
        init = nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), ("queries", "embed"))
        latents = self.param("latents", init, (self.num_latents, width)).astype(x.dtype)
        latents = jnp.broadcast_to(latents, (x.shape[0], self.num_latents, width))
        attention = Attention(
            self.text.num_heads,
            self.text.head_dim,
            dropout=self.text.attention_dropout,
            kernel=self.kernel,
            name="attn",
        )
        return attention(latents, jnp.concatenate([x, latents], axis=1), deterministic=deterministic)[0]


TEXT, LAYER = "text_model.model", "text_model.model.layers.{layer}"
RULES = (
    *rules.clip_vision("vision_model.model", "vision"),
    *rules.linear("image_to_text_projection.dense", "connector/dense"),
    rules.Rule("image_to_text_projection.latent_query", "connector/latents"),
    *rules.attention("image_to_text_projection.x_attn", "connector/attn"),
    rules.Rule(f"{TEXT}.embed_tokens.weight", "text/embed/table"),
    *rules.head("text_model.lm_head", "text", tied=True),
    rules.Ignore(r"text_model\.model\.embed_positions\.weights", "sinusoids, computed from positions"),
    *rules.attention(f"{LAYER}.self_attn", "text/layers/attn"),
    *rules.layer_norm(f"{LAYER}.self_attn.inner_attn_ln", "text/layers/attn/inner_norm"),
    *rules.layer_norm(f"{LAYER}.self_attn_layer_norm", "text/layers/attn_norm"),
    *rules.linear(f"{LAYER}.ffn.fc1", "text/layers/mlp/up"),
    *rules.layer_norm(f"{LAYER}.ffn.ffn_layernorm", "text/layers/mlp/inner_norm"),
    *rules.linear(f"{LAYER}.ffn.fc2", "text/layers/mlp/down"),
    *rules.layer_norm(f"{LAYER}.final_layer_norm", "text/layers/mlp_norm"),
    *rules.layer_norm(f"{TEXT}.layer_norm", "text/final_norm"),
    rules.LORA,
)


PUBLISHED = base.VLMConfig(  # microsoft/kosmos-2-patch14-224
    model_type="kosmos-2",
    vision=sections.CLIP_L,
    text=DecoderConfig(
        width=2048,
        depth=24,
        mlp_dim=8192,
        num_heads=32,
        vocab_size=65_037,
        activation="gelu",
        norm_epsilon=1e-5,
        norm="layer",
        sub_norm=True,
        is_gated=False,
        attention_bias="all",
        mlp_bias=True,
        positions="sinusoid",
        head="tied",
        embed_scale=True,
        dropout=0.1,
        attention_dropout=0.1,
    ),
    connector=LatentConnectorConfig(num_latents=64),
    image=sections.clip_image(224),
    prompt="<grounding>An image of a robot {instruction}",
    bos_id=0,
    eos_id=2,
    pad_id=1,
    rules=RULES,
)
VISION_SECTION = sections.vision()
TEXT_SECTION = hf_config.Section(
    "text_config",
    fields={
        "width": ("embed_dim", "hidden_size"),
        "depth": ("layers", "num_hidden_layers"),
        "mlp_dim": ("ffn_dim", "intermediate_size"),
        "num_heads": ("attention_heads", "num_attention_heads"),
        "vocab_size": ("vocab_size",),
        "activation": ("activation_function", "hidden_act"),
        "norm_epsilon": ("layer_norm_eps",),
        "embed_scale": ("scale_embedding",),
        "dropout": ("dropout",),
        "attention_dropout": ("attention_dropout",),
    },
    fixed={"activation_dropout": 0.0, "layerdrop": 0.0, "add_cross_attention": False},
)
ID_SECTION = dataclasses.replace(sections.IDS, name="text_config")


@registry.register("kosmos-2")
def kosmos2() -> base.VLMConfig:
    return PUBLISHED


@registry.register("kosmos-2-twin")
def kosmos2_twin() -> base.VLMConfig:
    """The same architecture, small enough to train on a laptop in minutes; comes without published weights."""
    return _shrunken(64, num_latents=8, width=64, depth=2, mlp_dim=128, num_heads=4)


@registry.register("kosmos-2-mini")
def kosmos2_mini() -> base.VLMConfig:
    """The same architecture for one GPU and half an hour from scratch; comes without published weights."""
    return _shrunken(112, num_latents=16, width=256, depth=4, mlp_dim=1024, num_heads=8)


def _shrunken(image_size: int, *, num_latents: int, **sizes: int) -> base.VLMConfig:
    vision, text = PUBLISHED.vision, PUBLISHED.text
    return dataclasses.replace(
        PUBLISHED,
        vision=dataclasses.replace(vision, image_size=image_size, patch_size=16, **sizes),
        text=dataclasses.replace(text, vocab_size=512, dropout=0.0, attention_dropout=0.0, **sizes),
        connector=LatentConnectorConfig(num_latents=num_latents),
        image=dataclasses.replace(PUBLISHED.image, size=image_size),
    )


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration; what the file leaves out has the published value, as in transformers."""
    vision = VISION_SECTION.read(values, PUBLISHED.vision)
    return dataclasses.replace(
        ID_SECTION.read(values, PUBLISHED),
        vision=vision,
        text=sections.with_head(TEXT_SECTION.read(values, PUBLISHED.text), values),
        connector=LatentConnectorConfig(values.get("latent_query_num", PUBLISHED.connector.num_latents)),
        image=dataclasses.replace(PUBLISHED.image, size=vision.image_size),
    )


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    return {
        "architectures": ["Kosmos2ForConditionalGeneration"],
        "latent_query_num": config.connector.num_latents,
        "text_config": TEXT_SECTION.write(config.text) | ID_SECTION.write(config),
        "vision_config": VISION_SECTION.write(config.vision),
    } | sections.write_head(config.text)


registry.register_family("kosmos-2", read, write)
