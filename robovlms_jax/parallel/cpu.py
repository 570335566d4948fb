"""Tuning for programs that run on CPUs: compiler options for single programs, and memory that is kept.

Each choice differs from XLA's own, or the operating system's, because it was measured to be faster (docs/log.md,
2026-11-22; `benchmarks/cpu_options.py`, `benchmarks/host_memory.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax.experimental import xla_metadata

from robovlms_jax import cores

Kind = Literal["small_kernels", "tiny_kernels", "run_once", "tiny_run_once"]
"""What a program is like.

small_kernels: many small arrays, such as the twin's training step or the step of many tables.
tiny_kernels: hundreds of kernels on a few numbers each, such as the step of few tables.
run_once: runs for less time, in all, than it takes to optimise it.
tiny_run_once: both, and quickest to compile.
"""

# Only products of matrices go to XLA's library of kernels (YNNPACK), each alone; XLA itself hands over sums and what
# lies between, too.
_PRODUCTS_ALONE = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
# XLA's older code generator. A training step takes three times as long to compile with it.
_OLDER_GENERATOR = {"xla_cpu_use_fusion_emitters": False}
# Sixteen numbers at a time, where the processor can.
_WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}
_UNOPTIMIZED = {"xla_backend_optimization_level": 0}

OPTIONS: Mapping[Kind, Mapping[str, Any]] = {
    "small_kernels": _PRODUCTS_ALONE,
    "tiny_kernels": {**_PRODUCTS_ALONE, **_OLDER_GENERATOR, **_WIDE_VECTORS},
    "run_once": _UNOPTIMIZED,
    "tiny_run_once": {**_OLDER_GENERATOR, **_UNOPTIMIZED},
}


def options(kind: Kind, platform: str) -> dict[str, Any] | None:
    """`compiler_options` for `jax.jit`: of `OPTIONS`, those that the installed XLA has. None elsewhere than on CPUs, or
    if it has none of them. Starts JAX's devices.

    Args:
      platform: "cpu", "gpu" or "tpu", of the devices that the program is for (`mesh.platform`). They need not be those
        of the machine that compiles it.
    """
    return known(OPTIONS[kind], platform)


def known(wanted: Mapping[str, Any], platform: str) -> dict[str, Any] | None:
    """As `options`, of any compiler options."""
    if platform != "cpu":
        return None
    return {name: value for name, value in wanted.items() if is_known(name, value)} or None


def default_platform() -> str:
    """Where a program without a mesh runs: on `jax.default_device`, or else on the first device. Starts JAX's
    devices."""
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.local_devices()[0].platform
    return chosen if isinstance(chosen, str) else chosen.platform


def jit(function: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
    """`jax.jit` with `options(kind, default_platform())`, asked for when the function is called, so that importing it
    starts no device. What it makes cannot be called inside another `jit`."""
    compiled = functools.cache(lambda platform: jax.jit(function, compiler_options=options(kind, platform)))

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return compiled(default_platform())(*args)

    return call


@functools.cache
def is_known(name: str, value: Any) -> bool:
    """Whether the installed XLA has a compiler option. Its options are one list for all devices; asked of the CPU's
    compiler, whatever else the machine has."""
    with contextlib.suppress(jax.errors.JaxRuntimeError), jax.default_device(jax.local_devices(backend="cpu")[0]):
        jax.jit(lambda x: x + 1, compiler_options={name: value})(0)
        return True
    return False


_ONE_KERNEL = {"xla_cpu_small_call": "true", "inlineable": "false"}
"""How XLA marks a loop over little data that it compiles as one function of the machine."""


def one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same pure function of arrays, which inside a `jit` for a CPU becomes one kernel, on one thread: loops,
    branches and what lies between are code of the processor, without XLA's runtime, which takes microseconds for each
    operation of each turn. Worth it for loops over little data (docs/log.md, 2026-11-26). Products of matrices and sums
    over axes are refused by XLA in there.

    Another XLA than the one that this was tried with gets the function as it is: what its mark means is not promised.
    """

    @functools.wraps(function)
    def marked(*args: Any) -> Any:
        if not importlib.metadata.version("jaxlib").startswith("0.10."):
            return function(*args)
        # XLA ends the process where an argument is a constant of the program; behind a barrier nothing looks like one.
        leaves, tree = jax.tree.flatten(jax.jit(function)(*jax.lax.optimization_barrier(args)))
        leaves[0] = xla_metadata.set_xla_metadata(leaves[0], **_ONE_KERNEL)
        return jax.tree.unflatten(tree, leaves)

    return marked


# glibc, malloc/malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let memory that is freed serve the next allocation instead of going back to the operating system.

    XLA's CPU client allocates all intermediate values of a program anew for each call. glibc maps blocks above 32 MB
    each time, so that every training step had its pages faulted in and zeroed again (`benchmarks/host_memory.py`).
    One heap for all threads, because blocks above 64 MB fit into no other: threads wait for its lock, in the compiler
    most of all, which costs less than the pages (docs/log.md, 2026-11-27). Call it before JAX starts its devices:
    threads keep the heap they once had.

    Returns:
      Whether it was done: with glibc, where JAX can have no device but the CPU. Hosts of accelerators, whose loaders
      have many threads to share the one heap that this leaves, were not measured.
    """
    if platform.libc_ver()[0] != "glibc" or not _only_cpu():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    done = [mallopt(name, value) for name, value in settings]
    return all(done)


def device_per_core() -> None:
    """Let JAX have a CPU device for every core of this process. XLA runs the small operations of one program one after
    the other, whatever cores there are; programs on several devices run side by side (`rl.rollouts.Player`).

    Call it before JAX starts its devices. Nothing is done where JAX may have other devices than the CPU, or where their
    number was set.
    """
    chosen = jax.config.jax_num_cpu_devices > 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if _only_cpu() and not chosen:
        jax.config.update("jax_num_cpu_devices", cores.usable())


def _only_cpu() -> bool:
    """As far as can be said without starting devices."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
