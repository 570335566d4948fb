"""Sound as a log-mel spectrogram, computed on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

FLOOR = 1e-10
"""Power below which there is silence."""


def log_mel(pcm: jax.Array, *, sample_rate: int, window: int, hop: int, num_mels: int) -> jax.Array:
    """Base-10 logarithm of the power in mel bands.

    Periodic Hann windows that lie within the sound (nothing is padded), each zero-padded to a power of two; power is
    |DFT|^2; bands as `mel_filters`.

    Args:
      pcm: float[..., samples] in [-1, 1]. window, hop: samples.
    Returns:
      float32[..., T, num_mels], T = (samples - window) // hop + 1.
    """
    count = (pcm.shape[-1] - window) // hop + 1
    frames = pcm[..., np.arange(count)[:, None] * hop + np.arange(window)].astype(jnp.float32)
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    length = fft_length(window)
    power = jnp.abs(jnp.fft.rfft(frames * taper.astype(np.float32), length)) ** 2
    bands = power @ mel_filters(sample_rate, length, num_mels)
    return jnp.log10(jnp.maximum(bands, FLOOR))


def fft_length(window: int) -> int:
    """The power of two from `window` on."""
    return 1 << (window - 1).bit_length()


def mel_filters(sample_rate: int, length: int, num_mels: int) -> np.ndarray:
    """float32[length // 2 + 1, num_mels]: triangles of height 1, their corners evenly spaced from 0 to half the rate on
    the scale mel(f) = 2595 log10(1 + f / 700) (HTK's)."""
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, num_mels + 2) / 2595) - 1)
    hertz = np.arange(length // 2 + 1)[:, None] * sample_rate / length
    left, middle, right = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (hertz - left) / (middle - left), (right - hertz) / (right - middle)
    return np.maximum(np.minimum(rising, falling), 0).astype(np.float32)
