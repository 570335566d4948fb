"""UForm-Gen2: a ViT-H, 256 latents decoded from it, Qwen1.5-0.5B. huggingface.co/unum-cloud/uform-gen2-qwen-500m."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.backbones import base, hf_config, registry, sections
from robovlms_jax.nn.attention import Attention
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.nn.linear import Dense, Kernel
from robovlms_jax.nn.mlp import MLP
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.vit import ViTConfig
from robovlms_jax.weights import rules


@dataclasses.dataclass(frozen=True)
class PoolerConfig:
    """One layer of a transformer decoder (Vaswani et al. 2017) over latents, then a matrix."""

    num_latents: int = 256
    """P, tokens per image."""
    num_heads: int = 16
    mlp_dim: int = 3200

    def build(self, text: DecoderConfig, kernel: Kernel) -> nn.Module:
        return Pooler(self, text, kernel)

    def tiny(self) -> PoolerConfig:
        return PoolerConfig(num_latents=5, num_heads=4, mlp_dim=36)


class Pooler(nn.Module):
    """Latents attend to each other, to the features, pass an MLP, and become embeddings."""

    config: PoolerConfig
    text: DecoderConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """float[B, P', vision width] -> float[B, P, D]."""
        c, width = self.config, features.shape[-1]
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02**0.5), ("queries", "embed"))
        x = self.param("latents", init, (c.num_latents, width)).astype(features.dtype)
        x = jnp.broadcast_to(x, (features.shape[0], *x.shape))

        def norm(name: str) -> nn.Module:
            return LayerNorm(1e-5, name=name)

        def attention(name: str) -> nn.Module:
            return Attention(c.num_heads, width // c.num_heads, kernel=self.kernel, name=name)

        x += attention("attn")(norm("attn_norm")(x))[0]
        x += attention("cross_attn")(norm("cross_attn_norm")(x), features)[0]
        x += MLP(c.mlp_dim, "silu", kernel=self.kernel, name="mlp")(norm("mlp_norm")(x))
        return Dense(self.text.width, (None, "embed"), kernel=self.kernel, name="out")(x)


VISION = hf_config.Section(
    "",
    {
        "image_size": ("image_size",),
        "patch_size": ("image_encoder_patch_size",),
        "width": ("image_encoder_hidden_size",),
        "depth": ("image_encoder_num_layers",),
        "num_heads": ("image_encoder_num_heads",),
    },
)
POOLER = hf_config.Section(
    "",
    {
        "num_latents": ("num_image_latents", "image_pooler_num_latents"),
        "num_heads": ("image_pooler_num_attn_heads",),
        "mlp_dim": ("image_pooler_intermediate_size",),
    },
)
TEXT = sections.text("qwen2")
BLOCK, POOL = "image_encoder.blocks.{layer}", "image_pooler.pooler"


def _attention(source: str, target: str) -> rules.Rules:
    fused = rules.fused_qkv(f"{source}.in_proj_weight", f"{source}.in_proj_bias", target)
    return fused + rules.linear(f"{source}.out_proj", f"{target}/o", "d (n h) -> n h d")


RULES = (
    rules.Rule("image_encoder.cls_token", "vision/cls", "1 1 d -> d"),
    rules.Rule("image_encoder.pos_embed", "vision/positions", "1 p d -> p d"),
    *rules.linear("image_encoder.patch_embed", "vision/patch", "o c h w -> h w c o"),
    *rules.layer_norm(f"{BLOCK}.norm1", "vision/layers/attn_norm"),
    *(
        row
        for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
        for row in rules.linear(
            f"{BLOCK}.attn.{theirs}", f"vision/layers/attn/{ours}", "(n h) d -> d n h", "(n h) -> n h"
        )
    ),
    *rules.linear(f"{BLOCK}.attn.out", "vision/layers/attn/o", "d (n h) -> n h d"),
    rules.Rule(f"{BLOCK}.ls1.weight", "vision/layers/attn_scale"),
    *rules.layer_norm(f"{BLOCK}.norm2", "vision/layers/mlp_norm"),
    *rules.linear(f"{BLOCK}.mlp.hidden_layer", "vision/layers/mlp/up"),
    *rules.linear(f"{BLOCK}.mlp.output_layer", "vision/layers/mlp/down"),
    rules.Rule(f"{BLOCK}.ls2.weight", "vision/layers/mlp_scale"),
    *rules.layer_norm("image_encoder.norm", "vision/post_norm"),
    rules.Rule("image_pooler.image_latents", "connector/latents", "1 p d -> p d"),
    *_attention(f"{POOL}.self_attn", "connector/attn"),
    *_attention(f"{POOL}.multihead_attn", "connector/cross_attn"),
    *rules.linear(f"{POOL}.linear1", "connector/mlp/up"),
    *rules.linear(f"{POOL}.linear2", "connector/mlp/down"),
    *rules.layer_norm(f"{POOL}.norm1", "connector/attn_norm"),
    *rules.layer_norm(f"{POOL}.norm2", "connector/cross_attn_norm"),
    *rules.layer_norm(f"{POOL}.norm3", "connector/mlp_norm"),
    *rules.linear("image_pooler.projection", "connector/out"),
    *rules.llama("text_decoder.model", "text", bias="qkv"),
    *rules.head("text_decoder.lm_head", "text", tied=True),
    rules.LORA,
)
VIT = ViTConfig(
    image_size=336,
    patch_size=14,
    width=1280,
    depth=32,
    mlp_dim=5120,
    num_heads=16,
    activation="gelu",
    norm_epsilon=1e-6,
    cls="keep",
    cls_position=False,
    layer_scale=True,
    position_side=16,
    position_offset=0.1,
)
QWEN_05B = dataclasses.replace(  # the file names Qwen/Qwen1.5-0.5B-Chat and leaves its sizes out
    sections.QWEN2_7B, width=1024, depth=24, mlp_dim=2816, num_heads=16, rope_theta=1e6, head="tied"
)


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration."""
    decoder = values.get("text_decoder_name_or_path") or "Qwen/Qwen1.5-0.5B-Chat"
    if "text_config" not in values and "Qwen1.5-0.5B" not in decoder:
        raise ValueError(f"text_decoder_name_or_path={decoder!r} is not supported; this model has Qwen1.5-0.5B.")
    vision = VISION.read(values, VIT)
    return base.VLMConfig(
        model_type="vlm",
        vision=dataclasses.replace(
            vision,
            mlp_dim=values.get("image_encoder_intermediate_size", 4 * vision.width),
            position_side=values.get("position_side", 16),
        ),
        text=sections.read_text(values, TEXT, QWEN_05B),
        connector=POOLER.read(values, PoolerConfig()),
        image=sections.clip_image(vision.image_size),
        prompt="<image> {instruction}",  # upstream's, placeholder included
        lead=0,
        bos_id=151_643,
        eos_id=151_645,
        pad_id=151_643,
        rules=RULES,
    )


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json, with entries of our own for what the published file leaves to its code."""
    vision = config.vision
    own = {
        "image_encoder_intermediate_size": vision.mlp_dim,
        "position_side": vision.position_side or vision.side,
        "text_config": TEXT.write(config.text),
    } | sections.write_head(config.text)
    return {"architectures": ["VLMForCausalLM"]} | VISION.write(vision) | POOLER.write(config.connector) | own


registry.register_family("vlm", read, write)
registry.register("uform-gen2-qwen-500m")(functools.partial(read, {}))
