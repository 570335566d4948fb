"""Compiler options of programs for GPUs, on a machine that need not have one."""

from __future__ import annotations

import pytest

from robovlms_jax.parallel import cpu, gpu


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_only_gpus_have_them(platform):
    # Fails if a CPU's or TPU's compiler is told about GPUs.
    assert gpu.served(platform) is None


def test_an_option_that_the_installed_xla_has_not_is_left_out(monkeypatch):
    # jit refuses a program for the sake of one unknown option, and robots would not start after an update.
    assert gpu.served("gpu") == gpu.SERVED
    monkeypatch.setattr(gpu, "SERVED", {**gpu.SERVED, "xla_gpu_never_heard_of": 1})
    assert gpu.served("gpu") == {name: 0 for name in gpu.SERVED if cpu.is_known(name, 0)}
    monkeypatch.setattr(gpu, "SERVED", {"xla_gpu_never_heard_of": 1})
    assert gpu.served("gpu") is None
