"""Shared fixtures."""

from __future__ import annotations

import os
import pathlib

# Tests compile far more than they compute. Set before jax is imported; child processes inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Reference data kept beside the repository; tests that use it are skipped where it is absent."""
    path = pathlib.Path(os.environ.get("ROBOVLMS_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("no reference data beside the repository (ROBOVLMS_SHARED_DATA)")
    return path


@pytest.fixture(scope="session")
def golden(shared_data: pathlib.Path):
    """name -> arrays that upstream's own code produced; float16 weights and shared tensors are resolved."""
    root = shared_data / "golden"
    shared = dict(np.load(root / "shared_mlp.npz"))

    def load(name: str) -> dict[str, np.ndarray]:
        out = {}
        with np.load(root / name, allow_pickle=False) as arrays:
            for key in arrays.files:
                value = arrays[key]
                if key.startswith("shared:"):
                    key, value = key.removeprefix("shared:"), shared[str(value)]
                out[key] = value.astype(np.float32) if value.dtype == np.float16 else value
        return out

    return load


@pytest.fixture
def exact_matmul():
    """Full float32 matrix products, for comparisons with an oracle."""
    with jax.default_matmul_precision("highest"):
        yield
