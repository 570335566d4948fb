"""Compiler options that an XLA may or may not have, and freed memory that stays with the process."""

from __future__ import annotations

import platform

import pytest

from robovlms_jax.parallel import cpu
from tests.processes import run_python

NEVER_HEARD_OF = {"xla_cpu_no_such_option": True}


def test_what_xla_does_not_know_is_left_out():
    # jit itself refuses a program for the sake of one unknown option. Fails if one is passed on, or takes others along.
    assert cpu.known({**NEVER_HEARD_OF, **cpu.OPTIONS["run_once"]}) == cpu.OPTIONS["run_once"]
    assert cpu.known(NEVER_HEARD_OF) is None


def test_a_kernel_library_by_another_name_is_no_error():
    # The name of the value may change, too. Fails if only names of options are tried.
    (name,) = cpu.OPTIONS["small_kernels"]
    assert cpu.known({name: "LIBRARY_FUSION_TYPE_NO_SUCH"}) is None


def test_only_cpus_have_them(monkeypatch):
    # GPUs' and TPUs' compilers must not be told about CPUs. Fails if the platform is not asked.
    monkeypatch.setattr(cpu.jax, "default_backend", lambda: "gpu")
    assert cpu.options("small_kernels") is None


FAULTS = """
import resource, sys
import numpy as np
from robovlms_jax.parallel import cpu
if sys.argv[1] == "kept":
    assert cpu.keep_freed_memory()
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
    code = "from robovlms_jax.parallel import cpu; print(cpu.keep_freed_memory())"
    assert run_python("-c", code, JAX_PLATFORMS="cuda,cpu").split() == ["False"]
