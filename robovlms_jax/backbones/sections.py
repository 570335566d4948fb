"""Parts of config.json that several families share, with the defaults of transformers' configuration classes.

A published file leaves out what equals those defaults, so reading begins with them.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

from robovlms_jax.backbones import base, hf_config
from robovlms_jax.inputs.images import ImageSpec
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.nn.vit import ViTConfig

logger = logging.getLogger(__name__)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def clip_image(size: int) -> ImageSpec:
    """OpenAI CLIP's preparation of images."""
    return ImageSpec(size, CLIP_MEAN, CLIP_STD, "bicubic")


def half_image(size: int, interpolation: str = "bicubic") -> ImageSpec:
    """SigLIP's preparation of images: to [-1, 1]."""
    return ImageSpec(size, HALF, HALF, interpolation)


# Vision towers.

CLIP_L = ViTConfig(
    image_size=224,
    patch_size=14,
    width=1024,
    depth=24,
    mlp_dim=4096,
    num_heads=16,
    activation="quick_gelu",
    norm_epsilon=1e-5,
    cls="keep",
    patch_bias=False,
    pre_norm=True,
)
SIGLIP_B = ViTConfig(  # SiglipVisionConfig()
    image_size=224,
    patch_size=16,
    width=768,
    depth=12,
    mlp_dim=3072,
    num_heads=12,
    activation="gelu_pytorch_tanh",
    norm_epsilon=1e-6,
)
VISION_FIELDS = {
    "image_size": ("image_size",),
    "patch_size": ("patch_size",),
    "width": ("hidden_size",),
    "depth": ("num_hidden_layers",),
    "mlp_dim": ("intermediate_size",),
    "num_heads": ("num_attention_heads",),
    "activation": ("hidden_act",),
    "norm_epsilon": ("layer_norm_eps",),
}
VISION_FIXED = {"attention_dropout": 0.0, "num_channels": 3}


def vision(model_type: str | None = None, **fixed: Any) -> hf_config.Section:
    """`vision_config` of CLIP and SigLIP."""
    kind = {} if model_type is None else {"model_type": model_type}
    return hf_config.Section("vision_config", VISION_FIELDS, VISION_FIXED | kind | fixed)


# Language decoders.

