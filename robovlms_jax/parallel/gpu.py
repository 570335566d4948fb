"""Tuning for programs that run on GPUs: compiler options that differ from XLA's own, by what was read off its programs
(docs/log.md, 2026-11-26)."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from robovlms_jax.parallel import cpu

SERVED: Mapping[str, Any] = {
    # Products of one input with several matrices (queries, keys, values) are not made one: with weights that are
    # arguments of the program the matrices would be written behind each other in every step.
    "xla_gpu_dot_merger_threshold_mb": 0,
}


def served(platform: str) -> dict[str, Any] | None:
    """`compiler_options` of a control step for devices of `platform` ("cpu", "gpu", "tpu"): of `SERVED`, those that the
    installed XLA has. None elsewhere than on GPUs, or if it has none of them. Starts JAX's devices."""
    if platform != "gpu":
        return None
    return {name: value for name, value in SERVED.items() if cpu.is_known(name, value)} or None


CUDNN = 91000
"""The version of cuDNN that described GPUs have, 9.10 (`targets.describe`), as JAX counts."""
_DESCRIBED = contextvars.ContextVar("described_have_cudnn", default=False)


def has_cudnn(mesh: Mesh) -> bool:
    """Whether cuDNN may compute what is traced for `mesh`: its devices are NVIDIA's, are there (or described, inside of
    `cudnn_of_described`), and do not split heads (axis `tensor`), which nobody has tried."""
    device = mesh.devices.flat[0]
    version = getattr(getattr(device, "client", None), "platform_version", "")
    there = device.platform == "gpu" and (_DESCRIBED.get() or "cuda" in version.lower())
    return there and mesh.shape.get("tensor", 1) == 1


@contextlib.contextmanager
def cudnn_of_described() -> Iterator[None]:
    """Programs that are lowered and compiled inside, for GPUs that are only described, may ask cuDNN for attention, as
    those of the cards do (`has_cudnn`). The compiler leaves such kernels as calls of a library that is not here: the
    program can be read, and cannot run.

    Where this JAX has no such place to be told a version in, `has_cudnn` holds for no described device.
    """
    try:
        module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        ask = module.check_cudnn_version
    except (ImportError, AttributeError):
        yield
        return
    token, module.check_cudnn_version = _DESCRIBED.set(True), lambda: CUDNN
    try:
        yield
    finally:
        _DESCRIBED.reset(token)
        module.check_cudnn_version = ask
