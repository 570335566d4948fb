"""Which source tensor becomes which parameter: the table rows, their rearrangements, and the rows of common layers.

One row serves every direction: loading, loading only the slice a device holds, and exporting again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """One source tensor per parameter, or one per layer of a stacked parameter."""

    source: str
    """Tensor name after `normalize`. "{layer}" is a layer's number; its tensors are stacked on the leading axis."""
    target: str
    """Parameter path, joined by "/"."""
    pattern: str = ""
    """How one layer's tensor is laid out anew, say "(n h) d -> d n h" (see `Rearrange`). Empty: as it is."""

    @property
    def is_stacked(self) -> bool:
        """The parameter has a leading axis of layers."""
        return "{layer}" in self.source

    def match(self, name: str) -> tuple[bool, int | None]:
        """Whether a normalised tensor name belongs to this rule, and its layer."""
        found = _source_regex(self.source).fullmatch(name)
        if found is None:
            return False, None
        return True, int(found["layer"]) if self.is_stacked else None

    def name(self, layer: int | None) -> str:
        """The tensor name of a layer: inverse of `match`."""
        return self.source if layer is None else self.source.replace("{layer}", str(layer))


@dataclasses.dataclass(frozen=True)
class Ignore:
    """Source tensors that become nothing, if they are there at all."""

    source: str
    """Regular expression the whole normalised name matches."""
    reason: str


@dataclasses.dataclass(frozen=True)
class Fresh:
    """Parameters no source tensor fills; they keep their own initialisation and are left out of what is loaded."""

    target: str
    """Regular expression searched in the parameter path."""
    reason: str


Rules = tuple[Rule | Ignore | Fresh, ...]

LORA = Fresh(r"/lora_[ab]$", "adapters are born with the run")

_WRAPPERS = re.compile(r"^(module\.|model\.|backbone\.|_forward_module\.|_orig_mod\.)+")


def normalize(name: str) -> str:
    """A tensor name without what training wrappers put around it, so that one rule admits every spelling.

    Removed: leading `module.` (DDP), `_forward_module.` (DeepSpeed), `model.` and `model.backbone.` (upstream,
    and transformers 5 where 4 had nothing), and `_orig_mod.` anywhere (torch.compile).
    """
    return _WRAPPERS.sub("", name.replace("._orig_mod.", "."))


def prefixed(rules: Iterable[Rule | Ignore | Fresh], *, source: str = "", target: str = "") -> Rules:
    """The same rules for tensors whose names begin with `source` and parameters whose paths begin with `target`.

    `prefixed(config.rules, target="backbone/")` maps a backbone's checkpoint into a policy's tree.
    """

    def move(rule):
        if isinstance(rule, Rule):
            return Rule(source + rule.source, target + rule.target, rule.pattern)
        if isinstance(rule, Ignore):
            return Ignore(re.escape(source) + rule.source, rule.reason)
        return rule

    return tuple(move(rule) for rule in rules)


# Rows of common layers, in PyTorch's names.


def linear(source: str, target: str, kernel: str = "o i -> i o", bias: str = "o -> o") -> Rules:
    """torch.nn.Linear (weight [out, in]) -> Einsum with bias."""
    return (Rule(f"{source}.weight", f"{target}/kernel", kernel), Rule(f"{source}.bias", f"{target}/bias", bias))


