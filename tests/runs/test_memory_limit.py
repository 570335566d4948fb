"""A run that this machine cannot hold is refused before anything is compiled, on CPUs as on accelerators."""

from __future__ import annotations

import os
import types

import jax
import pytest

from robovlms_jax.runs import setup as setups
from robovlms_jax.runs import steps


def test_a_run_is_held_against_the_memory_that_the_machine_has(monkeypatch):
    limits = []
    monkeypatch.setattr(steps, "memory_of", lambda *_: "118 GiB")
    monkeypatch.setattr(steps, "require_room", lambda *given: limits.append(given[-2:]))
    stage = types.SimpleNamespace(name="only")
    setup = types.SimpleNamespace(
        stages=(stage,), abstracts=(None,), first=0, config=None, model=None, batch_shapes=lambda stage: None
    )
    setups.require_memory(setup)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if jax.default_backend() != "cpu":
        pytest.skip("accelerators say themselves how much they have")
    assert limits == [(whole // jax.local_device_count(), "118 GiB")]
