"""Upstream checkpoints: where their tensors are, and which of them becomes which parameter of ours."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence

from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.policies.vla import VLA
from robovlms_jax.weights import rules, sources, torch_files


def open_checkpoint(path: str | pathlib.Path) -> sources.Source:
    """The tensors of a policy that upstream trained, read slice by slice.

    A tensor that upstream's modules register under two names (`model.model...` and `model.backbone...`) appears once.

    Args:
      path: a .pt or .ckpt file with a state dict, bare or as Lightning and DeepSpeed wrap it, safetensors, or the
        folder that Lightning writes with DeepSpeed.
    Raises:
      FileNotFoundError: nothing there.
      ValueError: truncated, no checkpoint, or a pickle that wants to run code.
    """
    source = sources.open_source(path)
    return _Deduplicated(source) if isinstance(source, torch_files.TorchSource) else source


class _Deduplicated:
    """A source without the second names of the same numbers."""

    def __init__(self, source: torch_files.TorchSource):
        first: dict[tuple, str] = {}
        for name, tensor in source.tensors.items():
            first.setdefault((rules.normalize(name), tensor.identity), name)
        self.name = source.name
        self.shapes = {name: source.shapes[name] for name in source.shapes if name in set(first.values())}
        self.read = source.read


def policy_rules(model: VLA) -> rules.Rules:
    """Rules for a whole upstream policy (`action_space: continuous`, LSTMDecoder); wrapper prefixes are stripped
    before matching.

    Upstream repeats one action token for all queries, so only a policy with one query has a counterpart there.

    Raises:
      ValueError: a head, or a number of queries, that upstream's checkpoints do not hold.
    """
    head = model.config.head
    if not isinstance(head, LSTMHeadConfig) or model.config.num_queries != 1:
        raise ValueError(
            f"upstream checkpoints are read for an LSTM head with policy.num_queries=1; this policy has "
            f"{type(head).__name__} "
            f"with {model.config.num_queries}."
        )
    resampler = () if model.vlm.resampler is None else rules.perceiver("vision_resampler", "backbone/resampler")
    return (
        *rules.prefixed(model.vlm.rules, target="backbone/"),
        *resampler,
        rules.Rule("action_token", "readout/queries", "(q d) -> q d"),
        *lstm_head("act_head", "head", head),
    )


def lstm_head(source: str, target: str, config: LSTMHeadConfig) -> rules.Rules:
    """torch.nn.LSTM plus two MLPs whose Linear layers are every second entry (ReLU between) -> LSTMHead."""
    rows: rules.Rules = ()
    for layer in range(config.num_layers):
        for ours, theirs in (("input", "ih"), ("hidden", "hh")):
            here = f"{target}/lstm_{layer}/{ours}"
            rows += (rules.Rule(f"{source}.rnn.weight_{theirs}_l{layer}", f"{here}_kernel", "(g h) d -> d g h"),)
            rows += (rules.Rule(f"{source}.rnn.bias_{theirs}_l{layer}", f"{here}_bias", "(g h) -> g h"),)
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
    named = [rules.normalize(name) for name in tensors]
    filled, known = set(), set()
    for rule in table:
        if isinstance(rule, rules.Rule):
            hits = {name for name in named if rule.match(name)[0]}
            known |= hits
            if hits:
                filled.add(rule.target)
        elif isinstance(rule, rules.Ignore):
            known |= {name for name in named if re.fullmatch(rule.source, name)}
    born = [rule.target for rule in table if isinstance(rule, rules.Fresh)]
    absent = [
        path
        for path in parameters
        if path not in filled
        and not any(re.search(pattern, path) for pattern in born)
        and any(re.search(pattern, path) for pattern in missing)
    ]
    left = [
        name
        for name in tensors
        if rules.normalize(name) not in known and any(re.search(pattern, name) for pattern in unused)
    ]
    extra = (
        *(rules.Fresh(f"^{re.escape(path)}$", "absent from the checkpoint, allowed") for path in absent),
        *(rules.Ignore(re.escape(rules.normalize(name)), "left over, allowed") for name in left),
    )
    return (*table, *extra), absent, left
