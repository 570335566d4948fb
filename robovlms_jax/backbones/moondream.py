"""MoonDream2 of 2024: SigLIP So400m at 378 pixels, a two-layer MLP, Phi 1.5. huggingface.co/vikhyatk/moondream2."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from robovlms_jax.backbones import base, hf_config, registry, sections
from robovlms_jax.backbones.connectors import MLPConnectorConfig
from robovlms_jax.weights import rules

VIT = dataclasses.replace(
    sections.SIGLIP_B,
    image_size=378,
    patch_size=14,
    width=1152,
    depth=27,
    mlp_dim=4304,
    num_heads=16,
    norm_epsilon=1e-5,
)
PHI = dataclasses.replace(sections.PHI, norm_in_head=True)
TEXT = hf_config.Section(
    "text_config",
    {key: names for key, names in sections.TEXT_FIELDS.items() if key != "own_head_dim"}
    | {
        "norm_epsilon": ("layer_norm_eps",),
        "rotary_fraction": ("partial_rotary_factor", "rope_parameters.partial_rotary_factor"),
    },
    {"model_type": "phi", "qk_layernorm": False},
)
VISUAL, LAYER = "vision_encoder.encoder.model.visual", "text_model.transformer.h.{layer}"
BLOCK = f"{VISUAL}.blocks.{{layer}}"
RULES = (
    rules.Rename(r"^vision_encoder\.model\.", "vision_encoder."),
    *rules.linear(f"{VISUAL}.patch_embed.linear", "vision/patch", "o (c h w) -> h w c o"),
    rules.Rule(f"{VISUAL}.pos_embed", "vision/positions", "1 p d -> p d"),
    *rules.layer_norm(f"{BLOCK}.norm1", "vision/layers/attn_norm"),
    *rules.fused_qkv(f"{BLOCK}.attn.qkv.weight", f"{BLOCK}.attn.qkv.bias", "vision/layers/attn"),
    *rules.linear(f"{BLOCK}.attn.proj", "vision/layers/attn/o", "d (n h) -> n h d"),
    *rules.layer_norm(f"{BLOCK}.norm2", "vision/layers/mlp_norm"),
    *rules.linear(f"{BLOCK}.mlp.fc1", "vision/layers/mlp/up"),
    *rules.linear(f"{BLOCK}.mlp.fc2", "vision/layers/mlp/down"),
    *rules.layer_norm(f"{VISUAL}.norm", "vision/post_norm"),
    *rules.linear("vision_encoder.projection.mlp.fc1", "connector/hidden"),
    *rules.linear("vision_encoder.projection.mlp.fc2", "connector/out"),
    rules.Rule("text_model.transformer.embd.wte.weight", "text/embed/table"),
    *rules.layer_norm(f"{LAYER}.ln", "text/layers/attn_norm"),
    *rules.fused_qkv(f"{LAYER}.mixer.Wqkv.weight", f"{LAYER}.mixer.Wqkv.bias", "text/layers/attn"),
    *rules.linear(f"{LAYER}.mixer.out_proj", "text/layers/attn/o", "d (n h) -> n h d"),
    *rules.linear(f"{LAYER}.mlp.fc1", "text/layers/mlp/up"),
    *rules.linear(f"{LAYER}.mlp.fc2", "text/layers/mlp/down"),
    *rules.layer_norm("text_model.lm_head.ln", "text/final_norm"),
    *rules.linear("text_model.lm_head.linear", "text/head"),
    rules.Ignore(r"region_model\..*", "finds boxes and points; no part of the language model"),
    rules.LORA,
)


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration. The file does not say which projector it is for: see `fit`."""
    vision = sections.SIGLIP.read(values, VIT)
    return base.VLMConfig(
        model_type="moondream1",
        vision=vision,
        text=sections.read_text(values, TEXT, PHI),
        connector=MLPConnectorConfig(
            values.get("projection_hidden", 8192), "gelu_pytorch_tanh", values.get("projection_views", 2)
        ),
        image=sections.half_image(vision.image_size),
        prompt="<|endoftext|>{instruction}",
        bos_id=50_256,
        eos_id=50_256,
        pad_id=50_256,
        rules=RULES,
    )


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json, with entries of our own for what the published file leaves to its code."""
    return {
        "architectures": ["Moondream"],
        "projection_hidden": config.connector.mlp_dim,
        "projection_views": config.connector.views,
        "text_config": TEXT.write(config.text),
        "vision_config": sections.SIGLIP.write(config.vision),
    }


def fit(config: base.VLMConfig, tensors: Mapping[str, tuple[int, ...]]) -> base.VLMConfig:
    """The projector of a checkpoint: until May 2024 for one view of the image, afterwards for two.

    Raises ValueError for revisions of 2025, which are another model.
    """
    if any(name.startswith("model.text.") for name in tensors):
        raise ValueError(
            "these are MoonDream2 weights of 2025 (model.text.*), another architecture; take a revision of 2024, "
            "such as hf://vikhyatk/moondream2@2024-07-23 (text_model.*, vision_encoder.*)."
        )
    for name, shape in tensors.items():
        if name.endswith("projection.mlp.fc1.weight"):
            views = shape[1] // config.vision.width
            return dataclasses.replace(config, connector=dataclasses.replace(config.connector, views=views))
    return config


registry.register_family("moondream1", read, write, fit)
registry.register("moondream2")(functools.partial(read, {}))
registry.register("moondream2-2024-03")(functools.partial(read, {"projection_views": 1}))
