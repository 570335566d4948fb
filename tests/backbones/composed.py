"""Models transformers does not have, put together from parts it or torch has, with their published tensor names.

Written from the architectures' published facts; each vision side and connector is torch's, each decoder transformers'.
"""

from __future__ import annotations

import re
import types
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

from robovlms_jax.backbones import base
from tests.backbones.oracle import IMAGE


class Composed(nn.Module):
    """Image features in place of the placeholders, then the decoder."""

    decoder: nn.Module

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """float[N, 3, size, size] -> float[N, P, D]."""
        raise NotImplementedError

    def published(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by our names here (parameters or their gradients) -> by the names of the checkpoint."""
        raise NotImplementedError

    def forward(self, input_ids, pixel_values, attention_mask, **more: Any) -> Any:
        embeds = self.decoder.get_input_embeddings()(input_ids)
        where = (input_ids == IMAGE)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(where, self.features(pixel_values))
        return self.decoder(inputs_embeds=embeds, attention_mask=attention_mask, **more)


def fuse(state: dict[str, torch.Tensor], pattern: str, target: str) -> None:
    """Stack q, k, v in place: `pattern` has (q|k|v) as its last group."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in list(state):
        match = re.fullmatch(pattern, name)
        if match:
            found.setdefault(match.expand(target), {})[match[match.re.groups]] = state.pop(name)
    assert found, pattern
    state |= {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in found.items()}


def rename(state: dict[str, torch.Tensor], *table: tuple[str, str]) -> dict[str, torch.Tensor]:
    """Every (pattern, replacement) in order, on every name."""
    out = {}
    for name, value in state.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def decoder_values(text) -> dict[str, Any]:
    return {
        "hidden_size": text.width,
        "intermediate_size": text.mlp_dim,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.kv_heads,
        "vocab_size": text.vocab_size,
    }


def vision_values(vision) -> dict[str, Any]:
    return {
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_dim,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_epsilon,
    }


class LlavaMpt(Composed):
    def __init__(self, config: base.VLMConfig):
        super().__init__()
        text = config.text
        self.vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision_values(config.vision)))
        self.projector = nn.Linear(config.vision.width, text.width)
        values = {"d_model": text.width, "n_heads": text.num_heads, "n_layers": text.depth}
        self.decoder = transformers.MptForCausalLM(
            transformers.MptConfig(**values, vocab_size=text.vocab_size, max_seq_len=64)
        )

    def features(self, images):
        return self.projector(self.vision(images, output_hidden_states=True).hidden_states[-2][:, 1:])

    def published(self, state):
        return rename(
            state,
            (r"^vision\.(vision_model\.)?", "vision_model."),
            (r"^projector\.", "transformer.mm_projector."),
            (r"^decoder\.", ""),
        )


class Moondream(Composed):
    def __init__(self, config: base.VLMConfig):
        super().__init__()
        vision, text, connector = config.vision, config.text, config.connector
        self.views = connector.views
        values = vision_values(vision) | {"vision_use_head": False}
        self.vision = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**values))
        self.fc1 = nn.Linear(vision.width * self.views, connector.mlp_dim)
        self.fc2 = nn.Linear(connector.mlp_dim, text.width)
        self.decoder = transformers.PhiForCausalLM(
            transformers.PhiConfig(**decoder_values(text), partial_rotary_factor=text.rotary_fraction)
        )
        self.decoder.model.final_layernorm.register_forward_pre_hook(self._keep)

    def _keep(self, module, arguments):
        self.raw = arguments[0]

    def features(self, images):
        x = self.vision(images).last_hidden_state
        return self.fc2(functional.gelu(self.fc1(torch.cat([x] * self.views, -1)), approximate="tanh"))

    def forward(self, *args, **more):
        out = super().forward(*args, **more)
        return types.SimpleNamespace(logits=out.logits, hidden_states=(self.raw,))  # its code returns them un-normed

    def published(self, state):
        visual, layer = "vision_encoder.encoder.model.visual", "text_model.transformer.h"
        state = rename(
            state,
            (r"^vision\.(vision_model\.)?", f"{visual}."),
            (r"embeddings\.patch_embedding", "patch_embed.linear"),
            (r"embeddings\.position_embedding\.weight", "pos_embed"),
            (r"\.encoder\.layers\.", ".blocks."),
            (r"layer_norm(\d)", r"norm\1"),
            (r"post_layernorm", "norm"),
            (r"^(fc\d)", r"vision_encoder.projection.mlp.\1"),
            (r"^decoder\.model\.embed_tokens", "text_model.transformer.embd.wte"),
            (r"^decoder\.model\.layers\.", f"{layer}."),
            (r"^decoder\.model\.final_layernorm", "text_model.lm_head.ln"),
            (r"^decoder\.lm_head", "text_model.lm_head.linear"),
            (r"input_layernorm", "ln"),
            (rf"({re.escape(layer)}.*)self_attn\.dense", r"\1mixer.out_proj"),
            (rf"({re.escape(visual)}.*)self_attn\.out_proj", r"\1attn.proj"),
        )
        parts = r"\.self_attn\.(?=._proj\.(weight|bias))(q|k|v)_proj\.\2"
        fuse(state, rf"({re.escape(visual)}\.blocks\.\d+){parts}", r"\1.attn.qkv.\2")
        fuse(state, rf"({re.escape(layer)}\.\d+){parts}", r"\1.mixer.Wqkv.\2")
        patch, positions = f"{visual}.patch_embed.linear.weight", f"{visual}.pos_embed"
        return state | {patch: state[patch].flatten(1), positions: state[positions][None]}


