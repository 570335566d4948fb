"""Episodes on disk and how they become batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from robovlms_jax import schema
from robovlms_jax.data.vl.config import VLConfig
from robovlms_jax.inputs.config import AugmentConfig
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("data.others")
class OthersConfig:
    """Demonstrations of other robots, as sources beside the policy's own; train.sources and stages say their shares.
    Each is normalised by its own statistics, and its actions may have other dimensions (policy.other_heads)."""

    roots: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name of one's own -> directory, as data.root."""
    datasets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name -> kind, as data.dataset; calvin where it is not named."""

    def __post_init__(self):
        unknown = sorted(set(self.datasets) - set(self.roots))
        require(not unknown, f"data.others.datasets names {unknown}; data.others.roots has {sorted(self.roots)}.")
        require("robot" not in self.roots, "data.others.roots: `robot` is the name of the policy's own demonstrations.")


@dataclasses.dataclass(frozen=True)
@schema.checked("data.further")
class FurtherConfig:
    """More demonstrations by the same robot, as sources with shares of their own (train.sources and stages say them):
    a memory of earlier tasks, a new table. Actions and state are scaled as those of data.root."""

    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name of one's own -> file of episodes, as data.episode_list."""
    roots: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name -> directory, as data.root; where it is not named, data.root itself. A name that has no list here has all
    episodes."""
    align: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Name -> weight of a loss that keeps the pictures' tokens of that source and of the robot's demonstrations alike:
    the distance of their means and of their covariances (policies/alignment.py)."""
    unlabelled: tuple[str, ...] = ()
    """Sources whose actions are not learned: their pictures alone are seen, by `align`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all these sources."""
        return tuple(dict.fromkeys((*self.roots, *self.lists)))

    def __post_init__(self):
        require("robot" not in self.names, "data.further: `robot` is the name of data.root's own demonstrations.")
        for field in ("align", "unlabelled"):
            unknown = sorted(set(getattr(self, field)) - set(self.names))
            require(not unknown, f"data.further.{field} names {unknown}; further sources are {sorted(self.names)}.")
        wrong = {name: x for name, x in self.align.items() if not x > 0}
        require(not wrong, f"data.further.align has {wrong}; expected weights above 0.")
        idle = sorted(set(self.unlabelled) - set(self.align))
        require(
            not idle, f"data.further.unlabelled has {idle}, from which nothing is learned without a weight in align."
        )


