"""SmolVLM2: SigLIP, neighbouring patches gathered, a matrix, SmolLM2. Marafioti et al. 2025, arXiv:2504.05299."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from robovlms_jax.backbones import base, registry, sections
from robovlms_jax.backbones.connectors import LinearConnectorConfig
from robovlms_jax.weights import rules

# 384 pixels are 27 patches of 14 and a rest.
SIGLIP = dataclasses.replace(sections.SIGLIP_B, image_size=512, is_ragged=True)
RULES = (
    *rules.siglip_vision("model.vision_model", "vision"),
    *rules.linear("model.connector.modality_projection.proj", "connector/dense", use_bias=False),
    *rules.llama("model.text_model", "text"),
    *rules.head("lm_head", "text", tied=False),
    rules.LORA,
)


SMOLLM = {
    "model_type": "smolvlm",
    "prompt": "<|im_start|>{instruction}<end_of_utterance>",
    "special_tokens": False,
    "bos_id": 1,
    "eos_id": 49_279,
    "pad_id": 2,
}


def read(values: Mapping[str, Any], **fields: Any) -> base.VLMConfig:
    """config.json -> configuration; `fields` of VLMConfig are what a relative has in place of SMOLLM."""
    size = sections.SIGLIP.read(values, SIGLIP).image_size
    connector = LinearConnectorConfig(use_bias=False, shuffle=values.get("scale_factor", 2))
    image = sections.half_image(size, "lanczos")  # one picture, not split into tiles
    fields = SMOLLM | fields | {"connector": connector, "image": image, "tail": 0, "rules": RULES}
    return sections.read_siglip_llama(values, SIGLIP, **fields)


def write(
    config: base.VLMConfig, architecture: str = "SmolVLMForConditionalGeneration", image_token_id: int = 49_190
) -> dict[str, Any]:
    """Configuration -> config.json."""
    more = {"image_token_id": image_token_id, "scale_factor": config.connector.shuffle}
    return sections.write_siglip_llama(config, architecture, **more)


def published(scale_factor: int, vision: Mapping[str, Any], **text: Any) -> dict[str, Any]:
    """What HuggingFaceTB/SmolVLM2-*-Instruct say in config.json."""
    text = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 49_280} | text
    return {"scale_factor": scale_factor, "vision_config": vision, "text_config": text}


def sizes(width: int, mlp_dim: int, depth: int, heads: int, kv_heads: int, rope_theta: float) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_theta": rope_theta,
    }


SO400M = {"image_size": 384, "patch_size": 14} | {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
}

registry.register_family("smolvlm", read, write)
registry.register("smolvlm2-256m")(functools.partial(read, published(4, {}, **sizes(576, 1536, 30, 9, 3, 1e5))))
registry.register("smolvlm2-500m")(functools.partial(read, published(4, {}, **sizes(960, 2560, 32, 15, 5, 1e5))))
registry.register("smolvlm2-2.2b")(
    functools.partial(read, published(3, SO400M, **sizes(2048, 8192, 24, 32, 32, 1.3e5)))
)
