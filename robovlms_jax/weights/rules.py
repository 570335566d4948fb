"""Which source tensor becomes which parameter: the table rows, their rearrangements, and the rows of common layers.

One row serves every direction: loading, loading only the slice a device holds, and exporting again.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

from robovlms_jax.weights import rearrange


@dataclasses.dataclass(frozen=True)
class Rule:
    """One source tensor per parameter, or one per layer of a stacked parameter."""

    source: str
    """Tensor name, compared after `normalize`. "{layer}" is a layer's number; all are stacked on the leading axis."""
    target: str
    """Parameter path, joined by "/"."""
    pattern: str = ""
    """How one layer's tensor is laid out anew, say "(n h) d -> d n h" (see `rearrange.Rearrange`). Empty: as it is.

    An axis "1/3" takes the second of three equal parts: rules of all parts share a tensor ("(0/3 n h) d -> d n h" for
    the queries of a fused projection).
    """
    first: int = 0
    stride: int = 1
    """Row i of the parameter is layer first + stride * i, where layers of one stack differ in turns."""

    @property
    def is_stacked(self) -> bool:
        """The parameter has a leading axis of layers."""
        return "{layer}" in self.source

    @property
    def part(self) -> tuple[int, int]:
        """(i, k): this is the i-th of k equal parts of the tensor; (0, 1) for a whole one."""
        found = rearrange.PART.search(self.pattern)
        return (int(found[1]), int(found[2])) if found else (0, 1)

    def match(self, name: str) -> tuple[bool, int | None]:
        """Whether a normalised tensor name belongs to this rule, and its row of the parameter."""
        found = _source_regex(normalize(self.source)).fullmatch(name)
        if found is None or not self.is_stacked:
            return found is not None, None
        row, rest = divmod(int(found["layer"]) - self.first, self.stride)
        return (False, None) if rest or row < 0 else (True, row)

    def name(self, layer: int | None) -> str:
        """The tensor name of a row: inverse of `match`."""
        return self.source if layer is None else self.source.replace("{layer}", str(self.first + self.stride * layer))


@dataclasses.dataclass(frozen=True)
class Tied:
    """A head, or another copy, that is the token table stored once more: equal to it, or stored in its place."""

    source: str
    """Tensor name, as in `Rule`."""
    table: str
    """Path of the token table."""
    head: str = ""
    """Path of the kernel that it would be in a model that ties nothing. Empty: the model has no place for another."""

    def match(self, name: str) -> bool:
        """Whether a normalised tensor name is this copy."""
        return name == normalize(self.source)


@dataclasses.dataclass(frozen=True)
class Ignore:
    """Source tensors that become nothing, if they are there at all."""

    source: str
    """Regular expression the whole normalised name matches."""
    reason: str

    def match(self, name: str) -> bool:
        """Whether a normalised tensor name is one of them."""
        return re.fullmatch(self.source, name) is not None


@dataclasses.dataclass(frozen=True)
class Fallback:
    """Source tensors that count only where no other tensor fills their place: a second copy of some, or what another
    checkpoint was trained on from."""

    source: str
    """Regular expression the whole normalised name matches, before it is renamed."""
    reason: str

    def match(self, name: str) -> bool:
        """Whether a normalised tensor name is one of them."""
        return re.fullmatch(self.source, name) is not None


@dataclasses.dataclass(frozen=True)
class Initialised:
    """Parameters no source tensor fills; they keep their own initialisation and are left out of what is loaded."""

    target: str
    """Regular expression searched in the parameter path."""
    reason: str


@dataclasses.dataclass(frozen=True)
class Rename:
    """Another spelling of source tensors; applied to normalised names before they are matched, in the order given."""

    pattern: str
    """Regular expression."""
    replacement: str


Rules = tuple[Rule | Tied | Ignore | Fallback | Initialised | Rename, ...]

LORA = Initialised(r"/lora_[abm]$", "LoRA adapters are initialised by the run, not loaded")

