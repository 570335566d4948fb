"""OpenFlamingo: CLIP-L at 224 pixels, a Perceiver, and a decoder with gated cross-attention to what comes out of it.

Awadalla et al. 2023, arXiv:2308.01390. CLIP, the decoder and what was trained between them are published apart.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from robovlms_jax.backbones import base, hf_config, llava, llava_mpt, registry, sections
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.nn.gated import GatedConfig
from robovlms_jax.nn.perceiver import PerceiverConfig
from robovlms_jax.weights import rules

LANGUAGE = "lang_encoder."
# Patches of the last layer as they are; its norm is for what CLIP makes of the class token.
CLIP = dataclasses.replace(sections.CLIP_L, cls="drop", post_norm=False)
MPT_1B = dataclasses.replace(  # anas-awadalla/mpt-1b-redpajama-200b
    llava_mpt.MPT_7B, width=2048, depth=24, mlp_dim=8192, num_heads=16, qk_norm=True, norm_all_heads=True
)
NEOX_3B = DecoderConfig(  # togethercomputer/RedPajama-INCITE-Base-3B-v1
    width=2560,
    depth=32,
    mlp_dim=10_240,
    num_heads=32,
    vocab_size=50_432,
    activation="gelu",
    norm_epsilon=1e-5,
    norm="layer",
    is_gated=False,
    attention_bias="all",
    mlp_bias=True,
)


def mosaic_rules(source: str) -> rules.Rules:
    """MPT-1B's tensors (MosaicGPT), whose names begin with `source` -> Decoder."""
    layer, here = f"{source}transformer.blocks.{{layer}}", "text/layers"
    return (
        rules.Rule(f"{source}transformer.wte.weight", "text/embed/table"),
        *rules.fused_qkv(f"{layer}.attn.Wqkv.weight", None, f"{here}/attn"),
        *rules.rms_norm(f"{layer}.attn.q_ln", f"{here}/attn/q_norm"),
        *rules.rms_norm(f"{layer}.attn.k_ln", f"{here}/attn/k_norm"),
        *rules.linear(f"{layer}.attn.out_proj", f"{here}/attn/o", "d (n h) -> n h d", use_bias=False),
        *rules.rms_norm(f"{layer}.ln_1", f"{here}/attn_norm"),
        *rules.rms_norm(f"{layer}.ln_2", f"{here}/mlp_norm"),
        *rules.linear(f"{layer}.mlp.mlp_up", f"{here}/mlp/up", use_bias=False),
        *rules.linear(f"{layer}.mlp.mlp_down", f"{here}/mlp/down", use_bias=False),
        *rules.rms_norm(f"{source}transformer.ln_f", "text/final_norm"),
        *rules.head(f"{source}lm_head", "text", tied=True),
    )


