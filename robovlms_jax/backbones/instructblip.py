"""InstructBLIP (Dai et al. 2023, arXiv:2305.06500): BLIP-2 whose Q-Former reads the instruction; Vicuna or FLAN-T5."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from robovlms_jax.backbones import base, blip2, hf_config, qformer, registry, sections
from robovlms_jax.inputs import tokenizers

QFORMER = hf_config.Section(
    "qformer_config",
    blip2.QFORMER.fields | {"vocab_size": ("vocab_size",), "max_positions": ("max_position_embeddings",)},
    {"cross_attention_frequency": 2},
)
FORMER_RULES = qformer.make_rules("query_tokens", "qformer", "language_projection", "connector", words=True)


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration."""
    config = blip2.read({**values, "qformer_config": {}})
    former = QFORMER.read(values, dataclasses.replace(config.connector, vocab_size=30_522))
    return dataclasses.replace(
        config,
        model_type="instructblip",
        connector=former,
        connector_tokenizer=tokenizers.CONNECTOR_TOKENIZER,
        rules=tuple(row for row in config.rules if row not in blip2.FORMER_RULES) + FORMER_RULES,
    )


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    former = QFORMER.write(config.connector) | {"encoder_hidden_size": config.vision.width}
    return blip2.write(config) | {
        "architectures": ["InstructBlipForConditionalGeneration"],
        "qformer_config": former,
    }


FORMER = {"vocab_size": 30_523}  # BERT's words and [DEC]
VICUNA_7B = {"model_type": "llama", "vocab_size": 32_001}
VICUNA_13B = VICUNA_7B | sections.LLAMA_13B
LANGUAGES = {"vicuna-7b": VICUNA_7B, "vicuna-13b": VICUNA_13B, "flan-t5-xl": blip2.FLAN_T5_XL}

registry.register_family("instructblip", read, write)
for _name, _text in LANGUAGES.items():
    registry.register(f"instructblip-{_name}")(
        functools.partial(read, {"qformer_config": FORMER, "text_config": _text})
    )
