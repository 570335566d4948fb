"""Experiment configuration: frozen dataclasses that are the schema, the defaults and the help text.

Facts of one part are checked when the part is built; facts between parts by `ExperimentConfig.validate`, before
anything
is compiled. `to_dict` / `from_dict` are what checkpoints store.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from robovlms_jax import interface, schema
from robovlms_jax.actions import normalize, statistics
from robovlms_jax.evaluation.execution import Execution
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.policies.heads import discrete, lstm


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
@schema.checked("backbone")
class BackboneConfig:
    """Which vision-language model, and how it computes."""

    name: str = "kosmos-2"
    """Registered backbone. With `weights`, the architecture comes from that directory's config.json instead of the
    published size."""
    weights: str = ""
    """Directory with config.json, weights and tokenizer files, as published on the Hugging Face hub; or
    hf://OWNER/NAME[@REVISION] to download it. Several, separated by commas, where a model's parts were published apart
    (LLaVA-MPT, then its CLIP); the first has the config.json. Empty: random parameters."""
    attention: Literal["causal", "prefix"] = "causal"
    """causal: RoboVLMs' way for every backbone. prefix: images and prompt see each other in both directions, and action
    queries follow the whole prompt, as PaliGemma was trained."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products. Parameters, norms, softmax and losses stay float32."""
    remat: bool = False
    """Recompute layer activations in the backward pass: much less memory for about a third more compute."""
    resampler_latents: int = 0
    """> 0: a Perceiver resampler behind the connector turns every image's tokens into this many (upstream's
    `use_vision_resampler`: 64), with random parameters at first."""
    resampler_depth: int = 6
    """Its layers."""
    resampler_heads: int = 8
    """Its attention heads, of 64 channels each."""
    lora_rank: int = 0
    """> 0 adds low-rank adapters to every matrix of the backbone; set train.trainable to train only them."""
    lora_alpha: float = 16.0
    """Adapters are scaled by lora_alpha / lora_rank."""

    def __post_init__(self):
        for field in ("lora_rank", "resampler_latents"):
            _require(getattr(self, field) >= 0, f"backbone.{field}={getattr(self, field)} must be 0 (off) or positive.")
        for field in ("resampler_depth", "resampler_heads"):
            _require(getattr(self, field) >= 1, f"backbone.{field}={getattr(self, field)} must be at least 1.")


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.proprio")
class ProprioConfig:
    """The robot's own state as one more token per frame, between the prompt and the action queries."""

    enabled: bool = False
    """Off: policies are driven by images and text alone, as every released RoboVLMs checkpoint is."""
    center: tuple[float, ...] = (0.0, -0.15, 0.5, 3.1416, 0.0, 1.5708)
    """Subtracted from tcp xyz (m) and Euler xyz (rad, the short way round). The default is the middle of CALVIN's table
    with the gripper pointing down; zeros, together with a scale of ones, give the raw values upstream feeds."""
    scale: tuple[float, ...] = (0.25, 0.25, 0.1, 0.5, 0.5, 0.5)
    """What one unit of each centred number is."""
    dropout: float = 0.0
    """Share of training frames that are not told. Where the hand is on its way to something betrays where that is, so a
    policy that is always told can learn the demonstrations without looking."""

    def __post_init__(self):
        _require(0 <= self.dropout < 1, f"policy.proprio.dropout={self.dropout} must lie in [0, 1).")
        _require(
            len(self.center) == len(self.scale) == 6 and all(scale > 0 for scale in self.scale),
            f"policy.proprio.center and policy.proprio.scale need 6 numbers each, scales positive; got {self.center} "
            f"and {self.scale}.",
        )


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.action_history")
class ActionHistoryConfig:
    """The actions executed before a frame, as more tokens between the prompt and the action queries."""

    length: int = 0
    """How many; each is a token. 0: off."""
    dropout: float = 0.0
    """Share of training frames that are not told: what was done is a strong hint at what comes next, and a policy that
    trusts it alone repeats itself."""

    def __post_init__(self):
        _require(self.length >= 0, f"policy.action_history.length={self.length} must be 0 (off) or positive.")
        _require(0 <= self.dropout < 1, f"policy.action_history.dropout={self.dropout} must lie in [0, 1).")


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.auxiliary.forward")
class ForwardConfig:
    """Predict future frames of every camera from the features that actions are made of."""

    loss_weight: float = 0.0
    """> 0: on. Weighs the mean squared error of patches scaled to zero mean and unit variance."""
    offsets: tuple[int, ...] = (3,)
    """Frames ahead."""
    patch_size: int = 16
    """Pixels; divides the side of the model's images."""
    width: int = 384
    depth: int = 2
    """Layers of the decoder."""
    head_dim: int = 64

    def __post_init__(self):
        name = "policy.auxiliary.forward"
        _require(self.loss_weight >= 0, f"{name}.loss_weight={self.loss_weight} must be 0 (off) or positive.")
        _require(
            len(self.offsets) > 0 and min(self.offsets) >= 1,
            f"{name}.offsets={self.offsets} must name frames ahead, each at least 1.",
        )
        for field in ("patch_size", "width", "depth", "head_dim"):
            _require(getattr(self, field) >= 1, f"{name}.{field}={getattr(self, field)} must be at least 1.")
        _require(self.width % self.head_dim == 0, f"{name}.head_dim={self.head_dim} must divide width={self.width}.")


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.auxiliary.clip")
class ClipConfig:
    """Keep the features near the instruction's embedding by CLIP (upstream's CLIP-norm loss, its CLIP frozen)."""

    weights: str = ""
    """CLIP directory as published (upstream: ViT-L/14), or hf://OWNER/NAME. Empty: off. Only training opens it."""
    dim: int = 768
    """Width of its embeddings (projection_dim)."""
    loss_weight: float = 0.05

    def __post_init__(self):
        _require(self.dim >= 1, f"policy.auxiliary.clip.dim={self.dim} must be at least 1.")
        _require(self.loss_weight >= 0, f"policy.auxiliary.clip.loss_weight={self.loss_weight} must not be negative.")


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.auxiliary")
class AuxiliaryConfig:
    """Losses beside the actions'. Acting needs none of them."""

    forward: ForwardConfig = ForwardConfig()
    clip: ClipConfig = ClipConfig()
    caption_weight: float = 0.0
    """> 0: on. Weighs the language model's cross-entropy on the prompt given the images, so that it stays a language
    model."""

    def __post_init__(self):
        _require(
            self.caption_weight >= 0,
            f"policy.auxiliary.caption_weight={self.caption_weight} must be 0 (off) or positive.",
        )

    @property
    def enabled(self) -> bool:
        """Whether any of them is on."""
        return self.forward.loss_weight > 0 or self.clip.weights != "" or self.caption_weight > 0

    @property
    def future_frames(self) -> int:
        """F: frames after a segment that training needs."""
        return max(self.forward.offsets) if self.forward.loss_weight else 0


