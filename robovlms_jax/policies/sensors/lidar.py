"""A planar range scan: neighbouring beams form a patch, each patch is a token."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.inputs.sensors import Reading
from robovlms_jax.policies.sensors.base import Encoder, SensorConfig, register, strided
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
class LidarConfig(SensorConfig):
    """num_ranges / patch_size tokens per frame. A beam without echo (infinite, NaN) counts as max_range."""

    num_ranges: int = 360
    """Beams of a scan."""
    max_range: float = 10.0
    """Metres; what is further away counts as this far."""
    patch_size: int = 30
    """Beams of one token."""

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("num_ranges", "max_range", "patch_size")
        require(
            self.num_ranges % self.patch_size == 0,
            f"{self.path}.patch_size={self.patch_size} must divide num_ranges={self.num_ranges}.",
        )

    @property
    def reading(self) -> Reading:
        return self.make_reading((self.num_ranges,), no_return=self.max_range)


@register("lidar", LidarConfig)
class LidarEncoder(Encoder):
    @nn.compact
    def encode(self, values: jax.Array) -> jax.Array:
        """float32[B, G, 1, num_ranges] in metres -> float32[B, G, num_ranges / patch_size, D]."""
        c = self.config
        x = 1 - jnp.clip(values[:, :, 0, :, None] / c.max_range, 0, 1)  # 0 where nothing is near
        return self.patches(strided(x, c.patch_size, c.patch_size))
