"""Gemma 3: SigLIP So400m at 896 pixels, means of 4 x 4 patches, Gemma 3. Gemma Team 2025, arXiv:2503.19786."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from robovlms_jax.backbones import base, hf_config, paligemma, registry, sections
from robovlms_jax.backbones.connectors import PoolConnectorConfig
from robovlms_jax.weights import rules

ROPE, LOCAL = "rope_parameters.full_attention", "rope_parameters.sliding_attention"
TEXT = hf_config.Section(
    "text_config",
    sections.TEXT_FIELDS
    | {
        "activation": ("hidden_activation", "hidden_act"),
        "query_scalar": ("query_pre_attn_scalar",),
        "sliding_window": ("sliding_window",),
        "sliding_period": ("sliding_window_pattern", "_sliding_window_pattern"),
        "rope_theta": (f"{ROPE}.rope_theta", "rope_theta"),
        "rope_factor": (f"{ROPE}.factor", "rope_scaling.factor"),
        "local_rope_theta": (f"{LOCAL}.rope_theta", "rope_local_base_freq"),
    },
    {
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
)
RULES = (
    *rules.HUB_NAMES,
    *rules.siglip_vision("vision_tower.vision_model", "vision"),
    *rules.rms_norm("multi_modal_projector.mm_soft_emb_norm", "connector/norm"),
    rules.Rule("multi_modal_projector.mm_input_projection_weight", "connector/dense/kernel"),  # not transposed
    *rules.llama("language_model.model", "text", norms=rules.GEMMA2_NORMS, qk_norm=True),
    *rules.head("language_model.lm_head", "text", tied=True),
    rules.LORA,
)
GEMMA3_2B = dataclasses.replace(  # Gemma3TextConfig()
    sections.GEMMA2_2B,
    vocab_size=262_208,
    softcap=None,
    logit_softcap=None,
    rope_theta=1e6,
    local_rope_theta=1e4,
    sliding_period=6,
    window_over_blocks=False,
    qk_norm=True,
)


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration."""
    text = {"head_dim": 256} | dict(values.get("text_config") or {})  # whatever the width
    _check_rope(text)
    vision = sections.SIGLIP.read(values, sections.SIGLIP_B)
    start, end = (values.get(f"{name}_token_index", default) for name, default in (("boi", 255_999), ("eoi", 256_000)))
    return base.VLMConfig(
        model_type="gemma3",
        vision=vision,
        text=sections.with_head(TEXT.read({**values, "text_config": text}, GEMMA3_2B), values),
        connector=PoolConnectorConfig(values.get("mm_tokens_per_image", 256), norm_epsilon=vision.norm_epsilon),
        image=sections.half_image(vision.image_size, "bilinear"),
        prompt="{instruction}",
        tail=0,
        image_start=(start,),
        image_end=(end,),
        image_block=True,
        bos_id=2,
        eos_id=1,
        pad_id=0,
        rules=RULES,
    )


def _check_rope(text: Mapping[str, Any]) -> None:
    """Raise ValueError for scaled rotary embeddings of another kind, and for layers in another order."""
    scaled = (text.get("rope_parameters") or {}).get("full_attention") or text.get("rope_scaling") or {}
    kind = scaled.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise ValueError(f"text_config.rope_scaling of type {kind!r} is not supported; this model has 'linear'.")
    kinds, period = text.get("layer_types"), text.get("sliding_window_pattern", text.get("_sliding_window_pattern", 6))
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(kinds or ()))]
    if kinds and list(kinds) != expected:
        raise ValueError(f"text_config.layer_types={kinds}; expected full attention in every {period}th layer alone.")


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    text = TEXT.write(config.text)
    text["rope_parameters"]["full_attention"]["rope_type"] = "linear"
    text["rope_parameters"]["sliding_attention"]["rope_type"] = "default"
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": config.image_start[0],
        "eoi_token_index": config.image_end[0],
        "mm_tokens_per_image": config.connector.tokens,
        "text_config": text,
        "vision_config": sections.SIGLIP.write(config.vision),
    } | sections.write_head(config.text)


def published(width: int, mlp_dim: int, depth: int, heads: int, kv_heads: int, **more: int) -> dict[str, Any]:
    """What google/gemma-3-*-it say in config.json, where it is not transformers' default."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": width,
        "intermediate_size": mlp_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    } | more
    return paligemma.published(896, text)


registry.register_family("gemma3", read, write)
registry.register("gemma-3-4b")(functools.partial(read, published(2560, 10_240, 34, 8, 4)))
registry.register("gemma-3-12b")(functools.partial(read, published(3840, 15_360, 48, 16, 8)))
registry.register("gemma-3-27b")(
    functools.partial(read, published(5376, 21_504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168))
)