@dataclasses.dataclass(frozen=True)
@schema.checked("policy")
class PolicyConfig:
    """History x readout x head: what makes a VLM a robot policy."""

    history: Literal["one_step", "interleaved", "policy_head", "video"] = "policy_head"
    """one_step: the newest frame alone (window 1). interleaved: the language model reads frame after frame in one
    sequence. policy_head: every frame is encoded alone, the head remembers. video: all frames in one prompt."""
    readout: Literal["action_query", "pool", "token"] = "action_query"
    """action_query: learned tokens appended to the prompt; their hidden states are the head's features. pool: maxima
    over bins of the prompt's own hidden states. token: logits of vocabulary tokens that stand for actions."""
    head: heads.HeadConfig = lstm.LSTMHeadConfig()
    """Which head goes with which history and readout: `products()`."""
    num_queries: int = 1
    """Learned action tokens per frame; with readout pool, bins."""
    pool: Literal["all", "text", "vision"] = "all"
    """Readout pool: which tokens; text leaves out the first and the last one."""
    window: int = 8
    """W: observed steps looked back over, the current one included."""
    reencode_every: int = 1
    """History interleaved, control only: once the window slides, decode all of it again every this many steps. 1 is
    exact; 0 never does and costs one frame per step (see `policies.stream` for what is approximate then)."""
    chunk: int = 10
    """C: future actions predicted at every step, beginning with the current one."""
    cameras: tuple[str, ...] = ("wrist", "static")
    """Cameras in the order their tokens follow the prompt's first token (released RoboVLMs checkpoints: wrist, then
    static)."""
    compat_count_padding: bool = False
    """Training only, as upstream's batches: positions count the padding of prompts (see `sequence.Order`)."""
    compat_queries_last: bool = False
    """Training only, as upstream's batches: action queries come before the last slot of the padded prompt, so after the
    end and the padding of every prompt but the longest."""
    proprio: ProprioConfig = ProprioConfig()
    action_history: ActionHistoryConfig = ActionHistoryConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    action_scaling: Literal["bounds", "quantile", "mean_std"] = "bounds"
    """Where action_low and action_high come from. bounds: as given below. quantile: the 1 % and 99 % quantiles of the
    training split's actions. mean_std: their mean, minus and plus action_num_std standard deviations. The latter two
    are filled in when a run starts, and saved with its checkpoints."""
    action_num_std: float = 3.0
    """Standard deviations that mean_std maps to 1 (heads reach no further)."""
    action_low: tuple[float, ...] = (-0.65,) * 6
    """Lower end of each arm dimension in dataset units; clipped, then mapped to -1. The gripper is never normalised."""
    action_high: tuple[float, ...] = (0.65,) * 6
    """Upper end of each arm dimension in dataset units; clipped, then mapped to +1."""
    action_mean: float = 0.0
    """With action_std: upstream's `regular_action`, (arm - action_mean) / action_std after the bounds."""
    action_std: float = 0.0
    """0: off. Below 1, some actions lie beyond the [-1, 1] that heads reach, as they do upstream."""
    action_mu: float = 0.0
    """> 0: mu-law at the end, finer where actions are small. Upstream's mu is 255."""

    def __post_init__(self):
        for field in ("num_queries", "window", "chunk"):
            _require(getattr(self, field) >= 1, f"policy.{field}={getattr(self, field)} must be at least 1.")
        _require(
            self.reencode_every >= 0, f"policy.reencode_every={self.reencode_every} must be 0 (never) or positive."
        )
        _require(
            self.pool in ("all", "text", "vision"), f"policy.pool={self.pool!r} must be 'all', 'text' or 'vision'."
        )
        self._require_product()
        _require(
            self.readout != "token" or not (self.auxiliary.forward.loss_weight or self.auxiliary.clip.weights),
            "policy.auxiliary.forward and .clip learn from a head's hidden features; with policy.readout='token' there "
            "are none. Switch them off, or use another readout.",
        )
        _require(
            not (self.compat_count_padding or self.compat_queries_last) or self.history in ("one_step", "policy_head"),
            f"policy.compat_count_padding and policy.compat_queries_last are of histories that decode every frame by "
            f"itself, one_step and policy_head; this one is {self.history!r}.",
        )
        unknown = sorted(set(self.cameras) - set(interface.CAMERAS))
        _require(not unknown, f"policy.cameras has unknown {unknown}; known cameras: {list(interface.CAMERAS)}.")
        _require(
            len(self.cameras) > 0 and len(set(self.cameras)) == len(self.cameras),
            f"policy.cameras={self.cameras} must name each camera once and at least one.",
        )
        arm = interface.ACTION_DIM - 1
        _require(
            len(self.action_low) == len(self.action_high) == arm
            and all(low < high for low, high in zip(self.action_low, self.action_high)),
            f"policy.action_low and policy.action_high need {arm} numbers each, low < high everywhere; "
            f"got {self.action_low} and {self.action_high}.",
        )
        _require(self.action_num_std > 0, f"policy.action_num_std={self.action_num_std} must be positive.")
        for field in ("action_std", "action_mu"):
            _require(getattr(self, field) >= 0, f"policy.{field}={getattr(self, field)} must be 0 (off) or positive.")

    @property
    def normalizer(self) -> normalize.Normalizer:
        """Dataset units <-> what the head predicts. Raises ValueError where bounds still have to come from the data."""
        given = (self.action_low, self.action_high)
        if self.action_scaling != "bounds" and given == (PolicyConfig.action_low, PolicyConfig.action_high):
            raise ValueError(
                f"policy.action_scaling={self.action_scaling!r} takes its bounds from training data; call "
                "policy.with_statistics (training does) before the policy is used."
            )
        std = self.action_std or None
        return normalize.Normalizer(*given, mean=self.action_mean, std=std, mu=self.action_mu)

    def with_bins(self, actions: np.ndarray) -> PolicyConfig:
        """With the bins that the head takes from training data, where it does: actions float[N, 7], dataset units."""
        if not isinstance(self.head, discrete.DiscreteHeadConfig):
            return self
        return dataclasses.replace(self, head=self.head.with_actions(self.normalizer.normalize(actions)))

    def with_statistics(self, action: Mapping[str, Any]) -> PolicyConfig:
        """With the bounds that `action_scaling` asks for; a dimension that never changes gets bounds one unit apart.

        Args:
          action: "q01", "q99", "mean", "std" -> float[7], of the training split in dataset units.
        Raises:
          ValueError: outliers decide the bounds (mean_std); see `statistics.require_bounds`.
        """
        arm = interface.ACTION_DIM - 1
        if self.action_scaling == "bounds":
            return self
        if self.action_scaling == "quantile":
            low, high = (np.array(action[name][:arm], np.float64) for name in ("q01", "q99"))
        else:
            mean, std = (np.array(action[name][:arm], np.float64) for name in ("mean", "std"))
            low, high = mean - self.action_num_std * std, mean + self.action_num_std * std
            statistics.require_bounds(action, low, high)
        still = high - low < 1e-6
        low, high = np.where(still, low - 0.5, low), np.where(still, high + 0.5, high)
        return dataclasses.replace(self, action_low=tuple(low.tolist()), action_high=tuple(high.tolist()))

    @property
    def head_window(self) -> int:
        """Steps that the head predicts at and looks back over: one where the history leaves one."""
        return 1 if self.history == "video" else self.window

    @property
    def is_autoregressive(self) -> bool:
        """Whether action tokens are decoded one after the other."""
        return isinstance(self.head, discrete.DiscreteHeadConfig) and self.head.decoding == "autoregressive"

    def _require_product(self) -> None:
        kind, known = heads.kind_of(type(self.head)), heads.products()
        if (self.history, self.readout, kind) not in known:
            listed = "\n".join(f"  history={h} readout={r} head={k}" for h, r, k in known)
            raise ValueError(
                f"policy.history={self.history!r} with policy.readout={self.readout!r} and a {kind!r} head means "
                f"nothing. These do:\n{listed}"
            )
        _require(
            self.history != "one_step" or self.window == 1,
            f"policy.history='one_step' sees one step, but policy.window={self.window}; set policy.window=1.",
        )


