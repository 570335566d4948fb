"""What every key of upstream's JSON files decides here; `ignored.py` has those that decide nothing.

docs/upstream.md shows the table. What upstream does with its keys was read at commit 8adc1d2.
"""

from __future__ import annotations

from typing import Any

from robovlms_jax.inputs.config import AugmentConfig
from robovlms_jax.upstream.rows import UNSET, Must, Row, Shared, Take, shared, when

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

RLDS_AUGMENT = AugmentConfig(crop_area=0.9, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)
"""What upstream's loader does to images under `image_aug`."""

CALVIN = ("train_dataset.type", "DiskCalvinDataset")
RLDS = ("train_dataset.type", "OpenVLADataset")
EPISODE_LISTS = {
    "train_dataset.few_shot": "configs/data/calvin/10_shot_task_data.json",
    "train_dataset.partial_data": "configs/data/calvin/data_name_list.txt",
}

_PRECISIONS = dict.fromkeys(("16", "16-mixed", "fp16", "bf16", "bf16-mixed", "bf16-true", 16), "bfloat16")
_PRECISIONS |= dict.fromkeys(("32", "32-true", 32, None), "float32")
_READOUTS = {"continuous": "action_query", "down_sample": "pool", "discrete": "token"}
_SCHEDULES = {"constant": "constant", "half-cosine": "cosine", "cosine": "cosine"}

_MISSING = ": upstream's code for it is missing"
_RESAMPLER = "64, with the depth and heads of upstream's constructor"
_CONVERTED = "convert the checkpoint first, and pass --train.init_from with its directory"


def _latents(use: bool) -> int:
    return 64 if use else 0


def _clip(use: bool) -> str:
    return CLIP if use else ""


def _augment(use: bool) -> AugmentConfig:
    return RLDS_AUGMENT if use else AugmentConfig()