_WRAPPERS = re.compile(r"^(module\.|model\.|backbone\.|_forward_module\.|_orig_mod\.)+")


def normalize(name: str) -> str:
    """A tensor name without what training wrappers put around it, so that one rule admits every spelling.

    Removed: leading `module.` (DDP), `_forward_module.` (DeepSpeed), `model.` and `model.backbone.` (upstream,
    and transformers 5 where 4 had nothing), and `_orig_mod.` anywhere (torch.compile).
    """
    return _WRAPPERS.sub("", name.replace("._orig_mod.", "."))


def canonical(rules: Rules, name: str) -> str:
    """A tensor's name in the spelling the rules are written in."""
    name = normalize(name)
    for rule in rules:
        if isinstance(rule, Rename):
            name = re.sub(rule.pattern, rule.replacement, name)
    return name


def prefixed(rules: Rules, *, source: str = "", target: str = "") -> Rules:
    """The same rules for tensors whose names begin with `source` and parameters whose paths begin with `target`.

    `prefixed(config.rules, target="backbone/")` maps a backbone's checkpoint into a policy's tree.
    """

    def move(rule):
        if isinstance(rule, Rule):
            return dataclasses.replace(rule, source=source + rule.source, target=target + rule.target)
        if isinstance(rule, Tied):
            head = target + rule.head if rule.head else ""
            return Tied(source + rule.source, target + rule.table, head)
        if isinstance(rule, Ignore | Fallback):
            return dataclasses.replace(rule, source=re.escape(source) + rule.source)
        return rule

    return tuple(move(rule) for rule in rules)


