"""Freed memory stays with the process."""

from __future__ import annotations

import platform

import pytest

from tests.processes import run_python

FAULTS = """
import resource, sys
import numpy as np
from robovlms_jax.parallel import host_memory
if sys.argv[1] == "kept":
    assert host_memory.keep_freed_memory()
faults = []
for _ in range(5):  # 64 MB, which glibc otherwise maps anew
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(2**23, 1.0)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again():
    # Fails if a setting is refused, or glibc stops doing with it what it did; given back, every page costs a fault.
    assert int(run_python("-c", FAULTS, "given back", JAX_PLATFORMS="cpu")) > 10  # huge pages: 32
    assert int(run_python("-c", FAULTS, "kept", JAX_PLATFORMS="cpu")) == 0


def test_heaps_of_threads_stay_where_there_may_be_accelerators():
    # Fails if the settings, measured on CPUs, are made for every run.
    code = "from robovlms_jax.parallel import host_memory; print(host_memory.keep_freed_memory())"
    assert run_python("-c", code, JAX_PLATFORMS="cuda,cpu").split() == ["False"]