def neox_rules(source: str) -> rules.Rules:
    """GPT-NeoX's tensors, whose names begin with `source` -> Decoder."""
    layer, here = f"{source}gpt_neox.layers.{{layer}}", "text/layers"
    fused = f"{layer}.attention.query_key_value"
    return (
        rules.Rule(f"{source}gpt_neox.embed_in.weight", "text/embed/table"),
        *rules.fused_qkv(f"{fused}.weight", f"{fused}.bias", f"{here}/attn", per_head=True),
        *rules.linear(f"{layer}.attention.dense", f"{here}/attn/o", "d (n h) -> n h d"),
        *rules.layer_norm(f"{layer}.input_layernorm", f"{here}/attn_norm"),
        *rules.layer_norm(f"{layer}.post_attention_layernorm", f"{here}/mlp_norm"),
        *rules.linear(f"{layer}.mlp.dense_h_to_4h", f"{here}/mlp/up"),
        *rules.linear(f"{layer}.mlp.dense_4h_to_h", f"{here}/mlp/down"),
        *rules.layer_norm(f"{source}gpt_neox.final_layer_norm", "text/final_norm"),
        rules.Rename(rf"^{re.escape(source)}lm_head\.", f"{source}embed_out."),  # transformers 5
        *rules.head(f"{source}embed_out", "text", tied=False),
        rules.Ignore(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", "constants"),
    )


def llama_rules(source: str) -> rules.Rules:
    """Llama's tensors, whose names begin with `source` -> Decoder."""
    return (*rules.llama(f"{source}model", "text"), *rules.head(f"{source}lm_head", "text", tied=False))


@dataclasses.dataclass(frozen=True)
class Language:
    """One of the decoders: its part of config.json, and its tensors.

    ratio: key of the MLP's width over the decoder's, where the file has no width. special: what tokenizers put first.
    """

    section: hf_config.Section
    default: DecoderConfig
    rules: Callable[[str], rules.Rules]
    ratio: str = ""
    lead: int = 0
    end: str = "<|endoftext|>"
    ids: tuple[int, int, int] = (0, 0, 1)
    """bos, eos and pad."""


MPT_SIZES = {"width": ("d_model",), "depth": ("n_layers",), "num_heads": ("n_heads",), "vocab_size": ("vocab_size",)}
LANGUAGES = {
    "mosaic_gpt": Language(
        hf_config.Section(
            "text_config",
            MPT_SIZES,
            {"model_type": "mosaic_gpt", "no_bias": True, "alibi": True, "alibi_bias_max": 8, "attn_qk_ln": True},
        ),
        MPT_1B,
        mosaic_rules,
        "mlp_ratio",
    ),
    "mpt": Language(
        hf_config.Section(
            "text_config",
            MPT_SIZES,
            {"model_type": "mpt", "no_bias": True}
            | {
                f"attn_config.{key}": value for key, value in (("alibi", True), ("alibi_bias_max", 8), ("qk_ln", False))
            },
        ),
        llava_mpt.MPT_7B,
        llava_mpt.text_rules,
        "expansion_ratio",
    ),
    "gpt_neox": Language(
        sections.text(
            "gpt_neox",
            {
                "norm_epsilon": ("layer_norm_eps",),
                "rotary_fraction": ("rotary_pct", "partial_rotary_factor"),
                "rope_theta": ("rotary_emb_base", "rope_theta"),
            },
            use_parallel_residual=False,
            attention_bias=True,
        ),
        NEOX_3B,
        neox_rules,
    ),
    "llama": Language(sections.LLAMA, sections.LLAMA_7B, llama_rules, lead=1, end="</s>", ids=(1, 2, 32_000)),
}
"""By the model_type of `text_config`."""


def kind(text: DecoderConfig) -> str:
    """Which of `LANGUAGES` a decoder is."""
    if text.positions == "alibi":
        return "mosaic_gpt" if text.norm_all_heads else "mpt"
    return "gpt_neox" if text.norm == "layer" else "llama"


def make_rules(language: Language, every: int, *, is_otter: bool = False) -> rules.Rules:
    """How published tensors become parameters: names of OpenFlamingo's checkpoints, or of Otter's."""
    here, there = "text/cross_layers", f"{LANGUAGE}gated_cross_attn_layers.{{layer}}"
    feed = "feed_forward" if is_otter else "ff"
    gated = (
        *rules.layer_norm(f"{there}.attn.norm", f"{here}/attn_norm"),
        rules.Rule(f"{there}.attn.to_q.weight", f"{here}/attn/q/kernel", "(n h) d -> d n h"),
        rules.Rule(f"{there}.attn.to_kv.weight", f"{here}/attn/k/kernel", "(0/2 n h) d -> d n h"),
        rules.Rule(f"{there}.attn.to_kv.weight", f"{here}/attn/v/kernel", "(1/2 n h) d -> d n h"),
        rules.Rule(f"{there}.attn.to_out.weight", f"{here}/attn/o/kernel", "d (n h) -> n h d"),
        rules.Rule(f"{there}.attn_gate", f"{here}/attn_gate"),
        *rules.layer_norm(f"{there}.{feed}.0", f"{here}/mlp_norm"),
        rules.Rule(f"{there}.{feed}.1.weight", f"{here}/mlp/up/kernel", "f d -> d f"),
        rules.Rule(f"{there}.{feed}.3.weight", f"{here}/mlp/down/kernel", "d f -> f d"),
        rules.Rule(f"{there}.ff_gate", f"{here}/mlp_gate"),
    )
    resampler = rules.perceiver("perceiver", "connector")
    if is_otter:
        resampler = tuple(dataclasses.replace(row, source=_otter_resampler(row.source)) for row in resampler)
    clip = tuple(
        row for row in rules.clip_vision("vision_encoder.vision_model", "vision") if "post_norm" not in str(row)
    )
    return (
        rules.Rename(r"^vision_model\.", "vision_encoder.vision_model."),
        rules.Rename(
            r"^(transformer|gpt_neox|embed_out|lm_head|gated_cross_attn_layers|old_decoder_blocks)\b", rf"{LANGUAGE}\1"
        ),
        rules.Rename(r"^(layers|embed_tokens|norm)\.", rf"{LANGUAGE}model.\1."),
        # The layers are in a model three times: by themselves, and in the wrappers that join them.
        rules.Rename(
            r"^lang_encoder\.(?:[a-z_]+\.)?(?:blocks|layers)\.(\d+)\.gated_cross_attn_layer\.",
            rf"{LANGUAGE}gated_cross_attn_layers.\1.",
        ),
        rules.Rename(r"^(lang_encoder\.(?:[a-z_]+\.)?(?:blocks|layers)\.\d+)\.decoder_layer\.", r"\1."),
        rules.Rename(r"^lang_encoder\.old_decoder_blocks\.", f"{LANGUAGE}{_blocks(language)}."),
        rules.Fallback(r"lang_encoder\.(old_decoder_blocks|gated_cross_attn_layers)\..*", "the same layers once more"),
        rules.Fallback(r"(?!lang_encoder\.|vision|perceiver\.).*", "the decoder that training began from"),
        *clip,
        *rules.open_clip_vision("vision_encoder", "vision"),  # as OpenFlamingo's own files have it
        rules.Ignore(r"vision_encoder\.vision_model\.post_layernorm\..*", "of CLIP's class token, which is not used"),
        llava_mpt.CLIP_TEXT,
        *resampler,
        *rules.every(gated, every, every - 1),
        *language.rules(LANGUAGE),
        rules.LORA,
    )


def _otter_resampler(name: str) -> str:
    """OpenFlamingo's name of a resampler's tensor -> Otter's, which has attention and MLP in one module."""
    return name.replace("{layer}.0.", "{layer}.").replace("{layer}.1.", "{layer}.feed_forward.")


def _blocks(language: Language) -> str:
    """Where a decoder has its layers."""
    row = next(row for row in language.rules("") if isinstance(row, rules.Rule) and row.is_stacked)
    return row.source.partition(".{layer}")[0]


def read(values: Mapping[str, Any], model_type: str = "flamingo") -> base.VLMConfig:
    """config.json -> configuration."""
    name = (values.get("text_config") or {}).get("model_type", "mosaic_gpt")
    if name not in LANGUAGES:
        raise ValueError(f"text_config.model_type={name!r} is not supported; this model has one of {list(LANGUAGES)}.")
    language, every = LANGUAGES[name], values.get("cross_attn_every_n_layers", 1)
    text = sections.read_text(values, language.section, language.default)
    if language.ratio:
        text = dataclasses.replace(
            text, mlp_dim=round(text.width * language.section.part(values).get(language.ratio, 4))
        )
    vision = llava.VISION.read(values, CLIP)
    bos, eos, pad = language.ids
    return base.VLMConfig(
        model_type=model_type,
        vision=vision,
        text=dataclasses.replace(text, gated=GATED.read(values, GatedConfig(every))),
        connector=RESAMPLER.read(values, PerceiverConfig()),
        image=sections.clip_image(vision.image_size),
        prompt=f"<image>{{instruction}}<|endofchunk|>{language.end}",
        lead=language.lead,
        bos_id=bos,
        eos_id=eos,
        pad_id=pad,
        rules=make_rules(language, every, is_otter=model_type == "otter"),
    )


GATED = hf_config.Section(
    "gated_config", {"num_heads": ("num_heads",), "head_dim": ("head_dim",), "mlp_ratio": ("mlp_ratio",)}
)
RESAMPLER = hf_config.Section(
    "perceiver_config",
    {key: (key,) for key in ("num_latents", "depth", "num_heads", "head_dim", "mlp_ratio")},
)


def read_decoder(values: Mapping[str, Any], every: int) -> base.VLMConfig:
    """The config.json of the decoder alone -> the OpenFlamingo that was made of it."""
    return read({"text_config": values, "cross_attn_every_n_layers": every})


def write(config: base.VLMConfig) -> dict[str, Any]:
    """Configuration -> config.json, with two parts of our own for sizes that the published code has as constants."""
    language = LANGUAGES[kind(config.text)]
    text = language.section.write(config.text)
    if language.ratio:
        text[language.ratio] = config.text.mlp_dim / config.width
    return sections.write_head(config.text) | {
        "architectures": [f"{config.model_type.capitalize()}ForConditionalGeneration"],
        "cross_attn_every_n_layers": config.text.gated.every,
        "text_config": text,
        "vision_config": llava.VISION.write(config.vision),
        "gated_config": GATED.write(config.text.gated),
        "perceiver_config": RESAMPLER.write(config.connector),
    }


def fit(config: base.VLMConfig, tensors: Mapping[str, tuple[int, ...]]) -> base.VLMConfig:
    """As many rows in the token table as the trained checkpoint has, which knows more tokens than its decoder did."""
    table = next(row.source for row in config.rules if isinstance(row, rules.Rule) and row.target == "text/embed/table")
    names = {name: rules.canonical(config.rules, name) for name in tensors}
    found = sorted((not rules.normalize(name).startswith(LANGUAGE), name) for name in names if names[name] == table)
    if not found:
        return config
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=tensors[found[0][1]][0]))


registry.register_family("flamingo", read, write, fit)
registry.register("flamingo-mpt-1b")(functools.partial(read, {}))
registry.register("flamingo-neox-3b")(
    functools.partial(read, {"text_config": {"model_type": "gpt_neox"}, "cross_attn_every_n_layers": 2})
)
registry.register("flamingo-mpt-7b")(
    functools.partial(read, {"text_config": {"model_type": "mpt"}, "cross_attn_every_n_layers": 4})
)
for decoder, layers in (("mosaic_gpt", 1), ("gpt_neox", 2), ("mpt", 4)):
    # The directory of weights that comes first has the config.json, and OpenFlamingo publishes none of its own.
    registry.register_family(decoder, functools.partial(read_decoder, every=layers), write, fit)
