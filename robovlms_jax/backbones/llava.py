"""LLaVA-1.5: CLIP-L at 336 pixels, a two-layer MLP, Vicuna. Liu et al. 2023, arXiv:2310.03744."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from robovlms_jax.backbones import base, hf_config, registry, sections
from robovlms_jax.backbones.connectors import MLPConnectorConfig
from robovlms_jax.weights import rules

# Features are those of the last layer but one, patches only.
CLIP = dataclasses.replace(sections.CLIP_L, cls="drop", unused_layers=1)
VISION = sections.vision("clip_vision_model")
TOP = hf_config.Section(
    "", {}, {"projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
)
RULES = (
    *rules.HUB_NAMES,
    *rules.clip_vision("vision_tower.vision_model", "vision"),
    *rules.linear("multi_modal_projector.linear_1", "connector/hidden"),
    *rules.linear("multi_modal_projector.linear_2", "connector/out"),
    *rules.llama("language_model.model", "text"),
    *rules.head("language_model.lm_head", "text", tied=False),
    rules.LORA,
)


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration."""
    vision = VISION.read(values, CLIP)
    config = base.VLMConfig(
        model_type="llava",
        vision=vision,
        text=sections.read_text(values, sections.LLAMA, sections.LLAMA_7B),
        connector=MLPConnectorConfig(),
        image=sections.clip_image(vision.image_size),
        prompt="{instruction}",
        bos_id=1,
        eos_id=2,
        pad_id=32_001,
        rules=RULES,
    )
    config = TOP.read(values, config)
    return dataclasses.replace(config, pad_id=values.get("pad_token_id") or config.pad_id)


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    return (
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": 32_000,
            "pad_token_id": config.pad_id,
            "text_config": sections.LLAMA.write(config.text),
            "vision_config": VISION.write(config.vision),
        }
        | TOP.write(config)
        | sections.write_head(config.text)
    )


VICUNA_7B = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32_064}
VICUNA_13B = VICUNA_7B | sections.LLAMA_13B
CLIP_336 = {"image_size": 336}

registry.register_family("llava", read, write)
registry.register("llava-1.5-7b")(functools.partial(read, {"vision_config": CLIP_336, "text_config": VICUNA_7B}))
registry.register("llava-1.5-13b")(functools.partial(read, {"vision_config": CLIP_336, "text_config": VICUNA_13B}))
