"""Shared fixtures."""

from __future__ import annotations

import atexit
import gc
import importlib.metadata
import logging
import os
import pathlib
import shutil
import tempfile

# Tests compile far more than they compute, and many of them the same. Set before jax is imported; child processes,
# pytest-xdist's workers too, inherit it and share what was compiled.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA ends a process over a flag it does not know
    # The older code generator, in one piece: 5.3 instead of 9.1 s to compile one test (docs/log.md, 2026-11-21).
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="robovlms_jax_tests_")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import hypothesis
import jax
import numpy as np
import pytest

# Tracing makes small objects by the million, few of them in circles. Python's default, a look at them every 700 new
# ones and at all of them every 70 000, costs a seventh of the tests' time (docs/log.md, 2026-11-26).
gc.set_threshold(100_000, 10, 10)

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


# On crowded cores a first example that compiles takes longer than the 200 ms after which hypothesis fails a test.
hypothesis.settings.register_profile("crowded", deadline=None)
hypothesis.settings.load_profile("crowded")


def pytest_collection_finish() -> None:
    """What is imported by now stays until the end: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session", autouse=True)
def loaders_are_measured_briefly():
    """A run reads ahead for a second, with both cores, to say how fast its loader is. Tests ask that it is said."""
    from robovlms_jax.data import loading

    whole = loading.measure

    def measure(batches, windows_per_batch, seconds):
        return whole(batches, windows_per_batch, min(seconds, 0.05))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "measure", measure)
        yield


def shorten_runs(patch: pytest.MonkeyPatch, *, evaluated: bool = False) -> None:
    """Runs estimate no memory and, unless `evaluated`, compare nothing on the validation split: for tests of what a run
    learns and keeps. Each of these traces and compiles the policy once more; test_calvin_abcd.py has a run with all."""
    from robovlms_jax.runs import run

    patch.setattr(run.setups, "require_memory", lambda setup: None)
    if not evaluated:
        patch.setattr(run.validation, "evaluator", lambda *_: run.validation.Unevaluated())


@pytest.fixture
def short_runs(monkeypatch):
    """`shorten_runs`, for one test."""
    shorten_runs(monkeypatch)


@pytest.fixture(autouse=True)
def same_log_level():
    """Programs that a test runs set up logging; what the next one hears must not depend on it."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


@pytest.fixture
def exact_matmul():
    """Full float32 matrix products, for comparisons with an oracle."""
    with jax.default_matmul_precision("highest"):
        yield
