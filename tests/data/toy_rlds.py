"""Fabricated RLDS datasets, small and quick to write."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import simplejpeg

from robovlms_jax.data import rlds_writer
from robovlms_jax.data.features import Field

FIELDS = (
    Field("steps/is_first", "tensor", "bool"),
    Field("steps/is_last", "tensor", "bool"),
    Field("steps/action", "tensor", "float32", (7,)),
    Field("steps/observation/state", "tensor", "float64", (7,)),
    Field("steps/observation/image", "image", "uint8", (None, None, 3)),
    Field("steps/observation/wrist_image", "image", "uint8", (24, 24, 3)),
    Field("steps/observation/packed", "tensor", "float32", (3,), "zlib"),
    Field("steps/observation/depth", "tensor", "float32", (9, 9)),
    Field("steps/codes", "tensor", "int32", (96,)),
    Field("steps/language_instruction", "text", "string"),
    Field("steps/other_wordings", "text", "string", (2,)),
    Field("steps/remarks", "text", "string", (None,)),
    Field("steps/language_embedding", "tensor", "float32", (70,)),
    Field("success", "tensor", "bool", per_step=False),
    Field("episode_metadata/file_path", "text", "string", per_step=False),
)
"""Every kind of field the real datasets have."""


def image(seed: int, size: int) -> np.ndarray:
    """uint8[size, size, 3], smooth, different for every seed."""
    ramp = np.arange(size)[:, None, None] * 3 + np.arange(size)[None, :, None] * 2
    return ((ramp + np.random.default_rng(seed).integers(0, 256, 3)) % 200).astype(np.uint8)


def episode(seed: int, length: int, *, text: str = "push the block", **changes: object) -> dict[str, object]:
    """One episode of `FIELDS`; `changes` replace fields by the last part of their name."""
    rng = np.random.default_rng(seed)
    steps = np.arange(length)
    action = rng.uniform(-0.05, 0.05, (length, 7)).astype(np.float32)
    action[:, 6] = np.repeat([0.0, 1.0], -(-length // 2))[:length]
    codes = np.zeros((length, 96), np.int32)
    codes[:, : len(text)] = [ord(c) for c in text]
    values = {
        "is_first": steps == 0,
        "is_last": steps == length - 1,
        "action": action,
        "state": np.cumsum(rng.normal(size=(length, 7)) * 0.01, axis=0),
        "image": [_jpeg(image(1000 * seed + t, 32)) for t in range(length)],
        "wrist_image": [_jpeg(image(1000 * seed + t + 500, 24)) for t in range(length)],
        "packed": rng.normal(size=(length, 3)).astype(np.float32),
        "depth": rng.normal(size=(length, 9, 9)).astype(np.float32),
        "codes": codes,
        "language_instruction": [text.encode()] * length,
        "other_wordings": [(b"shove the block", b"")] * length,
        "remarks": [(b"seen",) * (t % 3) for t in steps],
        "language_embedding": np.repeat(rng.normal(size=(1, 70)).astype(np.float32), length, axis=0),
        "success": np.array([True]),
        "file_path": [f"/recorded/{seed}".encode()],
    }
    values.update(changes)
    return {field.path: values[field.path.rpartition("/")[2]] for field in FIELDS}


def write(
    directory: pathlib.Path,
    episodes: Sequence[Mapping[str, object]] | None = None,
    *,
    name: str = "toy",
    val: Sequence[Mapping[str, object]] = (),
    **options: object,
) -> pathlib.Path:
    """Write a dataset; by default six episodes of 9 to 14 steps. Returns the directory with features.json."""
    episodes = [episode(seed, 9 + seed) for seed in range(6)] if episodes is None else episodes
    splits = {"train": episodes} | ({"val": val} if val else {})
    return rlds_writer.write(directory, name, FIELDS, splits, **options)


def _jpeg(pixels: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444")
