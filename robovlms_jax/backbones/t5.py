"""T5 (Raffel et al. 2019, arXiv:1910.10683) as encoder and decoder of other models: FLAN-T5 of BLIP-2, InstructBLIP.

Relative positions, no scale on attention, norms without means or biases. Both halves read one token table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from robovlms_jax.backbones import hf_config, sections
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.weights import rules

SMALL = DecoderConfig(  # T5Config()
    width=512,
    depth=6,
    mlp_dim=2048,
    num_heads=8,
    vocab_size=32_128,
    activation="relu",
    norm_epsilon=1e-6,
    is_gated=False,
    positions="relative",
    query_scalar=1,
    head="tied",
    head_scale=True,
    dropout=0.1,
    attention_dropout=0.1,
)
HALVES = "encoder", "decoder"
FIELDS = {
    "width": ("d_model",),
    "mlp_dim": ("d_ff",),
    "num_heads": ("num_heads",),
    "own_head_dim": ("d_kv",),
    "vocab_size": ("vocab_size",),
    "norm_epsilon": ("layer_norm_epsilon",),
    "relative_buckets": ("relative_attention_num_buckets",),
    "relative_distance": ("relative_attention_max_distance",),
    "dropout": ("dropout_rate",),
    "attention_dropout": ("dropout_rate",),
}
ENCODER = hf_config.Section("text_config", FIELDS | {"depth": ("num_layers",)}, {"model_type": "t5"})
DECODER = hf_config.Section(
    "text_config", FIELDS | {"depth": ("num_decoder_layers", "num_layers")}, {"model_type": "t5"}
)
IDS = hf_config.Section(
    "text_config",
    {"eos_id": ("eos_token_id",), "pad_id": ("pad_token_id",), "start_id": ("decoder_start_token_id", "pad_token_id")},
)


def read(values: Mapping[str, Any]) -> tuple[DecoderConfig, DecoderConfig]:
    """`text_config` -> decoder and encoder. What is dropped inside of MLPs and behind the last norms is not."""
    part = ENCODER.part(values)
    projection = part.get("feed_forward_proj", "relu")
    *gated, activation = projection.split("-")
    # transformers' T5 means the approximation by gated-gelu, unless `dense_act_fn` says otherwise: BLIP's FLAN-T5 does.
    activation = part.get("dense_act_fn") or ("gelu_new" if projection == "gated-gelu" else activation)
    form = {"is_gated": bool(gated), "activation": activation}
    # Version 1.1 and FLAN say that the head is not tied, and mean by it that nothing is scaled, either; transformers 5
    # notes the second under a name of its own.
    tied = part.get("tie_word_embeddings", True)
    form |= {"head": "tied" if tied else "linear", "head_scale": part.get("scale_decoder_outputs", tied)}
    base = dataclasses.replace(SMALL, own_head_dim=64, **form)
    encoder = dataclasses.replace(ENCODER.read(values, base), relative_both=True, head="tied", head_scale=False)
    text = sections.with_head(dataclasses.replace(DECODER.read(values, base), cross=True), values)
    return text, encoder


def write(text: DecoderConfig, encoder: DecoderConfig) -> dict[str, Any]:
    """The part of config.json that `read` takes."""
    return (
        ENCODER.write(encoder)
        | {"num_decoder_layers": text.depth}
        | {"feed_forward_proj": f"{'gated-' * text.is_gated}{text.activation}", "dense_act_fn": text.activation}
        | {"tie_word_embeddings": text.head == "tied", "scale_decoder_outputs": text.head_scale}
    )


def make_rules(source: str, *, is_gated: bool) -> rules.Rules:
    """transformers' T5 -> `text/` and `encoder/`."""
    return (
        *rules.shared(f"{source}.shared.weight", [f"{source}.{half}.embed_tokens.weight" for half in HALVES]),
        rules.Ignore(
            rf"{source}\.decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
            "transformers before 4 stored one that was never read",
        ),
        *_half(f"{source}.encoder", "encoder", is_gated=is_gated, cross=False),
        *_half(f"{source}.decoder", "text", is_gated=is_gated, cross=True),
        *rules.head(f"{source}.lm_head", "text", tied=True),
    )


def _half(source: str, target: str, *, is_gated: bool, cross: bool) -> rules.Rules:
    layer, here = f"{source}.block.{{layer}}.layer", f"{target}/layers"
    first = f"{source}.block.0.layer.0.SelfAttention"
    parts = [("SelfAttention", "attn")] + ([("EncDecAttention", "cross")] if cross else [])
    mlp = f"{layer}.{len(parts)}"
    rows = (
        rules.Rule(f"{first}.relative_attention_bias.weight", f"{target}/relative"),
        *rules.rms_norm(f"{source}.final_layer_norm", f"{target}/final_norm"),
        *rules.rms_norm(f"{mlp}.layer_norm", f"{here}/mlp_norm"),
    )
    names = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if is_gated else {"wi": "up", "wo": "down"}
    for theirs, ours in names.items():
        rows += rules.linear(f"{mlp}.DenseReluDense.{theirs}", f"{here}/mlp/{ours}", use_bias=False)
    for number, (theirs, ours) in enumerate(parts):
        rows += rules.rms_norm(f"{layer}.{number}.layer_norm", f"{here}/{ours}_norm")
        for name in "qkv":
            rows += rules.linear(
                f"{layer}.{number}.{theirs}.{name}", f"{here}/{ours}/{name}", "(n h) d -> d n h", use_bias=False
            )
        rows += rules.linear(f"{layer}.{number}.{theirs}.o", f"{here}/{ours}/o", "d (n h) -> n h d", use_bias=False)
    return rows
