"""Florence-2 (Xiao et al. 2023, arXiv:2311.06242): DaViT, a projection, and BART, an encoder and a decoder.

In the layout of transformers' own class; the first release, which brings its code along, has other tensor names.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.backbones import base, hf_config, registry, sections, t5
from robovlms_jax.inputs.images import ImageSpec
from robovlms_jax.nn.davit import DaViTConfig
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.nn.linear import Dense, Kernel
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.weights import rules

logger = logging.getLogger(__name__)

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BART = DecoderConfig(  # BartConfig()
    width=1024,
    depth=12,
    mlp_dim=4096,
    num_heads=16,
    vocab_size=50_265,
    activation="gelu",
    norm_epsilon=1e-5,
    norm="layer",
    residual="post",
    cross=True,
    embed_norm=True,
    final_norm=False,
    is_gated=False,
    attention_bias="all",
    mlp_bias=True,
    positions="learned",
    max_positions=1024,
    head="tied",
    dropout=0.1,
)


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Learned rows and columns, one matrix, a norm; a token more, the patches' mean, comes first."""

    max_positions: int = 50
    """Rows, and columns, that there are positions for."""

    def build(self, text: DecoderConfig, kernel: Kernel) -> nn.Module:
        return Projector(self, text, kernel)

    def tiny(self) -> ProjectorConfig:
        return dataclasses.replace(self, max_positions=7)


