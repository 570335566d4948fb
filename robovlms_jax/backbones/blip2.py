"""BLIP-2 with OPT: EVA-CLIP's ViT-g at 224 pixels, the Q-Former, OPT. Li et al. 2023, arXiv:2301.12597."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from robovlms_jax.backbones import base, hf_config, qformer, registry, sections
from robovlms_jax.nn.decoder import DecoderConfig
from robovlms_jax.nn.vit import ViTConfig
from robovlms_jax.weights import rules

VISION = hf_config.Section("vision_config", sections.VISION_FIELDS, {"attention_dropout": 0.0, "qkv_bias": True})
QFORMER = hf_config.Section(
    "qformer_config",
    {
        "width": ("hidden_size",),
        "depth": ("num_hidden_layers",),
        "num_heads": ("num_attention_heads",),
        "mlp_dim": ("intermediate_size",),
        "activation": ("hidden_act",),
        "norm_epsilon": ("layer_norm_eps",),
    },
    {"cross_attention_frequency": 2, "use_qformer_text_input": False},
)
TEXT = hf_config.Section(
    "text_config",
    {
        "width": ("hidden_size",),
        "depth": ("num_hidden_layers",),
        "mlp_dim": ("ffn_dim",),
        "num_heads": ("num_attention_heads",),
        "vocab_size": ("vocab_size",),
        "activation": ("activation_function",),
        "max_positions": ("max_position_embeddings",),
        "attention_dropout": ("attention_dropout",),
    },
    {
        "model_type": "opt",
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
)
BLOCK, OPT = "vision_model.encoder.layers.{layer}", "language_model.model.decoder"
LAYER = f"{OPT}.layers.{{layer}}"
RULES = (
    rules.Rule("vision_model.embeddings.class_embedding", "vision/cls", "1 1 d -> d"),
    rules.Rule("vision_model.embeddings.position_embedding", "vision/positions", "1 p d -> p d"),
    *rules.linear("vision_model.embeddings.patch_embedding", "vision/patch", "o c h w -> h w c o"),
    *rules.layer_norm(f"{BLOCK}.layer_norm1", "vision/layers/attn_norm"),
    *rules.fused_qkv(f"{BLOCK}.self_attn.qkv.weight", f"{BLOCK}.self_attn.qkv.bias", "vision/layers/attn"),
    *rules.linear(f"{BLOCK}.self_attn.projection", "vision/layers/attn/o", "d (n h) -> n h d"),
    *rules.layer_norm(f"{BLOCK}.layer_norm2", "vision/layers/mlp_norm"),
    *rules.linear(f"{BLOCK}.mlp.fc1", "vision/layers/mlp/up"),
    *rules.linear(f"{BLOCK}.mlp.fc2", "vision/layers/mlp/down"),
    *rules.layer_norm("vision_model.post_layernorm", "vision/post_norm"),
    *qformer.make_rules("query_tokens", "qformer", "language_projection", "connector"),
    rules.Rule(f"{OPT}.embed_tokens.weight", "text/embed/table"),
    rules.Rule(f"{OPT}.embed_positions.weight", "text/positions"),
    *rules.layer_norm(f"{LAYER}.self_attn_layer_norm", "text/layers/attn_norm"),
    *rules.attention(f"{LAYER}.self_attn", "text/layers/attn"),
    *rules.layer_norm(f"{LAYER}.final_layer_norm", "text/layers/mlp_norm"),
    *rules.linear(f"{LAYER}.fc1", "text/layers/mlp/up"),
    *rules.linear(f"{LAYER}.fc2", "text/layers/mlp/down"),
    *rules.layer_norm(f"{OPT}.final_layer_norm", "text/final_norm"),
    *rules.head("language_model.lm_head", "text", tied=True),
    rules.LORA,
)
EVA_G = ViTConfig(  # Blip2VisionConfig()
    image_size=224,
    patch_size=14,
    width=1408,
    depth=39,
    mlp_dim=6144,
    num_heads=16,
    activation="gelu",
    norm_epsilon=1e-6,
    cls="keep",
)
OPT_125M = DecoderConfig(  # OPTConfig()
    width=768,
    depth=12,
    mlp_dim=3072,
    num_heads=12,
    vocab_size=50_272,
    activation="relu",
    norm_epsilon=1e-5,
    norm="layer",
    is_gated=False,
    attention_bias="all",
    mlp_bias=True,
    positions="learned",
    max_positions=2048,
    head="tied",
)


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration."""
    vision, text = VISION.read(values, EVA_G), TEXT.read(values, OPT_125M)
    projected = (values.get("text_config") or {}).get("word_embed_proj_dim") or text.width
    if projected != text.width:
        raise ValueError(f"text_config.word_embed_proj_dim={projected} is not supported; this model has {text.width}.")
    former = QFORMER.read(values, qformer.QFormerConfig())
    return base.VLMConfig(
        model_type="blip-2",
        vision=vision,
        text=sections.with_head(text, values),
        connector=dataclasses.replace(former, num_queries=values.get("num_query_tokens", former.num_queries)),
        image=sections.clip_image(vision.image_size),
        prompt="{instruction}",
        lead=0,
        tail=0,
        bos_id=2,
        eos_id=2,
        pad_id=1,
        rules=RULES,
    )


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "image_token_index": 50_265,
        "num_query_tokens": config.connector.num_queries,
        "qformer_config": QFORMER.write(config.connector) | {"encoder_hidden_size": config.vision.width},
        "text_config": TEXT.write(config.text) | {"word_embed_proj_dim": config.width},
        "vision_config": VISION.write(config.vision),
    } | sections.write_head(config.text)


def published(width: int, heads: int) -> dict[str, Any]:
    """What Salesforce/blip2-opt-* say about their decoder in config.json."""
    text = {"hidden_size": width, "ffn_dim": 4 * width, "num_hidden_layers": 32, "num_attention_heads": heads}
    return {"text_config": text | {"model_type": "opt", "vocab_size": 50_304}}


registry.register_family("blip-2", read, write)
registry.register("blip2-opt-2.7b")(functools.partial(read, published(2560, 32)))
registry.register("blip2-opt-6.7b")(functools.partial(read, published(4096, 32)))
