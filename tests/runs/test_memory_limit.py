"""A run that this machine cannot hold is refused before anything is compiled, on CPUs as on accelerators."""

from __future__ import annotations

import dataclasses
import os
import types

import jax
import pytest

from robovlms_jax.runs import setup as setups
from robovlms_jax.runs import steps
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import stages
from robovlms_jax.training.config import StageConfig, TrainConfig


def test_a_run_is_held_against_the_memory_that_the_machine_has(monkeypatch):
    limits = []
    monkeypatch.setattr(steps, "memory_of", lambda *_: "118 GiB")
    monkeypatch.setattr(steps, "require_room", lambda *given: limits.append(given[4:6]))
    stage = types.SimpleNamespace(name="only")
    setup = types.SimpleNamespace(
        stages=(stage,), abstracts=(None,), first=0, config=None, model=None, batch_shapes=lambda stage: None
    )
    setups.require_memory(setup)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if jax.default_backend() != "cpu":
        pytest.skip("accelerators say themselves how much they have")
    assert limits == [(whole // jax.local_device_count(), "118 GiB")]


@dataclasses.dataclass
class Model:
    """A model, and what it is made of: both have one field that matters here."""

    vlm: Model | None = None
    remat: str = "full"


def test_less_memory_is_sought_with_rows_of_every_source_and_the_losses_of_the_stage_itself(monkeypatch):
    def memory_of(config, model, state, batch, stage, *, platform):
        return config.train.accumulation, {name: rows.shape[0] for name, (rows,) in batch.items()}, stage.name

    monkeypatch.setattr(steps, "memory_of", memory_of)
    mesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 1, "tensor": 1})
    state = types.SimpleNamespace(step=types.SimpleNamespace(sharding=types.SimpleNamespace(mesh=mesh)))
    batch = {name: [jax.ShapeDtypeStruct((rows, 3), "float32")] for name, rows in (("robot", 14), ("questions", 2))}
    shares = {"robot": 9.0, "questions": 1.0}
    config = ExperimentConfig(
        train=TrainConfig(stages=(StageConfig(1, sources={"questions": 1.0}), StageConfig(1, "late", sources=shares)))
    )
    late = stages.plan(config.train, config.optimizer)[1]
    assert list(steps.smaller(config, Model(Model()), state, batch, late)) == [
        ("--train.accumulation 2", (2, {"robot": 12, "questions": 4}, "late")),
        ("--train.accumulation 4", (4, {"robot": 8, "questions": 8}, "late")),
    ]
