"""PEFT's adapter_config.json: what is written, what is read, and what is refused of it."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from robovlms_jax.nn.linear import Lora
from robovlms_jax.weights import peft_biases

CONFIG = "adapter_config.json"

_PLAIN = {
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "use_qalora": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "lora_bias": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "velora_config": None,
    "monteclora_config": None,
}
"""Settings of PEFT that change what is computed, with the only value that our adapters have."""
_REWRITING = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Beginnings of `init_lora_weights` with which PEFT changes the base's own weights when it opens an adapter."""


def written(lora: Lora, modules: list[str], fused: Mapping[str, int], base_model: str) -> dict[str, Any]:
    """Settings of adapters that `peft.export` writes, but for `bias`.

    fused: module -> how many kernels share its adapter.
    """
    more = math.sqrt if lora.kind == "rslora" else float  # so that alpha / r, or alpha / sqrt(r), stays
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.kind == "rslora",
        "use_dora": lora.kind == "dora",
        "target_modules": modules,
        "rank_pattern": {re.escape(module): lora.rank * parts for module, parts in fused.items()},
        "alpha_pattern": {re.escape(module): lora.alpha * more(parts) for module, parts in fused.items()},
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def require_kind(directory: pathlib.Path, settings: Mapping[str, Any], lora: Lora) -> None:
    """Raise ValueError where the settings are of another method, or of adapters that mean something else than ours."""
    if settings.get("peft_type") != "LORA" or (settings.get("use_dora") and settings.get("use_rslora")):
        raise ValueError(
            f"{directory / CONFIG}: peft_type={settings.get('peft_type')!r}, use_dora={settings.get('use_dora')}, "
            f"use_rslora={settings.get('use_rslora')}; LORA, with one of the two at most, is read here."
        )
    if settings.get("bias", "none") not in peft_biases.KINDS:
        raise ValueError(
            f"{directory / CONFIG} has bias={settings['bias']!r}; one of {list(peft_biases.KINDS)} is read here."
        )
    other = {key: settings[key] for key, value in _PLAIN.items() if settings.get(key, value) not in (value, None, [])}
    if other:
        raise ValueError(
            f"{directory / CONFIG} has {other}; adapters with { ({k: _PLAIN[k] for k in other}) } are read here."
        )
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_REWRITING):
        raise ValueError(
            f"{directory / CONFIG} has init_lora_weights={begun!r}: with it PEFT changes the base's weights when it "
            "opens the adapter; here they stay as published. Save it as a plain one, with peft's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=DIRECTORY of the adapter before training)."
        )
    ranks = [settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()]
    wrong = [rank for rank in ranks if not isinstance(rank, int) or rank < 1]
    if wrong:
        raise ValueError(f"{directory / CONFIG} has rank {wrong[0]!r}; r and rank_pattern are whole numbers above 0.")
    require_rank(directory, settings.get("r", 8), settings, lora)


def require_rank(directory: pathlib.Path, rank: int, settings: Mapping[str, Any], lora: Lora) -> None:
    """Raise ValueError where the adapters have a larger rank than the backbone's, or are of another kind."""
    kind = "dora" if settings.get("use_dora") else "rslora" if settings.get("use_rslora") else "lora"
    if lora.rank < rank or lora.kind != kind:
        raise ValueError(
            f"{directory} holds adapters of kind {kind!r} and rank {rank}; the backbone is to have kind {lora.kind!r} "
            f"and rank {lora.rank}. Pass --backbone.lora_rank {max(rank, lora.rank)} --backbone.lora_kind {kind}."
        )


def other_base(settings: Mapping[str, Any], weights: str) -> str:
    """The base that adapters were made for, where its name is another one than that of the weights; else empty.

    weights: a directory, or hf://OWNER/NAME; empty: none.
    """
    there = str(settings.get("base_model_name_or_path") or "")
    names = [re.split("[@,]", path)[0].rstrip("/").rsplit("/", 1)[-1].lower() for path in (there, weights)]
    return there if names[0] != names[1] else ""


def scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's factor of B A: the first pattern that the end of a module's name has, else lora_alpha."""
    patterns = (settings.get("alpha_pattern") or {}).items()
    own = (alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", module))
    return next(own, settings.get("lora_alpha", 8)) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
