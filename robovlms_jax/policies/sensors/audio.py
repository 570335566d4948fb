"""Sound as the policy hears it: log-mel spectrogram patches. Speech that is to be an instruction is better written down
by a recogniser of the user's own."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax

from robovlms_jax.inputs import audio
from robovlms_jax.inputs.sensors import Reading
from robovlms_jax.policies.sensors.base import Encoder, SensorConfig, joined, register, strided
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
class AudioConfig(SensorConfig):
    """A token for every patch_frames columns of the spectrogram. A reading is the PCM recorded since the last step."""

    sample_rate: int = 16_000
    """Hz."""
    samples: int = 1_600
    """Per frame: sample_rate over the control rate."""
    frames: int = 10
    """Frames listened back over, the current one included."""
    full_scale: float = 1.0
    """The largest value that samples can have: 1 for floating-point PCM, 32768 for 16-bit integers."""
    window: int = 400
    """Samples of one column."""
    hop: int = 160
    """Samples between columns."""
    num_mels: int = 40
    patch_frames: int = 14
    """Columns of one token; those that are left over at the beginning are not used."""

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("sample_rate", "samples", "frames", "full_scale", "window", "hop", "num_mels")
        self.require_positive("patch_frames")
        require(
            self.columns >= self.patch_frames,
            f"{self.path}: {self.frames} frames of {self.samples} samples make {self.columns} columns (window="
            f"{self.window}, hop={self.hop}), fewer than patch_frames={self.patch_frames}; set frames higher.",
        )

    @property
    def columns(self) -> int:
        """Of the spectrogram."""
        return max((self.samples * self.frames - self.window) // self.hop + 1, 0)

    @property
    def reading(self) -> Reading:
        return self.make_reading((self.samples,), past=self.frames - 1)


@register("audio", AudioConfig)
class AudioEncoder(Encoder):
    @nn.compact
    def encode(self, values: jax.Array) -> jax.Array:
        """float32[B, G, frames, samples] -> float32[B, G, columns // patch_frames, D]."""
        c = self.config
        x = audio.log_mel(
            joined(values) / c.full_scale,
            sample_rate=c.sample_rate,
            window=c.window,
            hop=c.hop,
            num_mels=c.num_mels,
        )
        x = x / 4 + 1  # silence -1.5, the loudest sounds near 2
        return self.patches(strided(x[:, :, c.columns % c.patch_frames :], c.patch_frames, c.patch_frames))
