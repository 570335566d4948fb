"""Everything a run depends on: the parts of all rooms, and what must hold between them.

Facts of one part are checked when the part is built; facts between parts by `ExperimentConfig.validate`, before
anything is compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from robovlms_jax import schema
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.data.config import DataConfig, needs_all_pictures
from robovlms_jax.evaluation.config import EvaluationConfig, RolloutConfig
from robovlms_jax.parallel.config import DistributedConfig, MeshConfig
from robovlms_jax.playtable.config import DemonstrationConfig
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.training.config import OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
@schema.checked("")
class ExperimentConfig:
    """Everything a run depends on. Saved beside its checkpoints, enough to serve them."""

    USUAL: ClassVar[Mapping[str, str]] = {
        "data.root": "directory of the dataset",
        "data.dataset": "calvin, lerobot, libero_hdf5 or a name",
        "data.windows_per_segment": "windows that share frames",
        "backbone.name": "which VLM",
        "backbone.weights": "its published weights, DIR or hf://",
        "backbone.dtype": "",
        "backbone.remat": "compute again instead of keeping",
        "backbone.lora_rank": "above 0: low-rank adapters",
        "policy.history": "",
        "policy.head": "",
        "policy.cameras": "in the order of their tokens",
        "policy.window": "observed steps looked back over",
        "policy.chunk": "future actions predicted at every step",
        "optimizer.learning_rate": "the largest",
        "optimizer.schedule": "",
        "train.steps": "optimizer steps",
        "train.batch_size": "windows per step over all hosts",
        "train.accumulation": "micro-batches per step",
        "train.trainable": "expressions for what is trained",
        "train.output": "directory of the run",
        "train.resume": "go on from the newest checkpoint",
        "train.init_from": "begin with another run's parameters",
        "mesh.fsdp": "devices that split parameters and batch",
        "rollouts.trials": "rollouts per evaluation",
    }
    """What --help shows, and how it says so where the terminal is narrow; "" where the first words of a field's own
    text do."""

    backbone: BackboneConfig = BackboneConfig()
    policy: PolicyConfig = PolicyConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    demonstrations: DemonstrationConfig = DemonstrationConfig()
    rollouts: RolloutConfig = RolloutConfig()

    @property
    def segments_per_batch(self) -> int:
        """Segments per optimizer step over all hosts."""
        return self.train.batch_size // self.data.windows_per_segment

    def validate(self, num_devices: int) -> None:
        """Check facts between parts. Raises ValueError that names the fields, the conflict and a way out."""
        per_segment, size = self.data.windows_per_segment, self.train.batch_size
        if size % per_segment:
            raise ValueError(
                f"train.batch_size={size} windows is no multiple of data.windows_per_segment={per_segment}; "
                f"try {_neighbours(size, per_segment)}."
            )
        if self.backbone.attention == "prefix" and (
            self.policy.readout != "action_query" or self.policy.history == "video"
        ):
            raise ValueError(
                "backbone.attention='prefix' needs policy.readout='action_query' and another history than 'video'; "
                f"it is {self.policy.readout!r} with {self.policy.history!r}. Set backbone.attention=causal."
            )
        if self.backbone.attention == "prefix" and self.policy.auxiliary.caption_weight:
            raise ValueError(
                "policy.auxiliary.caption_weight asks for each word from those before it, and with "
                "backbone.attention='prefix' every word sees the whole prompt. Set backbone.attention=causal, or the "
                "weight to 0."
            )
        if self.data.compat_second_norm and self.policy.action_scaling != "quantile":
            raise ValueError(
                "data.compat_second_norm repeats the scaling by quantiles: set policy.action_scaling=quantile (it is "
                f"{self.policy.action_scaling})."
            )
        self.require_known_sources()
        self.optimizer.require_effects()
        for number, stage in enumerate(self.train.stages):
            if stage.optimizer is not None:
                stage.optimizer.require_effects(f"train.stages[{number}].optimizer")
        if any(x.ewc for x in (self.optimizer, *(s.optimizer for s in self.train.stages if s.optimizer))) and (
            self.train.stages or not self.train.init_from
        ):
            raise ValueError(
                "optimizer.ewc holds parameters where another run left them: set train.init_from to that run, and "
                "leave train.stages empty (a later stage would hold them where the one before it ended)."
            )
        self._require_pictures()
        data, fsdp, _ = self.mesh_sizes(num_devices)
        step = data * fsdp * self.train.accumulation
        if self.segments_per_batch % step:
            whole, rest = divmod(self.segments_per_batch, data * fsdp)
            # Micro-batches must part each device's segments evenly.
            parts = [n for n in range(1, whole + 1) if whole % n == 0] if rest == 0 else []
            nearest = min(parts, key=lambda n: abs(n - self.train.accumulation), default=None)
            raise ValueError(
                f"train.batch_size={size} is {self.segments_per_batch} segments of {per_segment} windows, which does "
                f"not divide over {data * fsdp} data-parallel devices (mesh.data={data} x mesh.fsdp={fsdp}) x "
                f"train.accumulation={self.train.accumulation}; try train.batch_size="
                f"{_neighbours(size, step * per_segment)}"
                + (f", or train.accumulation={nearest}." if nearest is not None else ".")
            )

    def _require_pictures(self) -> None:
        """Raises ValueError where demonstrations show what training or rollouts have no use for."""
        shown, asked = self.demonstrations, self.rollouts
        if shown.episodes and shown.picture_every > 1:
            segments, future = self.data.windows_per_segment, self.policy.auxiliary.future_frames
            if problem := needs_all_pictures(self.policy.window, segments, future):
                raise ValueError(f"demonstrations.picture_every={shown.picture_every}: {problem}")
        if asked.trials:
            asked.execution.require(self.policy.robot)
        if shown.episodes and asked.trials and shown.image_size != asked.image_size:
            raise ValueError(
                f"rollouts.image_size={asked.image_size} is not demonstrations.image_size={shown.image_size}: the "
                "policy would be asked with other pictures than it learned from. Set both to the same pixels."
            )

    def require_known_sources(self) -> None:
        """Raises ValueError that names a source of train.* which no field of `data` has, or which is never drawn."""
        known, drawn = self.data.sources, {}
        shared = [("train.sources", self.train.sources or {"robot": 1.0})]
        if self.train.stages:
            named = [(stage.name or str(number + 1), stage.sources) for number, stage in enumerate(self.train.stages)]
            shared = [(f"train.stages, stage {name!r}: sources", shares) for name, shares in named]
        for words, shares in shared:
            unknown = sorted(set(shares) - set(known))
            if unknown:
                raise ValueError(
                    f"{words} names {unknown}; this run has data of {sorted(known)}. Pictures with text are named in "
                    "data.vl.paths."
                )
            drawn |= {source: share for source, share in shares.items() if share}
        taught = [source for source in drawn if source not in self.data.further.unlabelled]
        unknown = sorted(set(self.train.source_weights) - set(taught))
        if unknown:
            raise ValueError(
                f"train.source_weights names {unknown}; sources with a loss that this run draws from are "
                f"{', '.join(taught)} (train.sources, train.stages)."
            )

    def resolve(self, num_windows: int, text_length: int, actions: Mapping[str, Any] | None = None) -> ExperimentConfig:
        """Fill in what depends on the data: epochs become steps, prompt length and action bounds become numbers.

        Args:
          num_windows: windows of the training split.
          text_length: tokens that fit every training prompt.
          actions: statistics of the training actions, as `PolicyConfig.with_statistics` takes them; None leaves the
            policy as it is.
        """
        per_epoch = num_windows / self.train.batch_size
        steps = max(round(self.train.epochs * per_epoch), 1) if self.train.epochs else self.train.steps
        stages = tuple(
            dataclasses.replace(stage, optimizer=stage.optimizer and _warmed_up(stage.optimizer, per_epoch))
            for stage in self.train.stages
        )
        steps = sum(stage.steps for stage in stages) if stages else steps
        return dataclasses.replace(
            self,
            policy=self.policy if actions is None else self.policy.with_statistics(actions),
            data=dataclasses.replace(self.data, text_length=self.data.text_length or text_length),
            optimizer=_warmed_up(self.optimizer, per_epoch),
            train=dataclasses.replace(self.train, steps=steps, epochs=0.0, stages=stages),
        )

    def mesh_sizes(self, num_devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) with -1 filled in. Raises ValueError when they do not make `num_devices`."""
        return self.mesh.sizes(num_devices)


def _warmed_up(optimizer: OptimizerConfig, per_epoch: float) -> OptimizerConfig:
    """With warm-up in steps alone."""
    steps = optimizer.warmup_steps + round(optimizer.warmup_epochs * per_epoch)
    return dataclasses.replace(optimizer, warmup_steps=steps, warmup_epochs=0.0)


def _neighbours(size: int, step: int) -> str:
    """The multiples of `step` around `size`, for an error message."""
    below = size // step * step
    return f"{below} or {below + step}" if below else str(step)
