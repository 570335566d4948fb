"""Position encodings, computed from integer positions so that no table limits the sequence length."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


def sinusoid(positions: jax.Array, width: int) -> jax.Array:
    """Fairseq's sinusoids as KOSMOS-2 uses them: [sin | cos] halves, token 0 at row 2 (pad_id = 1 is padding's row).

    Args:
      positions: int32[...], 0-based.
      width: D, even.
    Returns:
      float32[..., D].
    """
    half = width // 2
    # half - 1, not half: the last frequency is exactly 1 / 10000 (tensor2tensor's form, unlike Vaswani et al. 2017).
    frequency = np.exp(-np.log(10_000.0) / (half - 1) * np.arange(half)).astype(np.float32)
    angle = (positions[..., None] + 2) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


Rotary = tuple[jax.Array, jax.Array]
"""Cosine and sine, float32[B, S, R / 2] (or without B), of the angles that turn R channels of every head."""


def rotary(
    places: jax.Array, channels: int, theta: float, sections: tuple[int, ...] = (), *, interleaved: bool = False
) -> Rotary:
    """Angles of rotary embeddings (Su et al. 2021, arXiv:2104.09864), frequencies theta^(-2 i / channels).

    Args:
      places: int32[B, S, A], coordinates of every token: A = 1, or one per section.
      channels: R, how many channels of a head are turned; even.
      sections: how many neighbouring frequencies follow each coordinate (M-RoPE, arXiv:2409.12191); empty: all the one.
      interleaved: the coordinates take turns from one frequency to the next, for as long as each has any left; what
        then remains follows the first (Qwen3-VL, arXiv:2511.21631).
    """
    frequency = theta ** (-np.arange(0, channels, 2) / channels)
    axis = np.zeros(channels // 2, np.int32)
    if interleaved:
        for coordinate, count in enumerate(sections[1:], 1):
            axis[coordinate : len(sections) * count : len(sections)] = coordinate
    elif sections:
        axis = np.repeat(np.arange(len(sections)), sections)
    angle = places[..., axis].astype(jnp.float32) * frequency.astype(np.float32)
    return jnp.cos(angle), jnp.sin(angle)


def grid_rotary(side: int, channels: int) -> Rotary:
    """Angles of side x side patches, row by row: a quarter of `channels` follows the row, a quarter the column.

    Returns:
      float32[1, side * side, channels / 2] each.
    """
    quarter = channels // 4
    frequency = 10_000.0 ** -(np.arange(quarter) / quarter)
    rows, columns = np.indices((side, side)).reshape(2, -1, 1)
    angle = np.concatenate([rows * frequency, columns * frequency], 1)[None].astype(np.float32)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, angles: Rotary) -> jax.Array:
    """Turn the first R channels of float[B, S, N, H], channel i together with channel i + R / 2; in float32."""
    cos, sin = (angle[..., None, :] for angle in angles)
    half = cos.shape[-1]
    y = x[..., : 2 * half].astype(jnp.float32)
    first, second = y[..., :half], y[..., half:]
    y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([y, x[..., 2 * half :]], axis=-1)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slope of each head's linear bias (Press et al. 2021, arXiv:2108.12409): float32[N].

    2^(-8 i / N) for powers of two. For other numbers of heads, the slopes of the next power of two, odd ones first.
    """
    power = 1 << (num_heads - 1).bit_length()
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    if power != num_heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:num_heads]
    return slopes.astype(np.float32)


def relative_buckets(distance: jax.Array, buckets: int, limit: int, *, both: bool) -> jax.Array:
    """Bucket of each signed distance int32[...], key's place less query's (Raffel et al. 2019, arXiv:1910.10683): int32
    of the same shape.

    With `both`, keys that come later have the second half of the buckets; without, they all have bucket 0. Of a
    direction's n buckets the first n / 2 are of one distance each, the others grow by a constant factor, and all
    distances from `limit` on share the last.
    """
    first = 0
    if both:
        buckets //= 2
        first = jnp.where(distance > 0, buckets, 0)
    distance = jnp.abs(distance) if both else jnp.maximum(-distance, 0)
    exact = buckets // 2
    share = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / np.log(limit / exact)
    far = jnp.minimum(exact + (share * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return first + jnp.where(distance < exact, distance, far)


def resize_positions(
    table: jax.Array, side: int, *, scale: float | None = None, method: Literal["bicubic", "bilinear"] = "bicubic"
) -> jax.Array:
    """A square table of positions for another grid, as torch's `interpolate` has it.

    Args:
      table: float[P * P, D], row by row.
      side: of the wanted grid; equal to the table's: nothing changes.
      method: bicubic with a = -0.75 and edges clamped; or bilinear between corners that stay where they are.
      scale: wanted over stored size where the sampling points are to follow it instead of side / P.
    Returns:
      float[side * side, D].
    """
    stored = int(np.sqrt(table.shape[0]))
    if stored * stored != table.shape[0]:
        raise ValueError(f"a table of {table.shape[0]} positions is not square.")
    if stored == side:
        return table
    if method == "bilinear":
        place = np.linspace(0, stored - 1, side)[:, None]
        weights = np.maximum(1 - np.abs(place - np.arange(stored)), 0).astype(np.float32)
    else:
        weights = _bicubic_weights(stored, side, scale or side / stored)
    x = table.reshape(stored, stored, -1)
    return jnp.einsum("up,vq,pqd->uvd", weights, weights, x.astype(jnp.float32)).reshape(side * side, -1)


@functools.lru_cache
def _bicubic_weights(stored: int, side: int, scale: float) -> np.ndarray:
    """float32[side, stored]; unlike `inputs.images`, no antialiasing and a = -0.75."""
    centre = (np.arange(side) + 0.5) / scale - 0.5
    first = np.floor(centre).astype(int) - 1
    weights = np.zeros((side, stored))
    for tap in range(4):
        x = np.abs(centre - (first + tap))
        near = (1.25 * x - 2.25) * x * x + 1
        far = ((-0.75 * x + 3.75) * x - 6) * x + 3
        np.add.at(weights, (np.arange(side), np.clip(first + tap, 0, stored - 1)), np.where(x <= 1, near, far))
    return weights.astype(np.float32)
