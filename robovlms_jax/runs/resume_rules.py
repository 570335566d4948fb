"""Which settings may change when a run is resumed: a rule with its reason for every field of a configuration."""

from __future__ import annotations

import dataclasses
import fnmatch
import typing
from collections.abc import Iterator
from typing import Literal

from robovlms_jax import schema
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.policies.sensors import base as sensors
from robovlms_jax.policies.sensors.base import SensorConfig
from robovlms_jax.runs.config import ExperimentConfig

Kind = Literal["free", "said", "kept", "order", "stage", "refused"]
"""free: may change. said: may change, and the log says so, for training goes on differently. kept: the checkpoint's
value stays, and the log says so. order: may change with train.allow_new_order, for other batches come. stage: what is
trained or learned from is another, which is a new stage of training (train.init_from). refused: parameters would mean
something else."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of settings that differ. fields: dotted paths, `*` = anything; but: those that have another rule."""

    kind: Kind
    fields: tuple[str, ...]
    reason: str
    but: tuple[str, ...] = ()

    def covers(self, path: str) -> bool:
        """Whether the rule is about the field at `path`."""
        covered, left = (any(fnmatch.fnmatchcase(path, p) for p in listed) for listed in (self.fields, self.but))
        return covered and not left


RULES = (
    # What is trained.
    Rule(
        "kept",
        ("backbone.weights", "backbone.adapter"),
        "parameters, tokenizer and preprocessing come from the checkpoint",
    ),
    Rule("said", ("backbone.dtype",), "numbers are computed in another precision"),
    Rule("free", ("backbone.remat",), "the same numbers with less memory"),
    Rule("free", ("backbone.attention_kernel",), "the same numbers but for the last of sixteen bits"),
    Rule(
        "refused",
        (
            "backbone.name",
            "backbone.attention",
            "backbone.states",
            "backbone.resampler_*",
            "backbone.storage",
            "backbone.lora_*",
        ),
        "it is the architecture that the parameters belong to",
        but=("backbone.lora_dropout",),
    ),
    Rule(
        "refused",
        (
            *("policy.history", "policy.readout", "policy.num_queries", "policy.pool", "policy.window", "policy.chunk"),
            *("policy.cameras", "policy.compat_*", "policy.action_history.length"),
            *("policy.proprio.enabled", "policy.proprio.center", "policy.proprio.scale", "policy.lora_*"),
        ),
        "the parameters were learned with it and mean something else without",
        but=("policy.lora_dropout",),
    ),
    Rule("said", ("*.lora_dropout",), "adapters are trained with another dropout"),
    Rule(
        "refused",
        (
            *("policy.action_scaling", "policy.action_num_std", "policy.action_low", "policy.action_high"),
            *("policy.action_mean", "policy.action_std", "policy.action_mu", "data.compat_second_norm"),
        ),
        "what the head predicts is scaled by it into what a robot is sent",
    ),
    Rule("refused", ("policy.representation",), "it is what the head predicts"),
    Rule("free", ("policy.robot.name",), "what the robot is called"),
    Rule(
        "refused",
        tuple(f"policy.robot.{part}" for part in ("rate_hz", "cameras", "action", "state")),
        "it says what the policy's numbers and pictures are",
    ),
    Rule("free", ("policy.reencode_every",), "only control reads it"),
    Rule(
        "refused",
        ("policy.sensors", "policy.sensors.*"),
        "the parameters were learned with these readings, in this order",
        but=("policy.sensors.*.dropout", "policy.sensors.*.field"),
    ),
    Rule("stage", ("policy.sensors.*.field",), "these are other readings under the same name"),
    Rule(
        "said",
        ("policy.proprio.dropout", "policy.action_history.dropout", "policy.sensors.*.dropout"),
        "training goes on with another dropout",
    ),
    Rule("stage", ("policy.auxiliary.*",), "it is a loss of its own, some with parameters of their own"),
    Rule(
        "refused",
        ("policy.other_heads", "policy.others", "policy.shared.*"),
        "the parameters belong to these robots' heads, and their actions are scaled by it",
    ),
    Rule("stage", ("policy.insulate",), "it decides what teaches the backbone"),
    Rule(
        "said",
        tuple(f"policy.head.{name}" for name in ("arm_loss", "huber_delta", "gripper_loss_weight", "dropout")),
        "training goes on with another loss",
    ),
    Rule("said", ("policy.head.max_delay",), "training goes on with other simulated delays"),
    Rule("said", ("policy.head.draws", "policy.head.time_power"), "training goes on with other times and noises"),
    Rule("refused", ("policy.head.spread",), "it has parameters of its own in most heads"),
    Rule(
        "free",
        (
            *("policy.head.num_steps", "policy.head.seed", "policy.head.constrained", "policy.head.num_samples"),
            "policy.head.temperature",
            *("policy.head.guidance", "policy.head.guidance_limit", "policy.head.guidance_schedule"),
        ),
        "only control reads it",
    ),
    Rule(
        "refused",
        (
            *(f"policy.head.{name}" for name in ("kind", "trunk", "hidden_size", "num_layers", "num_heads")),
            *(f"policy.head.{name}" for name in ("num_bins", "low", "high", "binning", "quantile_edges")),
            *(f"policy.head.{name}" for name in ("vocab_end", "decoding", "time_turns", "data_std")),
        ),
        "it is the head that the parameters belong to, or what its outputs mean",
    ),
    # What it is trained on.
    Rule("free", ("data.root", "data.index_dir", "data.index_workers"), "where data lie; their content is compared"),
    Rule("free", ("data.num_threads", "data.num_workers", "data.prefetch"), "the same batches, read otherwise"),
    Rule("free", ("data.decoded_gb",), "the same pictures, decoded less often"),
    Rule("free", ("data.check_actions", "data.max_corrupt_share"), "when to stop, not what to learn"),
    Rule("stage", ("data.conventions",), "it says in which units data are"),
    Rule(
        "said",
        ("data.static_shift", "data.wrist_shift", "data.shift*", "data.augment.*"),
        "pictures are augmented otherwise",
        but=("data.augment.mirror*",),
    ),
    Rule("order", ("data.augment.mirror*",), "other samples are mirrored"),
    Rule(
        "order",
        (
            *("data.unlabelled_*", "data.success_only", "data.left_pad", "data.vary_language", "data.paraphrases"),
            *("data.shorter_sentences", "data.skip_still"),
            *("data.compat_goal_relabelling", "data.windows_per_segment", "data.episode_list", "data.exclude_tasks"),
            *("data.annotation_folder", "data.max_left_out_share", "train.batch_size", "train.seed"),
        ),
        "other batches follow than would have",
    ),
    Rule("stage", ("data.text_length",), "all prompts are padded to it"),
    Rule("free", ("data.others.roots",), "where data lie; their content is compared"),
    Rule("stage", ("data.others.datasets",), "these are other data"),
    Rule("free", ("data.further.roots", "data.further.lists"), "where data lie; their content is compared"),
    Rule("stage", ("data.further.align", "data.further.unlabelled"), "these are other losses"),
    Rule("free", ("data.vl.paths", "data.vl.images"), "where pictures and texts lie; their content is compared"),
    Rule("free", ("data.vl.validation",), "what is asked in validation, not learned"),
    Rule("order", ("data.vl.turns", "data.vl.length", "data.vl.leave_out_long"), "other batches follow"),
    Rule(
        "stage",
        ("data.dataset", "data.image_size", "data.reference", "data.statistics"),
        "these are other data, or the same in other units",
    ),
    Rule("free", ("demonstrations.tables",), "simulated side by side, not learned from"),
    Rule(
        "order",
        (
            *("demonstrations.episodes", "demonstrations.validation_*", "demonstrations.tasks"),
            *("demonstrations.scenes", "demonstrations.random_scenes", "demonstrations.chain_length"),
            *("demonstrations.max_steps", "demonstrations.disturbance", "demonstrations.start_spread"),
            *("demonstrations.image_size", "demonstrations.picture_every", "demonstrations.seed"),
        ),
        "these are other demonstrations",
    ),
    # How it is trained.
    Rule(
        "said",
        ("optimizer.*",),
        "the optimizer goes on otherwise, with the moments that it has",
        but=("optimizer.name", "optimizer.ewc", "optimizer.ewc_floor"),
    ),
    Rule("stage", ("optimizer.name", "optimizer.ewc"), "its state has another form"),
    Rule("stage", ("optimizer.ewc_floor",), "parameters are held by what the run began with"),
    Rule("said", ("train.steps",), "the schedule may end elsewhere; never before the checkpoint's own step"),
    Rule("free", ("train.epochs",), "it becomes train.steps"),
    Rule("said", ("train.accumulation", "train.on_nonfinite", "train.max_skipped"), "steps are made otherwise"),
    Rule("stage", ("train.trainable", "train.stages"), "the optimizer has moments of other parameters"),
    Rule("order", ("train.sources",), "other batches follow than would have"),
    Rule("stage", ("train.source_weights",), "this is another loss"),
    Rule("free", ("train.resume", "train.init_from", "train.allow_new_order"), "how this start was asked for"),
    Rule("free", ("train.output", "train.compilation_cache"), "where things lie"),
    Rule("free", ("train.compiler_options",), "programs compute the same by other kernels"),
    Rule(
        "free",
        (
            *("train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints"),
            *("train.profile", "train.hang_timeout_s", "train.wandb_project", "evaluation.*", "rollouts.*"),
        ),
        "what is looked at and kept, not what is learned",
    ),
    Rule("free", ("mesh.*", "distributed.*"), "the same step on other devices"),
)


def rule_of(path: str) -> Rule:
    """The rule about a field. Raises LookupError unless there is exactly one."""
    found = [rule for rule in RULES if rule.covers(path)]
    if len(found) != 1:
        raise LookupError(
            f"{path} is in {len(found)} rows of resume_rules.RULES; it needs one that says why it may change."
        )
    return found[0]


def fields_of(cls: type = ExperimentConfig, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all fields that a configuration can have, those of every registered head and sensor included; of
    tuples of configurations their own, and those of an item called `*`."""
    if cls is heads.HeadConfig:
        names = {name for kind in heads.kinds() for name in fields_of(heads.config_of(kind), prefix)}
        yield from sorted({*names, f"{prefix}kind"})
        return
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from fields_of(hint, f"{prefix}{field.name}.")
        elif schema.item_of(hint) is SensorConfig:
            yield from (f"{prefix}{field.name}", *(f"{prefix}{field.name}.*.{name}" for name in sensors.fields()))
        else:
            yield f"{prefix}{field.name}"