def layer_norm(source: str, target: str) -> Rules:
    """torch.nn.LayerNorm -> LayerNorm."""
    return (Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias"))


def attention(source: str, target: str) -> Rules:
    """Separate q, k, v and output projections, heads merged into one axis -> Attention."""
    rows = ()
    for name in "qkv":
        rows += linear(f"{source}.{name}_proj", f"{target}/{name}", "(n h) d -> d n h", "(n h) -> n h")
    return rows + linear(f"{source}.out_proj", f"{target}/o", "d (n h) -> n h d")


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
    layer, here = f"{source}.encoder.layers.{{layer}}", f"{target}/layers"
    return (
        Rule(f"{source}.embeddings.patch_embedding.weight", f"{target}/patch/kernel", "o c h w -> h w c o"),
        Rule(f"{source}.embeddings.class_embedding", f"{target}/cls"),
        Rule(f"{source}.embeddings.position_embedding.weight", f"{target}/positions"),
        Ignore(
            rf"{re.escape(source)}\.embeddings\.position_ids", "a constant range; transformers before 4.31 stored it"
        ),
        *layer_norm(f"{source}.pre_layrnorm", f"{target}/pre_norm"),  # the published spelling
        *attention(f"{layer}.self_attn", f"{here}/attn"),
        *layer_norm(f"{layer}.layer_norm1", f"{here}/attn_norm"),
        *layer_norm(f"{layer}.layer_norm2", f"{here}/mlp_norm"),
        *linear(f"{layer}.mlp.fc1", f"{here}/mlp/up"),
        *linear(f"{layer}.mlp.fc2", f"{here}/mlp/down"),
        *layer_norm(f"{source}.post_layernorm", f"{target}/post_norm"),
    )


# Rearrangement of one tensor.


@dataclasses.dataclass(frozen=True)
class Rearrange:
    """An einops-style pattern; the source may have groups, the target names each axis alone: "(n h) d -> d n h".

    So the target's shape fixes every size, and each slice of the target comes from one slice of the source.
    """

    source: tuple[tuple[str, ...], ...]
    target: tuple[str, ...]

    @classmethod
    def parse(cls, pattern: str, ndim: int) -> Rearrange:
        """Read a pattern for a target of `ndim` axes; empty: the identity. Raises ValueError on a bad one."""
        return _parse(pattern, ndim)

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape the source must have to become a target of `shape`."""
        sizes = dict(zip(self.target, shape))
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.source)

    def forward(
        self, read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], index: tuple[slice, ...]
    ) -> np.ndarray:
        """Slice `index` of the target.

        Args:
          read: slices of the source -> array; called once, with no more than the wanted part needs (where an inner axis
            of a group is cut, the rows it is part of).
          shape: of the whole target.
          index: one slice of step 1 per target axis.
        """
        sizes = dict(zip(self.target, shape))
        wanted = {axis: slice(*cut.indices(sizes[axis])[:2]) for axis, cut in zip(self.target, index)}
        ranges, shapes, cuts = [], [], []
        for group in self.source:
            begin, stride, free = 0, math.prod(sizes[axis] for axis in group), True
            length = stride
            for axis in group:
                stride //= sizes[axis]
                # A range can shrink while every axis further out is one index wide; axes further in come whole.
                cut = wanted[axis] if free else slice(0, sizes[axis])
                if free:
                    begin, length = begin + cut.start * stride, (cut.stop - cut.start) * stride
                free = free and cut.stop - cut.start == 1
                shapes.append(cut.stop - cut.start)
                cuts.append(slice(wanted[axis].start - cut.start, wanted[axis].stop - cut.start))
            ranges.append(slice(begin, begin + length))
        axes = [axis for group in self.source for axis in group]
        return read(tuple(ranges)).reshape(shapes)[tuple(cuts)].transpose([axes.index(axis) for axis in self.target])

    def backward(self, x: np.ndarray) -> np.ndarray:
        """A whole target -> the source it came from."""
        axes = [axis for group in self.source for axis in group]
        return x.transpose([self.target.index(axis) for axis in axes]).reshape(self.source_shape(x.shape))


@functools.cache
def _parse(pattern: str, ndim: int) -> Rearrange:
    if not pattern:
        axes = tuple(f"axis{i}" for i in range(ndim))
        return Rearrange(tuple((axis,) for axis in axes), axes)
    left, arrow, right = pattern.partition("->")
    groups = tuple(tuple((many or one).split()) for many, one in re.findall(r"\(([^()]*)\)|(\w+)", left))
    target = tuple(right.split())
    axes = [axis for group in groups for axis in group]
    if not arrow or "(" in right or sorted(axes) != sorted(target) or len(set(axes)) != len(axes):
        raise ValueError(
            f"pattern {pattern!r} must name the same axes on both sides, each once, and group them only on the left."
        )
    if len(target) != ndim:
        raise ValueError(f"pattern {pattern!r} makes {len(target)} axes, but the parameter has {ndim}.")
    return Rearrange(groups, target)


@functools.cache
def _source_regex(source: str) -> re.Pattern[str]:
    return re.compile(re.escape(source).replace(r"\{layer\}", r"(?P<layer>\d+)"))
