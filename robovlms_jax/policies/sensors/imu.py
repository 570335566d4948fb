"""An inertial measurement unit: its last samples, over one or several frames, as one token."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.inputs.sensors import Reading
from robovlms_jax.policies.sensors.base import Encoder, SensorConfig, joined, register, strided
from robovlms_jax.schema import require

STRIDE = 2
"""Of the second convolution."""


@dataclasses.dataclass(frozen=True)
class ImuConfig(SensorConfig):
    """Two 1-D convolutions over time, then one token. A reading is the `samples` taken since the last control step."""

    samples: int = 1
    """Per frame: the unit's rate over the control rate."""
    frames: int = 16
    """Frames looked back over, the current one included."""
    scale: tuple[float, ...] = (9.81, 9.81, 9.81, 1.0, 1.0, 1.0)
    """What one unit of each number of a sample is: accelerations (m/s^2), then angular velocities (rad/s)."""
    kernel_size: int = 3
    """Samples that each convolution sees."""

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("samples", "frames", "kernel_size")
        require(
            len(self.scale) > 0 and all(x > 0 for x in self.scale),
            f"{self.path}.scale={self.scale} must have a positive number for each number of a sample.",
        )
        shortest = 2 * self.kernel_size - 1
        require(
            self.samples * self.frames >= shortest,
            f"{self.path}: {self.frames} frames of {self.samples} samples are fewer than the {shortest} that two "
            f"convolutions of kernel_size={self.kernel_size} need; set {self.path}.frames higher.",
        )

    @property
    def reading(self) -> Reading:
        return self.make_reading((self.samples, len(self.scale)), past=self.frames - 1)


@register("imu", ImuConfig)
class ImuEncoder(Encoder):
    @nn.compact
    def encode(self, values: jax.Array) -> jax.Array:
        """float32[B, G, frames, samples, channels] -> float32[B, G, 1, D]."""
        x, size = joined(values) / jnp.asarray(self.config.scale), self.config.kernel_size
        x = self.inner(strided(x, size, 1), "conv_0")
        x = self.inner(strided(x, size, STRIDE), "conv_1")
        return self.out(self.inner(x.reshape(*x.shape[:2], 1, -1), "mix"))