@dataclasses.dataclass(frozen=True)
@schema.checked("data.augment")
class AugmentConfig:
    """Random changes to training images, the same for all frames of a segment; shifts are under data. All zero: off.

    There are no mirror images: they would turn left into right under an instruction that says which."""

    crop_area: float = 0.0
    """Share of the image that a random crop covers at least, in (0, 1]; scaled back to full size. Upstream's RLDS: 0.9
    always, here 0.9 to 1. 0: off."""
    brightness: float = 0.0
    """Add up to this much, of an image in [0, 1]. Upstream: 0.2."""
    contrast: float = 0.0
    """Scale the distance to the mean by 1 - x to 1 + x. Upstream: 0.2."""
    saturation: float = 0.0
    """The same for the distance to grey. Upstream: 0.2."""
    hue: float = 0.0
    """Turn colours by up to this share of the colour circle. Upstream: 0.05."""

    def __post_init__(self):
        _require(0 <= self.crop_area <= 1, f"data.augment.crop_area={self.crop_area} must lie in [0, 1].")
        for field in ("brightness", "contrast", "saturation", "hue"):
            _require(0 <= getattr(self, field) <= 1, f"data.augment.{field}={getattr(self, field)} must lie in [0, 1].")


@dataclasses.dataclass(frozen=True)
@schema.checked("data")
class DataConfig:
    """Episodes on disk and how they become batches."""

    dataset: str = "calvin"
    """calvin; lerobot (LeRobotDataset v3); a dataset or mixture of the RLDS registry (bridge, rt_1, oxe_magic_soup,
    oxe_magic_soup_plus, ...); or a YAML or JSON file with a mixture of one's own (data/README.md)."""
    root: str = ""
    """calvin: directory that holds `training` and `validation`, in CALVIN's own layout or packed by `python -m
    experiments.pack_calvin`. Others: the dataset's directory, or the one that holds all datasets of a mixture; may be
    a URL such as gs://bucket/folder."""
    index_dir: str = ""
    """RLDS: where indexes go. Empty: beside the data, or in the user's cache directory where that cannot be written."""
    index_workers: int = 0
    """RLDS: processes that build an index. 0: one per core."""
    image_size: int = 0
    """Scale all images to this height and width on the host; mixtures of unlike cameras need it. 0: as recorded."""
    reference: str = ""
    """Mixture: the dataset whose action units the policy speaks. Empty: the first one."""
    statistics: str = ""
    """JSON file of action statistics in OpenVLA's layout, used instead of those of the data itself."""
    conventions: str = ""
    """LeRobot: JSON file that says what the numbers mean (data/README.md). Empty: meta/robovlms.json of the dataset,
    where it has one."""
    max_left_out_share: float = 0.1
    """LeRobot: share of the episodes that may be left out because their parts disagree or are missing."""
    unlabelled_share: float = 0.0
    """RLDS, LeRobot: share of the episodes without an instruction to keep."""
    unlabelled_instruction: str = "interact with the objects"
    """What those episodes are told."""
    success_only: bool = True
    """RLDS: leave out episodes that the dataset marks as failed."""
    left_pad: bool = False
    """Let windows begin before their episode, masked, so that its first frames are learned from as the newest, too."""
    vary_language: bool = False
    """Draw each training sample's sentence from the recorded ones, the templates and `paraphrases`."""
    paraphrases: str = ""
    """JSON file {"templates": ["please {instruction}"], "sentences": {instruction: [others]}} for vary_language. Empty:
    a few built-in templates."""
    compat_goal_relabelling: bool = False
    """As upstream's RLDS loader: mask all actions after a random later step (K = 1 only). It hides valid actions."""
    compat_second_norm: bool = False
    """As upstream's configs on RLDS data: after the quantiles, clip to +-0.65 and scale by 1/0.65 once more."""
    windows_per_segment: int = 1
    """K: windows that share one run of W + K - 1 frames, each frame encoded once. 1 is upstream's sampling; 8 is
    about four times
    faster at W = 8."""
    episode_list: str = ""
    """JSON ({task: [[start, end], ...]}) or text ("index start end" per line) naming the annotated spans to train on.
    Empty: all."""
    exclude_tasks: tuple[str, ...] = ()
    """Task ids to leave out of training."""
    annotation_folder: str = "lang_annotations"
    """Folder under each split with auto_lang_ann.npy (original layout only)."""
    text_length: int = 0
    """Prompt tokens every prompt is padded to. 0: the longest prompt of the training split, rounded up to a multiple
    of 8."""
    static_shift: int = 10
    """Random shift augmentation of the static camera, in pixels at the model's resolution, constant within a segment.
    0: off."""
    wrist_shift: int = 4
    """The same for the wrist camera."""
    augment: AugmentConfig = AugmentConfig()
    num_threads: int = 8
    """Threads that read and decode, in each worker."""
    num_workers: int = 0
    """Processes that read. 0: threads of the main process do, which is faster until Python itself is the limit; -1:
    whichever reads faster here, measured at the start. Batches are the same."""
    prefetch: int = 16
    """Batches kept ready."""
    check_actions: Literal["refuse", "warn"] = "refuse"
    """What follows when the training actions look wrong (see `actions.statistics`): no run, or a warning."""
    max_corrupt_share: float = 0.01
    """Unreadable segments are replaced, counted and named; training stops when they exceed this share."""

    def __post_init__(self):
        for field in ("windows_per_segment", "num_threads", "prefetch"):
            _require(getattr(self, field) >= 1, f"data.{field}={getattr(self, field)} must be at least 1.")
        for field in ("static_shift", "wrist_shift", "text_length", "index_workers", "image_size"):
            _require(getattr(self, field) >= 0, f"data.{field}={getattr(self, field)} must not be negative.")
        _require(self.num_workers >= -1, f"data.num_workers={self.num_workers} must be -1 (measure), 0 or positive.")
        _require(0 <= self.unlabelled_share <= 1, f"data.unlabelled_share={self.unlabelled_share} must be in [0, 1].")
        _require(
            0 <= self.max_left_out_share < 1, f"data.max_left_out_share={self.max_left_out_share} must lie in [0, 1)."
        )
        _require(
            self.dataset == "lerobot" or not self.conventions,
            f"data.conventions describes a LeRobotDataset; data.dataset is {self.dataset!r}.",
        )
        _require(self.dataset != "", "data.dataset must name a format, dataset, mixture or file.")
        _require(
            self.vary_language or not self.paraphrases, "data.paraphrases needs --data.vary_language to have an effect."
        )
        _require(
            not self.compat_goal_relabelling or self.windows_per_segment == 1,
            f"data.compat_goal_relabelling draws a goal for each window; set data.windows_per_segment=1 "
            f"(it is {self.windows_per_segment}).",
        )
        _require(
            0 <= self.max_corrupt_share < 1, f"data.max_corrupt_share={self.max_corrupt_share} must lie in [0, 1)."
        )


