"""Qwen2.5-VL: a ViT of windows, two by two patches merged, Qwen2.5 with M-RoPE. Bai et al. 2025, arXiv:2502.13923."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.backbones import base, connectors, hf_config, registry, sections
from robovlms_jax.nn.attention import Attention
from robovlms_jax.nn.linear import Kernel
from robovlms_jax.nn.mlp import MLP
from robovlms_jax.nn.norms import RMSNorm
from robovlms_jax.nn.positions import Rotary, grid_rotary
from robovlms_jax.nn.stack import Remat, scan_layers
from robovlms_jax.nn.vit import embed_patches
from robovlms_jax.weights import rules

EPSILON = 1e-6  # of all norms of the vision tower


@dataclasses.dataclass(frozen=True)
class WindowViTConfig:
    """Size of the vision tower. Published files leave the size of images open; here it is fixed, so shapes are."""

    image_size: int = 224
    patch_size: int = 14
    frames: int = 2
    """Frames of a patch; a picture is shown twice."""
    width: int = 1280
    depth: int = 32
    mlp_dim: int = 3420
    num_heads: int = 16
    activation: str = "silu"
    merge: int = 2
    """merge x merge patches become one token."""
    window_size: int = 112
    """Pixels; patches attend within windows, in all but `full_layers`."""
    full_layers: tuple[int, ...] = (7, 15, 23, 31)

    def __post_init__(self):
        if self.image_size % (self.patch_size * self.merge):
            raise ValueError(
                f"image_size={self.image_size} is no multiple of {self.patch_size * self.merge} "
                f"(patch_size={self.patch_size} x spatial_merge_size={self.merge})."
            )

    @property
    def side(self) -> int:
        """Patches along an edge."""
        return self.image_size // self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return (self.side // self.merge,) * 2

    def build(self, kernel: Kernel, remat: Remat) -> nn.Module:
        return WindowViT(self, kernel, remat)

    def tiny(self) -> WindowViTConfig:
        return dataclasses.replace(  # 3 x 3 tokens; windows of 2 x 2 of them, cut at the border
            self, image_size=84, width=24, depth=2, mlp_dim=40, num_heads=2, window_size=56, full_layers=(1,)
        )


class Block(nn.Module):
    """Pre-norm layer with a gated MLP."""

    config: WindowViTConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, rotary: Rotary) -> jax.Array:
        """float[B, P, D] -> float[B, P, D]."""
        c = self.config
        attention = Attention(c.num_heads, c.width // c.num_heads, kernel=self.kernel, name="attn")
        x = x + attention(RMSNorm(EPSILON, name="attn_norm")(x), mask=mask, rotary=rotary)[0]
        mlp = MLP(c.mlp_dim, c.activation, is_gated=True, kernel=self.kernel, name="mlp")
        return x + mlp(RMSNorm(EPSILON, name="mlp_norm")(x))


class WindowViT(nn.Module):
    """Normalised images to features of all patches, row by row."""

    config: WindowViTConfig
    kernel: Kernel = Kernel()
    remat: Remat = "none"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float[B, size, size, 3] -> float[B, P, D]."""
        c = self.config
        x = embed_patches(images, c, self.kernel, use_bias=False)
        rows, columns = np.indices((c.side, c.side)).reshape(2, -1)
        cells = c.window_size // c.patch_size
        window = rows // cells * c.side + columns // cells
        near = jnp.asarray(window[:, None] == window)[None]
        rotary = grid_rotary(c.side, c.width // c.num_heads)

        def step(block, x, is_full):
            return block(x, jnp.where(is_full, True, near), rotary), None

        is_full = jnp.asarray([layer in c.full_layers for layer in range(c.depth)])
        block = Block(c, self.kernel, name="layers")
        return scan_layers(step, block, x, is_full, length=c.depth, remat=self.remat)[0]


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
        "window_size": ("window_size",),
        "full_layers": ("fullatt_block_indexes",),
    },
)
TEXT = hf_config.Section(
    "text_config",
    {key: names for key, names in sections.TEXT_FIELDS.items() if key not in ("own_head_dim", "rope_theta")}
    | {
        "rope_theta": ("rope_parameters.rope_theta", "rope_theta"),
        "mrope_sections": ("rope_parameters.mrope_section", "rope_scaling.mrope_section"),
    },
    {"use_sliding_window": False},
)
NAMES, BLOCK = ("gate", "up", "down"), "model.visual.blocks.{layer}"


