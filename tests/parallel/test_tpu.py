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

    known = {"xla_backend_optimization_level": 1}
    monkeypatch.setattr(tpu, "SingleDeviceSharding", lambda device: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    monkeypatch.setattr(tpu, "TRAINED", known | {"xla_jf_never_heard_of": 1})
    assert tpu.trained(Device()) == known
    monkeypatch.setattr(tpu, "TRAINED", {"xla_jf_never_heard_of": 1})
    assert tpu.trained(Device()) is None


@pytest.mark.slow
def test_libtpu_has_the_options():
    pytest.importorskip("libtpu", reason="make test-plans")
    assert tpu.trained(targets.devices(targets.parse("v5e:2x2"))[0]) == tpu.TRAINED
