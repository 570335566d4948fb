"""A cloud of points as a few tokens, whatever the points' order (PointNet, Qi et al. 2017, arXiv:1612.00593)."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.inputs.sensors import Reading
from robovlms_jax.nn.linear import Dense
from robovlms_jax.policies.sensors.base import Encoder, SensorConfig, register
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
class PointCloudConfig(SensorConfig):
    """Every point goes through the same MLP; the maximum over all points becomes num_tokens tokens."""

    num_points: int = 256
    """Points that are looked at: of more, evenly spaced ones; of fewer, all."""
    center: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Subtracted from each point: metres, and colours or other numbers where points have them."""
    scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    """What one unit of each number is."""
    num_tokens: int = 4

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("num_points", "num_tokens")
        require(
            len(self.center) == len(self.scale) > 0 and all(x > 0 for x in self.scale),
            f"{self.path}.center={self.center} and scale={self.scale} need a number each for every number of a point, "
            "scales positive.",
        )

    @property
    def reading(self) -> Reading:
        return self.make_reading((self.num_points, len(self.center)), no_return=math.nan, any_rows=True)


@register("pointcloud", PointCloudConfig)
class PointCloudEncoder(Encoder):
    @nn.compact
    def encode(self, values: jax.Array) -> jax.Array:
        """float32[B, G, 1, points, channels], NaN = no point -> float32[B, G, num_tokens, D]."""
        c = self.config
        there = jnp.isfinite(values).all(axis=-1, keepdims=True)
        x = (jnp.where(there, values, 0) - jnp.asarray(c.center)) / jnp.asarray(c.scale)
        x = self.inner(self.inner(x, "point_0"), "point_1")
        x = jnp.where(there, x, -1).max(axis=-2)[:, :, 0]  # GELU is above -0.2
        x = Dense(c.num_tokens * c.hidden_size, ("hidden", None), kernel=self.kernel, name="mix")(x)
        return self.out(jax.nn.gelu(x).reshape(*x.shape[:2], c.num_tokens, c.hidden_size))
