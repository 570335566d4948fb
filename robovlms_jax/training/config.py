"""The optimizer and the training run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

from robovlms_jax import schema
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("optimizer")
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    """adamw: as upstream and the paper. adafactor: no first moment and second moments by row and column, for memory.
    lion: signs, with learning rates three to ten times smaller. muon: matrices of layers orthogonalised, the rest by
    AdamW, at AdamW's learning rates."""
    learning_rate: float = 2e-5
    """The largest, at the end of warm-up."""
    weight_decay: float = 0.0
    """Decoupled, on every trainable parameter, as upstream does."""
    beta1: float = 0.9
    beta2: float = 0.999
    """Of Adam's moments, and of Lion's (whose authors have 0.99)."""
    epsilon: float = 1e-8
    """Of AdamW, and of muon."""
    schedule: Literal["constant", "cosine", "step", "rsqrt", "warmup_stable_decay"] = "constant"
    """After warm-up: constant; cosine down to min_scale at train.steps; multiplied by step_factor every step_every
    steps; with the inverse square root of steps, counted from rsqrt_steps; or constant, and linear down to min_scale in
    the last decay_share of the steps after warm-up."""
    warmup_steps: int = 0
    """Linear warm-up from 0; the first update then has learning rate 0, as upstream's has."""
    warmup_epochs: float = 0.0
    """The same in passes over the training windows; added to warmup_steps when the run starts."""
    min_scale: float = 0.0
    """Cosine, warmup_stable_decay: final learning rate as a share of learning_rate."""
    step_every: int = 10_000
    """Step: steps between two falls of the learning rate."""
    step_factor: float = 0.1
    """Step: what it is multiplied by."""
    rsqrt_steps: int = 10_000
    """Rsqrt: steps after which it is 1 / sqrt(2) of the largest."""
    decay_share: float = 0.2
    """Warmup_stable_decay: share of the steps after warm-up in which it falls."""
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    """Regular expression -> factor of the learning rate of parameters in whose path it is found; the first counts. Such
    as {"^head/": 10} for a new head, or {"lora_b$": 16}, which is LoRA+ (Hayou et al. 2024, arXiv:2402.12354)."""
    layer_decay: float = 1.0
    """Below 1: each layer of a tower has this share of the rate of the layer above it; what comes before the first
    layer is one deeper."""
    last_layers: dict[str, int] = dataclasses.field(default_factory=dict)
    """Regular expression -> n: of the stacked layers in whose path it is found only the last n train, such as
    {"^backbone/text/": 4}. The others keep optimizer state and are differentiated through all the same."""
    ema: float = 0.0
    """Above 0: a moving average of the trained parameters, ema = ema * average + (1 - ema) * parameters after every
    update, is what is evaluated, saved as the policy and served, and what a later stage begins with."""
    ewc: float = 0.0
    """Above 0: parameters are held where they begin by this times their Fisher information in what train.init_from's
    run learned (training/consolidation.py), which lies in its fisher.npz."""
    ewc_floor: float = 0.0
    """With ewc: the least information that a parameter counts with, as a share of the mean of all. At 0, parameters
    that earlier tasks never used move freely, and what they switch on is new to the tasks that were learned."""
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off (what upstream's configs really ran with)."""

    def __post_init__(self):
        for field in ("learning_rate", "step_factor"):
            x = getattr(self, field)
            require(0 < x < math.inf, f"optimizer.{field}={x} must be positive and finite.")
        for field in ("weight_decay", "epsilon", "warmup_steps", "warmup_epochs", "clip_norm", "ewc", "ewc_floor"):
            x = getattr(self, field)
            require(0 <= x < math.inf, f"optimizer.{field}={x} must be 0 or positive, and finite.")
        for field in ("beta1", "beta2"):
            require(0 <= getattr(self, field) < 1, f"optimizer.{field}={getattr(self, field)} must lie in [0, 1).")
        require(self.step_every >= 1, f"optimizer.step_every={self.step_every} must be at least 1.")
        require(0 <= self.min_scale <= 1, f"optimizer.min_scale={self.min_scale} must lie in [0, 1].")
        require(self.rsqrt_steps >= 1, f"optimizer.rsqrt_steps={self.rsqrt_steps} must be at least 1.")
        require(0 < self.decay_share <= 1, f"optimizer.decay_share={self.decay_share} must lie in (0, 1].")
        require(0 < self.layer_decay <= 1, f"optimizer.layer_decay={self.layer_decay} must lie in (0, 1].")
        require(
            self.ewc > 0 or not self.ewc_floor,
            f"optimizer.ewc_floor={self.ewc_floor} has no effect while optimizer.ewc is 0.",
        )
        require(0 <= self.ema < 1, f"optimizer.ema={self.ema} must lie in [0, 1).")
        for field in ("rates", "last_layers"):
            values = getattr(self, field)
            kind = "whole" if field == "last_layers" else "finite"
            wrong = {name: x for name, x in values.items() if not 0 < x < math.inf or (kind == "whole" and x % 1)}
            require(not wrong, f"optimizer.{field} has {wrong}; expected patterns with {kind} numbers above 0.")
            if values:
                _require_patterns(tuple(values), f"optimizer.{field}")
        betas = (self.beta1, self.beta2) == (OptimizerConfig.beta1, OptimizerConfig.beta2)
        require(
            self.name != "adafactor" or betas,
            f"optimizer.beta1={self.beta1}, optimizer.beta2={self.beta2}: adafactor has neither; leave them out.",
        )

    def require_effects(self, where: str = "optimizer") -> None:
        """Raises ValueError for fields that are set and that this schedule, or this optimizer, does not read. Not at
        once, since runs of versions that did not ask have such settings, and their checkpoints go on loading."""
        for chosen, readers in _READERS.items():
            for field, values in readers.items():
                given = getattr(self, field)
                require(
                    getattr(self, chosen) in values or given == getattr(OptimizerConfig, field),
                    f"{where}.{field}={given} has no effect with {where}.{chosen}={getattr(self, chosen)}: it is read "
                    f"with {' or '.join(values)}. Leave it out, or set {where}.{chosen}.",
                )


_READERS = {
    "schedule": {
        "min_scale": ("cosine", "warmup_stable_decay"),
        "step_every": ("step",),
        "step_factor": ("step",),
        "rsqrt_steps": ("rsqrt",),
        "decay_share": ("warmup_stable_decay",),
    },
    "name": {"epsilon": ("adamw", "muon")},
}
"""Choice -> field of `OptimizerConfig` -> the values of the choice with which it is read."""


@dataclasses.dataclass(frozen=True)
@schema.checked("train.stages")
class StageConfig:
    """A part of a run that trains other parameters, on other losses or other data, than the parts before it."""

    steps: int
    """Optimizer steps of this stage."""
    name: str = ""
    """For the log; empty: its number."""
    trainable: tuple[str, ...] = (".*",)
    """As train.trainable, in this stage."""
    optimizer: OptimizerConfig | None = None
    """None: as `optimizer.*`. Its schedule begins with the stage, and so do its moments."""
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Task -> weight of its loss in this stage, 0: off. Tasks that are not named keep theirs (actions: 1; forward,
    clip, ahead, scene, caption and vl: as policy.auxiliary says)."""
    sources: dict[str, float] = dataclasses.field(default_factory=lambda: {"robot": 1.0})
    """Source of data -> its share of every batch, relative to the others."""

    def __post_init__(self):
        name = f"train.stages: {f'stage {self.name!r}' if self.name else 'a stage'}"
        require(self.steps >= 1, f"{name} has steps={self.steps}; it must make at least 1.")
        _require_patterns(self.trainable, f"{name}: trainable")
        _require_shares(self.weights, f"{name}: weights")
        _require_sources(self.sources, f"{name}: sources")


@dataclasses.dataclass(frozen=True)
@schema.checked("train")
class TrainConfig:
    """The training run."""

    output: str = "runs/default"
    """Run directory: config, logs, checkpoints, report. In short: --out."""
    resume: bool = False
    """Go on from the newest checkpoint in `output`. Without it, a directory that already holds checkpoints is
    refused."""
    init_from: str = ""
    """Start with the parameters of another run (its directory or a checkpoint's), as far as they fit; what does not is
    listed. Its tokenizer and architecture are used, its optimizer state and data order are not."""
    allow_new_order: bool = False
    """With resume: go on although other batches follow than would have (other episodes, batch size or seed). The run is
    then no longer what it would have been without the interruption."""
    steps: int = 50_000
    """Optimizer steps."""
    epochs: float = 0.0
    """> 0: train for this many passes over the training windows instead of `steps`. A preset's is 0 where a command
    line names `steps` alone."""
    batch_size: int = 128
    """Windows per step over all hosts: segments per step times data.windows_per_segment."""
    accumulation: int = 1
    """Micro-batches per step; the gradient equals that of the whole batch."""
    on_nonfinite: Literal["abort", "skip"] = "abort"
    """What follows a loss or gradient that is not finite. Either way the batch changes nothing, and its episodes are
    written to nonfinite.jsonl. abort: the last good state is saved and the run ends. skip: it goes on."""
    max_skipped: int = 100
    """Batches that on_nonfinite=skip may leave out in the whole run; one more ends it as abort does."""
    trainable: tuple[str, ...] = (".*",)
    """Regular expressions searched in parameter paths such as backbone/text/layers/attn/q/kernel; what matches none
    is frozen."""
    sources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Source of data -> its share of every batch, relative to the others: `robot` and the names in data.vl.paths. Such
    as --train.sources robot 4 questions 1. Empty: the robot's demonstrations alone."""
    source_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Source of data -> weight of its loss, in all stages; 1 for those not named. Losses are means over a source's own
    rows and are added up, so its share of a batch says how precisely its loss is known, not how much it counts."""
    stages: tuple[StageConfig, ...] = ()
    """Stages of training, one after the other, in place of `steps`, `trainable` and `sources`; their steps add up to
    the run's. Empty: one, made of these and `optimizer.*`."""
    seed: int = 0
    """Initialisation, data order, augmentation and dropout."""
    log_every: int = 10
    """Steps between progress lines and logged metrics."""
    eval_every: int = 5_000
    """Steps between evaluations on the validation split; 0: only at the end."""
    checkpoint_every: int = 2_000
    """Steps between checkpoints; one is always written at the end and on SIGTERM."""
    keep_checkpoints: int = 3
    """Newest ones that stay; the last of every stage stays, too."""
    profile: int = 0
    """Steps to trace with JAX's profiler, from the third one on; the trace lies in the run's tensorboard directory, for
    TensorBoard's profile plugin (`pip install tensorboard-plugin-profile`) or ui.perfetto.dev. 0: none."""
    hang_timeout_s: int = 1800
    """A process that makes no step for this many seconds ends with an error, the stacks of its threads and status 75;
    time in evaluations does not count. 0: it waits for ever."""
    compilation_cache: str = "auto"
    """Directory of compiled programs, so that the next start need not compile them again. auto: the one that
    JAX_COMPILATION_CACHE_DIR names, else ~/.cache/robovlms_jax/xla/<type of processor>, of at most 8 GiB. Empty:
    none."""
    compiler_options: Literal["auto", "none"] = "auto"
    """How the training step is compiled. auto: with the options that made its program better on this kind of device
    (docs/clusters.md, "Compiler options"). none: as XLA does by itself."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project (needs `pip install wandb`)."""

    def __post_init__(self):
        for field in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"):
            require(getattr(self, field) >= 1, f"train.{field}={getattr(self, field)} must be at least 1.")
        require(self.max_skipped >= 0, f"train.max_skipped={self.max_skipped} must not be negative.")
        require(self.hang_timeout_s >= 0, f"train.hang_timeout_s={self.hang_timeout_s} must be 0 (never) or positive.")
        require(self.profile >= 0, f"train.profile={self.profile} must be 0 (off) or positive.")
        require(self.epochs >= 0, f"train.epochs={self.epochs} must be 0 (use train.steps) or positive.")
        require(self.eval_every >= 0, f"train.eval_every={self.eval_every} must be 0 (only at the end) or positive.")
        require(self.output != "", "train.output must name a directory.")
        _require_patterns(self.trainable, "train.trainable")
        _require_sources(self.sources or {"robot": 1.0}, "train.sources")
        _require_shares(self.source_weights, "train.source_weights")
        none = [source for source, weight in self.source_weights.items() if not weight]
        require(not none, f"train.source_weights is 0 for {none}; leave these out of train.sources instead.")
        require(
            not (self.stages and self.epochs),
            f"train.epochs={self.epochs} and train.stages both say how long training is; a stage names its steps.",
        )
        names = [stage.name for stage in self.stages if stage.name]
        require(len(set(names)) == len(names), f"train.stages has two stages of one name: {names}.")


def _require_shares(shares: Mapping[str, float], name: str) -> None:
    wrong = {key: x for key, x in shares.items() if not schema.fits(x, float) or not 0 <= x < math.inf}
    require(not wrong, f"{name} has {wrong}; expected names with finite numbers that are not negative.")


def _require_sources(shares: Mapping[str, float], name: str) -> None:
    _require_shares(shares, name)
    require(any(shares.values()), f"{name}={dict(shares)} has no share above 0, so no data.")


def _require_patterns(patterns: tuple[str, ...], name: str) -> None:
    require(len(patterns) > 0, f"{name} must hold at least one pattern; nothing would be trained.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name} has {pattern!r}, which is not a regular expression: {error}.") from error