@dataclasses.dataclass(frozen=True)
@schema.checked("optimizer")
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    """Decoupled, on every trainable parameter, as upstream does."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """After warm-up: constant; cosine down to min_scale at train.steps; or multiplied by step_factor every step_every
    steps."""
    warmup_steps: int = 0
    """Linear warm-up from 0; the first update then has learning rate 0, as upstream's has."""
    warmup_epochs: float = 0.0
    """The same in passes over the training windows; added to warmup_steps when the run starts."""
    min_scale: float = 0.0
    """Cosine: final learning rate as a share of learning_rate."""
    step_every: int = 10_000
    step_factor: float = 0.1
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off (what upstream's configs really ran with)."""

    def __post_init__(self):
        _require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive.")
        for field in ("warmup_steps", "warmup_epochs"):
            _require(getattr(self, field) >= 0, f"optimizer.{field}={getattr(self, field)} must not be negative.")
        _require(self.clip_norm >= 0, f"optimizer.clip_norm={self.clip_norm} must be 0 (off) or positive.")
        _require(self.step_every >= 1, f"optimizer.step_every={self.step_every} must be at least 1.")
        _require(0 <= self.min_scale <= 1, f"optimizer.min_scale={self.min_scale} must lie in [0, 1].")


@dataclasses.dataclass(frozen=True)
@schema.checked("train")
class TrainConfig:
    """The training run."""

    output: str = "runs/default"
    """Run directory: config, logs, checkpoints, report."""
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
    """> 0: train for this many passes over the training windows instead of `steps`."""
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
    seed: int = 0
    """Initialisation, data order, augmentation and dropout."""
    log_every: int = 10
    """Steps between progress lines and logged metrics."""
    eval_every: int = 5_000
    """Steps between evaluations on the validation split; 0: only at the end."""
    checkpoint_every: int = 2_000
    """Steps between checkpoints; one is always written at the end and on SIGTERM."""
    keep_checkpoints: int = 3
    profile: int = 0
    """Steps to trace with JAX's profiler, from the third one on; the trace lies in the run's tensorboard directory, for
    TensorBoard's profile plugin (`pip install tensorboard-plugin-profile`) or ui.perfetto.dev. 0: none."""
    compilation_cache: str = "auto"
    """Directory of compiled programs, so that the next start need not compile them again. auto: the one that
    JAX_COMPILATION_CACHE_DIR names, else ~/.cache/robovlms_jax/xla/<type of processor>, of at most 8 GiB. Empty:
    none."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project (needs `pip install wandb`)."""

    def __post_init__(self):
        for field in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, field) >= 1, f"train.{field}={getattr(self, field)} must be at least 1.")
        _require(self.max_skipped >= 0, f"train.max_skipped={self.max_skipped} must not be negative.")
        _require(self.profile >= 0, f"train.profile={self.profile} must be 0 (off) or positive.")
        _require(self.epochs >= 0, f"train.epochs={self.epochs} must be 0 (use train.steps) or positive.")
        _require(self.eval_every >= 0, f"train.eval_every={self.eval_every} must be 0 (only at the end) or positive.")
        _require(self.output != "", "train.output must name a directory.")
        _require(len(self.trainable) > 0, "train.trainable must hold at least one pattern; nothing would be trained.")
        for pattern in self.trainable:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"train.trainable has {pattern!r}, which is not a regular expression: {error}."
                ) from error


