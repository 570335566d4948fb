"""PaliGemma 1 and 2: SigLIP So400m, a matrix, Gemma or Gemma 2. Beyer et al. 2024, arXiv:2407.07726, 2412.03555."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from robovlms_jax.backbones import base, registry, sections
from robovlms_jax.backbones.connectors import LinearConnectorConfig
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.weights import rules

GEMMA = sections.text("gemma", attention_bias=False)
GEMMA2 = sections.text(
    "gemma2",
    {
        "query_scalar": ("query_pre_attn_scalar",),
        "softcap": ("attn_logit_softcapping",),
        "logit_softcap": ("final_logit_softcapping",),
        "sliding_window": ("sliding_window",),
    },
    attention_bias=False,
)


def make_rules(text: DecoderConfig) -> rules.Rules:
    """Weights as published, and as transformers 5 names them."""
    norms = rules.GEMMA2_NORMS if text.residual == "sandwich" else rules.LLAMA_NORMS
    return (
        *rules.HUB_NAMES,
        *rules.siglip_vision("vision_tower.vision_model", "vision"),
        *rules.linear("multi_modal_projector.linear", "connector/dense"),
        *rules.llama("language_model.model", "text", norms=norms),
        *rules.head("language_model.lm_head", "text", tied=True),
        rules.LORA,
    )


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration."""
    is_second = (values.get("text_config") or {}).get("model_type") == "gemma2"
    section, default = (GEMMA2, sections.GEMMA2_2B) if is_second else (GEMMA, sections.GEMMA_7B)
    text = sections.read_text(values, section, default)
    vision = sections.SIGLIP.read(values, sections.SIGLIP_B)
    config = base.VLMConfig(
        model_type="paligemma",
        vision=vision,
        text=text,
        connector=LinearConnectorConfig(),
        image=sections.half_image(vision.image_size),
        prompt="<eos>{instruction}\n",  # upstream's: the end token first, images after it, queries before the newline
        special_tokens=False,
        bos_id=2,
        eos_id=1,
        pad_id=0,
        rules=make_rules(text),
    )
    return sections.IDS.read(values, config)


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    section = GEMMA2 if config.text.residual == "sandwich" else GEMMA
    return (
        {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "image_token_index": 257_152,
            "projection_dim": config.width,
            "text_config": section.write(config.text),
            "vision_config": sections.SIGLIP.write(config.vision) | {"projection_dim": config.width},
        }
        | sections.IDS.write(config)
        | sections.write_head(config.text)
    )


def published(size: int, text: Mapping[str, Any]) -> dict[str, Any]:
    """What google/paligemma-3b-pt-224 and its relatives say in config.json, where it is not transformers' default."""
    so400m = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
    return {"vision_config": so400m | {"image_size": size, "patch_size": 14}, "text_config": text}


GEMMA_2B = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "vocab_size": 257_216,
}
GEMMA2_2B = {"model_type": "gemma2", "vocab_size": 257_216}
GEMMA2_9B = GEMMA2_2B | {
    "hidden_size": 3584,
    "intermediate_size": 14_336,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
}
GEMMA2_27B = GEMMA2_2B | {
    "hidden_size": 4608,
    "intermediate_size": 36_864,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 144,
}

registry.register_family("paligemma", read, write)
registry.register("paligemma-3b-224")(functools.partial(read, published(224, GEMMA_2B)))
registry.register("paligemma-3b-448")(functools.partial(read, published(448, GEMMA_2B)))
registry.register("paligemma2-3b-224")(functools.partial(read, published(224, GEMMA2_2B)))
registry.register("paligemma2-10b-224")(functools.partial(read, published(224, GEMMA2_9B)))
registry.register("paligemma2-3b-mix-224")(functools.partial(read, published(224, GEMMA2_2B)))
registry.register("paligemma2-3b-mix-448")(functools.partial(read, published(448, GEMMA2_2B)))
registry.register("paligemma2-10b-mix-448")(functools.partial(read, published(448, GEMMA2_9B)))
registry.register("paligemma2-28b-mix-448")(functools.partial(read, published(448, GEMMA2_27B)))
