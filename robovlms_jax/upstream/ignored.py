"""Keys of upstream's JSON files that decide nothing here, and why."""

from __future__ import annotations

import fnmatch

from robovlms_jax.upstream import table

_BY_REASON: dict[str, tuple[str, ...]] = {
    "where upstream downloads from; the published pair does not always match model_path": ("model_url",),
    "upstream only tests whether it exists; vlm.pretrained_model_name_or_path is what is loaded": ("model_path",),
    "config.json is taken from the weights' directory": ("model_config",),
    "layouts of checkpoint files are told apart by looking": ("model_load_source",),
    "a name for upstream's prompt builder, which cannot be imported": ("llava",),
    "upstream never reads it": (
        "llava_config",
        "qwen",
        "seq_len",
        "data_scale",
        "warmup_ratio",
        "use_time_causal_attn",
        "use_mim_obs_loss",
        "use_pixel_loss",
        "use_obs_queries",
        "use_act_queries",
        "vision_masked_ratio",
        "use_tube_mask",
        "use_multi_modal_emb",
        "no_video_pretrained_model",
        "finetune",
        "train_setup.bits",
        "train_setup.mm_*",
        "train_setup.tune_mm_mlp_adapter",
        "train_setup.freeze_mm_mlp_adapter",
        "act_head.with_history",
        "cache_root",
        "data_dir",
        "data_subfolder",
        "annotation_file",
        "task_num",
        "llm.*",
    ),
    "a transformers class; config.json says which model it is": ("vlm.type",),
    "false in the published file; of upstream's Flamingo blocks": ("vlm.residual",),
    "Flamingo's vision tower is part of its backbone here": ("vision_encoder.*",),
    "a transformers class; the tokenizer files say what they are": ("tokenizer.type",),
    "the prompt follows the backbone": ("tokenizer.tokenizer_type", "train_dataset.tokenizer_type"),
    "upstream never enforces it; see data.text_length": ("tokenizer.max_text_len",),
    "part of the backbone's tokenizer files": ("tokenizer.additional_special_tokens",),
    "read by no loaded code": ("tokenizer.use_*_start_end", "tokenizer.*_start_token", "tokenizer.*_end_token"),
    "upstream has these numbers in its code as well; the backbone's are used": ("image_mean", "image_std"),
    "upstream always uses AdamW, and so is it here": ("optimizer",),
    "upstream never computes a forward prediction loss": ("fwd_loss_ratio",),
    "upstream never computes this loss": ("kl_div_ratio",),
    "upstream's co-training batches fail and no published dataset asks for them": ("vl_cotrain_ratio",),
    "of mixed datasets, which no published file has": ("train_weights",),
    "of discrete OXE training, which fails upstream": ("discrete_action_history",),
    "upstream builds its resampler with constructor defaults instead": ("vision_resampler.*",),
    "overwritten by trainer.precision": ("train_setup.precision",),
    "sets a flag nothing reads; see backbone.remat": ("train_setup.gradient_checkpointing",),
    "overwritten by the top-level value": ("act_head.fwd_pred_next_n", "act_head.window_size"),
    "JAX finds the devices": ("trainer.accelerator", "trainer.devices"),
    "JSON lines and TensorBoard always; see train.wandb_project": ("trainer.logger",),
    "every process reads its own share": ("trainer.use_distributed_sampler",),
    "evaluations are counted in steps here: train.eval_every": ("trainer.check_val_every_n_epoch",),
    "shifts are constant within a segment, which is what the name promises": ("train_dataset.traj_cons",),
    "episodes are drawn from the whole dataset, not from a buffer": ("train_dataset.shuffle_buffer_size",),
    "training and validation are the parts they are named after": ("train_dataset.mode", "train_dataset.train"),
    "swallowed by upstream's dataset": ("train_dataset.shift_first",),
    "overwritten by model": ("train_dataset.model_name",),
    "all other keys: validation reads the same data in the same way, all of it, without augmentation": (
        "val_dataset.*",
    ),
    "logs lie in train.output": ("log_root",),
    "where upstream found the file": ("config", "raw_config_path"),
    "folder of one upstream run": ("exp_name", "log_dir", "output_dir"),
    "of upstream's SimplerEnv wrapper": ("action_scale",),
}

IGNORED = {key: reason for reason, keys in _BY_REASON.items() for key in keys}
"""Key -> why nothing happens. `*` stands for any part of a name."""


def reason(key: str) -> str | None:
    """Why a key decides nothing; None where it decides something, or nobody knows it."""
    if key in table.MAPPED:
        return None
    return next((reason for pattern, reason in IGNORED.items() if fnmatch.fnmatchcase(key, pattern)), None)