@dataclasses.dataclass(frozen=True)
@schema.checked("data")
class DataConfig:
    """Episodes on disk and how they become batches."""

    dataset: str = "calvin"
    """calvin; lerobot (LeRobotDataset v3); libero_hdf5 (LIBERO's own files); a dataset or mixture of the RLDS registry
    (bridge, rt_1, libero_goal_no_noops, oxe_magic_soup, oxe_magic_soup_plus, ...); or a YAML or JSON file with a
    mixture of one's own (data/README.md)."""
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
    """LeRobot: JSON file that says what the numbers mean (data/README.md), or `libero`. Empty: meta/robovlms.json of
    the dataset, where it has one."""
    max_left_out_share: float = 0.1
    """LeRobot: share of the episodes that may be left out because their parts disagree or are missing."""
    unlabelled_share: float = 0.0
    """RLDS, LeRobot: share of the episodes without an instruction to keep."""
    unlabelled_instruction: str = "interact with the objects"
    """What those episodes are told."""
    success_only: bool = True
    """RLDS, LeRobot: leave out episodes that the dataset marks as failed (data/README.md says how it is told)."""
    skip_still: float = 0.0
    """> 0: steps at which demonstrations wait are left out of chunks, which go on with the next that does something: a
    policy that sees no past would wait there for ever. A step waits where no number of its action is larger than this
    (of absolute ones: has changed more), in the unit of the actions that are learned (CALVIN: 1 is 2 cm or 0.05 rad),
    no gripper is told anything else, and fingers are not on their way; motion as slow as this is lost. policy.window 1
    only; held-out data likewise."""
    left_pad: bool = False
    """Let windows begin before their episode, masked, so that its first frames are learned from as the newest, too."""
    vary_language: bool = False
    """Draw each training sample's sentence from the recorded ones, the templates, `paraphrases` and
    `shorter_sentences`."""
    paraphrases: str = ""
    """JSON file {"templates": ["please {instruction}"], "sentences": {instruction: [others]}, "never": [sentences that
    nobody is told], "tasks": {task: [sentences to tell apart]}} for vary_language. Empty: a few built-in templates."""
    shorter_sentences: int = 0
    """For vary_language: so many more wordings of each sentence, at most, without some of its words, drawn at random.
    None could be left of a sentence of another task, so "turn on the light" stands for neither of two lights; none is
    one that validation asks."""
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
    """Prompt tokens every prompt is padded to. 0: the longest prompt of demonstrations and rollouts, rounded up to a
    multiple of 4."""
    static_shift: int = 10
    """Random shift augmentation of the static camera, in pixels at the model's resolution, constant within a segment.
    0: off."""
    wrist_shift: int = 4
    """The same for the wrist camera."""
    shift: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """The same for cameras by name, such as --data.shift cam_high 10 cam_left_wrist 4; goes before the two above.
    Cameras that are nowhere named are not shifted."""
    augment: AugmentConfig = AugmentConfig()
    vl: VLConfig = VLConfig()
    others: OthersConfig = OthersConfig()
    further: FurtherConfig = FurtherConfig()
    num_threads: int = 8
    """Threads that read and decode, in each worker."""
    num_workers: int = 0
    """Processes that read. 0: threads of the main process do, which is faster until Python itself is the limit; -1:
    whichever reads faster here, measured at the start, when nothing is in memory yet (data.decoded_gb: take 0 with it,
    for every process keeps pictures of its own). Batches are the same."""
    prefetch: int = 16
    """Batches kept ready."""
    decoded_gb: float = 0.0
    """Gigabytes of pictures kept in memory once they are decoded, in each process that reads and of each dataset that
    is trained on, up to half of the machine's memory; for packed ones that are read several times over. Batches are the
    same."""
    check_actions: Literal["refuse", "warn"] = "refuse"
    """What follows when the training actions look wrong (see `actions.statistics`): no run, or a warning."""
    max_corrupt_share: float = 0.01
    """Unreadable segments are replaced, counted and named; training stops when they exceed this share."""

    def __post_init__(self):
        for field in ("windows_per_segment", "num_threads", "prefetch"):
            require(getattr(self, field) >= 1, f"data.{field}={getattr(self, field)} must be at least 1.")
        require(0 <= self.decoded_gb < math.inf, f"data.decoded_gb={self.decoded_gb} must be finite, not negative.")
        for field in ("static_shift", "wrist_shift", "text_length", "index_workers", "image_size", "shorter_sentences"):
            require(getattr(self, field) >= 0, f"data.{field}={getattr(self, field)} must not be negative.")
        negative = {camera: pixels for camera, pixels in self.shift.items() if pixels < 0}
        require(not negative, f"data.shift={negative} must not be negative.")
        require(self.num_workers >= -1, f"data.num_workers={self.num_workers} must be -1 (measure), 0 or positive.")
        require(0 <= self.unlabelled_share <= 1, f"data.unlabelled_share={self.unlabelled_share} must be in [0, 1].")
        require(
            0 <= self.max_left_out_share < 1, f"data.max_left_out_share={self.max_left_out_share} must lie in [0, 1)."
        )
        require(
            self.dataset == "lerobot" or not self.conventions,
            f"data.conventions describes a LeRobotDataset; data.dataset is {self.dataset!r}.",
        )
        named = [*self.vl.paths, *self.others.roots, *self.further.names]
        both = sorted({name for name in named if named.count(name) > 1})
        require(
            not both,
            f"data.vl.paths, data.others.roots and data.further have {both} more than once; a source needs a name of "
            "its own.",
        )
        require(self.dataset != "", "data.dataset must name a format, dataset, mixture or file.")
        for field in ("paraphrases", "shorter_sentences"):
            alone = not self.vary_language and getattr(self, field)
            require(not alone, f"data.{field} needs --data.vary_language to have an effect.")
        require(
            not self.compat_goal_relabelling or self.windows_per_segment == 1,
            f"data.compat_goal_relabelling draws a goal for each window; set data.windows_per_segment=1 "
            f"(it is {self.windows_per_segment}).",
        )
        require(0 <= self.skip_still < math.inf, f"data.skip_still={self.skip_still} must be finite, not negative.")
        require(
            not self.skip_still or self.windows_per_segment == 1,
            "data.skip_still leaves steps out of the chunks of single windows; set data.windows_per_segment=1 (it is "
            f"{self.windows_per_segment}).",
        )
        require(
            not (self.skip_still and self.compat_goal_relabelling),
            "data.skip_still leaves steps out and data.compat_goal_relabelling counts them; set one of them.",
        )
        require(0 <= self.max_corrupt_share < 1, f"data.max_corrupt_share={self.max_corrupt_share} must lie in [0, 1).")

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of everything that batches can be drawn from."""
        return ("robot", *self.others.roots, *self.further.names, *self.vl.paths)

    @property
    def shifts(self) -> dict[str, int]:
        """Camera -> pixels of random shift."""
        return {"static": self.static_shift, "wrist": self.wrist_shift, **self.shift}


def needs_all_pictures(window: int, windows_per_segment: int, future_frames: int) -> str:
    """What of a training run has no use for recordings with pictures of few frames, and what to do; empty: nothing."""
    for field, is_one in (("policy.window", window == 1), ("data.windows_per_segment", windows_per_segment == 1)):
        if not is_one:
            return (
                f"pictures that follow each other are rare there, and {field} needs them; set {field}=1, or record "
                "pictures of all frames (picture_every=1)."
            )
    if future_frames:
        return (
            "policy.auxiliary.forward predicts those that follow; switch it off, or record pictures of all frames "
            "(picture_every=1)."
        )
    return ""
