"""Qwen3-VL: a ViT whose features of several layers enter the decoder (DeepStack), Qwen 3. Bai et al. 2025,
arXiv:2511.21631."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.backbones import base, hf_config, qwen2_5_vl, registry, sections
from robovlms_jax.backbones.connectors import MLPConnector, MLPConnectorConfig
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.nn.linear import Kernel
from robovlms_jax.nn.vit import ViTConfig
from robovlms_jax.weights import rules


@dataclasses.dataclass(frozen=True)
class MergedViTConfig(ViTConfig):
    """The vision tower. Published files leave the size of images open; here it is fixed, so shapes are."""

    merge: int = 2
    """merge x merge patches become one token."""

    def __post_init__(self):
        super().__post_init__()
        if self.side % self.merge:
            raise ValueError(
                f"image_size={self.image_size} is no multiple of {self.patch_size * self.merge} "
                f"(patch_size={self.patch_size} x spatial_merge_size={self.merge})."
            )
        if not self.taps or list(self.taps) != sorted({*self.taps} & {*range(self.depth)}):
            raise ValueError(
                f"deepstack_visual_indexes={list(self.taps)} must name some of the {self.depth} layers, in their order."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return (self.side // self.merge,) * 2

    def tiny(self) -> MergedViTConfig:
        small = {"width": 24, "depth": 3, "mlp_dim": 40, "num_heads": 2, "taps": (0, 1)}
        return dataclasses.replace(self, image_size=24, patch_size=4, position_side=4, **small)  # 3 x 3 tokens


@dataclasses.dataclass(frozen=True)
class DeepStackConfig:
    """Neighbouring patches side by side, then two matrices, for the last layer's features and for every other layer's
    that is tapped."""

    merge: int = 2

    def build(self, text: DecoderConfig, kernel: Kernel) -> nn.Module:
        return DeepStack(self, text, kernel)

    def tiny(self) -> DeepStackConfig:
        return self


class DeepStack(nn.Module):
    """Tokens of the last layer, and what those of the others add behind the decoder's first layers (Meng et al. 2024,
    arXiv:2406.04334)."""

    config: DeepStackConfig
    text: DecoderConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> tuple[jax.Array, jax.Array]:
        """float[1 + n, B, P', vision width] -> float[B, P, D], float[B, P, n, D]; P = P' / merge^2."""
        last = MLPConnectorConfig("gathered", shuffle=self.config.merge, norm="layer")
        others = dataclasses.replace(last, norm_gathered=True)
        each = nn.vmap(
            MLPConnector,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        tokens = MLPConnector(last, self.text, self.kernel, name="last")(features[0])
        return tokens, jnp.moveaxis(each(others, self.text, self.kernel, name="layers")(features[1:]), 0, 2)


VISION = hf_config.Section(
    "vision_config",
    {
        "image_size": ("image_size",),  # our own entry; transformers lets it vary
        "patch_size": ("patch_size",),
        "frames": ("temporal_patch_size",),
        "width": ("hidden_size",),
        "depth": ("depth",),
        "mlp_dim": ("intermediate_size",),
        "num_heads": ("num_heads",),
        "activation": ("hidden_act",),
        "merge": ("spatial_merge_size",),
        "taps": ("deepstack_visual_indexes",),
    },
)
TEXT = hf_config.Section(
    "text_config",
    qwen2_5_vl.TEXT.fields | {"own_head_dim": ("head_dim",)},
    {"attention_bias": False},
)
BLOCK, MERGER = "model.visual.blocks.{layer}", "model.visual.deepstack_merger_list.{layer}"


def _merger(source: str, target: str) -> rules.Rules:
    rows = rules.layer_norm(f"{source}.norm", f"{target}/norm")
    rows += rules.linear(f"{source}.linear_fc1", f"{target}/hidden")
    return rows + rules.linear(f"{source}.linear_fc2", f"{target}/out")


RULES = (
    rules.Rule("model.visual.patch_embed.proj.weight", "vision/patch/kernel", "o c t h w -> t h w c o"),
    rules.Rule("model.visual.patch_embed.proj.bias", "vision/patch/bias"),
    rules.Rule("model.visual.pos_embed.weight", "vision/positions"),
    *rules.layer_norm(f"{BLOCK}.norm1", "vision/layers/attn_norm"),
    *rules.fused_qkv(f"{BLOCK}.attn.qkv.weight", f"{BLOCK}.attn.qkv.bias", "vision/layers/attn"),
    *rules.linear(f"{BLOCK}.attn.proj", "vision/layers/attn/o", "d (n h) -> n h d"),
    *rules.layer_norm(f"{BLOCK}.norm2", "vision/layers/mlp_norm"),
    *rules.linear(f"{BLOCK}.mlp.linear_fc1", "vision/layers/mlp/up"),
    *rules.linear(f"{BLOCK}.mlp.linear_fc2", "vision/layers/mlp/down"),
    *_merger("model.visual.merger", "connector/last"),
    *_merger(MERGER, "connector/layers"),
    *rules.llama("model.language_model", "text", qk_norm=True),
    *rules.head("lm_head", "text", tied=False),
    rules.LORA,
)
VIT = MergedViTConfig(
    image_size=256,
    patch_size=16,
    width=1152,
    depth=27,
    mlp_dim=4304,
    num_heads=16,
    activation="gelu_pytorch_tanh",
    norm_epsilon=1e-6,
    post_norm=False,
    position_side=48,
    position_resize="bilinear",
    grid_rotary=True,
    frames=2,
    taps=(8, 16, 24),
)
QWEN3 = dataclasses.replace(
    sections.QWEN2_7B,
    attention_bias="none",
    rope_theta=500_000.0,
    mrope_sections=(24, 20, 20),
    mrope_interleaved=True,
    qk_norm=True,
)


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration."""
    visual = values.get("vision_config") or {}
    text = {"head_dim": 128} | dict(values.get("text_config") or {})  # whatever the width
    side = int(visual.get("num_position_embeddings", 2304) ** 0.5)
    vision = VISION.read(values, dataclasses.replace(VIT, position_side=side))
    return base.VLMConfig(
        model_type="qwen3_vl",
        vision=vision,
        text=sections.read_text({**values, "text_config": text}, TEXT, QWEN3),
        connector=DeepStackConfig(vision.merge),
        image=sections.half_image(vision.image_size),
        rules=RULES,
        **qwen2_5_vl.sequence_fields(values, vision.grid),
    )


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    text, vision = TEXT.write(config.text), config.vision
    text["rope_parameters"] |= {"rope_type": "default", "mrope_interleaved": True}
    more = {"out_hidden_size": config.width, "num_position_embeddings": (vision.position_side or vision.side) ** 2}
    parts = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": text,
        "vision_config": VISION.write(vision) | more,
    }
    return parts | qwen2_5_vl.write_sequence_fields(config) | sections.write_head(config.text)


def published(vision: Mapping[str, Any], width: int, mlp_dim: int, depth: int, heads: int) -> dict[str, Any]:
    """What Qwen/Qwen3-VL-*-Instruct say in config.json."""
    text = {
        "hidden_size": width,
        "intermediate_size": mlp_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "rope_theta": 5_000_000,
    }
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": width < 4096}


VIT_L = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}

registry.register_family("qwen3_vl", read, write)
registry.register("qwen3-vl-2b")(functools.partial(read, published(VIT_L, 2048, 6144, 28, 16)))
registry.register("qwen3-vl-4b")(functools.partial(read, published(VIT_L, 2560, 9728, 36, 32)))
registry.register("qwen3-vl-8b")(functools.partial(read, published({}, 4096, 12_288, 36, 32)))
