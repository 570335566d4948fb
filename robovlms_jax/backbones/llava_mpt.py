"""LLaVA-Lightning-MPT-7B-preview: CLIP-L at 224 pixels, a matrix, MPT-7B. Its CLIP is published apart."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from robovlms_jax.backbones import base, hf_config, llava, registry, sections
from robovlms_jax.backbones.connectors import LinearConnectorConfig
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.weights import rules

MPT_7B = DecoderConfig(
    width=4096,
    depth=32,
    mlp_dim=16_384,
    num_heads=32,
    vocab_size=50_432,
    activation="gelu",
    norm_epsilon=1e-5,
    norm="layer_no_bias",
    is_gated=False,
    positions="alibi",
    head="tied",
)
TEXT = hf_config.Section(
    "",
    {"width": ("d_model",), "depth": ("n_layers",), "num_heads": ("n_heads",), "vocab_size": ("vocab_size",)},
    {
        "no_bias": True,
        "attn_config.alibi": True,
        "attn_config.qk_ln": False,
        "attn_config.alibi_bias_max": 8,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
    },
)


def text_rules(source: str) -> rules.Rules:
    """MPT's tensors, whose names begin with `source` -> Decoder."""
    layer = f"{source}transformer.blocks.{{layer}}"
    return (
        rules.Rule(f"{source}transformer.wte.weight", "text/embed/table"),
        *rules.fused_qkv(f"{layer}.attn.Wqkv.weight", None, "text/layers/attn"),
        *rules.linear(f"{layer}.attn.out_proj", "text/layers/attn/o", "d (n h) -> n h d", use_bias=False),
        *rules.rms_norm(f"{layer}.norm_1", "text/layers/attn_norm"),
        *rules.rms_norm(f"{layer}.norm_2", "text/layers/mlp_norm"),
        *rules.linear(f"{layer}.ffn.up_proj", "text/layers/mlp/up", use_bias=False),
        *rules.linear(f"{layer}.ffn.down_proj", "text/layers/mlp/down", use_bias=False),
        *rules.rms_norm(f"{source}transformer.norm_f", "text/final_norm"),
        *rules.head(f"{source}lm_head", "text", tied=True),
    )


CLIP_TEXT = rules.Ignore(
    r"text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale", "CLIP's text side"
)
RULES = (
    *rules.clip_vision("vision_model", "vision"),
    *rules.linear("transformer.mm_projector", "connector/dense"),
    *text_rules(""),
    CLIP_TEXT,
    rules.LORA,
)


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration."""
    text = sections.with_head(TEXT.read(values, MPT_7B), values)
    text = dataclasses.replace(text, mlp_dim=round(text.width * values.get("expansion_ratio", 4)))
    vision = llava.VISION.read(values, dataclasses.replace(sections.CLIP_L, cls="drop", unused_layers=1))
    return base.VLMConfig(
        model_type="llava_mpt",
        vision=vision,
        text=text,
        connector=LinearConnectorConfig(),
        image=sections.clip_image(vision.image_size),
        prompt="{instruction}",
        bos_id=0,
        eos_id=0,
        pad_id=1,
        rules=RULES,
    )


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json, with a `vision_config` that the published file has elsewhere."""
    return (
        TEXT.write(config.text)
        | sections.write_head(config.text)
        | {
            "architectures": ["LlavaMPTForCausalLM"],
            "expansion_ratio": config.text.mlp_dim / config.width,
            "vision_config": llava.VISION.write(config.vision),
        }
    )


registry.register_family("llava_mpt", read, write)
registry.register("llava-mpt-7b")(functools.partial(read, {}))
