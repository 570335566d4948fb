"""A vector of numbers as one token: joint torques, a force-torque sensor, tactile pads."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.inputs.sensors import Reading
from robovlms_jax.policies.sensors.base import Encoder, SensorConfig, register
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
class VectorConfig(SensorConfig):
    """One token per frame by an MLP of two layers."""

    size: int = 7
    """Numbers of a reading."""
    center: tuple[float, ...] = ()
    """Subtracted from each. Empty: zeros."""
    scale: tuple[float, ...] = ()
    """What one unit of each is, such as the largest torque of each joint. Empty: ones."""

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("size")
        for field in ("center", "scale"):
            given = getattr(self, field)
            require(
                len(given) in (0, self.size), f"{self.path}.{field} has {len(given)} numbers; expected {self.size}."
            )
        require(all(x > 0 for x in self.scale), f"{self.path}.scale={self.scale} must be positive everywhere.")

    @property
    def reading(self) -> Reading:
        return self.make_reading((self.size,))


@register("vector", VectorConfig)
class VectorEncoder(Encoder):
    @nn.compact
    def encode(self, values: jax.Array) -> jax.Array:
        """float32[B, G, 1, size] -> float32[B, G, 1, D]."""
        c = self.config
        values = values - jnp.asarray(c.center) if c.center else values
        values = values / jnp.asarray(c.scale) if c.scale else values
        return self.out(self.inner(self.inner(values, "layer_0"), "layer_1"))