class QwenVL(Composed):
    def __init__(self, config: base.VLMConfig):
        super().__init__()
        vision, text, count = config.vision, config.text, config.connector.num_queries
        self.heads, self.side = vision.num_heads, vision.side
        self.conv1 = nn.Conv2d(3, vision.width, vision.patch_size, vision.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros((vision.position_side or vision.side) ** 2, vision.width))
        self.ln_pre = nn.LayerNorm(vision.width, 1e-6)
        options = {
            "dropout": 0.0,
            "activation": "gelu",
            "layer_norm_eps": 1e-6,
            "batch_first": True,
            "norm_first": True,
        }
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(vision.width, vision.num_heads, vision.mlp_dim, **options)
            for _ in range(vision.depth)
        )
        self.kv_proj = nn.Linear(vision.width, text.width, bias=False)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(text.width, 1e-6) for _ in range(3))
        self.query, self.pos_embed = (nn.Parameter(torch.zeros(count, text.width)) for _ in range(2))
        self.pool = nn.MultiheadAttention(text.width, text.width // config.connector.head_dim, batch_first=True)
        self.proj = nn.Parameter(torch.zeros(text.width, text.width))
        values = decoder_values(text) | {"tie_word_embeddings": False, "rms_norm_eps": text.norm_epsilon}
        rope = {"rope_type": "default", "rope_theta": text.rope_theta}
        self.decoder = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values, rope_parameters=rope))

    @staticmethod
    def resize(table: torch.Tensor, side: int) -> torch.Tensor:
        stored = round(len(table) ** 0.5)
        grid = table.reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return grid.flatten(2)[0].T

    def features(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + self.resize(self.positional_embedding, self.side))
        for block in self.blocks:
            x = block(x)
        x = self.ln_kv(self.kv_proj(x))
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        x = self.pool(query, x + self.resize(self.pos_embed, self.side), x)[0]
        return self.ln_post(x) @ self.proj

    def published(self, state):
        state = rename(
            state,
            (r"^(conv1|positional_embedding|ln_pre|ln_post|proj)\b", r"transformer.visual.\1"),
            (r"^(kv_proj|ln_q|ln_kv|query|pos_embed)\b", r"transformer.visual.attn_pool.\1"),
            (r"^pool\.", "transformer.visual.attn_pool.attn."),
            (r"^blocks\.(\d+)\.self_attn\.in_proj_", r"transformer.visual.transformer.resblocks.\1.attn.in_proj."),
            (r"^blocks\.(\d+)\.self_attn\.", r"transformer.visual.transformer.resblocks.\1.attn."),
            (r"^blocks\.(\d+)\.norm", r"transformer.visual.transformer.resblocks.\1.ln_"),
            (r"^blocks\.(\d+)\.linear1", r"transformer.visual.transformer.resblocks.\1.mlp.c_fc"),
            (r"^blocks\.(\d+)\.linear2", r"transformer.visual.transformer.resblocks.\1.mlp.c_proj"),
            (r"^decoder\.lm_head", "lm_head"),
            (r"^decoder\.model\.embed_tokens", "transformer.wte"),
            (r"^decoder\.model\.norm", "transformer.ln_f"),
            (r"^decoder\.model\.layers\.", "transformer.h."),
            (r"input_layernorm", "ln_1"),
            (r"post_attention_layernorm", "ln_2"),
            (r"self_attn\.o_proj", "attn.c_proj"),
            (r"mlp\.up_proj", "mlp.w1"),
            (r"mlp\.gate_proj", "mlp.w2"),
            (r"mlp\.down_proj", "mlp.c_proj"),
        )
        fuse(state, r"(.*\.h\.\d+)\.self_attn\.(?=._proj\.(weight|bias))(q|k|v)_proj\.\2", r"\1.attn.c_attn.\2")
        for (
            name,
            value,
        ) in state.items():  # torch has blocks [q; k; v], the checkpoint q, k, v of one head after another
            if ".resblocks." in name and ".in_proj." in name:
                parts = value.reshape(3, self.heads, -1, *value.shape[1:])
                state[name] = parts.transpose(0, 1).reshape(value.shape)
        return state


