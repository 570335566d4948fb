"""Accelerators that need not be there: their published figures, and their devices as the compilers describe them.

The compilers come as wheels, extras `plan-tpu` and `plan-gpu`; a program compiled for these devices cannot be run here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from robovlms_jax import extras

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one device.

    memory: bytes that a program may use. bandwidth: of it, bytes/s. flops: dense bfloat16 products per second, each
    product and each sum counted. link: bytes/s that a device sends to its neighbours along one ring, both directions
    together (TPU: one axis of the torus; GPU: NVLink). network: bytes/s that one device's share of the network between
    hosts or slices sends. axes: of the torus; GPUs: 0. kind: as libtpu or NVIDIA call it. description: what XLA's
    compiler asks about a GPU.
    """

    kind: str
    memory: float
    bandwidth: float
    flops: float
    link: float
    network: float
    source: str
    axes: int = 0
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Google's pages give a chip's links together, both directions: 400 (v5e), 1200 (v5p) and 800 GB/s (v6e) over 4, 6 and 4
# ports; what leaves along one axis, two ports, is a quarter, a sixth and a quarter of it. For v4 they say nothing: its
# link is the book's, whose figures for the others are a tenth lower. v6e's memory was 1640 GB/s there, later 1600.
_TPU = "docs.cloud.google.com/tpu/docs; v4's link, networks: Austin et al. 2025, How to Scale Your Model"
_GPU = "NVIDIA's data sheet; network: a DGX's NICs, one per GPU; memory, description: openxla/xla, target_config/specs"
_ORIN = (
    "NVIDIA, Jetson AGX Orin series data sheet and technical brief (64 GB, shared with the operating system): the "
    "GPU's 170 sparse int8 TOPS are 42.5 dense bfloat16 TFLOP/s; link, network: its 10 Gb/s Ethernet"
)


def _description(cores: int, fpus: int, clock: float, cache: int, shared: int, capability: tuple[int, int]) -> dict:
    return {"cores": cores, "fpus": fpus, "clock": clock, "cache": cache, "shared": shared, "capability": capability}


CHIPS: Mapping[str, Chip] = {
    "v4": Chip("TPU v4", 30.75 * GIB, 1200e9, 275e12, 90e9, 6.25e9, _TPU, 3),
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 819e9, 197e12, 100e9, 3.125e9, _TPU, 2),
    "v5p": Chip("TPU v5", 95.74 * GIB, 2765e9, 459e12, 200e9, 6.25e9, _TPU, 3),
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 1640e9, 918e12, 200e9, 12.5e9, _TPU, 2),
    "a100": Chip(
        "NVIDIA A100-SXM4-80GB", 85.1e9, 2039e9, 312e12, 300e9, 25e9, _GPU,
        description=_description(108, 64, 1.41, 41943040, 167936, (8, 0)),
    ),
    "h100": Chip(
        "NVIDIA H100 80GB HBM3", 84.9e9, 3350e9, 989e12, 450e9, 50e9, _GPU,
        description=_description(132, 128, 1.98, 52428800, 233472, (9, 0)),
    ),
    "h200": Chip(
        "NVIDIA H200 141GB HBM3e", 151.4e9, 4800e9, 989e12, 450e9, 50e9, _GPU,
        description=_description(132, 128, 1.98, 52428800, 233472, (9, 0)),
    ),
    "b200": Chip(
        "NVIDIA B200", 191.5e9, 7700e9, 2250e12, 900e9, 50e9, _GPU,
        description=_description(148, 128, 1.965, 132644864, 233472, (10, 0)),
    ),
    "orin": Chip(
        "Orin", 64e9, 204.8e9, 42.5e12, 1.25e9, 1.25e9, _ORIN,
        description=_description(16, 128, 1.3, 4194304, 167936, (8, 7)),
    ),
}  # fmt: skip
"""Name in a target -> figures."""

# Dense bfloat16 FLOP/s and bytes/s by NVIDIA's data sheets. The first whose name is part of a device's counts, so the
# cards of a family that differ come before the one that its short name means.
_CARDS: Mapping[str, tuple[float, float]] = {
    "H100 PCIe": (756e12, 2000e9),
    "H100 NVL": (835e12, 3900e9),
    "A100 80GB PCIe": (312e12, 1935e9),
    "A100-SXM4-80GB": (CHIPS["a100"].flops, CHIPS["a100"].bandwidth),
    "A100": (312e12, 1555e9),
    **{name.upper(): (CHIPS[name].flops, CHIPS[name].bandwidth) for name in ("h100", "h200", "b200")},
}


def peaks(device_kind: str, dtype: str) -> tuple[float, float] | None:
    """Published FLOP/s of matrix products in `dtype` and bytes/s of memory of a device; None: it is in no table here.

    Args:
      device_kind: `jax.Device.device_kind`.
      dtype: bfloat16, or float32, which JAX multiplies as TF32 on GPUs (half as fast) and as bfloat16 on TPUs.
    """
    for chip in CHIPS.values():
        if chip.axes and chip.kind == device_kind:
            return chip.flops, chip.bandwidth
    found = next((peak for name, peak in _CARDS.items() if name in device_kind), None)
    return found and (found[0] * (1 if dtype == "bfloat16" else 0.5), found[1])


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    # Without the card nothing can be timed, so kernels are not chosen by timing them, and Triton's need that.
    "gpu": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
    "tpu": {},
}
"""Platform -> `compiler_options` of a program that is compiled to be read."""

