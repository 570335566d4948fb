"""Tuning for programs that run on TPUs: compiler options that differ from libtpu's own, by what was read off its
programs (docs/log.md, 2026-11-26)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

TRAINED: Mapping[str, Mapping[str, Any]] = {
    "": {
        # Weights that are split along the axis a product sums over are gathered before it. libtpu would rather pass
        # them around and add up one product per device, each as large as the result, which is read and written every
        # time.
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    },
    "TPU v6 lite": {
        # All-gathers go on inside of kernels, as they do on a v5e by libtpu's own choice; without, all are waited for.
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    },
}
"""Options of a training step, by the kind of a device (`jax.Device.device_kind`); "": of all."""


def trained(device: jax.Device) -> dict[str, Any] | None:
    """`compiler_options` of a training step for devices like this one, which may be a described one: of `TRAINED`,
    those that its compiler has. None elsewhere than on TPUs, or if it has none of them."""
    if device.platform != "tpu":
        return None
    listed = {**TRAINED.get("", {}), **TRAINED.get(device.device_kind, {})}
    return {name: value for name, value in listed.items() if is_known(device, name, value)} or None


def is_known(device: jax.Device, name: str, value: Any) -> bool:
    """Whether the device's compiler has an option: libtpu has many of its own, which XLA's others do not know."""
    number = jax.ShapeDtypeStruct((), np.float32, sharding=SingleDeviceSharding(device))
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(number).compile()
        return True
    return False
