"""Compiler options of programs for GPUs and who has cuDNN, on a machine that need not have one."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from robovlms_jax.parallel import cpu, gpu

ASKED = fused_attention_stablehlo.check_cudnn_version


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


def mesh(platform: str, version: str, tensor: int = 1) -> SimpleNamespace:
    device = SimpleNamespace(platform=platform, client=SimpleNamespace(platform_version=version))
    return SimpleNamespace(devices=np.array([device], object).reshape(1, 1, 1), shape={"tensor": tensor})


def test_devices_that_are_only_described_have_cudnn_where_a_plan_says_so():
    card, described, split = mesh("gpu", "cuda 12090"), mesh("gpu", "PJRT C API"), mesh("gpu", "cuda 12090", tensor=2)
    assert gpu.has_cudnn(card) and not gpu.has_cudnn(described) and not gpu.has_cudnn(split)
    assert not gpu.has_cudnn(mesh("gpu", "rocm 6"))
    with gpu.cudnn_of_described():
        assert gpu.has_cudnn(card) and gpu.has_cudnn(described) and not gpu.has_cudnn(split)
        assert not gpu.has_cudnn(mesh("tpu", "PJRT C API")) and not gpu.has_cudnn(mesh("cpu", "cpu"))
    assert not gpu.has_cudnn(described)


def test_jax_asks_for_the_librarys_version_itself_outside_of_plans():
    # Fails if a run would be told of a cuDNN that it has not.
    with contextlib.suppress(ValueError), gpu.cudnn_of_described():
        assert fused_attention_stablehlo.check_cudnn_version() == gpu.CUDNN
        raise ValueError
    assert fused_attention_stablehlo.check_cudnn_version is ASKED