@dataclasses.dataclass(frozen=True)
@schema.checked("mesh")
class MeshConfig:
    """How many devices share what. -1 takes all that are left."""

    data: int = -1
    """Copies of the model, each with its own part of the batch."""
    fsdp: int = 1
    """Devices that split parameters and optimizer state (and the batch)."""
    tensor: int = 1
    """Devices that split each matrix product."""

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        _require(all(size == -1 or size >= 1 for size in sizes), f"mesh sizes {sizes} must be positive or -1.")
        _require(sizes.count(-1) <= 1, f"mesh sizes {sizes}: at most one may be -1.")


@dataclasses.dataclass(frozen=True)
@schema.checked("distributed")
class DistributedConfig:
    """How the processes of a run find each other; docs/clusters.md has the commands. No part of what a run computes,
    and not kept with it."""

    coordinator: str = "auto"
    """auto: join the others on Cloud TPU, under SLURM and under Open MPI, be alone elsewhere. HOST:PORT: where process
    0 waits for the others. none: be alone."""
    num_processes: int | None = None
    """Processes of the run, where HOST:PORT is given; SLURM and Open MPI know it."""
    process_id: int | None = None
    """This one's number, from 0."""
    start_timeout_s: int = 300
    """Seconds to wait for all processes to come."""
    peer_timeout_s: int = 60
    """A process that gives no sign of life for this many seconds is dead, and the others end with an error."""

    def __post_init__(self):
        for field in ("start_timeout_s", "peer_timeout_s"):
            _require(getattr(self, field) >= 1, f"distributed.{field}={getattr(self, field)} must be at least 1.")


