"""BLIP-2 (Li et al. 2023, arXiv:2301.12597): EVA-CLIP's ViT-g at 224 pixels, the Q-Former; OPT, Llama or FLAN-T5."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from robovlms_jax.backbones import base, hf_config, qformer, registry, sections, t5
from robovlms_jax.nn.decoder_config import DecoderConfig
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
TOWER_RULES = (
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
)
FORMER_RULES = qformer.make_rules("query_tokens", "qformer", "language_projection", "connector")
OPT_RULES = (
    rules.Rule(f"{OPT}.embed_tokens.weight", "text/embed/table"),
    rules.Rule(f"{OPT}.embed_positions.weight", "text/positions"),
    *rules.layer_norm(f"{LAYER}.self_attn_layer_norm", "text/layers/attn_norm"),
    *rules.attention(f"{LAYER}.self_attn", "text/layers/attn"),
    *rules.layer_norm(f"{LAYER}.final_layer_norm", "text/layers/mlp_norm"),
    *rules.linear(f"{LAYER}.fc1", "text/layers/mlp/up"),
    *rules.linear(f"{LAYER}.fc2", "text/layers/mlp/down"),
    *rules.layer_norm(f"{OPT}.final_layer_norm", "text/final_norm"),
    *rules.head("language_model.lm_head", "text", tied=True),
)
LLAMA_RULES = (
    *rules.llama("language_model.model", "text"),
    *rules.head("language_model.lm_head", "text", tied=False),
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


def _language(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of VLMConfig that the language model decides."""
    kind = (values.get("text_config") or {}).get("model_type", "opt")
    if kind == "t5":
        text, encoder = t5.read(values)
        own = t5.make_rules("language_model", is_gated=text.is_gated)
        return {"text": text, "encoder": encoder, "bos_id": 1, "eos_id": 1, "pad_id": 0, "rules": own}
    if kind == "llama":
        text = sections.read_text(values, sections.LLAMA, sections.LLAMA_7B)
        # InstructBLIP's tokenizer begins with </s>, and has [PAD] as one token more.
        return {"text": text, "bos_id": 2, "eos_id": 2, "pad_id": 32_000, "rules": LLAMA_RULES}
    text = TEXT.read(values, OPT_125M)
    projected = (values.get("text_config") or {}).get("word_embed_proj_dim") or text.width
    if projected != text.width:
        raise ValueError(f"text_config.word_embed_proj_dim={projected} is not supported; this model has {text.width}.")
    return {"text": sections.with_head(text, values), "bos_id": 2, "eos_id": 2, "pad_id": 1, "rules": OPT_RULES}


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration."""
    vision = VISION.read(values, EVA_G)
    former = QFORMER.read(values, qformer.QFormerConfig())
    config = base.VLMConfig(
        model_type="blip-2",
        vision=vision,
        connector=dataclasses.replace(former, num_queries=values.get("num_query_tokens", former.num_queries)),
        image=sections.clip_image(vision.image_size),
        prompt="{instruction}",
        lead=0,
        tail=0,
        **_language(values),
    )
    config = dataclasses.replace(config, rules=(*TOWER_RULES, *FORMER_RULES, *config.rules, rules.LORA))
    return config if config.encoder is None else t5.IDS.read(values, config)


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    image_token = 50_265
    if config.encoder is not None:
        image_token, text = 32_100, t5.write(config.text, config.encoder) | t5.IDS.write(config)
    elif config.text.positions == "learned":
        text = TEXT.write(config.text) | {"word_embed_proj_dim": config.width}
    else:
        image_token, text = 32_000, sections.LLAMA.write(config.text)
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "image_token_index": image_token,
        "num_query_tokens": config.connector.num_queries,
        "qformer_config": QFORMER.write(config.connector) | {"encoder_hidden_size": config.vision.width},
        "text_config": text,
        "vision_config": VISION.write(config.vision),
    } | sections.write_head(config.text)


def published(width: int, heads: int) -> dict[str, Any]:
    """What Salesforce/blip2-opt-* say about their decoder in config.json."""
    text = {"hidden_size": width, "ffn_dim": 4 * width, "num_hidden_layers": 32, "num_attention_heads": heads}
    return {"text_config": text | {"model_type": "opt", "vocab_size": 50_304}}


FLAN_T5_XL = {
    "model_type": "t5",
    "d_model": 2048,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",  # exact, unlike FLAN-T5's own
    "tie_word_embeddings": False,
}
registry.register_family("blip-2", read, write)
registry.register("blip2-opt-2.7b")(functools.partial(read, published(2560, 32)))
registry.register("blip2-opt-6.7b")(functools.partial(read, published(4096, 32)))
registry.register("blip2-flan-t5-xl")(functools.partial(read, {"text_config": FLAN_T5_XL}))