class Projector(nn.Module):
    """norm(matrix([mean of x; x])), x the patches with their places."""

    config: ProjectorConfig
    text: DecoderConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """float[B, P, vision width] -> float[B, 1 + P, D]."""
        width, side = features.shape[-1], int(features.shape[1] ** 0.5)
        limit = self.config.max_positions
        if side > limit:
            raise ValueError(f"the vision tower gives {side} rows of patches, and the model has places for {limit}.")

        def places(name: str, size: int) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", "embed"))
            return self.param(name, init, (limit, size))[:side].astype(features.dtype)

        rows, columns = places("rows", width // 2), places("columns", width - width // 2)
        grid = [jnp.tile(columns, (side, 1)), jnp.repeat(rows, side, axis=0)]
        # The first of the sinusoids that tell the frames of a video apart: sin 0, cos 0, sin 0, ...
        x = features + jnp.concatenate(grid, axis=-1) + np.arange(width, dtype=np.float32).astype(features.dtype) % 2
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        x = Dense(self.text.width, (None, "embed"), use_bias=False, kernel=self.kernel, name="dense")(x)
        return LayerNorm(1e-5, name="norm")(x)


def tower_rules(source: str, target: str, stages: int) -> rules.Rules:
    """DaViT's tensors."""
    rows = ()
    for stage in range(stages):
        there, here = f"{source}.convs.{stage}", f"{target}/stage{stage}"
        rows += rules.linear(f"{there}.conv", f"{here}/patch", "o c h w -> h w c o")
        rows += rules.layer_norm(f"{there}.norm", f"{here}/patch_norm")
        for kind, attention, ours in (("spatial", "window", "windows"), ("channel", "channel", "channels")):
            there, here = f"{source}.blocks.{stage}.{{layer}}.{kind}_block", f"{target}/stage{stage}/layers/{ours}"
            qkv = f"{there}.{attention}_attn.qkv"
            for number, name in ((1, "nearby"), (2, "nearby_mlp")):
                rows += (
                    rules.Rule(f"{there}.conv{number}.weight", f"{here}/{name}/taps", "(d 1) 1 h w -> h w d"),
                    rules.Rule(f"{there}.conv{number}.bias", f"{here}/{name}/bias"),
                )
            rows += (
                *rules.layer_norm(f"{there}.norm1", f"{here}/attn_norm"),
                *rules.fused_qkv(f"{qkv}.weight", f"{qkv}.bias", f"{here}/attn"),
                *rules.linear(f"{there}.{attention}_attn.proj", f"{here}/attn/o", "d (n h) -> n h d"),
                *rules.layer_norm(f"{there}.norm2", f"{here}/mlp_norm"),
                *rules.linear(f"{there}.ffn.fc1", f"{here}/mlp/up"),
                *rules.linear(f"{there}.ffn.fc2", f"{here}/mlp/down"),
            )
    return rows


def bart_rules(source: str, target: str, *, cross: bool) -> rules.Rules:
    """BART's encoder or decoder, without the token table."""
    layer, here = f"{source}.layers.{{layer}}", f"{target}/layers"
    rows = (
        rules.Rule(f"{source}.embed_positions.weight", f"{target}/positions"),
        *rules.layer_norm(f"{source}.layernorm_embedding", f"{target}/embed_norm"),
        *rules.attention(f"{layer}.self_attn", f"{here}/attn"),
        *rules.layer_norm(f"{layer}.self_attn_layer_norm", f"{here}/attn_norm"),
        *rules.linear(f"{layer}.fc1", f"{here}/mlp/up"),
        *rules.linear(f"{layer}.fc2", f"{here}/mlp/down"),
        *rules.layer_norm(f"{layer}.final_layer_norm", f"{here}/mlp_norm"),
    )
    if cross:
        rows += rules.attention(f"{layer}.encoder_attn", f"{here}/cross")
        rows += rules.layer_norm(f"{layer}.encoder_attn_layer_norm", f"{here}/cross_norm")
    return rows


def make_rules(stages: int) -> rules.Rules:
    """How published tensors become parameters, of a tower of so many stages."""
    projector, language = "model.multi_modal_projector", "model.language_model"
    return (
        *tower_rules("model.vision_tower", "vision", stages),
        rules.Rule(f"{projector}.image_position_embed.row_embeddings.weight", "connector/rows"),
        rules.Rule(f"{projector}.image_position_embed.column_embeddings.weight", "connector/columns"),
        *rules.linear(f"{projector}.image_projection", "connector/dense", use_bias=False),
        *rules.layer_norm(f"{projector}.image_proj_norm", "connector/norm"),
        rules.Ignore(r"multi_modal_projector\.visual_temporal_embed\..*", "constant sinusoids"),
        *rules.shared(f"{language}.shared.weight", [f"{language}.{half}.embed_tokens.weight" for half in t5.HALVES]),
        *bart_rules(f"{language}.encoder", "encoder", cross=False),
        *bart_rules(f"{language}.decoder", "text", cross=True),
        *rules.head("lm_head", "text", tied=True),
        rules.LORA,
    )


TOWER = {
    "depths": "depths",
    "widths": "embed_dim",
    "num_heads": "num_heads",
    "num_groups": "num_groups",
    "patch_sizes": "patch_size",
    "strides": "patch_stride",
    "paddings": "patch_padding",
    "prenorms": "patch_prenorm",
}
"""Fields with an entry per stage -> their names in config.json."""
VISION = hf_config.Section(
    "vision_config",
    {
        "image_size": ("image_size",),
        "window": ("window_size",),
        "mlp_ratio": ("mlp_ratio",),
        "activation": ("activation_function",),
    },
    {"qkv_bias": True, "in_channels": 3},
)
PROJECTOR = hf_config.Section("vision_config", {"max_positions": ("max_position_embeddings",)})


def half(name: str) -> hf_config.Section:
    """The part of config.json about BART's encoder or decoder."""
    sizes = {"depth": (f"{name}_layers",), "mlp_dim": (f"{name}_ffn_dim",), "num_heads": (f"{name}_attention_heads",)}
    both = {
        "width": ("d_model",),
        "vocab_size": ("vocab_size",),
        "activation": ("activation_function",),
        "max_positions": ("max_position_embeddings",),
        "dropout": ("dropout",),
        "attention_dropout": ("attention_dropout",),
    }
    fixed = {"model_type": "bart", "scale_embedding": False, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    return hf_config.Section("text_config", sizes | both, fixed)


IDS = hf_config.Section(
    "text_config",
    {
        "bos_id": ("bos_token_id",),
        "eos_id": ("eos_token_id",),
        "pad_id": ("pad_token_id",),
        "start_id": ("decoder_start_token_id",),
    },
)


def read(values: Mapping[str, Any]) -> base.VLMConfig:
    """config.json -> configuration. What is dropped inside of MLPs, and layers that training skips, are not."""
    part = VISION.part(values)
    stages = {ours: tuple(part[theirs]) for ours, theirs in TOWER.items() if part.get(theirs) is not None}
    vision = VISION.read(values, dataclasses.replace(DaViTConfig(), **stages))
    text = sections.with_head(half("decoder").read(values, BART), values)
    projected = part.get("projection_dim", 1024)
    if projected != text.width:
        raise ValueError(f"vision_config.projection_dim={projected} is not supported; the decoder has {text.width}.")
    config = base.VLMConfig(
        model_type="florence2",
        vision=vision,
        text=text,
        encoder=dataclasses.replace(half("encoder").read(values, BART), cross=False, head="tied"),
        connector=PROJECTOR.read(values, ProjectorConfig()),
        image=ImageSpec(vision.image_size, *IMAGENET, "bicubic"),
        prompt="<s>{instruction}</s>",
        special_tokens=False,
        lead=0,
        tail=0,
        bos_id=0,
        eos_id=2,
        pad_id=1,
        start_id=2,
        rules=make_rules(len(vision.widths)),
    )
    return IDS.read(values, config)


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json, with `vision_config.image_size` of our own: published ones leave it to the image
    processor's file."""
    stages = {theirs: list(getattr(config.vision, ours)) for ours, theirs in TOWER.items()}
    vision = VISION.write(config.vision) | PROJECTOR.write(config.connector) | stages
    text = half("encoder").write(config.encoder) | half("decoder").write(config.text) | IDS.write(config)
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "image_token_id": 51_289,
        "text_config": text,
        "vision_config": vision | {"projection_dim": config.width},
    } | sections.write_head(config.text)


def fit(config: base.VLMConfig, tensors: Mapping[str, tuple[int, ...]]) -> base.VLMConfig:
    """As many rows in the token table as the weights have: some files hold rows that no token uses."""
    rows = {rules.normalize(name): shape[0] for name, shape in tensors.items()}.get("language_model.shared.weight")
    if rows is None or rows == config.text.vocab_size:
        return config
    logger.warning(
        "the token table has %d rows and config.json says %d; taken from the weights", rows, config.text.vocab_size
    )
    text, encoder = (dataclasses.replace(half, vocab_size=rows) for half in (config.text, config.encoder))
    return dataclasses.replace(config, text=text, encoder=encoder)


def published(width: int, layers: int, heads: int, positions: int, tower: int) -> dict[str, Any]:
    """Sizes that Florence-2's config.json has, those that base and large share left out."""
    sizes = {f"{name}_layers": layers for name in ("encoder", "decoder")}
    sizes |= {f"{name}_attention_heads": heads for name in ("encoder", "decoder")}
    sizes |= {f"{name}_ffn_dim": 4 * width for name in ("encoder", "decoder")}
    counts = [tower // 32 * 2**stage for stage in range(4)]
    vision = {"embed_dim": [tower * 2**stage for stage in range(4)], "num_heads": counts, "num_groups": counts}
    return {
        "text_config": sizes | {"d_model": width, "vocab_size": 51_289, "max_position_embeddings": positions},
        "vision_config": vision | {"projection_dim": width},
    }


registry.register_family("florence2", read, write, fit)
registry.register("florence-2-base")(functools.partial(read, published(768, 6, 12, 1024, 128)))
registry.register("florence-2-large")(functools.partial(read, published(1024, 12, 16, 4096, 256)))
