"""How programs that run on the CPU take memory from the operating system."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import platform

import jax

# glibc, malloc/malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let memory that is freed serve the next allocation instead of going back to the operating system.

    XLA's CPU client allocates all intermediate values of a program anew for each call. glibc maps blocks above 32 MB
    each time, so that every training step had its pages faulted in and zeroed again: a tenth of the twin's step
    (`benchmarks/host_memory.py`). Call it before JAX starts its devices: threads keep the heap they once had.

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


def _only_cpu() -> bool:
    """As far as can be said without starting devices."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