@dataclasses.dataclass(frozen=True)
@schema.checked("evaluation")
class EvaluationConfig:
    """Evaluation on the validation split, without a simulator."""

    batches: int = 50
    """Batches per evaluation; 0: the whole split."""
    episodes: int = 3
    """Episodes whose predicted and recorded actions are drawn in the report."""

    def __post_init__(self):
        for field in ("batches", "episodes"):
            _require(getattr(self, field) >= 0, f"evaluation.{field}={getattr(self, field)} must not be negative.")


@dataclasses.dataclass(frozen=True)
@schema.checked("demonstrations")
class DemonstrationConfig:
    """Scripted demonstrations on PlayTable, the embedded simulator."""

    episodes: int = 0
    """Training chains. For a training run: recorded to data.root before it, unless they are there; 0: none."""
    validation_episodes: int = 100
    """Validation chains."""
    tasks: tuple[str, ...] = ()
    """Task ids to demonstrate; empty: all 34."""
    scenes: tuple[str, ...] = ("A", "B", "C")
    """Tables of the training split; chains take turns."""
    random_scenes: int = 0
    """This many more training tables, their parts placed and coloured at random: with three tables alone, a policy
    learns places by heart instead of looking."""
    validation_scene: str = "D"
    """Table of the validation split."""
    chain_length: int = 5
    """Tasks per chain; a chain ends early when no task of the list is possible or the expert fails."""
    max_steps: int = 200
    """Control steps an expert may take for one task."""
    disturbance: float = 0.0
    """Share of the thirds of a second in which the hand is pushed off course, by up to 5 cm. The recorded action is the
    one that the expert wanted, so a policy sees how to come back (Laskey et al. 2017, arXiv:1703.09327)."""
    start_spread: float = 0.0
    """Metres by which the hand is moved from CALVIN's resting pose before a chain begins, at most: so far along x, a
    quarter as far along y and z. When all begin at one place, where the hand is soon tells where it is going, and a
    policy need not look."""
    image_size: tuple[int, int] = (200, 84)
    """Pixels of static and wrist camera."""
    tables: int = 16
    """Tables simulated side by side; a GPU takes hundreds."""
    seed: int = 0

    def __post_init__(self):
        _require(self.episodes >= 0, f"episodes={self.episodes} must not be negative.")
        for field in ("validation_episodes", "chain_length", "max_steps", "tables"):
            _require(getattr(self, field) >= 1, f"{field}={getattr(self, field)} must be at least 1.")
        _require(self.random_scenes >= 0, f"random_scenes={self.random_scenes} must not be negative.")
        _require(0 <= self.disturbance <= 1, f"disturbance={self.disturbance} must lie in [0, 1].")
        _require(min(self.image_size) >= 8, f"image_size={self.image_size} must be at least 8 pixels each.")
        _require(0 <= self.start_spread <= 0.3, f"start_spread={self.start_spread} must lie in [0, 0.3] metres.")


