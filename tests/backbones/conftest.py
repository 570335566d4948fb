"""Hugging Face's own models, tiny and random, beside ours."""

from __future__ import annotations

import pytest

from robovlms_jax.backbones import registry
from tests.backbones.families import torch_model
from tests.backbones.oracle import Twin, from_torch, randomize


@pytest.fixture(scope="session")
def kosmos() -> Twin:
    config = registry.get("kosmos-2").tiny()
    model = randomize(torch_model(config))
    return Twin(config, model, from_torch(config, model.state_dict()))
