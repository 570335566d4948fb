"""Qwen-VL: a ViT at 448 pixels, 256 queries that resample it, Qwen-7B. Bai et al. 2023, arXiv:2308.12966."""

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
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.positions import resize_positions
from robovlms_jax.nn.vit import ViTConfig
from robovlms_jax.weights import rules


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """Pools image features into a fixed number of tokens by learned queries."""

    num_queries: int = 256
    """P, tokens per image."""
    head_dim: int = 128

    def build(self, text: DecoderConfig, kernel: Kernel) -> nn.Module:
        return Resampler(self, text, kernel)

    def tiny(self) -> ResamplerConfig:
        return ResamplerConfig(num_queries=4, head_dim=8)


class Resampler(nn.Module):
    """One attention from learned queries to the features; both sides carry a square grid of positions."""

    config: ResamplerConfig
    text: DecoderConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """float[B, P', vision width] -> float[B, P, D]."""
        width, shape = self.text.width, (self.config.num_queries, self.text.width)

        def norm(name: str) -> nn.Module:
            return LayerNorm(1e-6, name=name)

        x = norm("kv_norm")(Dense(width, (None, "embed"), use_bias=False, kernel=self.kernel, name="kv")(features))
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("queries", "embed"))
        queries = self.param("queries", init, shape).astype(x.dtype)
        positions = self.param("positions", init, shape)
        keys = x + resize_positions(positions, int(x.shape[1] ** 0.5)).astype(x.dtype)
        queries = norm("query_norm")(queries) + positions.astype(x.dtype)
        queries = jnp.broadcast_to(queries, (x.shape[0], *shape))
        attention = Attention(width // self.config.head_dim, self.config.head_dim, kernel=self.kernel, name="attn")
        x = norm("post_norm")(attention(queries, keys, values=x)[0])
        return Dense(width, (None, "embed"), use_bias=False, kernel=self.kernel, name="out")(x)


VISION = hf_config.Section(
    "visual",
    {
        "image_size": ("image_size",),
        "patch_size": ("patch_size",),
        "width": ("width",),
        "depth": ("layers",),
        "num_heads": ("heads",),
    },
)
TEXT = hf_config.Section(
    "",
    {
        "width": ("hidden_size",),
        "depth": ("num_hidden_layers",),
        "num_heads": ("num_attention_heads",),
        "own_head_dim": ("kv_channels",),
        "vocab_size": ("vocab_size",),
        "norm_epsilon": ("layer_norm_epsilon",),
        "rope_theta": ("rotary_emb_base",),
    },
    {"no_bias": True, "rotary_pct": 1.0},
)
VISUAL, POOL, LAYER = "transformer.visual", "transformer.visual.attn_pool", "transformer.h.{layer}"
BLOCK = f"{VISUAL}.transformer.resblocks.{{layer}}"
RULES = (
    rules.Rule(f"{VISUAL}.conv1.weight", "vision/patch/kernel", "o c h w -> h w c o"),
    rules.Rule(f"{VISUAL}.positional_embedding", "vision/positions"),
    *rules.layer_norm(f"{VISUAL}.ln_pre", "vision/pre_norm"),
    *rules.layer_norm(f"{BLOCK}.ln_1", "vision/layers/attn_norm"),
    *rules.fused_qkv(f"{BLOCK}.attn.in_proj.weight", f"{BLOCK}.attn.in_proj.bias", "vision/layers/attn", per_head=True),
    *rules.linear(f"{BLOCK}.attn.out_proj", "vision/layers/attn/o", "d (n h) -> n h d"),
    *rules.layer_norm(f"{BLOCK}.ln_2", "vision/layers/mlp_norm"),
    *rules.linear(f"{BLOCK}.mlp.c_fc", "vision/layers/mlp/up"),
    *rules.linear(f"{BLOCK}.mlp.c_proj", "vision/layers/mlp/down"),
    *rules.linear(f"{POOL}.kv_proj", "connector/kv", use_bias=False),
    *rules.layer_norm(f"{POOL}.ln_kv", "connector/kv_norm"),
    *rules.layer_norm(f"{POOL}.ln_q", "connector/query_norm"),
    rules.Rule(f"{POOL}.query", "connector/queries"),
    rules.Rule(f"{POOL}.pos_embed", "connector/positions"),
    *rules.fused_qkv(f"{POOL}.attn.in_proj_weight", f"{POOL}.attn.in_proj_bias", "connector/attn"),
    *rules.linear(f"{POOL}.attn.out_proj", "connector/attn/o", "d (n h) -> n h d"),
    *rules.layer_norm(f"{VISUAL}.ln_post", "connector/post_norm"),
    rules.Rule(f"{VISUAL}.proj", "connector/out/kernel"),  # multiplied from the right: not transposed
    rules.Rule("transformer.wte.weight", "text/embed/table"),
    *rules.rms_norm(f"{LAYER}.ln_1", "text/layers/attn_norm"),
    *rules.fused_qkv(f"{LAYER}.attn.c_attn.weight", f"{LAYER}.attn.c_attn.bias", "text/layers/attn"),
    *rules.linear(f"{LAYER}.attn.c_proj", "text/layers/attn/o", "d (n h) -> n h d", use_bias=False),
    *rules.rms_norm(f"{LAYER}.ln_2", "text/layers/mlp_norm"),
    *rules.linear(f"{LAYER}.mlp.w1", "text/layers/mlp/up", use_bias=False),
    *rules.linear(f"{LAYER}.mlp.w2", "text/layers/mlp/gate", use_bias=False),
    *rules.linear(f"{LAYER}.mlp.c_proj", "text/layers/mlp/down", use_bias=False),
    *rules.rms_norm("transformer.ln_f", "text/final_norm"),
    *rules.head("lm_head", "text", tied=False),
    rules.Ignore(r"transformer\.(.*\.)?(rotary_emb\.inv_freq|masked_bias|attn\.bias)", "computed"),
    rules.LORA,
)
VIT = ViTConfig(
    image_size=448,
    patch_size=14,
    width=1664,
    depth=48,
    mlp_dim=8192,
    num_heads=16,
    activation="gelu",
    norm_epsilon=1e-6,
    patch_bias=False,
    pre_norm=True,
    post_norm=False,
    position_side=16,  # 448 pixels have 32 x 32 patches
)
QWEN_7B = DecoderConfig(
    width=4096,
    depth=32,
    mlp_dim=11_008,
    num_heads=32,
    vocab_size=151_936,
    activation="silu",
    norm_epsilon=1e-6,
    attention_bias="qkv",
)


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration."""
    visual = values.get("visual") or {}
    text, vision = sections.with_head(TEXT.read(values, QWEN_7B), values), VISION.read(values, VIT)
    start = visual.get("image_start_id", 151_857)
    return base.VLMConfig(
        model_type="qwen",
        vision=dataclasses.replace(
            vision,
            mlp_dim=int(vision.width * visual.get("mlp_ratio", 4.9231)),
            position_side=visual.get("position_side", 16),
        ),
        text=dataclasses.replace(text, mlp_dim=values.get("intermediate_size", 22_016) // 2),
        connector=ResamplerConfig(visual.get("n_queries", 256), visual.get("head_dim", 128)),
        image=sections.clip_image(vision.image_size),
        prompt="{instruction}",
        lead=0,
        tail=0,
        image_start=(start,),
        image_end=(start + 1,),
        bos_id=151_643,
        eos_id=151_643,
        pad_id=151_643,
        rules=RULES,
    )


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    vision, connector = config.vision, config.connector
    visual = VISION.write(vision) | {
        "image_start_id": config.image_start[0],
        "mlp_ratio": (vision.mlp_dim + 0.5) / vision.width,  # read back by rounding down
        "n_queries": connector.num_queries,
        "output_dim": config.width,
        "position_side": vision.position_side or vision.side,
        "head_dim": connector.head_dim,
    }
    text = TEXT.write(config.text) | {"intermediate_size": 2 * config.text.mlp_dim}
    return {"architectures": ["QWenLMHeadModel"], "visual": visual} | text | sections.write_head(config.text)


registry.register_family("qwen", read, write)
registry.register("qwen-vl")(functools.partial(read, {}))