LLAMA_7B = DecoderConfig(  # LlamaConfig()
    width=4096, depth=32, mlp_dim=11_008, num_heads=32, vocab_size=32_000, activation="silu", norm_epsilon=1e-6
)
GEMMA_7B = DecoderConfig(  # GemmaConfig()
    width=3072,
    depth=28,
    mlp_dim=24_576,
    num_heads=16,
    vocab_size=256_000,
    activation="gelu_pytorch_tanh",
    norm_epsilon=1e-6,
    own_head_dim=256,
    norm="rms_plus_one",
    head="tied",
    embed_scale=True,
)
GEMMA2_2B = dataclasses.replace(  # Gemma2Config()
    GEMMA_7B,
    width=2304,
    depth=26,
    mlp_dim=9216,
    num_heads=8,
    num_kv_heads=4,
    residual="sandwich",
    query_scalar=256,
    softcap=50.0,
    logit_softcap=30.0,
    sliding_window=4096,
)
QWEN2_7B = DecoderConfig(  # Qwen2Config()
    width=4096,
    depth=32,
    mlp_dim=22_016,
    num_heads=32,
    vocab_size=151_936,
    activation="silu",
    norm_epsilon=1e-6,
    attention_bias="qkv",
)
PHI = DecoderConfig(  # PhiConfig(): Phi 1.5
    width=2048,
    depth=24,
    mlp_dim=8192,
    num_heads=32,
    vocab_size=51_200,
    activation="gelu_new",
    norm_epsilon=1e-5,
    norm="layer",
    residual="parallel",
    is_gated=False,
    attention_bias="all",
    mlp_bias=True,
    rotary_fraction=0.5,
    head="linear_bias",
)
TEXT_FIELDS = {
    "width": ("hidden_size",),
    "depth": ("num_hidden_layers",),
    "mlp_dim": ("intermediate_size",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "own_head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "activation": ("hidden_act",),
    "norm_epsilon": ("rms_norm_eps",),
    "rope_theta": ("rope_theta", "rope_parameters.rope_theta"),
    "attention_dropout": ("attention_dropout",),
}


def text(model_type: str, fields: Mapping[str, tuple[str, ...]] | None = None, **fixed: Any) -> hf_config.Section:
    """`text_config` of Llama and its relatives."""
    return hf_config.Section("text_config", TEXT_FIELDS | dict(fields or {}), {"model_type": model_type} | fixed)


def read_text(values: Mapping[str, Any], section: hf_config.Section, default: DecoderConfig) -> DecoderConfig:
    """A decoder from its part of config.json. Raises ValueError for scaled rotary embeddings, too."""
    part = section.part(values)
    rope = part.get("rope_parameters") or part.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope", "dynamic"):  # dynamic: only beyond max_position_embeddings, some 30 000 tokens
        raise ValueError(f"{section.prefix}rope_scaling of type {kind!r} is not supported; this model has none.")
    return with_head(section.read(values, default), values)


def with_head(text: DecoderConfig, values: Mapping[str, Any]) -> DecoderConfig:
    """The decoder with its head tied to the token table or not, as config.json says; where it says nothing, as is.

    transformers 5 reads `tie_word_embeddings` at the top, 4 in `text_config`. Where the two disagree, the head is tied
    until weights show one of its own: see `registry.untied`. Raises ValueError for a head with a bias, which is never
    tied.
    """
    top, part = values.get("tie_word_embeddings"), values.get("text_config") or {}
    nested = part.get("tie_word_embeddings")
    if top is None and text.head == "tied":
        top = True
    stated = [bool(flag) for flag in (top, nested) if flag is not None]
    tied = any(stated) if stated else text.head == "tied"
    if len(set(stated)) == 2:
        _say_once(
            f"config.json: tie_word_embeddings is {top} at the top and {nested} in text_config; taken as true, unless "
            "the weights hold a head that differs from the token table."
        )
    if tied and text.head == "linear_bias":
        raise ValueError("tie_word_embeddings=True is not supported; this model's head has a matrix of its own.")
    return text if text.head == "linear_bias" else dataclasses.replace(text, head="tied" if tied else "linear")


def write_head(text: DecoderConfig) -> dict[str, Any]:
    """The entry of config.json that `with_head` reads."""
    return {"tie_word_embeddings": text.head == "tied"}


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


LLAMA = text("llama", attention_bias=False, mlp_bias=False)
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13_824, "num_attention_heads": 40, "num_hidden_layers": 40}
"""What `text_config` says of the next larger Llama, whose defaults are those of 7 billion parameters."""
IDS = hf_config.Section("", {"bos_id": ("bos_token_id",), "eos_id": ("eos_token_id",), "pad_id": ("pad_token_id",)})
SIGLIP = vision(vision_use_head=False)


def read_siglip_llama(values: Mapping[str, Any], siglip: ViTConfig = SIGLIP_B, **fields: Any) -> base.VLMConfig:
    """A model of SigLIP and Llama from its config.json; `fields` of VLMConfig are what the file does not say."""
    vision = SIGLIP.read(values, siglip)
    defaults = {"image": half_image(vision.image_size), "text": read_text(values, LLAMA, LLAMA_7B)}
    return base.VLMConfig(vision=vision, **defaults | fields)


def write_siglip_llama(config: base.VLMConfig, architecture: str, **fields: Any) -> dict[str, Any]:
    """The config.json that `read_siglip_llama` reads; logits with a matrix of their own."""
    parts = {"text_config": LLAMA.write(config.text), "vision_config": SIGLIP.write(config.vision)}
    return {"architectures": [architecture]} | write_head(config.text) | parts | fields
