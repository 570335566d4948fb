"""Hugging Face's own models, tiny and random, beside ours."""

from __future__ import annotations

import pytest

from robovlms_jax.backbones import registry
from tests.backbones.families import torch_model
from tests.backbones.oracle import Twin, from_torch, randomize

DIFFERENT = {"kosmos-2", "paligemma", "qwen3_vl", "flamingo"}
"""Model types that between them have every kind of tower, norm, position and attention."""

OF_DIFFERENT = {
    "test_bfloat16_stays_close": "pair",
    "test_adapters_reach_every_matrix_begin_as_nothing_and_can_be_merged": "twin",
    "test_what_stands_in_padding_changes_nothing": "twin",
}
"""Tests of what the shared parts do, whatever the family -> the parameter that names it; the rest of the families are
in the slow tests."""


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        name = params.get(OF_DIFFERENT.get(getattr(item, "originalname", "")))
        if name is not None and registry.get(name).model_type not in DIFFERENT:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def kosmos() -> Twin:
    config = registry.get("kosmos-2").tiny()
    model = randomize(torch_model(config))
    return Twin(config, model, from_torch(config, model.state_dict()))
