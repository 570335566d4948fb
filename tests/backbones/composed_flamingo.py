"""Flamingo put together from transformers' CLIP and decoders and from torch's linear layers, norms and attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

from robovlms_jax.backbones import base, flamingo
from tests.backbones.composed import Composed, decoder_values, rename, vision_values


def feed_forward(width: int, ratio: int) -> nn.Sequential:
    hidden = ratio * width
    linear = [nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)]
    return nn.Sequential(nn.LayerNorm(width), linear[0], nn.GELU(), linear[1])


class Attend(nn.Module):
    """Attention to something else, without biases; `names`: of the norms before it."""

    def __init__(self, width: int, other: int, heads: int, size: int, names: tuple[str, ...]):
        super().__init__()
        for name in names:
            self.add_module(name, nn.LayerNorm(width))
        self.heads, inner = heads, heads * size
        self.to_q, self.to_kv = nn.Linear(width, inner, bias=False), nn.Linear(other, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def attend(self, x: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(x), *self.to_kv(other).chunk(2, -1))
        )
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(y.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    def __init__(self, width: int, c):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(c.num_latents, width))
        norms = ("norm_media", "norm_latents")
        self.layers = nn.ModuleList(
            nn.ModuleList([Attend(width, width, c.num_heads, c.head_dim, norms), feed_forward(width, c.mlp_ratio)])
            for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        latents = self.latents.expand(len(x), -1, -1)
        for attention, mlp in self.layers:
            normed = attention.norm_latents(latents)
            latents = latents + attention.attend(normed, torch.cat([attention.norm_media(x), normed], 1))
            latents = latents + mlp(latents)
        return self.norm(latents)


class Gated(nn.Module):
    def __init__(self, width: int, other: int, c):
        super().__init__()
        self.attn = Attend(width, other, c.num_heads, c.head_dim, ("norm",))
        self.ff = feed_forward(width, c.mlp_ratio)
        self.attn_gate, self.ff_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x, media, sees):
        """sees: bool[B, S], tokens that have the picture before them; others add nothing."""
        y = self.attn.attend(self.attn.norm(x), media) * sees[..., None]
        x = x + torch.tanh(self.attn_gate) * y
        return x + torch.tanh(self.ff_gate) * self.ff(x)


class Flamingo(Composed):
    def __init__(self, config: base.VLMConfig):
        super().__init__()
        text, vision, gated = config.text, config.vision, config.text.gated
        self.lead, self.kind, self.is_otter = config.lead, flamingo.kind(text), config.model_type == "otter"
        self.vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision_values(vision)))
        self.perceiver = Resampler(vision.width, config.connector)
        self.gated = nn.ModuleDict(
            {str(i): Gated(text.width, vision.width, gated) for i in range(text.depth) if (i + 1) % gated.every == 0}
        )
        self.decoder = getattr(self, f"_{self.kind}")(text)
        layers = self.decoder.get_submodule(self.layers)
        for name, block in self.gated.items():
            layers[int(name)].register_forward_pre_hook(self._cross(block), with_kwargs=True)

    def _cross(self, block):
        def hook(module, arguments, more):
            if not arguments:
                return (), more | {"hidden_states": block(more["hidden_states"], self.media, self.sees)}
            return (block(arguments[0], self.media, self.sees), *arguments[1:]), more

        return hook

    def _mpt(self, text):
        self.layers = "transformer.blocks"
        values = {"d_model": text.width, "n_heads": text.num_heads, "n_layers": text.depth}
        return transformers.MptForCausalLM(
            transformers.MptConfig(**values, vocab_size=text.vocab_size, expansion_ratio=4, max_seq_len=64)
        )

    def _mosaic_gpt(self, text):
        decoder = self._mpt(text)
        self.q_ln, self.k_ln = (
            nn.ModuleList(nn.LayerNorm(text.width, text.norm_epsilon, bias=False) for _ in range(text.depth))
            for _ in range(2)
        )

        def normed(i):
            def hook(module, arguments, out):
                q, k, v = out.chunk(3, -1)
                return torch.cat([self.q_ln[i](q), self.k_ln[i](k), v], -1)

            return hook

        for i, block in enumerate(decoder.transformer.blocks):
            block.attn.Wqkv.register_forward_hook(normed(i))
        return decoder

    def _gpt_neox(self, text):
        self.layers = "gpt_neox.layers"
        values = decoder_values(text) | {"use_parallel_residual": False, "rotary_pct": 1.0}
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**values))

    def _llama(self, text):
        self.layers = "model.layers"
        values = decoder_values(text) | {"rms_norm_eps": text.norm_epsilon}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))

    def forward(self, input_ids, pixel_values, attention_mask, **more: Any) -> Any:
        features = self.perceiver(self.vision(pixel_values).last_hidden_state[:, 1:])
        self.media = features.reshape(len(input_ids), -1, features.shape[-1])
        self.sees = attention_mask.cumsum(1) > self.lead
        embeds = self.decoder.get_input_embeddings()(input_ids)
        return self.decoder(inputs_embeds=embeds, attention_mask=attention_mask, **more)

    def published(self, state):
        state = rename(
            state,
            (r"^vision\.(vision_model\.)?", "vision_encoder.vision_model."),
            (r"^gated\.", "lang_encoder.gated_cross_attn_layers."),
            (r"^decoder\.lm_head", "decoder.embed_out" if self.kind == "gpt_neox" else "decoder.lm_head"),
            (r"^decoder\.", "lang_encoder."),
        )
        if self.kind == "mosaic_gpt":
            layer = "lang_encoder.transformer.blocks"
            state = rename(
                state,
                (r"^(q|k)_ln\.(\d+)\.", rf"{layer}.\2.attn.\1_ln."),
                (r"\.norm_([12])\.", r".ln_\1."),
                (r"\.norm_f\.", ".ln_f."),
                (r"\.ffn\.(up|down)_proj\.", r".mlp.mlp_\1."),
            )
        if self.is_otter:
            state = rename(
                state,
                (r"^(perceiver\.layers\.\d+)\.0\.", r"\1."),
                (r"^(perceiver\.layers\.\d+)\.1\.", r"\1.feed_forward."),
                (r"(gated_cross_attn_layers\.\d+)\.ff\.", r"\1.feed_forward."),
            )
        return state
