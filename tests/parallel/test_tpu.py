"""Compiler options of programs for TPUs, on a machine that need not have one."""

from __future__ import annotations

import jax
import pytest

from robovlms_jax.parallel import targets, tpu


def test_no_other_compiler_is_told_about_tpus():
    assert tpu.trained(jax.devices("cpu")[0]) is None


def test_an_option_that_the_installed_compiler_has_not_is_left_out(monkeypatch):
    # Asked of the compiler of the device itself: libtpu's own options are no one else's. A CPU stands for a TPU.
    class Device:
        platform = "tpu"
        device_kind = "TPU v5"

    known = {"xla_cpu_use_fusion_emitters": True}
    monkeypatch.setattr(tpu, "SingleDeviceSharding", lambda device: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    monkeypatch.setattr(tpu, "TRAINED", {"": known | {"xla_jf_never_heard_of": 1}})
    assert tpu.trained(Device()) == known
    monkeypatch.setattr(tpu, "TRAINED", {"": {"xla_jf_never_heard_of": 1}})
    assert tpu.trained(Device()) is None
    monkeypatch.setattr(tpu, "TRAINED", {"": {}, "TPU v5": known, "TPU v6 lite": {"xla_cpu_never_heard_of": 1}})
    assert tpu.trained(Device()) == known  # what is for another kind is not asked for


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "v6e:2x2"])
def test_libtpu_has_the_options(target):
    pytest.importorskip("libtpu", reason="make test-plans")
    device = targets.devices(targets.parse(target))[0]
    assert tpu.trained(device) == {**tpu.TRAINED[""], **tpu.TRAINED.get(device.device_kind, {})}