def _batches(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError(f"trainer.limit_val_batches={value} must be a number of batches.")
    return value


ROWS: tuple[Row, ...] = (
    Shared("parent", "read first, this file merged over it; relative to this file, else to the working directory"),
    Take("model", "backbone.name", {model: names[2] for model, names in BACKBONES.items()}),
    *shared("checked against model", "robovlm_name", "vlm.name"),
    Take("vlm.pretrained_model_name_or_path", "backbone.weights"),
    Shared("tokenizer.pretrained_model_name_or_path", "backbone.weights; must be the same directory"),
    Shared("image_size", "checked: the backbone's own where upstream obeys it; data.image_size with OpenVLADataset"),
    Take("use_vision_resampler", "backbone.resampler_latents", _latents, False, _RESAMPLER),
    Take("trainer.precision", "backbone.dtype", _PRECISIONS, None, "half precisions are bfloat16"),
    *when(
        ("train_setup.lora_enable", True),
        Take("train_setup.lora_r", "backbone.lora_rank"),
        Take("train_setup.lora_alpha", "backbone.lora_alpha", float),
        Take("train_setup.lora_dropout", "backbone.lora_dropout", float),
        Must("train_setup.lora_bias", ("none", "all"), " or all with lora_enable: train.trainable"),
    ),
    # The policy's structure
    Take("window_size", "policy.window"),
    Take("fwd_pred_next_n", "policy.chunk"),
    Shared("use_hand_rgb", "policy.cameras: wrist before static. OXE datasets never have a wrist image: static alone"),
    Take("act_head.action_space", "policy.readout", _READOUTS, "continuous"),
    Shared("act_head.down_sample", "policy.readout; must fit action_space"),
    Shared("act_head.history_type", "policy.history; FCDecoder with post remembers nothing: one_step with window 1"),
    Take("act_head.latent", "policy.num_queries", default=1),
    Take("act_head.token_source", "policy.pool", {x: x for x in ("all", "text", "vision")}, "all"),
    Shared("act_head.type", "policy.head"),
    Shared("act_head.hidden_size", "policy.head.hidden_size"),
    Shared("act_head.num_layers", "policy.head.num_layers (LSTMDecoder)"),
    Shared("act_head.n_bin", "policy.head.num_bins (DiscreteDecoder)"),
    Shared("act_head.min_action", "policy.head.low (DiscreteDecoder)"),
    Shared("act_head.max_action", "policy.head.high (DiscreteDecoder)"),
    Shared("arm_gripper_loss_ratio", "policy.head.gripper_loss_weight"),
    *when(("act_head.type", "LSTMDecoder"), Must("act_head.policy_rnn_dropout_p", (0, 0.0))),
    Must("act_head.action_dim", (7,)),
    Must("act_head.fill_zero", (False,)),
    # Actions
    Shared("norm_action", "policy.action_low and action_high; false: -1 to 1. OpenVLADataset: data.compat_second_norm"),
    Shared("norm_min", "policy.action_low"),
    Shared("norm_max", "policy.action_high"),
    Shared("use_mu_law", "policy.action_mu"),
    *when(("use_mu_law", True), Take("mu_val", "policy.action_mu", float, 255, "with use_mu_law")),
    Shared("regular_action", "policy.action_mean, policy.action_std"),
    *when(
        ("regular_action", True),
        Take("x_mean", "policy.action_mean", float, 0, "with regular_action"),
        Take("x_std", "policy.action_std", lambda x: x + 1e-6, 1, "with regular_action; upstream adds 1e-6"),
    ),
    Take("tcp_rel", "policy.representation", {False: "robot", True: "tcp_upstream"}, False),
    # Losses
    Must("train_setup.predict_action", (True,)),
    Must("train_setup.predict_forward", (False,), _MISSING),
    Must("train_setup.predict_forward_hand", (False,), _MISSING),
    Must("fwd_head", (None,), _MISSING),
    Must("act_encoder", (None,), _MISSING),
    Shared("train_setup.predict_caption", "policy.auxiliary.caption_weight; upstream's own code for it fails"),
    *when(
        ("train_setup.predict_caption", True),
        Take("cap_loss_ratio", "policy.auxiliary.caption_weight", float, says="with train_setup.predict_caption"),
    ),
    Take("use_clip_norm", "policy.auxiliary.clip.weights", _clip, False, "the CLIP that upstream takes"),
    *when(
        ("use_clip_norm", True),
        Take("clip_norm_ratio", "policy.auxiliary.clip.loss_weight", default=0.05, says="with use_clip_norm"),
    ),
    # What trains
    *shared(
        "train.trainable", *(f"train_setup.{x}" for x in ("freeze_backbone", "train_vision", "train_text_embedding"))
    ),
    Shared("train_setup.freeze_resampler", "train.trainable, with use_vision_resampler"),
    Shared("train_setup.lora_enable", "backbone.lora_rank and train.trainable"),
    *shared("train.trainable; of Flamingo only", "train_setup.train_resampler", "train_setup.train_full_decoder"),
    Must("train_setup.train_decoder_layers", (-1,), " (all): layers are stacked here and train together"),
    Must("train_setup.reinit", (False,), "; here: leave backbone.weights empty"),
    # Data
    Shared("train_dataset.type", "data.dataset calvin, or an RLDS one, scaled by quantile (OpenVLADataset)"),
    Shared("val_dataset.type", "must be train_dataset.type"),
    *when(
        RLDS,
        Take("train_dataset.data_mix", "data.dataset"),
        Take("train_dataset.data_root_dir", "data.root"),
        Take("train_dataset.image_aug", "data.augment", _augment, False, "upstream's numbers"),
        Take("train_dataset.left_pad", "data.left_pad", default=False),
        Must("train_dataset.window_sample", ("sliding",)),
        Must("train_dataset.organize_type", ("interleave",)),
        Must("train_dataset.filter_langs", (False,)),
    ),
    Shared("train_dataset.data_dir", "data.root: the folder above training/"),
    Shared("val_dataset.data_dir", "data.root: the folder above validation/, the same one"),
    *(Shared(key, f"data.episode_list: {file} of upstream's repository") for key, file in EPISODE_LISTS.items()),
    *when(
        CALVIN,
        Take("train_dataset.exclude_tasks", "data.exclude_tasks", tuple, ()),
        Take("train_dataset.lang_folder", "data.annotation_folder", default="lang_annotations"),
        Must("train_dataset.skip_frames", (1,)),
        Must("train_dataset.text_aug", (False,), ": upstream's table of sentences is missing"),
    ),
    Take("train_dataset.rgb_pad", "data.static_shift", lambda x: max(x, 0), -1, "-1 is 0"),
    Take("train_dataset.gripper_pad", "data.wrist_shift", lambda x: max(x, 0), -1, "-1 is 0"),
    Take("num_workers", "data.num_threads", lambda x: max(x, 1), 8),
    # The optimizer
    Take("learning_rate", "optimizer.learning_rate"),
    Take("weight_decay", "optimizer.weight_decay", float, 0.0),
    Take("scheduler", "optimizer.schedule", _SCHEDULES, "constant"),
    *when(
        ("scheduler", "half-cosine"),
        Take("min_lr_scale", "optimizer.min_scale", float, 0.0, "with scheduler half-cosine; nothing without"),
    ),
    Shared("warmup_epochs", "optimizer.warmup_epochs; with trainer.max_steps, their share in optimizer.warmup_steps"),
    Shared("warmup_steps", "optimizer.warmup_steps"),
    Shared("gradient_clip_val", "optimizer.clip_norm"),
    Shared("trainer.gradient_clip_val", "optimizer.clip_norm without gradient_clip_val; upstream then clips nothing"),
    # The run
    Shared("batch_size", "train.batch_size, times gpus, num_nodes and trainer.accumulate_grad_batches"),
    *shared("train.batch_size", "gpus", "num_nodes"),
    Take("trainer.accumulate_grad_batches", "train.accumulation", default=1),
    Shared("trainer.max_epochs", "train.epochs where max_steps is not given"),
    Shared("trainer.max_steps", "train.steps; -1: trainer.max_epochs decides"),
    Shared("trainer.val_check_interval", "train.eval_every"),
    Take("trainer.log_every_n_steps", "train.log_every", default=50),
    Take("trainer.limit_val_batches", "evaluation.batches", _batches, UNSET),
    Shared("trainer.strategy", "mesh: DeepSpeed becomes fsdp over all devices, everything else data"),
    Take("seed", "train.seed"),
    *shared("train.output", "output_root", "task_name"),
    Take("model_load_path", "train.init_from", lambda path: path or "", None, _CONVERTED),
    Must("resume", (None,), ": upstream's training state is not read; here: train.resume"),
)

MAPPED = {row.key: row.text for row in ROWS}
"""Key -> what it decides. Nested keys are joined by dots."""