@dataclasses.dataclass(frozen=True)
@schema.checked("rollouts")
class RolloutConfig:
    """Closed loop on PlayTable during and after training. Its numbers are not CALVIN's."""

    trials: int = 0
    """Rollouts per evaluation: the first of the 1000 official chains, or single tasks; 0: no rollouts."""
    tasks: tuple[str, ...] = ()
    """Instead of chains: trials of these single tasks, taking turns."""
    scene: Literal["A", "B", "C", "D"] = "D"
    max_steps: int = 360
    """Control steps per task."""
    execution: Execution = Execution()
    image_size: tuple[int, int] = (200, 84)
    """Pixels of static and wrist camera; what the training data had."""
    tables: int = 16
    """Tables side by side."""
    films: int = 2
    """Rollouts filmed for the report."""
    every: int = 0
    """Steps between rollouts during training; 0: only at the end."""
    select: Literal["last", "best"] = "last"
    """Which checkpoint a run directory stands for when it is opened: the last, or the one with the best rollouts so
    far, which is then kept in best/ (the two strategies of arXiv:2412.14058)."""

    def __post_init__(self):
        for field in ("trials", "films", "every"):
            _require(getattr(self, field) >= 0, f"rollouts.{field}={getattr(self, field)} must not be negative.")
        for field in ("max_steps", "tables"):
            _require(getattr(self, field) >= 1, f"rollouts.{field}={getattr(self, field)} must be at least 1.")
        _require(
            self.select == "last" or self.trials > 0,
            "rollouts.select=best needs rollouts to choose by; set rollouts.trials (and rollouts.every).",
        )


