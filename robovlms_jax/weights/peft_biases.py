"""Biases that learned beside adapters, in PEFT's files: its `bias` "all" and "lora_only".

PEFT stores a bias by its module's name in torch, that of a module with an adapter below `base_layer`, and opens every
one that its file has. A bias that torch has no `.bias` for (a fused projection's `in_proj_bias`) has no place there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from robovlms_jax.weights import rules as rules_of
from robovlms_jax.weights.rearrange import Rearrange
from robovlms_jax.weights.rules import Ignore, Rule, Rules

KINDS = ("none", "all", "lora_only")
"""Values of PEFT's `bias`: which of the base's biases learned."""

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.base_layer)?\.bias")


def paths(rules: Rules, among: Collection[str]) -> set[str]:
    """Those parameters of the backbone that are `.bias` of a module in torch."""
    return {rule.target for rule in _by_target(rules, among).values()}


def tensors(
    flat: Mapping[str, Any], rules: Rules, module: Callable[[str], str], adapted: Collection[str], trained: set[str]
) -> tuple[str, dict[str, np.ndarray]]:
    """PEFT's `bias`, and what it stores for it: every bias; of modules with adapters alone, where no other learned.

    Args:
      flat: path -> array, of the backbone. module: tensor's name -> its module's in transformers 5.
      adapted: modules that have adapters. trained: paths of the biases that learned; none gives ("none", {}).
    Raises:
      ValueError: one of `trained` is no `.bias` in torch.
    """
    by_target = _by_target(rules, flat)
    if lost := sorted(trained - set(by_target)):
        raise ValueError(
            f"PEFT has no place for the trained biases {lost}: in torch they are no `.bias` of a module. Export the "
            "whole model, without --adapters."
        )
    found: dict[str, np.ndarray] = {}
    beside: set[str] = set()  # learned, and of modules without an adapter
    groups: dict[tuple[str, int], list[Rule]] = {}
    for rule in sorted(by_target.values(), key=lambda rule: rule.part):
        groups.setdefault((rule.source, rule.first), []).append(rule)
    for rules_here in groups.values():
        first = rules_here[0]
        for layer in range(flat[first.target].shape[0]) if first.is_stacked else [None]:
            name = module(first.name(layer).removesuffix(".bias") + ".weight")
            parts = [np.asarray(flat[r.target] if layer is None else flat[r.target][layer]) for r in rules_here]
            value = Rearrange.parse(first.pattern, parts[0].ndim).backward(*parts)
            if name not in adapted and any(rule.target in trained for rule in rules_here):
                beside.add(name)
            key = f"{name}.base_layer.bias" if name in adapted else f"{name}.bias"
            found[f"base_model.model.{key}"] = np.ascontiguousarray(value, np.float32)
    if not trained:
        return "none", {}
    if beside:
        return "all", found
    return "lora_only", {key: value for key, value in found.items() if key.endswith(".base_layer.bias")}


def places(keys: Collection[str], rules: Rules, flat: Mapping[str, Any]) -> dict[str, list[tuple[str, int | None]]]:
    """Tensor in PEFT's file -> paths and layers of the biases it becomes; empty for a part that the backbone is built
    without. Keys that are no bias, or no bias of this model, are left out."""
    by_target, found = _by_target(rules, flat), {}
    everywhere = [rule for rule in rules if isinstance(rule, Rule)]
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None or ".lora_" in key:
            continue
        name = rules_of.canonical(rules, f"{match['module']}.bias")
        matched = [(path, rule.match(name)) for path, rule in by_target.items()]
        mine = [(path, layer) for path, (fits, layer) in matched if fits]
        known = any(rule.match(name)[0] for rule in everywhere)
        if mine or known or any(rule.match(name) for rule in rules if isinstance(rule, Ignore)):
            found[key] = mine
    return found


def require_shapes(
    stored: Mapping[str, tuple[int, ...]],
    at: Mapping[str, list[tuple[str, int | None]]],
    rules: Rules,
    flat: Mapping[str, Any],
) -> None:
    """Raise ValueError where a bias in PEFT's file has another size than the backbone's. stored: key -> shape."""
    by_target = _by_target(rules, flat)
    for key, mine in at.items():
        for path, _ in mine:
            shape = tuple(flat[path].shape)[int(by_target[path].is_stacked) :]
            wanted = Rearrange.parse(by_target[path].pattern, len(shape)).source_shape(shape)
            if wanted != tuple(stored[key]):
                raise ValueError(
                    f"the adapter's {key} has {list(stored[key])} values; the backbone's {path} wants {list(wanted)}. "
                    "It is one of another model."
                )


def joined(
    values: Mapping[str, np.ndarray],
    at: Mapping[str, list[tuple[str, int | None]]],
    rules: Rules,
    flat: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Tensors of PEFT's file as our parameters: path -> float32 array.

    Args:
      values: key -> tensor. at: what `places` says of the keys. flat: path -> array, or shape, of the backbone.
    Raises:
      ValueError: a bias for some of the layers alone.
    """
    by_target, layers = _by_target(rules, flat), {}
    for key, mine in at.items():
        for path, layer in mine:
            rule, shape = by_target[path], tuple(flat[path].shape)
            shape = shape[1:] if rule.is_stacked else shape
            whole = (slice(None),) * len(shape)
            rearrange = Rearrange.parse(rule.pattern, len(shape))
            value = rearrange.forward(lambda cut, key=key: values[key][cut], shape, whole)
            layers.setdefault(path, {})[layer] = value.astype(np.float32)
    out = {}
    for path, rows in layers.items():
        if not by_target[path].is_stacked:
            out[path] = rows[None]
            continue
        if missing := sorted(set(range(flat[path].shape[0])) - set(rows)):
            raise ValueError(
                f"the adapter has {by_target[path].source} in layers {sorted(rows)}, and the backbone in {missing}, "
                "too; it was made for some layers only, or for a model of another depth."
            )
        out[path] = np.stack([rows[layer] for layer in range(len(rows))])
    return out


def _by_target(rules: Rules, among: Collection[str]) -> dict[str, Rule]:
    """The first rule of every parameter that is a module's bias in torch."""
    found: dict[str, Rule] = {}
    for rule in rules:
        if isinstance(rule, Rule) and rule.target in among:
            found.setdefault(rule.target, rule)
    return {path: rule for path, rule in found.items() if rule.source.endswith(".bias")}
