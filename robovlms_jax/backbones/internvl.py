"""InternVL3 (the -hf files): InternViT-300M at 448 pixels, 2 x 2 patches gathered, a two-layer MLP, Qwen2.5. Zhu et al.
2025, arXiv:2504.10479."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from robovlms_jax.backbones import base, hf_config, registry, sections
from robovlms_jax.backbones.connectors import MLPConnectorConfig
from robovlms_jax.inputs.images import ImageSpec
from robovlms_jax.nn.vit import ViTConfig
from robovlms_jax.weights import rules

VISION = hf_config.Section(
    "vision_config",
    sections.VISION_FIELDS,
    sections.VISION_FIXED | {"use_qk_norm": False, "norm_type": "layer_norm", "use_mean_pooling": True},
)
TOP = hf_config.Section(
    "", {}, {"projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
)
TEXT = sections.text("qwen2", use_sliding_window=False)
SOURCE, BLOCK, PROJECTOR = "vision_tower", "vision_tower.encoder.layer.{layer}", "multi_modal_projector"
RULES = (
    *rules.HUB_NAMES[:2],
    rules.Rule(f"{SOURCE}.embeddings.cls_token", "vision/cls", "1 1 d -> d"),
    rules.Rule(f"{SOURCE}.embeddings.position_embeddings", "vision/positions", "1 p d -> p d"),
    *rules.linear(f"{SOURCE}.embeddings.patch_embeddings.projection", "vision/patch", "o c h w -> h w c o"),
    *rules.layer_norm(f"{BLOCK}.layernorm_before", "vision/layers/attn_norm"),
    *rules.attention(f"{BLOCK}.attention", "vision/layers/attn", out="projection_layer"),
    rules.Rule(f"{BLOCK}.lambda_1", "vision/layers/attn_scale"),
    *rules.layer_norm(f"{BLOCK}.layernorm_after", "vision/layers/mlp_norm"),
    *rules.linear(f"{BLOCK}.mlp.fc1", "vision/layers/mlp/up"),
    *rules.linear(f"{BLOCK}.mlp.fc2", "vision/layers/mlp/down"),
    rules.Rule(f"{BLOCK}.lambda_2", "vision/layers/mlp_scale"),
    *rules.layer_norm(f"{PROJECTOR}.layer_norm", "connector/norm"),
    *rules.linear(f"{PROJECTOR}.linear_1", "connector/hidden"),
    *rules.linear(f"{PROJECTOR}.linear_2", "connector/out"),
    *rules.llama("language_model.model", "text", bias="qkv"),
    *rules.head("language_model.lm_head", "text", tied=False),
    rules.LORA,
)
INTERNVIT = ViTConfig(  # InternVLVisionConfig()
    image_size=448,
    patch_size=14,
    width=1024,
    depth=24,
    mlp_dim=4096,
    num_heads=16,
    activation="gelu",
    norm_epsilon=1e-6,
    cls="drop",
    layer_scale=True,
    post_norm=False,
)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration."""
    # Said in every published file; transformers' default would leave the biases out.
    if not (values.get("vision_config") or {}).get("attention_bias", True):
        raise ValueError("vision_config.attention_bias=False is not supported; this model has True.")
    vision = VISION.read(values, INTERNVIT)
    shuffle = round(1 / values.get("downsample_ratio", 0.5))
    config = base.VLMConfig(
        model_type="internvl",
        vision=vision,
        text=sections.read_text(values, TEXT, sections.QWEN2_7B),
        connector=MLPConnectorConfig(shuffle=shuffle, norm="layer", norm_gathered=True, norm_epsilon=1e-5),
        image=ImageSpec(vision.image_size, **IMAGENET, interpolation="bicubic"),  # one picture, not split into tiles
        prompt="{instruction}",
        lead=0,
        tail=0,
        image_start=(values.get("image_start_token_id", 151_665),),  # our own entries; the tokenizer's <img>, </img>
        image_end=(values.get("image_end_token_id", 151_666),),
        bos_id=151_643,
        eos_id=151_645,
        pad_id=151_643,
        rules=RULES,
    )
    return TOP.read(values, config)


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    shuffle = config.connector.shuffle
    parts = {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 1 / shuffle,
        "image_start_token_id": config.image_start[0],
        "image_end_token_id": config.image_end[0],
        "image_seq_length": config.vision.side**2 // shuffle**2,
        "text_config": TEXT.write(config.text),
        "vision_config": VISION.write(config.vision) | {"attention_bias": True},
    }
    return parts | TOP.write(config) | sections.write_head(config.text)


def published(width: int, mlp_dim: int, depth: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """What OpenGVLab/InternVL3-*-hf say about their decoder in config.json."""
    text = {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": mlp_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_theta": 1_000_000.0,
        "vocab_size": 151_674,
    }
    return {"text_config": text, "tie_word_embeddings": False}


registry.register_family("internvl", read, write)
registry.register("internvl3-1b")(functools.partial(read, published(896, 4864, 24, 14, 2)))
registry.register("internvl3-2b")(functools.partial(read, published(1536, 8960, 28, 12, 2)))
registry.register("internvl3-8b")(functools.partial(read, published(3584, 18_944, 28, 28, 4)))