HUB_NAMES = (
    Rename(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    Rename(r"^lm_head\.", "language_model.lm_head."),
    Rename(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
"""transformers 5 dropped levels of names that published files of PaliGemma and LLaVA have."""


# Rows of common layers, in PyTorch's names.

LLAMA_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
GEMMA2_NORMS = {  # post_attention_layernorm means something else than in Llama and Gemma 1
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "attn_out_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_out_norm",
}


def linear(
    source: str, target: str, kernel: str = "o i -> i o", bias: str = "o -> o", *, use_bias: bool = True
) -> Rules:
    """torch.nn.Linear (weight [out, in]) -> Einsum."""
    rows = (Rule(f"{source}.weight", f"{target}/kernel", kernel),)
    return (*rows, Rule(f"{source}.bias", f"{target}/bias", bias)) if use_bias else rows


def every(table: Rules, stride: int, first: int) -> Rules:
    """The same rules, of layers first, first + stride, ... alone."""
    return tuple(dataclasses.replace(row, first=first, stride=stride) for row in table)


def layer_norm(source: str, target: str) -> Rules:
    """torch.nn.LayerNorm -> LayerNorm."""
    return (*rms_norm(source, target), Rule(f"{source}.bias", f"{target}/bias"))


def rms_norm(source: str, target: str) -> Rules:
    """A norm with a weight and no bias -> RMSNorm, LayerNorm without bias."""
    return (Rule(f"{source}.weight", f"{target}/scale"),)


def renamed(table: Rules, names: Mapping[str, str]) -> Rules:
    """The rules of a relative whose checkpoints have other parts of names: here -> there, in rules' sources alone."""

    def there(source: str) -> str:
        return functools.reduce(lambda name, here: name.replace(here, names[here]), names, source)

    return tuple(
        dataclasses.replace(rule, source=there(rule.source)) if isinstance(rule, Rule) else rule for rule in table
    )


def attention(source: str, target: str, *, bias: str = "all", out: str = "out_proj") -> Rules:
    """Separate q, k, v and output projections, heads merged into one axis -> Attention.

    bias: which of them have one, as DecoderConfig.attention_bias says it.
    """
    rows = ()
    for name in "qkv":
        path = f"{target}/{name}"
        rows += linear(f"{source}.{name}_proj", path, "(n h) d -> d n h", "(n h) -> n h", use_bias=bias != "none")
    return rows + linear(f"{source}.{out}", f"{target}/o", "d (n h) -> n h d", use_bias=bias == "all")


def fused_qkv(weight: str, bias: str | None, target: str, *, per_head: bool = False) -> Rules:
    """One tensor of queries, keys and values -> q, k, v of Attention: blocks [q; k; v], or q, k, v head by head."""
    order = "n {part}/3 h" if per_head else "{part}/3 n h"
    rows = ()
    for part, name in enumerate("qkv"):
        axes = order.format(part=part)
        rows += (Rule(weight, f"{target}/{name}/kernel", f"({axes}) d -> d n h"),)
        if bias is not None:
            rows += (Rule(bias, f"{target}/{name}/bias", f"({axes}) -> n h"),)
    return rows


def perceiver(source: str, target: str) -> Rules:
    """Flamingo's resampler, in the names of open_flamingo and of upstream's `vision_resampler` -> Perceiver."""
    layer, here = f"{source}.layers.{{layer}}", f"{target}/layers"
    return (
        Rule(f"{source}.latents", f"{target}/latents"),
        *layer_norm(f"{layer}.0.norm_media", f"{here}/token_norm"),
        *layer_norm(f"{layer}.0.norm_latents", f"{here}/latent_norm"),
        Rule(f"{layer}.0.to_q.weight", f"{here}/q/kernel", "(n h) d -> d n h"),
        Rule(f"{layer}.0.to_kv.weight", f"{here}/kv/kernel", "(c n h) d -> d c n h"),
        Rule(f"{layer}.0.to_out.weight", f"{here}/o/kernel", "d (n h) -> n h d"),
        *layer_norm(f"{layer}.1.0", f"{here}/mlp_norm"),
        Rule(f"{layer}.1.1.weight", f"{here}/up/kernel", "f d -> d f"),
        Rule(f"{layer}.1.3.weight", f"{here}/down/kernel", "d f -> f d"),
        *layer_norm(f"{source}.norm", f"{target}/final_norm"),
    )


def clip_vision(source: str, target: str) -> Rules:
    """Hugging Face CLIP's vision transformer -> ViT."""
    return (
        Rule(f"{source}.embeddings.class_embedding", f"{target}/cls"),
        *layer_norm(f"{source}.pre_layrnorm", f"{target}/pre_norm"),  # the published spelling
        *_hugging_face_vit(source, target),
    )


def open_clip_vision(source: str, target: str) -> Rules:
    """open_clip's vision transformer of CLIP, without what it makes of the class token -> ViT."""
    layer, here = f"{source}.transformer.resblocks.{{layer}}", f"{target}/layers"
    return (
        Rule(f"{source}.class_embedding", f"{target}/cls"),
        Rule(f"{source}.positional_embedding", f"{target}/positions"),
        Rule(f"{source}.conv1.weight", f"{target}/patch/kernel", "o c h w -> h w c o"),
        *layer_norm(f"{source}.ln_pre", f"{target}/pre_norm"),
        *fused_qkv(f"{layer}.attn.in_proj_weight", f"{layer}.attn.in_proj_bias", f"{here}/attn"),
        *linear(f"{layer}.attn.out_proj", f"{here}/attn/o", "d (n h) -> n h d"),
        *layer_norm(f"{layer}.ln_1", f"{here}/attn_norm"),
        *layer_norm(f"{layer}.ln_2", f"{here}/mlp_norm"),
        *linear(f"{layer}.mlp.c_fc", f"{here}/mlp/up"),
        *linear(f"{layer}.mlp.c_proj", f"{here}/mlp/down"),
        Ignore(rf"{re.escape(source)}\.(ln_post\.(weight|bias)|proj)", "of CLIP's class token"),
    )


def siglip_vision(source: str, target: str) -> Rules:
    """Hugging Face SigLIP's vision transformer, without its pooling head -> ViT."""
    return (
        Rule(f"{source}.embeddings.patch_embedding.bias", f"{target}/patch/bias"),
        *_hugging_face_vit(source, target),
    )


def _hugging_face_vit(source: str, target: str) -> Rules:
    layer, here = f"{source}.encoder.layers.{{layer}}", f"{target}/layers"
    return (
        Rule(f"{source}.embeddings.patch_embedding.weight", f"{target}/patch/kernel", "o c h w -> h w c o"),
        Rule(f"{source}.embeddings.position_embedding.weight", f"{target}/positions"),
        Ignore(
            rf"{re.escape(source)}\.embeddings\.position_ids", "a constant range; transformers before 4.31 stored it"
        ),
        *attention(f"{layer}.self_attn", f"{here}/attn"),
        *layer_norm(f"{layer}.layer_norm1", f"{here}/attn_norm"),
        *layer_norm(f"{layer}.layer_norm2", f"{here}/mlp_norm"),
        *linear(f"{layer}.mlp.fc1", f"{here}/mlp/up"),
        *linear(f"{layer}.mlp.fc2", f"{here}/mlp/down"),
        *layer_norm(f"{source}.post_layernorm", f"{target}/post_norm"),
    )


def llama(
    source: str, target: str, *, bias: str = "none", norms: Mapping[str, str] = LLAMA_NORMS, qk_norm: bool = False
) -> Rules:
    """Hugging Face's Llama, Qwen 2 and Gemma decoders, without the head -> Decoder.

    Args:
      bias: which attention projections have one, as DecoderConfig.attention_bias says it.
      norms: name in the layer -> ours.
      qk_norm: as DecoderConfig has it.
    """
    layer, here = f"{source}.layers.{{layer}}", f"{target}/layers"
    rows = (
        Rule(f"{source}.embed_tokens.weight", f"{target}/embed/table"),
        *attention(f"{layer}.self_attn", f"{here}/attn", bias=bias, out="o_proj"),
        Ignore(rf"{re.escape(source)}\.(.*\.)?rotary_emb\.inv_freq", "computed from rope_theta"),
        *rms_norm(f"{source}.norm", f"{target}/final_norm"),
    )
    for name in ("gate", "up", "down"):
        rows += linear(f"{layer}.mlp.{name}_proj", f"{here}/mlp/{name}", use_bias=False)
    own = {f"self_attn.{name}_norm": f"attn/{name}_norm" for name in "qk"} if qk_norm else {}
    for theirs, ours in (dict(norms) | own).items():
        rows += rms_norm(f"{layer}.{theirs}", f"{here}/{ours}")
    return rows


def shared(table: str, copies: Sequence[str]) -> Rules:
    """One token table of an encoder and a decoder, of which files may hold copies: names of tensors."""
    return (Rule(table, "text/embed/table"), *(Tied(copy, "text/embed/table") for copy in copies))


def head(source: str, target: str, *, tied: bool) -> Rules:
    """The matrix that makes logits: a parameter of its own, or the token table stored once more."""
    if tied:
        return (Tied(f"{source}.weight", f"{target}/embed/table", f"{target}/head/kernel"),)
    return linear(source, f"{target}/head", use_bias=False)


def with_head(table: Rules, *, tied: bool) -> Rules:
    """The same rules for a model whose head is tied, or is not; see `head`."""
    rows: Rules = ()
    for row in table:
        if tied and isinstance(row, Rule) and row.target.endswith("/head/kernel"):
            rows += head(row.source.removesuffix(".weight"), row.target.removesuffix("/head/kernel"), tied=True)
        elif not tied and isinstance(row, Tied) and row.head:
            rows += head(row.source.removesuffix(".weight"), row.head.removesuffix("/head/kernel"), tied=False)
        else:
            rows += (row,)
    return rows


@functools.cache
def _source_regex(source: str) -> re.Pattern[str]:
    return re.compile(re.escape(source).replace(r"\{layer\}", r"(?P<layer>\d+)"))