class UForm(Composed):
    def __init__(self, config: base.VLMConfig):
        super().__init__()
        vision, text, pooler = config.vision, config.text, config.connector
        self.side, self.stored = vision.side, vision.position_side or vision.side
        self.patch_embed = nn.Conv2d(3, vision.width, vision.patch_size, vision.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, vision.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.stored**2, vision.width))
        self.blocks = nn.ModuleList(UFormBlock(vision) for _ in range(vision.depth))
        self.norm = nn.LayerNorm(vision.width, 1e-6)
        self.latents = nn.Parameter(torch.zeros(1, pooler.num_latents, vision.width))
        self.pooler = nn.TransformerDecoderLayer(
            vision.width,
            pooler.num_heads,
            pooler.mlp_dim,
            dropout=0.0,
            activation=functional.silu,
            batch_first=True,
            norm_first=True,
        )
        self.projection = nn.Linear(vision.width, text.width)
        values = decoder_values(text) | {"tie_word_embeddings": True, "rms_norm_eps": text.norm_epsilon}
        rope = {"rope_type": "default", "rope_theta": text.rope_theta}
        self.decoder = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values, rope_parameters=rope))

    def features(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        grid = self.pos_embed.reshape(1, self.stored, self.stored, -1).permute(0, 3, 1, 2)
        scale = (self.side + 0.1) / self.stored
        grid = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        assert grid.shape[-2:] == (self.side, self.side)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x + grid.flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            x = block(x)
        return self.projection(self.pooler(self.latents.expand(len(x), -1, -1), self.norm(x)))

    def published(self, state):
        out = rename(
            state,
            (r"^(patch_embed|cls_token|pos_embed|blocks|norm)\b", r"image_encoder.\1"),
            (r"^latents", "image_pooler.image_latents"),
            (r"^pooler\.", "image_pooler.pooler."),
            (r"^projection\.", "image_pooler.projection."),
            (r"^decoder\.", "text_decoder."),
            (r"(blocks\.\d+)\.ls(\d)", r"\1.ls\2.weight"),
            (r"(blocks\.\d+)\.linear1", r"\1.mlp.hidden_layer"),
            (r"(blocks\.\d+)\.linear2", r"\1.mlp.output_layer"),
            (r"(blocks\.\d+\.attn)\.out_proj", r"\1.out"),
        )
        for name in [name for name in out if re.search(r"blocks\.\d+\.attn\.in_proj_", name)]:
            prefix, kind = name.split("in_proj_")
            for part, value in zip(("query", "key", "value"), out.pop(name).chunk(3)):
                out[f"{prefix}{part}.{kind}"] = value
        return out


class UFormBlock(nn.Module):
    def __init__(self, vision):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(vision.width, 1e-6) for _ in range(2))
        self.attn = nn.MultiheadAttention(vision.width, vision.num_heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(vision.width, vision.mlp_dim), nn.Linear(vision.mlp_dim, vision.width)
        self.ls1, self.ls2 = (nn.Parameter(torch.zeros(vision.width)) for _ in range(2))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.ls1 * self.attn(y, y, y, need_weights=False)[0]
        return x + self.ls2 * self.linear2(functional.gelu(self.linear1(self.norm2(x))))
