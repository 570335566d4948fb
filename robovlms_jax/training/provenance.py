"""What a run was made with: git revision, package versions, devices."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

from robovlms_jax import atomic

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "chex",
)


def write_record(output: pathlib.Path, name: str, config: Mapping[str, Any]) -> None:
    """config.json and environment.json of a run that was started as preset `name`; by the first process.

    config: the run's, as plain JSON values."""
    if jax.process_index() != 0:
        return
    output.mkdir(parents=True, exist_ok=True)
    atomic.write_text(output / "config.json", json.dumps({"preset": name, **config}, indent=2) + "\n")
    atomic.write_text(output / "environment.json", json.dumps(environment(), indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Plain JSON values; git entries are None outside a checkout."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_revision": _git("rev-parse", "HEAD"),
        "git_changed_files": None if changes is None else len(changes.splitlines()),
        "python": platform.python_version(),
        "packages": versions,
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
    }


def _git(*arguments: str) -> str | None:
    root = pathlib.Path(__file__).resolve().parents[2]
    try:
        out = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() if out.returncode == 0 else None