@dataclasses.dataclass(frozen=True)
@schema.checked("")
class ExperimentConfig:
    """Everything a run depends on. Saved beside its checkpoints, enough to serve them."""

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

    def resolve(self, num_windows: int, text_length: int, actions: Mapping[str, Any] | None = None) -> ExperimentConfig:
        """Fill in what depends on the data: epochs become steps, prompt length and action bounds become numbers.

        Args:
          num_windows: windows of the training split.
          text_length: tokens that fit every training prompt.
          actions: statistics of the training actions, as `PolicyConfig.with_statistics` takes them; None leaves the
            policy as it is.
        """
        per_epoch = num_windows / self.train.batch_size
        warmup = self.optimizer.warmup_steps + round(self.optimizer.warmup_epochs * per_epoch)
        steps = max(round(self.train.epochs * per_epoch), 1) if self.train.epochs else self.train.steps
        return dataclasses.replace(
            self,
            policy=self.policy if actions is None else self.policy.with_statistics(actions),
            data=dataclasses.replace(self.data, text_length=self.data.text_length or text_length),
            optimizer=dataclasses.replace(self.optimizer, warmup_steps=warmup, warmup_epochs=0.0),
            train=dataclasses.replace(self.train, steps=steps, epochs=0.0),
        )

    def mesh_sizes(self, num_devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) with -1 filled in. Raises ValueError when they do not make `num_devices`."""
        sizes = [self.mesh.data, self.mesh.fsdp, self.mesh.tensor]
        fixed = 1
        for size in sizes:
            fixed *= 1 if size == -1 else size
        if -1 in sizes and num_devices % fixed == 0:
            sizes[sizes.index(-1)] = num_devices // fixed
        elif -1 in sizes or fixed != num_devices:
            ways = "".join(f" {name}={size}, or" for name, size in _nearest_mesh(sizes, num_devices).items())
            raise ValueError(
                f"mesh.data={sizes[0]} x mesh.fsdp={sizes[1]} x mesh.tensor={sizes[2]} does not make the "
                f"{num_devices} devices present; set{ways} one of them to -1 to take what is left."
            )
        return tuple(sizes)


def _nearest_mesh(sizes: list[int], num_devices: int) -> dict[str, int]:
    """Field -> the size nearest to the one it has with which, the others as they are, the mesh fits the devices."""
    near = {}
    for index, name in enumerate(("mesh.data", "mesh.fsdp", "mesh.tensor")):
        others = sizes[:index] + sizes[index + 1 :]
        left, rest = divmod(num_devices, math.prod(size for size in others if size != -1))
        if sizes[index] == -1 or rest:
            continue
        # A -1 among the others takes whatever share of it this one leaves.
        fitting = [n for n in range(1, left + 1) if left % n == 0] if -1 in others else [left]
        near[name] = min(fitting, key=lambda n: abs(n - sizes[index]))
    return near


def _neighbours(size: int, step: int) -> str:
    """The multiples of `step` around `size`, for an error message."""
    below = size // step * step
    return f"{below} or {below + step}" if below else str(step)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values. Heads carry their registered name under `kind`."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        out[field.name] = list(value) if isinstance(value, tuple) else value
    if isinstance(config, heads.HeadConfig):
        out["kind"] = heads.kind_of(type(config))
    return out


def from_dict(cls: type, values: Mapping[str, Any], path: str = "config") -> Any:
    """Inverse of `to_dict`. Raises ValueError naming an unknown field and the nearest known one, or a field whose value
    is of another type than the field's."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}={values!r} is a {type(values).__name__}; expected the fields of {cls.__name__}.")
    values = dict(values)
    if issubclass(cls, heads.HeadConfig):
        if "kind" not in values:
            raise ValueError(f"{path} has no field 'kind', the name of a registered head; it has {sorted(values)}.")
        kind = values.pop("kind")
        if not isinstance(kind, str):
            raise ValueError(f"{path}.kind={kind!r} is a {type(kind).__name__}; expected one of {heads.kinds()}.")
        cls = heads.config_of(kind)
    hints = schema.hints(cls)
    kwargs = {}
    for name, value in values.items():
        hint = hints.get(name)
        if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and dataclasses.is_dataclass(hint):
            value = from_dict(hint, value, f"{path}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        kwargs[name] = value
    schema.check(cls, kwargs, path)
    return cls(**kwargs)
