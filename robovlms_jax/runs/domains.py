"""How far the pictures of two domains are apart for a policy: statistics of their tokens."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax
import numpy as np

from robovlms_jax.data import base, opening
from robovlms_jax.data.config import DataConfig
from robovlms_jax.policies import alignment
from robovlms_jax.runs import load
from robovlms_jax.types import Inputs

_AT_A_TIME = 32
"""Frames that are encoded together."""


def pictures_apart(
    run: str | pathlib.Path, source: DataConfig, target: DataConfig, frames: int = 256
) -> dict[str, float]:
    """`alignment.shares_apart` between frames of two training splits, by the newest checkpoint of a run: "means" and
    "covariances"; and "means_within" and "covariances_within", between every second frame of the source and the others,
    which is what is found where no domain differs.

    Args:
      frames: of each split, spread evenly; all where there are fewer.
    Raises:
      ValueError, OSError: a split cannot be read, or lacks a camera of the policy.
    """
    model, params, _ = load.open_model(run)
    encode = jax.jit(lambda images: alignment.picture_tokens(model, params, Inputs(images, None, None, None)))
    datasets = [opening.open_split(data, "training") for data in (source, target)]
    first, second = (_tokens(encode, dataset, model.config.cameras, frames) for dataset in datasets)
    pairs = {"": (first, second), "_within": (first[::2], first[1::2])}
    found = {}
    for ending, pair in pairs.items():
        apart = alignment.shares_apart(*(x.reshape(-1, x.shape[-1]) for x in pair))
        found |= {f"{name}{ending}": float(x) for name, x in zip(("means", "covariances"), apart, strict=True)}
    return found


def _tokens(
    encode: Callable[..., jax.Array], dataset: base.Dataset, cameras: tuple[str, ...], frames: int
) -> np.ndarray:
    """float[frames, tokens, D]."""
    ids = np.concatenate([np.arange(episode.start, episode.end + 1) for episode in dataset.episodes])
    ids = ids[dataset.shown(ids)]
    ids = ids[np.linspace(0, len(ids) - 1, min(frames, len(ids))).astype(int)]
    parts = []
    for begin in range(0, len(ids), _AT_A_TIME):
        some = ids[begin : begin + _AT_A_TIME]
        padded = np.resize(some, _AT_A_TIME)  # one compiled program for all
        images = {camera: x[:, None] for camera, x in dataset.images(padded, cameras).items()}
        tokens = np.asarray(encode(images), np.float32)
        parts.append(tokens.reshape(_AT_A_TIME, -1, tokens.shape[-1])[: len(some)])
    return np.concatenate(parts)
