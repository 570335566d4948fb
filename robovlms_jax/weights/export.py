"""Parameters -> a directory that transformers' `from_pretrained` opens."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from robovlms_jax import atomic
from robovlms_jax.weights.rearrange import Rearrange
from robovlms_jax.weights.rules import Rule, Rules
from robovlms_jax.weights.sources import INDEX, SINGLE


def export(
    params: Mapping[str, Any],
    rules: Rules,
    directory: str | pathlib.Path,
    config_json: Mapping[str, Any],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write safetensors (sharded above `max_shard_bytes`, one shard in memory at a time) and config.json.

    Args:
      params: nested dict of arrays, adapters merged; types are kept.
      rules: those the parameters were or could have been loaded with; `prefixed` ones for a policy's tree.
      config_json: contents of the checkpoint's config.json.
    Raises:
      ValueError: parameters without a rule (adapters: see `nn.linear.merge_lora`) or rules without a parameter.
      FileExistsError: the directory holds safetensors already, which would mix with the new ones.
    """
    flat, directory = flatten_dict(params, sep="/"), pathlib.Path(directory)
    by_target = _by_target(flat, rules)
    if any(directory.glob("*.safetensors")):
        raise FileExistsError(f"{directory} holds safetensors files already; export to an empty directory.")

    tensors: dict[str, tuple[int | None, list[str]]] = {}  # name -> layer, paths of its parts in order
    for path, rule in sorted(by_target.items(), key=lambda item: item[1].part):
        for layer in range(flat[path].shape[0]) if rule.is_stacked else [None]:
            tensors.setdefault(rule.name(layer), (layer, []))[1].append(path)
    sizes = {
        name: sum(flat[path].nbytes for path in paths) // (1 if layer is None else flat[paths[0]].shape[0])
        for name, (layer, paths) in tensors.items()
    }
    shards = _shards(sizes, max_shard_bytes)

    directory.mkdir(parents=True, exist_ok=True)
    atomic.write_text(directory / "config.json", json.dumps(config_json, indent=2) + "\n")
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for name in shard:
            layer, paths = tensors[name]
            parts = [np.asarray(flat[path] if layer is None else flat[path][layer]) for path in paths]
            rearrange = Rearrange.parse(by_target[paths[0]].pattern, parts[0].ndim)
            arrays[name] = np.ascontiguousarray(rearrange.backward(*parts))
            weight_map[name] = file
        with atomic.becoming(directory / file) as temporary:
            save_file(arrays, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(x.nbytes for x in flat.values())}, "weight_map": weight_map}
        atomic.write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")


def _by_target(flat: Mapping[str, Any], rules: Rules) -> dict[str, Rule]:
    """The first rule of every parameter. Raises ValueError where parameters and rules do not match."""
    by_target: dict[str, Rule] = {}
    for rule in rules:
        if isinstance(rule, Rule):
            by_target.setdefault(rule.target, rule)
    unmapped, absent = sorted(set(flat) - set(by_target)), sorted(set(by_target) - set(flat))
    if unmapped or absent:
        raise ValueError(
            f"cannot export: parameters without a rule {unmapped}, rules without a parameter {absent}. "
            "Adapters (lora_a, lora_b) go into their kernels first, with nn.linear.merge_lora."
        )
    return by_target


def _shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in their order, in groups of at most `max_bytes`, or of one tensor that is larger."""
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards
