"""Upstream JSON -> ExperimentConfig.

Two tables say what happens to every key: `MAPPED` names what it decides here, `IGNORED` why it decides nothing. A key
in neither is an error, and so is a value that asks for something that is not built here: nothing is dropped in silence.
What upstream does with its keys was read at commit 8adc1d2; docs/upstream.md shows both tables.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from robovlms_jax import json_files
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.data.config import DataConfig
from robovlms_jax.evaluation.config import EvaluationConfig
from robovlms_jax.inputs.config import AugmentConfig
from robovlms_jax.parallel.config import MeshConfig
from robovlms_jax.policies.config import AuxiliaryConfig, ClipConfig, PolicyConfig
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.policies.heads.discrete import DiscreteHeadConfig
from robovlms_jax.policies.heads.gpt import GPTHeadConfig
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.policies.heads.mlp import MLPHeadConfig
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training.config import OptimizerConfig, TrainConfig

BACKBONES = {
    "kosmos": ("RoboKosMos", "kosmos", "kosmos-2"),
    "paligemma": ("RoboPaligemma", "paligemma", "paligemma-3b-224"),
    "llava": ("RoboLLaVA", "llava", "llava-mpt-7b"),
    "qwen": ("RoboQwen", "qwen", "qwen-vl"),
    "moondream": ("RoboMoonDream", "moondream", "moondream2"),
    "uform": ("RoboUform", "uform", "uform-gen2-qwen-500m"),
    "flamingo": ("RoboFlamingo", "mpt_1b_ift", "flamingo-mpt-1b"),
}
"""`model` -> its `robovlm_name` and `vlm.name`, and our backbone."""

CLIP = "hf://openai/clip-vit-large-patch14"
"""Upstream's ViT-L-14 "openai", as published for transformers."""

RLDS = "OpenVLADataset"
RLDS_AUGMENT = AugmentConfig(crop_area=0.9, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)
"""What upstream's loader does to images under `image_aug`."""

HISTORIES = {"post": "policy_head", "pre": "interleaved", "video": "video"}

MAPPED = {
    "parent": "read first, this file merged over it; relative to this file, else to the working directory",
    "robovlm_name": "checked against model",
    "model": "backbone.name",
    "vlm.name": "checked against model",
    "vlm.pretrained_model_name_or_path": "backbone.weights",
    "tokenizer.pretrained_model_name_or_path": "backbone.weights; must be the same directory",
    "image_size": "checked: the backbone's own where upstream obeys it; data.image_size with OpenVLADataset",
    "window_size": "policy.window",
    "fwd_pred_next_n": "policy.chunk",
    "use_hand_rgb": "policy.cameras: wrist before static. OXE datasets never have a wrist image: static alone",
    "act_head.type": "policy.head",
    "act_head.hidden_size": "policy.head.hidden_size",
    "act_head.num_layers": "policy.head.num_layers (LSTMDecoder)",
    "act_head.n_bin": "policy.head.num_bins (DiscreteDecoder)",
    "act_head.min_action": "policy.head.low (DiscreteDecoder)",
    "act_head.max_action": "policy.head.high (DiscreteDecoder)",
    "act_head.policy_rnn_dropout_p": "must be 0",
    "act_head.action_dim": "must be 7",
    "act_head.action_space": "policy.readout",
    "act_head.history_type": "policy.history; FCDecoder with post remembers nothing and is one_step with window 1",
    "act_head.down_sample": "policy.readout; must fit action_space",
    "act_head.latent": "policy.num_queries",
    "act_head.token_source": "policy.pool",
    "act_head.fill_zero": "must be false",
    "arm_gripper_loss_ratio": "policy.head.gripper_loss_weight",
    "norm_action": "policy.action_low, policy.action_high; false is -1 to 1. OpenVLADataset: data.compat_second_norm",
    "norm_min": "policy.action_low",
    "norm_max": "policy.action_high",
    "use_vision_resampler": "backbone.resampler_latents: 64, with the depth and heads of upstream's constructor",
    "train_setup.predict_action": "must be true",
    "train_setup.predict_forward": "must be false: upstream's code for it is missing",
    "train_setup.predict_forward_hand": "must be false: upstream's code for it is missing",
    "train_setup.predict_caption": "policy.auxiliary.caption_weight; upstream's own code for it fails",
    "cap_loss_ratio": "policy.auxiliary.caption_weight, with train_setup.predict_caption",
    "train_setup.freeze_backbone": "train.trainable",
    "train_setup.train_vision": "train.trainable",
    "train_setup.train_text_embedding": "train.trainable",
    "train_setup.freeze_resampler": "train.trainable, with use_vision_resampler",
    "train_setup.train_decoder_layers": "must be -1 (all): layers are stacked here and train together",
    "train_setup.train_resampler": "train.trainable; of Flamingo only",
    "train_setup.train_full_decoder": "train.trainable; of Flamingo only",
    "train_setup.lora_enable": "backbone.lora_rank and train.trainable",
    "train_setup.lora_r": "backbone.lora_rank",
    "train_setup.lora_alpha": "backbone.lora_alpha",
    "train_setup.lora_dropout": "must be 0 with lora_enable",
    "train_setup.lora_bias": "must be none with lora_enable",
    "train_setup.reinit": "must be false; here: leave backbone.weights empty",
    "fwd_head": "must be null: upstream's code for it is missing",
    "act_encoder": "must be null: upstream's code for it is missing",
    "use_clip_norm": "policy.auxiliary.clip: the CLIP that upstream takes",
    "clip_norm_ratio": "policy.auxiliary.clip.loss_weight, with use_clip_norm",
    "use_mu_law": "policy.action_mu",
    "mu_val": "policy.action_mu, with use_mu_law",
    "regular_action": "policy.action_mean, policy.action_std",
    "x_mean": "policy.action_mean, with regular_action",
    "x_std": "policy.action_std, with regular_action; upstream adds 1e-6",
    "tcp_rel": "must be false",
    "train_dataset.type": "data.dataset calvin, or an RLDS one with policy.action_scaling quantile (OpenVLADataset)",
    "train_dataset.data_mix": "data.dataset",
    "train_dataset.data_root_dir": "data.root",
    "train_dataset.image_aug": "data.augment: upstream's numbers",
    "train_dataset.window_sample": "must be sliding",
    "train_dataset.organize_type": "must be interleave",
    "train_dataset.left_pad": "data.left_pad",
    "train_dataset.filter_langs": "must be false",
    "train_dataset.data_dir": "data.root: the folder above training/",
    "val_dataset.type": "must be train_dataset.type",
    "val_dataset.data_dir": "data.root: the folder above validation/, the same one",
    "train_dataset.rgb_pad": "data.static_shift; -1 is 0",
    "train_dataset.gripper_pad": "data.wrist_shift; -1 is 0",
    "train_dataset.few_shot": "data.episode_list: configs/data/calvin/10_shot_task_data.json of upstream's repository",
    "train_dataset.partial_data": "data.episode_list: configs/data/calvin/data_name_list.txt of upstream's repository",
    "train_dataset.exclude_tasks": "data.exclude_tasks",
    "train_dataset.lang_folder": "data.annotation_folder",
    "train_dataset.skip_frames": "must be 1",
    "train_dataset.text_aug": "must be false: upstream's table of sentences is missing",
    "num_workers": "data.num_threads",
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "warmup_epochs": "optimizer.warmup_epochs; with trainer.max_steps, its share of them in optimizer.warmup_steps",
    "warmup_steps": "optimizer.warmup_steps",
    "scheduler": "optimizer.schedule",
    "min_lr_scale": "optimizer.min_scale with scheduler half-cosine; nothing without",
    "gradient_clip_val": "optimizer.clip_norm",
    "trainer.gradient_clip_val": "optimizer.clip_norm where gradient_clip_val is absent; upstream then clips nothing",
    "batch_size": "train.batch_size, times gpus, num_nodes and trainer.accumulate_grad_batches",
    "gpus": "train.batch_size",
    "num_nodes": "train.batch_size",
    "trainer.accumulate_grad_batches": "train.accumulation",
    "trainer.max_epochs": "train.epochs where max_steps is not given",
    "trainer.max_steps": "train.steps; -1: trainer.max_epochs decides",
    "trainer.val_check_interval": "train.eval_every",
    "trainer.log_every_n_steps": "train.log_every",
    "trainer.limit_val_batches": "evaluation.batches",
    "trainer.precision": "backbone.dtype; half precisions are bfloat16",
    "trainer.strategy": "mesh: DeepSpeed becomes fsdp over all devices, everything else data",
    "seed": "train.seed",
    "output_root": "train.output",
    "task_name": "train.output",
    "model_load_path": "train.init_from; convert the checkpoint first, and pass --train.init_from with its directory",
    "resume": "must be null: upstream's training state is not read; here: train.resume",
}
"""Key -> what it decides. Nested keys are joined by dots."""

_NEVER_READ = "upstream never reads it"
IGNORED = {
    "model_url": "where upstream downloads from; the published pair does not always match model_path",
    "model_path": "upstream only tests whether it exists; vlm.pretrained_model_name_or_path is what is loaded",
    "model_config": "config.json is taken from the weights' directory",
    "model_load_source": "layouts of checkpoint files are told apart by looking",
    "llava": "a name for upstream's prompt builder, which cannot be imported",
    "llava_config": _NEVER_READ,
    "qwen": _NEVER_READ,
    "vlm.type": "a transformers class; config.json says which model it is",
    "vlm.residual": "false in the published file; of upstream's Flamingo blocks",
    "vision_encoder.*": "Flamingo's vision tower is part of its backbone here",
    "tokenizer.type": "a transformers class; the tokenizer files say what they are",
    "tokenizer.tokenizer_type": "the prompt follows the backbone",
    "tokenizer.max_text_len": "upstream never enforces it; see data.text_length",
    "tokenizer.additional_special_tokens": "part of the backbone's tokenizer files",
    "tokenizer.use_*_start_end": "read by no loaded code",
    "tokenizer.*_start_token": "read by no loaded code",
    "tokenizer.*_end_token": "read by no loaded code",
    "seq_len": _NEVER_READ,
    "image_mean": "upstream has these numbers in its code as well; the backbone's are used",
    "image_std": "upstream has these numbers in its code as well; the backbone's are used",
    "data_scale": _NEVER_READ,
    "optimizer": "upstream always uses AdamW, and so is it here",
    "warmup_ratio": _NEVER_READ,
    "fwd_loss_ratio": "upstream never computes a forward prediction loss",
    "kl_div_ratio": "upstream never computes this loss",
    "vl_cotrain_ratio": "upstream's co-training batches fail and no published dataset asks for them",
    "use_time_causal_attn": _NEVER_READ,
    "use_mim_obs_loss": _NEVER_READ,
    "use_pixel_loss": _NEVER_READ,
    "use_obs_queries": _NEVER_READ,
    "use_act_queries": _NEVER_READ,
    "vision_masked_ratio": _NEVER_READ,
    "use_tube_mask": _NEVER_READ,
    "use_multi_modal_emb": _NEVER_READ,
    "no_video_pretrained_model": _NEVER_READ,
    "finetune": _NEVER_READ,
    "train_weights": "of mixed datasets, which no published file has",
    "discrete_action_history": "of discrete OXE training, which fails upstream",
    "vision_resampler.*": "upstream builds its resampler with constructor defaults instead",
    "train_setup.precision": "overwritten by trainer.precision",
    "train_setup.bits": _NEVER_READ,
    "train_setup.mm_*": _NEVER_READ,
    "train_setup.tune_mm_mlp_adapter": _NEVER_READ,
    "train_setup.freeze_mm_mlp_adapter": _NEVER_READ,
    "train_setup.gradient_checkpointing": "sets a flag nothing reads; see backbone.remat",
    "act_head.fwd_pred_next_n": "overwritten by the top-level value",
    "act_head.window_size": "overwritten by the top-level value",
    "act_head.with_history": _NEVER_READ,
    "trainer.accelerator": "JAX finds the devices",
    "trainer.logger": "JSON lines and TensorBoard always; see train.wandb_project",
    "trainer.use_distributed_sampler": "every process reads its own share",
    "trainer.check_val_every_n_epoch": "evaluations are counted in steps here: train.eval_every",
    "train_dataset.traj_cons": "shifts are constant within a segment, which is what the name promises",
    "train_dataset.shuffle_buffer_size": "episodes are drawn from the whole dataset, not from a buffer",
    "train_dataset.mode": "training and validation are the parts they are named after",
    "train_dataset.train": "training and validation are the parts they are named after",
    "train_dataset.shift_first": "swallowed by upstream's dataset",
    "train_dataset.tokenizer_type": "the prompt follows the backbone",
    "train_dataset.model_name": "overwritten by model",
    "val_dataset.*": "all other keys: validation reads the same data in the same way, all of it, without augmentation",
    "log_root": "logs lie in train.output",
    "cache_root": _NEVER_READ,
    "config": "where upstream found the file",
    "raw_config_path": "where upstream found the file",
    "exp_name": "folder of one upstream run",
    "log_dir": "folder of one upstream run",
    "output_dir": "folder of one upstream run",
    "data_dir": _NEVER_READ,
    "data_subfolder": _NEVER_READ,
    "annotation_file": _NEVER_READ,
    "task_num": _NEVER_READ,
    "llm.*": _NEVER_READ,
    "trainer.devices": "JAX finds the devices",
    "action_scale": "of upstream's SimplerEnv wrapper",
}
"""Key -> why nothing happens. `*` stands for any rest of a name."""

