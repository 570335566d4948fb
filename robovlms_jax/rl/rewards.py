"""A learned reward as a directory: arrays, and what they are of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax import atomic, npz
from robovlms_jax.rl.preferences import RewardModel, scale_of
from robovlms_jax.rl.progress import NAMES
from robovlms_jax.schema import require

ARRAYS, ABOUT = "reward.npz", "reward.json"
VERSION = 1
"""Of what frames are (`progress.frame`) and of the files."""


class Saved(NamedTuple):
    """every: control steps of a frame. about: what it was learned from and how well, JSON values."""

    model: RewardModel
    every: int
    about: dict[str, Any]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that answers were about; of others it says nothing."""
        return tuple(self.about["tasks"])


def save(directory: pathlib.Path, saved: Saved) -> None:
    """Write both files, the arrays first. Raises FileExistsError where there is a reward already."""
    if (directory / ABOUT).exists():
        raise FileExistsError(f"{directory} holds a reward already; choose another --out, or delete it.")
    directory.mkdir(parents=True, exist_ok=True)
    fields = {name: np.asarray(getattr(saved.model, name)) for name in ("center", "scale", "offset", "spread")}
    params = {f"params/{path}": np.asarray(x) for path, x in flatten_dict(saved.model.params, sep="/").items()}
    with atomic.replacing(directory / ARRAYS, durable=True) as file:
        np.savez(file, **fields, **params)
    about = {
        "version": VERSION,
        "widths": list(saved.model.widths),
        "choices": saved.model.choices,
        "every": saved.every,
        "about": saved.about,
    }
    atomic.write_text(directory / ABOUT, json.dumps(about, indent=2) + "\n", durable=True)


def identity(directory: str | pathlib.Path) -> str:
    """Checksum of a reward's arrays. Raises OSError."""
    return hashlib.sha256((pathlib.Path(directory) / ARRAYS).read_bytes()).hexdigest()[:16]


def load(directory: str | pathlib.Path) -> Saved:
    """Raises FileNotFoundError, ValueError that name the file."""
    directory = pathlib.Path(directory)
    for name in (ABOUT, ARRAYS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} is not there: no reward (experiments.reward).")
    try:
        about = json.loads((directory / ABOUT).read_text(encoding="utf-8"))
        require(about["version"] == VERSION, f"version {about['version']}, expected {VERSION}; learn it again")
        read = npz.read(directory / ARRAYS)
        bad = sorted(name for name, x in read.items() if not np.isfinite(x).all())
        require(not bad, f"{bad} of {ARRAYS} are not finite; learn it again")
        arrays = {name: jnp.asarray(x) for name, x in read.items()}
        params = {name.removeprefix("params/"): x for name, x in arrays.items() if name.startswith("params/")}
        own = {field.name: arrays[field.name] for field in dataclasses.fields(RewardModel) if field.name in arrays}
        own["scale"] = scale_of(own["scale"])  # earlier versions divided by standard deviations however small
        model = RewardModel(
            params=unflatten_dict(params, sep="/"), **own, widths=tuple(about["widths"]), choices=about["choices"]
        )
        found = Saved(model, int(about["every"]), dict(about["about"]))
        require(set(found.tasks) <= set(NAMES), f"tasks {found.tasks}")
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{directory} holds no reward that can be read ({type(error).__name__}: {error}).") from error
    return found