RULES = (
    rules.Rename(r"^(layers|embed_tokens|norm)\.", r"language_model.\1."),
    rules.Rule("model.visual.patch_embed.proj.weight", "vision/patch/kernel", "o c t h w -> t h w c o"),
    *rules.rms_norm(f"{BLOCK}.norm1", "vision/layers/attn_norm"),
    *rules.fused_qkv(f"{BLOCK}.attn.qkv.weight", f"{BLOCK}.attn.qkv.bias", "vision/layers/attn"),
    *rules.linear(f"{BLOCK}.attn.proj", "vision/layers/attn/o", "d (n h) -> n h d"),
    *rules.rms_norm(f"{BLOCK}.norm2", "vision/layers/mlp_norm"),
    *rules.linear("model.visual.merger.mlp.0", "connector/hidden"),
    *(row for name in NAMES for row in rules.linear(f"{BLOCK}.mlp.{name}_proj", f"vision/layers/mlp/{name}")),
    *rules.rms_norm("model.visual.merger.ln_q", "connector/norm"),
    *rules.linear("model.visual.merger.mlp.2", "connector/out"),
    *rules.llama("model.language_model", "text", bias="qkv"),
    *rules.head("lm_head", "text", tied=False),
    rules.LORA,
)


QWEN = dataclasses.replace(sections.QWEN2_7B, rope_theta=1e6, mrope_sections=(16, 24, 24))


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration. Published files have the decoder's entries at the top."""
    part = values.get("text_config") or values
    vision = VISION.read(values, WindowViTConfig())
    text = sections.read_text({**values, "text_config": part}, TEXT, QWEN)
    return base.VLMConfig(
        model_type="qwen2_5_vl",
        vision=vision,
        text=text,
        connector=connectors.MLPConnectorConfig("gathered", shuffle=vision.merge, norm="rms"),
        image=sections.clip_image(vision.image_size),
        rules=RULES,
        **sequence_fields(values, vision.grid),
    )


def sequence_fields(values: Mapping[str, Any], grid: tuple[int, int]) -> dict[str, Any]:
    """Fields of VLMConfig that say how Qwen's models since 2.5 put images and text together."""
    start = values.get("vision_start_token_id", 151_652)
    around = {"image_start": (start,), "image_end": (values.get("vision_end_token_id", start + 1),)}
    ids = {"bos_id": 151_643, "eos_id": 151_645, "pad_id": 151_643}
    return {"prompt": "{instruction}", "lead": 0, "tail": 0, "image_grid": grid} | around | ids


def write_sequence_fields(config: base.VLMConfig) -> dict[str, Any]:
    """The entries of config.json that `sequence_fields` reads."""
    return {"vision_start_token_id": config.image_start[0], "vision_end_token_id": config.image_end[0]}


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json."""
    text = TEXT.write(config.text)
    text["rope_parameters"]["rope_type"] = "default"
    parts = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "text_config": text,
        "vision_config": VISION.write(config.vision) | {"out_hidden_size": config.width},
    }
    return parts | write_sequence_fields(config) | sections.write_head(config.text)


def published(width: int, depth: int, mlp_dim: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    """What Qwen/Qwen2.5-VL-*-Instruct say about their decoder in config.json."""
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "intermediate_size": mlp_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": vocab == 151_936,
    }


registry.register_family("qwen2_5_vl", read, write)
registry.register("qwen2.5-vl-3b")(functools.partial(read, published(2048, 36, 11_008, 16, 2, 151_936)))
registry.register("qwen2.5-vl-7b")(functools.partial(read, published(3584, 28, 18_944, 28, 4, 152_064)))
