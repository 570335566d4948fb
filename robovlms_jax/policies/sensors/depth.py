"""A depth image: each square patch is a token."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.inputs.sensors import Reading
from robovlms_jax.policies.sensors.base import Encoder, SensorConfig, register
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
class DepthConfig(SensorConfig):
    """height * width / patch_size^2 tokens per frame. Pixels of 0, infinity or NaN were not measured."""

    height: int = 64
    """Pixels, as stored and as observed."""
    width: int = 64
    patch_size: int = 16
    """Pixels; divides both sides."""
    max_depth: float = 2.0
    """Metres, or whatever unit depth is stored in; what is further away counts as this far."""

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("height", "width", "patch_size", "max_depth")
        require(
            self.height % self.patch_size == 0 and self.width % self.patch_size == 0,
            f"{self.path}.patch_size={self.patch_size} must divide height={self.height} and width={self.width}.",
        )

    @property
    def reading(self) -> Reading:
        return self.make_reading((self.height, self.width), no_return=0.0)


@register("depth", DepthConfig)
class DepthEncoder(Encoder):
    @nn.compact
    def encode(self, values: jax.Array) -> jax.Array:
        """float32[B, G, 1, height, width] -> float32[B, G, patches, D]."""
        c, size = self.config, self.config.patch_size
        rows, columns = c.height // size, c.width // size
        pixels = values.reshape(*values.shape[:2], rows, size, columns, size)
        pixels = jnp.moveaxis(pixels, 4, 3).reshape(*values.shape[:2], rows * columns, size * size)
        depth = 2 * jnp.clip(pixels / c.max_depth, 0, 1) - 1
        measured = pixels > 0
        return self.patches(jnp.concatenate([jnp.where(measured, depth, 0), measured.astype(jnp.float32)], axis=-1))