_OVERRIDE = "__override__"


def load_experiment(path: str | pathlib.Path) -> ExperimentConfig:
    """The experiment an upstream JSON file describes; an ordinary configuration from then on.

    Raises:
      FileNotFoundError: the file, or its parent, does not exist.
      ValueError: it is not JSON, has a key that neither table knows, or asks for something that is not built here.
    """
    try:
        return to_experiment(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json(path: str | pathlib.Path) -> dict[str, Any]:
    """The file merged over its `parent`s, as upstream merges them: dictionaries deeply, all else by replacement.

    A dictionary with `"__override__": true` replaces its parent's instead of being merged.
    """
    return _read(pathlib.Path(path), ())


def to_experiment(values: Mapping[str, Any]) -> ExperimentConfig:
    """Contents of a merged file -> ExperimentConfig. Raises ValueError, see `load_experiment`."""
    flat = dict(_flatten(values))
    _require_known(flat)
    keys = _Keys(flat)
    return ExperimentConfig(
        backbone=_backbone(keys),
        policy=_policy(keys),
        data=_data(keys),
        optimizer=_optimizer(keys),
        train=_train(keys),
        mesh=MeshConfig(data=1, fsdp=-1) if "deepspeed" in str(keys.get("trainer.strategy", "")) else MeshConfig(),
        evaluation=_evaluation(keys),
    )


def evaluation_dtype(values: Mapping[str, Any]) -> str:
    """The type upstream evaluates in: its evaluator knows "bf16" only by that name, and takes float32 for the rest."""
    return "bfloat16" if values.get("trainer", {}).get("precision") == "bf16" else "float32"


def reason_ignored(key: str) -> str | None:
    """Why a key decides nothing; None where it is not ignored."""
    if key in MAPPED:
        return None
    return next((reason for pattern, reason in IGNORED.items() if fnmatch.fnmatchcase(key, pattern)), None)


class _Keys:
    """The values of a file, read by key; absent ones are what upstream takes instead."""

    def __init__(self, flat: Mapping[str, Any]):
        self._flat = flat

    def get(self, key: str, default: Any) -> Any:
        assert key in MAPPED, f"{key} decides something and must be in MAPPED"
        return self._flat.get(key, default)

    def need(self, key: str) -> Any:
        value = self.get(key, None)
        if value is None:
            raise ValueError(f"it has no {key}, which upstream needs as well; it decides {MAPPED[key]}.")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Raise where `key` is there with a value of which nothing is built here."""
        value = self.get(key, allowed[0])
        if value not in allowed:
            known = " or ".join(json.dumps(x) for x in allowed)
            raise ValueError(f"{key}={json.dumps(value)} is not built here; expected {known} ({MAPPED[key]}).")

    def choose(self, key: str, default: Any, table: Mapping[Any, Any]) -> Any:
        value = self.get(key, default)
        if value not in table:
            raise ValueError(f"{key}={value!r} is unknown; known: {list(table)}.")
        return table[value]


def _backbone(keys: _Keys) -> BackboneConfig:
    class_name, vlm_name, name = keys.choose("model", None, BACKBONES)
    keys.only("robovlm_name", class_name)
    keys.only("vlm.name", vlm_name)
    weights = keys.need("vlm.pretrained_model_name_or_path")
    keys.only("tokenizer.pretrained_model_name_or_path", weights)
    if keys.need("model") in ("kosmos", "llava", "flamingo"):  # the others bring their own image processor
        keys.only("image_size", 224)
    lora = {}
    if keys.get("train_setup.lora_enable", False):
        keys.only("train_setup.lora_dropout", 0, 0.0)
        keys.only("train_setup.lora_bias", "none")
        lora = {
            "lora_rank": keys.need("train_setup.lora_r"),
            "lora_alpha": float(keys.need("train_setup.lora_alpha")),
        }
    latents = 64 if keys.get("use_vision_resampler", False) else 0
    halves = dict.fromkeys(("16", "16-mixed", "fp16", "bf16", "bf16-mixed", "bf16-true", 16), "bfloat16")
    singles = dict.fromkeys(("32", "32-true", 32, None), "float32")
    dtype = keys.choose("trainer.precision", None, halves | singles)
    return BackboneConfig(name=name, weights=weights, dtype=dtype, resampler_latents=latents, **lora)


def _policy(keys: _Keys) -> PolicyConfig:
    for key in ("act_encoder", "fwd_head"):
        keys.only(key, None)
    for key in ("train_setup.predict_forward", "train_setup.predict_forward_hand", "tcp_rel", "act_head.fill_zero"):
        keys.only(key, False)
    keys.only("train_setup.predict_action", True)
    keys.only("act_head.action_dim", 7)
    is_rlds = keys.get("train_dataset.type", None) == RLDS
    readout, head = _readout(keys), _head(keys)
    history, window = keys.choose("act_head.history_type", "post", HISTORIES), keys.need("window_size")
    if isinstance(head, DiscreteHeadConfig):  # upstream always trains these on all frames in one sequence
        history = "interleaved" if window > 1 else "one_step"
    elif isinstance(head, MLPHeadConfig) and (history == "policy_head" or window == 1):
        history, window = "one_step", 1  # nothing in it remembers, so the frames of a window are strangers
    return PolicyConfig(
        history=history,
        readout=readout,
        head=head,
        num_queries=keys.get("act_head.latent", 1),
        pool=keys.choose("act_head.token_source", "all", {x: x for x in ("all", "text", "vision")}),
        window=window,
        chunk=keys.need("fwd_pred_next_n"),
        cameras=("wrist", "static") if keys.need("use_hand_rgb") and not is_rlds else ("static",),
        auxiliary=_auxiliary(keys),
        **_scaling(keys),
    )


def _auxiliary(keys: _Keys) -> AuxiliaryConfig:
    clip, caption = ClipConfig(), 0.0
    if keys.get("use_clip_norm", False):
        clip = ClipConfig(weights=CLIP, loss_weight=keys.get("clip_norm_ratio", 0.05))
    if keys.get("train_setup.predict_caption", False):
        caption = float(keys.need("cap_loss_ratio"))
    return AuxiliaryConfig(clip=clip, caption_weight=caption)


def _scaling(keys: _Keys) -> dict[str, Any]:
    """Fields of PolicyConfig that say how actions become targets."""
    fields: dict[str, Any] = {}
    if keys.get("train_dataset.type", None) == RLDS:  # scaled by quantiles, then once more: data.compat_second_norm
        fields["action_scaling"] = "quantile"
        if keys.get("norm_action", False):
            keys.only("norm_min", -0.65)
            keys.only("norm_max", 0.65)
    else:
        low, high = (keys.get("norm_min", -1), keys.get("norm_max", 1)) if keys.get("norm_action", False) else (-1, 1)
        fields |= {"action_low": (float(low),) * 6, "action_high": (float(high),) * 6}
    if keys.get("regular_action", False):
        fields |= {"action_mean": float(keys.get("x_mean", 0)), "action_std": keys.get("x_std", 1) + 1e-6}
    if keys.get("use_mu_law", False):
        fields["action_mu"] = float(keys.get("mu_val", 255))
    return fields


def _readout(keys: _Keys) -> str:
    readout = keys.choose(
        "act_head.action_space",
        "continuous",
        {"continuous": "action_query", "down_sample": "pool", "discrete": "token"},
    )
    keys.only("act_head.down_sample", {"action_query": "none", "pool": "pooling"}.get(readout, "none"))
    return readout


def _head(keys: _Keys) -> heads.HeadConfig:
    make = keys.choose(
        "act_head.type",
        None,
        {"LSTMDecoder": _lstm, "FCDecoder": _mlp, "GPTDecoder": _gpt, "DiscreteDecoder": _discrete},
    )
    if (make is _discrete) != (keys.get("act_head.action_space", "continuous") == "discrete"):
        raise ValueError("act_head.type DiscreteDecoder and act_head.action_space discrete go together.")
    return make(keys)


def _lstm(keys: _Keys) -> heads.HeadConfig:
    keys.only("act_head.policy_rnn_dropout_p", 0, 0.0)
    return LSTMHeadConfig(num_layers=keys.get("act_head.num_layers", 4), **_continuous(keys))


def _mlp(keys: _Keys) -> heads.HeadConfig:
    return MLPHeadConfig(**_continuous(keys))


def _gpt(keys: _Keys) -> heads.HeadConfig:
    return GPTHeadConfig(**_continuous(keys))


def _continuous(keys: _Keys) -> dict[str, Any]:
    return {
        "hidden_size": keys.get("act_head.hidden_size", 1024),
        "gripper_loss_weight": keys.need("arm_gripper_loss_ratio"),
    }


def _discrete(keys: _Keys) -> heads.HeadConfig:
    return DiscreteHeadConfig(
        num_bins=keys.get("act_head.n_bin", 256),
        low=float(keys.get("act_head.min_action", -1)),
        high=float(keys.get("act_head.max_action", 1)),
    )


def _data(keys: _Keys) -> DataConfig:
    read = keys.choose("train_dataset.type", None, {"DiskCalvinDataset": _calvin, RLDS: _rlds})
    keys.only("val_dataset.type", keys.need("train_dataset.type"))
    return dataclasses.replace(
        read(keys),
        static_shift=max(keys.get("train_dataset.rgb_pad", -1), 0),
        wrist_shift=max(keys.get("train_dataset.gripper_pad", -1), 0),
        num_threads=max(keys.get("num_workers", 8), 1),
    )


def _calvin(keys: _Keys) -> DataConfig:
    keys.only("train_dataset.skip_frames", 1)
    keys.only("train_dataset.text_aug", False)
    root, validation = (pathlib.PurePosixPath(keys.need(f"{x}_dataset.data_dir")) for x in ("train", "val"))
    if (root.name, validation.name) != ("training", "validation") or root.parent != validation.parent:
        raise ValueError(
            f"train_dataset.data_dir={str(root)!r} and val_dataset.data_dir={str(validation)!r} must be training and "
            "validation of one folder, which becomes data.root."
        )
    lists = {
        "train_dataset.few_shot": "configs/data/calvin/10_shot_task_data.json",
        "train_dataset.partial_data": "configs/data/calvin/data_name_list.txt",
    }
    chosen = [file for key, file in lists.items() if keys.get(key, False)]
    if len(chosen) > 1:
        raise ValueError("train_dataset.few_shot and train_dataset.partial_data exclude each other here.")
    return DataConfig(
        dataset="calvin",
        root=str(root.parent),
        episode_list="".join(chosen),
        exclude_tasks=tuple(keys.get("train_dataset.exclude_tasks", ())),
        annotation_folder=keys.get("train_dataset.lang_folder", "lang_annotations"),
    )


def _rlds(keys: _Keys) -> DataConfig:
    keys.only("train_dataset.window_sample", "sliding")
    keys.only("train_dataset.organize_type", "interleave")
    keys.only("train_dataset.filter_langs", False)
    return DataConfig(
        dataset=keys.need("train_dataset.data_mix"),
        root=keys.need("train_dataset.data_root_dir"),
        image_size=keys.need("image_size"),
        left_pad=keys.get("train_dataset.left_pad", False),
        augment=RLDS_AUGMENT if keys.get("train_dataset.image_aug", False) else AugmentConfig(),
        compat_second_norm=keys.get("norm_action", False),
    )


def _optimizer(keys: _Keys) -> OptimizerConfig:
    warmup_steps, warmup_epochs = keys.get("warmup_steps", 0), float(keys.get("warmup_epochs", 0))
    if _max_steps(keys):
        # Upstream's epoch is the estimated number of steps over max_epochs.
        warmup_steps += round(warmup_epochs * _max_steps(keys) / (keys.get("trainer.max_epochs", 1) or 1))
        warmup_epochs = 0.0
    schedule = keys.choose(
        "scheduler", "constant", {"constant": "constant", "half-cosine": "cosine", "cosine": "cosine"}
    )
    is_half = keys.get("scheduler", "constant") == "half-cosine"
    return OptimizerConfig(
        learning_rate=keys.need("learning_rate"),
        weight_decay=float(keys.get("weight_decay", 0.0)),
        schedule=schedule,
        warmup_steps=warmup_steps,
        warmup_epochs=warmup_epochs,
        min_scale=float(keys.get("min_lr_scale", 0.0)) if is_half else 0.0,
        clip_norm=float(keys.get("gradient_clip_val", keys.get("trainer.gradient_clip_val", 0.0)) or 0.0),
    )


def _max_steps(keys: _Keys) -> int:
    """0 where epochs decide."""
    return max(keys.get("trainer.max_steps", -1) or 0, 0)


def _train(keys: _Keys) -> TrainConfig:
    keys.only("resume", None)
    accumulation = keys.get("trainer.accumulate_grad_batches", 1)
    ways = keys.get("gpus", 1) * keys.get("num_nodes", 1)
    length = {"steps": _max_steps(keys)} if _max_steps(keys) else {"epochs": float(keys.need("trainer.max_epochs"))}
    evaluations = (
        {"eval_every": keys.need("trainer.val_check_interval")} if keys.get("trainer.val_check_interval", None) else {}
    )
    return TrainConfig(
        output=str(
            pathlib.PurePosixPath(keys.get("output_root", "runs")) / keys.need("model") / keys.need("task_name")
        ),
        batch_size=keys.need("batch_size") * accumulation * ways,
        accumulation=accumulation,
        trainable=_trainable(keys),
        init_from=keys.get("model_load_path", None) or "",
        seed=keys.need("seed"),
        log_every=keys.get("trainer.log_every_n_steps", 50),
        **length,
        **evaluations,
    )


def _trainable(keys: _Keys) -> tuple[str, ...]:
    """Upstream switches parts off and on again in this order: backbone, vision tower, adapters, text embedding."""
    keys.only("train_setup.train_decoder_layers", -1)
    keys.only("train_setup.reinit", False)
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
        return ("lora_", policy, *(f"^{part}" for part, trains in parts.items() if trains))
    if keys.get("train_setup.freeze_backbone", False):
        return (policy, *(f"^{part}" for part, trains in parts.items() if trains))
    frozen = [part for part, trains in parts.items() if not trains]
    return (f"^(?!{'|'.join(frozen)})",) if frozen else (".*",)


def _evaluation(keys: _Keys) -> EvaluationConfig:
    batches = keys.get("trainer.limit_val_batches", None)
    if batches is None:
        return EvaluationConfig()
    if not isinstance(batches, int):
        raise ValueError(f"trainer.limit_val_batches={batches} must be a number of batches.")
    return EvaluationConfig(batches=batches)


def _read(path: pathlib.Path, children: tuple[pathlib.Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        named = f", the parent of {children[-1]}" if children else ""
        raise FileNotFoundError(f"no file {path}{named}; expected an upstream JSON configuration.")
    if path.resolve() in children:
        raise ValueError(f"{path} is its own parent: {' -> '.join(str(child) for child in children)}.")
    values = json_files.read_object(path, "settings")
    parent = values.get("parent")
    if not parent:
        return _merge({}, values)
    beside = path.parent / parent
    merged = _read(beside if beside.is_file() else pathlib.Path(parent), (*children, path.resolve()))
    return _merge(merged, values)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` over `base`, in a new dictionary without override marks."""
    merged = {} if over.get(_OVERRIDE) else dict(base)
    for key, value in over.items():
        if key == _OVERRIDE:
            continue
        if isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = _merge(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _require_known(flat: Mapping[str, Any]) -> None:
    problems = []
    for key in flat:
        if key in MAPPED or reason_ignored(key) is not None:
            continue
        above = next((known for known in MAPPED if key.startswith(known + ".")), None)
        near = difflib.get_close_matches(key, [*MAPPED, *IGNORED], n=1)
        hint = f"{above} {MAPPED[above]}" if above else f"did you mean {near[0]!r}?" if near else ""
        problems.append(f"unknown key {key!r}" + (f"; {hint}" if hint else ""))
    if problems:
        raise ValueError("\n  ".join([*problems, "docs/upstream.md lists the keys that are read and those ignored."]))