_FORMS = "v5p:2x2x2 (a slice's chips), 2xv5p:2x2x2 (two slices), h100:8 (one host's cards), a100:8x4 (four hosts)"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind. shape: chips of a slice along its axes, or cards of a host and hosts. slices: of TPUs."""

    name: str
    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def figures(self) -> Chip:
        return CHIPS[self.chip]

    @property
    def platform(self) -> str:
        return "tpu" if self.figures.axes else "gpu"

    @property
    def count(self) -> int:
        """Devices in all."""
        return math.prod(self.shape) * self.slices


def parse(name: str) -> Target:
    """Raises ValueError: no such target; says which there are."""
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", name)
    if found is None:
        raise ValueError(f"target={name!r} has not the form {_FORMS}.")
    if found[2] not in CHIPS:
        raise ValueError(f"target={name!r}: no figures of {found[2]!r}; known are {', '.join(CHIPS)}, as in {_FORMS}.")
    shape, slices, chip = tuple(int(size) for size in found[3].split("x")), int(found[1] or 1), CHIPS[found[2]]
    right = len(shape) == chip.axes if chip.axes else len(shape) in (1, 2)
    if not right or 0 in shape or slices < 1:
        what = f"{chip.axes} numbers of chips, such as {'x'.join('2' * chip.axes)}" if chip.axes else "cards (x hosts)"
        raise ValueError(f"target={name!r}: a {found[2]} is given as {what}, not {found[3]!r}.")
    if slices > 1 and not chip.axes:
        raise ValueError(f"target={name!r}: several hosts of GPUs are written {found[2]}:{found[3]}x{slices}.")
    return Target(name, found[2], shape, slices)


def devices(target: Target) -> list[jax.Device]:
    """Devices to make a mesh of (`mesh.make_mesh`), and to compile for.

    Raises:
      ModuleNotFoundError: the compiler is not installed; says what to install.
      ValueError: the compiler knows no such slice.
    """
    # JAX asks plugins once, for whichever target comes first, and NVIDIA's wants a card unless it is told otherwise.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        return _tpu(target) if target.platform == "tpu" else _gpu(target)
    except jax.errors.JaxRuntimeError as error:
        # Other failures (a library that does not load, one that another process holds) are not about the target.
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(f"target={target.name!r}: the compiler knows no such devices: {error}") from None


def _require(module: str, target: Target, extra: str) -> None:
    try:
        __import__(module)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"target={target.name!r} needs a compiler for {target.platform.upper()}s ({module}), which runs on any "
            f"Linux machine: {extras.install(extra)}",
            name=module,
        ) from None


def _tpu(target: Target) -> list[jax.Device]:
    _require("libtpu", target, "plan-tpu")
    # libtpu asks the cloud's metadata server what it runs on, unless it is told.
    generation = {"v5e": "v5litepod"}.get(target.chip, target.chip)
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{generation}-8",
    }.items():
        os.environ.setdefault(name, value)
    how: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
    if target.chip == "v4":  # two cores that JAX sees as one device
        how["chip_config_name"] = "megacore"
    topology = f"{target.chip}:{'x'.join(map(str, target.shape))}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **how).devices)


def _gpu(target: Target) -> list[jax.Device]:
    _require("jax_plugins.xla_cuda12", target, "plan-gpu")
    cards, hosts = (*target.shape, 1)[:2]
    shape = f"1x{hosts}x{cards}"
    return list(
        topologies.get_topology_desc(shape, "cuda", target_config=describe(target.figures), topology=shape).devices
    )


def describe(chip: Chip) -> str:
    """A GPU as XLA's compiler wants to be told: the text form of its `GpuTargetConfigProto`."""
    card = chip.description
    limits = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
        "shared_memory_per_core": card["shared"], "shared_memory_per_block_optin": card["shared"] - 1024,
        "threads_per_core_limit": 2048, "core_count": card["cores"], "fpus_per_core": card["fpus"],
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64,
        "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
        "memory_bandwidth": int(chip.bandwidth), "l2_cache_size": card["cache"], "clock_rate_ghz": card["clock"],
        "device_memory_size": int(chip.memory),
    }  # fmt: skip
    major, minor = card["capability"]
    lines = [f"  {name}: {value}" for name, value in limits.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 patch: 0 }",
            f'device_description_str: "{chip.kind}"',
            "",
        ]
    )


def seconds(target: Target, groups: Sequence[Sequence[int]], places: Sequence[tuple[int, ...]], sent: float) -> float:
    """Below which a collective cannot end, in which each device sends `sent` bytes.

    Of a group of N devices on H hosts or slices, (H - 1) / (N - 1) of it has to cross the network: hosts exchange
    once what their devices share out among themselves.

    Args:
      groups: positions of devices that exchange with each other.
      places: per position, where the device is: slice and coordinates of a TPU, host and card of a GPU (`places`).
    """
    chip, slowest = target.figures, 0.0
    for group in groups:
        where = [places[device] for device in group]
        hosts, *along = (len(set(axis)) for axis in zip(*where, strict=True))
        rings = sum(size > 1 for size in along) if chip.axes else 1  # along every axis of the torus that it spans
        across = (hosts - 1) / (len(group) - 1)
        slowest = max(slowest, sent * across / chip.network, sent * (1 - across) / (chip.link * max(rings, 1)))
    return slowest


def places(target: Target, devices: Sequence[jax.Device]) -> list[tuple[int, ...]]:
    """See `seconds`."""
    if target.platform == "tpu":
        return [(getattr(device, "slice_index", 0) or 0, *device.coords) for device in devices]
    return [(device.id // target.shape[0], device.id % target.shape[0]) for device in devices]
