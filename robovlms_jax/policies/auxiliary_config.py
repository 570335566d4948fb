"""Losses beside the actions', which `auxiliary.py` and `tasks/` compute."""

from __future__ import annotations

import dataclasses
import math

from robovlms_jax import schema
from robovlms_jax.schema import require


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
        require(self.loss_weight >= 0, f"{name}.loss_weight={self.loss_weight} must be 0 (off) or positive.")
        require(
            len(self.offsets) > 0 and min(self.offsets) >= 1,
            f"{name}.offsets={self.offsets} must name frames ahead, each at least 1.",
        )
        for field in ("patch_size", "width", "depth", "head_dim"):
            require(getattr(self, field) >= 1, f"{name}.{field}={getattr(self, field)} must be at least 1.")
        require(self.width % self.head_dim == 0, f"{name}.head_dim={self.head_dim} must divide width={self.width}.")


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
        require(self.dim >= 1, f"policy.auxiliary.clip.dim={self.dim} must be at least 1.")
        require(self.loss_weight >= 0, f"policy.auxiliary.clip.loss_weight={self.loss_weight} must not be negative.")


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.auxiliary.ahead")
class AheadConfig:
    """Predict how far the robot will have moved some steps ahead, from the features that actions are made of: that is
    where what it is to reach lies, which actions hardly say from afar, since all of them go as fast as they may."""

    loss_weight: float = 0.0
    """> 0: on. Weighs the Huber loss of the movements."""
    offsets: tuple[int, ...] = (10, 20, 40)
    """Control steps ahead; where an episode ends before, its last state."""
    scale: float = 0.1
    """Metres, or radians of joints, that count as 1: there the loss goes over from squares to lines."""

    def __post_init__(self):
        name = "policy.auxiliary.ahead"
        require(self.loss_weight >= 0, f"{name}.loss_weight={self.loss_weight} must be 0 (off) or positive.")
        require(
            len(self.offsets) > 0 and min(self.offsets) >= 1,
            f"{name}.offsets={self.offsets} must name steps ahead, each at least 1.",
        )
        require(0 < self.scale < math.inf, f"{name}.scale={self.scale} must be positive and finite.")


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.auxiliary.scene")
class SceneConfig:
    """Tell where things are, which a simulator knows, from the pictures' own hidden states."""

    loss_weight: float = 0.0
    """> 0: on. Weighs the Huber loss of the numbers."""
    array: str = "scene_obs"
    """Numeric field of the dataset, of each frame."""
    columns: tuple[int, ...] = (6, 7, 8, 12, 13, 14, 18, 19, 20)
    """Which of its numbers; the default: where CALVIN's three blocks are, in metres."""
    scale: float = 0.1
    """What counts as 1: there the loss goes over from squares to lines."""

    def __post_init__(self):
        name = "policy.auxiliary.scene"
        require(self.loss_weight >= 0, f"{name}.loss_weight={self.loss_weight} must be 0 (off) or positive.")
        require(
            len(self.columns) > 0 and min(self.columns) >= 0 and len(set(self.columns)) == len(self.columns),
            f"{name}.columns={self.columns} must name numbers of {self.array!r}, each once, from 0 on.",
        )
        require(0 < self.scale < math.inf, f"{name}.scale={self.scale} must be positive and finite.")

    @property
    def numbers(self) -> tuple[str, tuple[int, ...]] | None:
        """Field and columns that a batch has to have; None: switched off."""
        return (self.array, self.columns) if self.loss_weight else None


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.auxiliary")
class AuxiliaryConfig:
    """Losses beside the actions'. Acting needs none of them."""

    forward: ForwardConfig = ForwardConfig()
    clip: ClipConfig = ClipConfig()
    ahead: AheadConfig = AheadConfig()
    scene: SceneConfig = SceneConfig()
    caption_weight: float = 0.0
    """> 0: on. Weighs the language model's cross-entropy on the prompt given the images, so that it stays a language
    model."""
    vl_weight: float = 0.0
    """> 0: answers to questions about pictures are learned, from the sources of data.vl; weighs their cross-entropy.
    StarVLA's value is 0.1."""

    def __post_init__(self):
        for field in ("caption_weight", "vl_weight"):
            weight = getattr(self, field)
            require(weight >= 0, f"policy.auxiliary.{field}={weight} must be 0 (off) or positive.")

    @property
    def enabled(self) -> bool:
        """Whether any of them is on."""
        return self.reads_features or self.scene.loss_weight > 0 or self.speaks

    @property
    def reads_features(self) -> bool:
        """Whether one of them learns from the features that a head makes actions of."""
        return self.forward.loss_weight > 0 or self.clip.weights != "" or self.ahead.loss_weight > 0

    @property
    def speaks(self) -> bool:
        """Whether the language model goes on saying words, so that it needs its head for them."""
        return self.caption_weight > 0 or self.vl_weight > 0

    @property
    def future_frames(self) -> int:
        """F: frames after a segment that training needs."""
        return max(self.forward.offsets) if self.forward.loss_weight else 0
