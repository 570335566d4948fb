"""Upstream checkpoints: where their tensors are, and which of them becomes which parameter of ours."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax.policies.heads.continuous import ContinuousHeadConfig
from robovlms_jax.policies.heads.discrete import DiscreteHeadConfig
from robovlms_jax.policies.heads.gpt import GPTHeadConfig
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.policies.heads.mlp import MLPHeadConfig
from robovlms_jax.policies.vla import VLA
from robovlms_jax.weights import rules, sources, torch_files

ACTION_TOKEN = "action_token"


def open_checkpoint(path: str | pathlib.Path, num_queries: int = 1) -> sources.Source:
    """The tensors of a policy that upstream trained, read slice by slice.

    A tensor that upstream's modules register under two names (`model.model...` and `model.backbone...`) appears once.

    Args:
      path: a .pt or .ckpt file with a state dict, bare or as Lightning and DeepSpeed wrap it, safetensors, or the
        folder that Lightning writes with DeepSpeed.
      num_queries: action queries of the policy; upstream stores one token and repeats it.
    Raises:
      FileNotFoundError: nothing there.
      ValueError: truncated, no checkpoint, or a pickle that wants to run code.
    """
    source = sources.open_source(path)
    return UpstreamSource(source, num_queries)


class UpstreamSource:
    """A source without the second names of the same numbers, and with as many action tokens as a policy has queries."""

    def __init__(self, source: sources.Source, num_queries: int = 1):
        tensors = source.tensors if isinstance(source, torch_files.TorchSource) else {}
        first: dict[tuple, str] = {}
        for name in source.shapes:
            same = tensors[name].identity if name in tensors else name
            first.setdefault((rules.normalize(name), same), name)
        self.name = source.name
        self.shapes = {name: source.shapes[name] for name in first.values()}
        self._source, self._num_queries = source, num_queries
        for name, shape in self.shapes.items():
            if rules.normalize(name) == ACTION_TOKEN and len(shape) == 1:
                self.shapes[name] = (shape[0] * num_queries,)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if self._num_queries > 1 and rules.normalize(name) == ACTION_TOKEN:
            return np.tile(self._source.read(name, (slice(None),)), self._num_queries)[index]
        return self._source.read(name, index)


def policy_rules(model: VLA) -> rules.Rules:
    """Rules for a whole upstream policy; wrapper prefixes are stripped before matching.

    Upstream repeats one action token for all queries: with several, open the checkpoint with `num_queries`.

    Raises:
      ValueError: a head that upstream does not have.
    """
    config, vlm = model.config, model.vlm
    make = HEADS.get(type(config.head))
    if make is None:
        known = ", ".join(kind.__name__ for kind in HEADS)
        raise ValueError(
            f"upstream has no head like {type(config.head).__name__}; its checkpoints hold one of {known}."
        )
    resampler = () if vlm.resampler is None else rules.perceiver("vision_resampler", "backbone/resampler")
    has_query = config.readout == "action_query"
    return (
        *rules.prefixed(vlm.rules, target="backbone/"),
        *resampler,
        *((rules.Rule(ACTION_TOKEN, "readout/queries", "(q d) -> q d"),) if has_query else ()),
        *make("act_head", "head", config.head),
        rules.Ignore(r"clip_norm_head\..*", "of a training loss"),
    )


def mlp_head(source: str, target: str, config: MLPHeadConfig) -> rules.Rules:
    """FCDecoder -> MLPHead."""
    first, second = (rules.linear(f"{source}.mlp.{2 * layer}", f"{target}/mlp/layer_{layer}") for layer in range(2))
    return (*first, *second, *_outputs(source, target, config))


def lstm_head(source: str, target: str, config: LSTMHeadConfig) -> rules.Rules:
    """LSTMDecoder, a torch.nn.LSTM -> LSTMHead."""
    rows: rules.Rules = ()
    for layer in range(config.num_layers):
        for ours, theirs in (("input", "ih"), ("hidden", "hh")):
            here = f"{target}/lstm_{layer}/{ours}"
            rows += (rules.Rule(f"{source}.rnn.weight_{theirs}_l{layer}", f"{here}_kernel", "(g h) d -> d g h"),)
            rows += (rules.Rule(f"{source}.rnn.bias_{theirs}_l{layer}", f"{here}_bias", "(g h) -> g h"),)
    return rows + _outputs(source, target, config)


def gpt_head(source: str, target: str, config: GPTHeadConfig) -> rules.Rules:
    """GPTDecoder, whose Conv1D layers hold [in, out] -> GPTHead."""
    block, here = f"{source}.gpt.h.{{layer}}", f"{target}/layers"
    qkv = ()
    for part, name in enumerate("qkv"):
        axes = f"{part}/3 n h"
        qkv += (rules.Rule(f"{block}.attn.c_attn.weight", f"{here}/attn/{name}/kernel", f"d ({axes}) -> d n h"),)
        qkv += (rules.Rule(f"{block}.attn.c_attn.bias", f"{here}/attn/{name}/bias", f"({axes}) -> n h"),)
    return (
        rules.Rule(f"{source}.gpt.wpe.weight", f"{target}/positions"),
        *rules.linear(f"{source}.fc", f"{target}/project"),
        *rules.layer_norm(f"{block}.ln_1", f"{here}/attn_norm"),
        *qkv,
        *rules.linear(f"{block}.attn.c_proj", f"{here}/attn/o", "(n h) d -> n h d"),
        rules.Ignore(rf"{re.escape(source)}\.gpt\.h\.\d+\.attn\.(bias|masked_bias)", "the causal mask"),
        *rules.layer_norm(f"{block}.ln_2", f"{here}/mlp_norm"),
        *rules.linear(f"{block}.mlp.c_fc", f"{here}/mlp/up", ""),
        *rules.linear(f"{block}.mlp.c_proj", f"{here}/mlp/down", ""),
        *rules.layer_norm(f"{source}.gpt.ln_f", f"{target}/final_norm"),
        *_outputs(source, target, config),
    )


HEADS: dict[type, Callable[[str, str, Any], rules.Rules]] = {
    MLPHeadConfig: mlp_head,
    LSTMHeadConfig: lstm_head,
    GPTHeadConfig: gpt_head,
    DiscreteHeadConfig: lambda source, target, config: (),  # it only names tokens
}
"""Our head -> the rules of its counterpart."""


def _outputs(source: str, target: str, config: ContinuousHeadConfig) -> rules.Rules:
    """Two MLPs whose Linear layers are every second entry, ReLU between."""
    rows: rules.Rules = ()
    for ours, theirs in (("arm", "actions"), ("gripper", "gripper")):
        for layer in range(len(config.trunk) + 1):
            rows += rules.linear(f"{source}.{theirs}.mlp.{2 * layer}", f"{target}/{ours}/layer_{layer}")
    return rows


def allow(
    table: rules.Rules,
    tensors: Mapping[str, tuple[int, ...]],
    parameters: Mapping[str, tuple[int, ...]],
    *,
    missing: Sequence[str] = (),
    unused: Sequence[str] = (),
) -> tuple[rules.Rules, list[str], list[str]]:
    """The same rules, with exceptions for what a checkpoint lacks and what it has too much.

    Only what really is missing or left over is excepted: a pattern as wide as ".*" changes nothing that fits.

    Args:
      tensors: of the checkpoint, name -> shape. parameters: of the model, path -> shape.
      missing: regular expressions searched in parameter paths whose tensors may be absent; they keep their own values.
      unused: regular expressions searched in the names of tensors that may be left over.
    Returns:
      rules, the parameters and the tensors that were excepted.
    """
    names = {name: rules.canonical(table, name) for name in tensors}
    filled, known = set(), set()
    for rule in table:
        if isinstance(rule, rules.Rule):
            hits = {name for name in names.values() if rule.match(name)[0]}
            known |= hits
            if hits:
                filled.add(rule.target)
        elif isinstance(rule, rules.Tied):
            heads = {name for name in names.values() if rule.match(name)}
            known |= heads
            filled |= {rule.table} if heads else set()
        elif isinstance(rule, rules.Ignore):
            known |= {name for name in names.values() if re.fullmatch(rule.source, name)}
    initialised = [rule.target for rule in table if isinstance(rule, rules.Initialised)]
    absent = [
        path
        for path in parameters
        if path not in filled
        and not any(re.search(pattern, path) for pattern in initialised)
        and any(re.search(pattern, path) for pattern in missing)
    ]
    left = [
        name for name in tensors if names[name] not in known and any(re.search(pattern, name) for pattern in unused)
    ]
    extra = (
        *(rules.Initialised(f"^{re.escape(path)}$", "absent from the checkpoint, allowed") for path in absent),
        *(rules.Ignore(re.escape(names[name]), "left over, allowed") for name in left),
    )
    return (*table, *extra), absent, left
