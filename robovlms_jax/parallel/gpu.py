"""Tuning for programs that run on GPUs: compiler options that differ from XLA's own, by what was read off its programs
(docs/log.md, 2026-11-26)."""

from __future__ import annotations

from collections.abc import Mapping
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


def has_cudnn(mesh: Mesh) -> bool:
    """Whether cuDNN may compute what is traced for `mesh`: its devices are NVIDIA's, are there and not only described,
    and do not split heads (axis `tensor`), which nobody has tried."""
    device = mesh.devices.flat[0]
    client = getattr(device, "client", None)
    there = device.platform == "gpu" and "cuda" in getattr(client, "platform_version", "").lower()
    return there and mesh.shape.get("tensor", 1) == 1
