"""Random changes to training images."""

from __future__ import annotations

import dataclasses
from typing import Literal

from robovlms_jax import schema
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("data.augment")
class AugmentConfig:
    """Random changes to training images, the same for all frames of a segment; shifts are under data. All zero: off."""

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
    erase_area: float = 0.0
    """Cover a rectangle of up to this share of the image, one and a half times as wide as high to the reverse, with its
    mean colour (Zhong et al. 2017, arXiv:1708.04896)."""

    mirror: float = 0.0
    """Share of the samples that are mirrored from right to left: pictures, what actions and state have to the side, and
    left and right in the sentence. Refused for robots of which it is not known what becomes of a number."""
    mirror_axis: Literal["", "x", "y"] = ""
    """Axis of the actions that points to the side in the pictures; empty: y, of a robot whose actions are in the frame
    of its base."""

    @property
    def of_pictures(self) -> AugmentConfig:
        """What is done to pictures alone, on the device; samples are mirrored where they are read."""
        return dataclasses.replace(self, mirror=0.0, mirror_axis="")

    def __post_init__(self):
        require(0 <= self.mirror <= 1, f"data.augment.mirror={self.mirror} must lie in [0, 1].")
        require(
            self.mirror > 0 or not self.mirror_axis,
            f"data.augment.mirror_axis={self.mirror_axis!r} has no effect while data.augment.mirror is 0.",
        )
        require(0 <= self.crop_area <= 1, f"data.augment.crop_area={self.crop_area} must lie in [0, 1].")
        for field in ("brightness", "contrast", "saturation", "hue", "erase_area"):
            require(0 <= getattr(self, field) <= 1, f"data.augment.{field}={getattr(self, field)} must lie in [0, 1].")
