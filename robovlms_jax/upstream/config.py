"""Upstream JSON -> ExperimentConfig.

`table.py` says what every key decides, `ignored.py` which ones decide nothing, and why. A key in neither is an error,
and so is a value that asks for something that is not built here: nothing is dropped in silence. Fields that several
keys decide together are made here.
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Mapping
from typing import Any

from robovlms_jax.policies.heads import base as heads
from robovlms_jax.policies.heads.discrete import DiscreteHeadConfig
from robovlms_jax.policies.heads.gpt import GPTHeadConfig
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.policies.heads.mlp import MLPHeadConfig
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.upstream import files, ignored, rows, table
from robovlms_jax.upstream.rows import Keys


def load_experiment(path: str | pathlib.Path) -> ExperimentConfig:
    """The experiment an upstream JSON file describes; an ordinary configuration from then on.

    Raises:
      FileNotFoundError: the file, or its parent, does not exist.
      ValueError: it is not JSON, has a key that neither table knows, or asks for something that is not built here.
    """
    try:
        return to_experiment(files.read(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_experiment(values: Mapping[str, Any]) -> ExperimentConfig:
    """Contents of a merged file -> ExperimentConfig. Raises ValueError, see `load_experiment`."""
    flat = dict(files.flatten(values))
    _require_known(flat)
    keys = Keys(flat, table.ROWS)
    _require_agreement(keys)
    fields = keys.fields()
    for decide in (_structure, _bounds, _data, _optimizer, _length, _train):
        fields |= decide(keys)
    return rows.replaced(ExperimentConfig(), fields)


def evaluation_dtype(values: Mapping[str, Any]) -> str:
    """The type upstream evaluates in: its evaluator knows "bf16" only by that name, and takes float32 for the rest."""
    return "bfloat16" if values.get("trainer", {}).get("precision") == "bf16" else "float32"


def _require_agreement(keys: Keys) -> None:
    """Raise ValueError for keys that contradict others."""
    class_name, vlm_name, _ = keys.choose("model", None, table.BACKBONES)
    keys.only("robovlm_name", class_name)
    keys.only("vlm.name", vlm_name)
    keys.only("tokenizer.pretrained_model_name_or_path", keys.need("vlm.pretrained_model_name_or_path"))
    if keys.need("model") in ("kosmos", "llava", "flamingo"):  # the others bring their own image processor
        keys.only("image_size", 224)
    dataset = keys.choose("train_dataset.type", None, {kind: kind for _, kind in (table.CALVIN, table.RLDS)})
    keys.only("val_dataset.type", dataset)


def _is_rlds(keys: Keys) -> bool:
    key, value = table.RLDS
    return keys.get(key, None) == value


def _structure(keys: Keys) -> dict[str, Any]:
    kinds = {"continuous": "none", "down_sample": "pooling", "discrete": "none"}
    keys.only("act_head.down_sample", keys.choose("act_head.action_space", "continuous", kinds))
    head = _head(keys)
    history = keys.choose(
        "act_head.history_type", "post", {"post": "policy_head", "pre": "interleaved", "video": "video"}
    )
    window = keys.need("window_size")
    if isinstance(head, DiscreteHeadConfig):  # upstream always trains these on all frames in one sequence
        history = "interleaved" if window > 1 else "one_step"
    elif isinstance(head, MLPHeadConfig) and (history == "policy_head" or window == 1):
        history, window = "one_step", 1  # nothing in it remembers, so the frames of a window are strangers
    both = keys.need("use_hand_rgb") and not _is_rlds(keys)
    cameras = ("wrist", "static") if both else ("static",)
    return {"policy.history": history, "policy.window": window, "policy.head": head, "policy.cameras": cameras}


def _bounds(keys: Keys) -> dict[str, Any]:
    """How actions become targets."""
    normalised = keys.get("norm_action", False)
    if _is_rlds(keys):  # scaled by quantiles, then once more: data.compat_second_norm
        if normalised:
            keys.only("norm_min", -0.65)
            keys.only("norm_max", 0.65)
        return {"policy.action_scaling": "quantile", "data.compat_second_norm": normalised}
    low, high = (keys.get("norm_min", -1), keys.get("norm_max", 1)) if normalised else (-1, 1)
    return {"policy.action_low": (float(low),) * 6, "policy.action_high": (float(high),) * 6}


def _head(keys: Keys) -> heads.HeadConfig:
    kinds = {
        "LSTMDecoder": LSTMHeadConfig,
        "FCDecoder": MLPHeadConfig,
        "GPTDecoder": GPTHeadConfig,
        "DiscreteDecoder": DiscreteHeadConfig,
    }
    kind = keys.choose("act_head.type", None, kinds)
    if (kind is DiscreteHeadConfig) != (keys.get("act_head.action_space", "continuous") == "discrete"):
        raise ValueError("act_head.type DiscreteDecoder and act_head.action_space discrete go together.")
    if kind is DiscreteHeadConfig:
        low, high = float(keys.get("act_head.min_action", -1)), float(keys.get("act_head.max_action", 1))
        return DiscreteHeadConfig(num_bins=keys.get("act_head.n_bin", 256), low=low, high=high)
    more = {"num_layers": keys.get("act_head.num_layers", 4)} if kind is LSTMHeadConfig else {}
    weight = keys.need("arm_gripper_loss_ratio")
    return kind(hidden_size=keys.get("act_head.hidden_size", 1024), gripper_loss_weight=weight, **more)


def _data(keys: Keys) -> dict[str, Any]:
    if _is_rlds(keys):
        return {"data.image_size": keys.need("image_size")}
    root, validation = (pathlib.PurePosixPath(keys.need(f"{x}_dataset.data_dir")) for x in ("train", "val"))
    if (root.name, validation.name) != ("training", "validation") or root.parent != validation.parent:
        raise ValueError(
            f"train_dataset.data_dir={str(root)!r} and val_dataset.data_dir={str(validation)!r} must be training and "
            "validation of one folder, which becomes data.root."
        )
    chosen = [file for key, file in table.EPISODE_LISTS.items() if keys.get(key, False)]
    if len(chosen) > 1:
        raise ValueError("train_dataset.few_shot and train_dataset.partial_data exclude each other here.")
    return {"data.dataset": "calvin", "data.root": str(root.parent), "data.episode_list": "".join(chosen)}


def _optimizer(keys: Keys) -> dict[str, Any]:
    warmup_steps, warmup_epochs = keys.get("warmup_steps", 0), float(keys.get("warmup_epochs", 0))
    if _max_steps(keys):
        # Upstream's epoch is the estimated number of steps over max_epochs.
        warmup_steps += round(warmup_epochs * _max_steps(keys) / (keys.get("trainer.max_epochs", 1) or 1))
        warmup_epochs = 0.0
    clip_norm = keys.get("gradient_clip_val", keys.get("trainer.gradient_clip_val", 0.0)) or 0.0
    return {
        "optimizer.warmup_steps": warmup_steps,
        "optimizer.warmup_epochs": warmup_epochs,
        "optimizer.clip_norm": float(clip_norm),
    }


def _max_steps(keys: Keys) -> int:
    """0 where epochs decide."""
    return max(keys.get("trainer.max_steps", -1) or 0, 0)


def _length(keys: Keys) -> dict[str, Any]:
    steps, interval = _max_steps(keys), keys.get("trainer.val_check_interval", None)
    length = {"train.steps": steps} if steps else {"train.epochs": float(keys.need("trainer.max_epochs"))}
    return length | ({"train.eval_every": interval} if interval else {})


def _train(keys: Keys) -> dict[str, Any]:
    accumulation = keys.get("trainer.accumulate_grad_batches", 1)
    ways = keys.get("gpus", 1) * keys.get("num_nodes", 1)
    output = pathlib.PurePosixPath(keys.get("output_root", "runs")) / keys.need("model") / keys.need("task_name")
    is_sharded = "deepspeed" in str(keys.get("trainer.strategy", ""))
    return {
        "train.output": str(output),
        "train.batch_size": keys.need("batch_size") * accumulation * ways,
        "train.trainable": _trainable(keys),
        **({"mesh.data": 1, "mesh.fsdp": -1} if is_sharded else {}),
    }


def _trainable(keys: Keys) -> tuple[str, ...]:
    """Upstream switches parts off and on again in this order: backbone, vision tower, adapters, text embedding."""
    parts = {
        "backbone/vision/": keys.get("train_setup.train_vision", False),
        "backbone/text/embed/": keys.get("train_setup.train_text_embedding", False),
    }
    if keys.get("use_vision_resampler", False):
        parts["backbone/resampler/"] = not keys.get("train_setup.freeze_resampler", False)
    policy = "^(?!backbone/)"
    if keys.need("model") == "flamingo":  # its gated cross-attention always trains
        parts["backbone/text/.*cross"] = True
        parts["backbone/connector/"] = keys.get("train_setup.train_resampler", False)
        parts["backbone/text/"] = keys.get("train_setup.train_full_decoder", False)
        return (policy, *(f"^{part}" for part, trains in parts.items() if trains))
    for key in ("train_setup.train_resampler", "train_setup.train_full_decoder"):
        keys.only(key, None)
    if keys.get("train_setup.lora_enable", False):
        parts["backbone/vision/"] = False  # frozen again, with all that adapters stand in for
        biases = ("^backbone/(?!vision/).*bias$",) if keys.get("train_setup.lora_bias", "none") == "all" else ()
        return ("lora_", *biases, policy, *(f"^{part}" for part, trains in parts.items() if trains))
    if keys.get("train_setup.freeze_backbone", False):
        return (policy, *(f"^{part}" for part, trains in parts.items() if trains))
    frozen = [part for part, trains in parts.items() if not trains]
    return (f"^(?!{'|'.join(frozen)})",) if frozen else (".*",)


def _require_known(flat: Mapping[str, Any]) -> None:
    problems = []
    for key in flat:
        if key in table.MAPPED or ignored.reason(key):
            continue
        above = next((known for known in table.MAPPED if key.startswith(known + ".")), None)
        near = difflib.get_close_matches(key, [*table.MAPPED, *ignored.IGNORED], n=1)
        hint = f"{above} {table.MAPPED[above]}" if above else f"did you mean {near[0]!r}?" if near else ""
        problems.append(f"unknown key {key!r}" + (f"; {hint}" if hint else ""))
    if problems:
        raise ValueError("\n  ".join([*problems, "docs/upstream.md lists the keys that are read and those ignored."]))
