"""Hugging Face's own models, tiny and random, beside ours."""

from __future__ import annotations

import pytest

from robovlms_jax.backbones import registry
from tests.backbones.families import torch_model
from tests.backbones.oracle import Twin, from_torch, randomize

DIFFERENT = {"kosmos-2", "paligemma", "qwen3_vl", "flamingo"}
"""Model types that between them have every kind of tower, norm, position and attention."""

CACHED = DIFFERENT | {"florence2", "gemma3"}
"""The same, with sequences that are two and attention that looks back a few tokens only."""

OF_DIFFERENT = {
    "test_bfloat16_stays_close": ("pair", DIFFERENT),
    "test_adapters_reach_every_matrix_begin_as_nothing_and_can_be_merged": ("twin", DIFFERENT),
    "test_what_stands_in_padding_changes_nothing": ("twin", DIFFERENT),
    # Of all families every day: what queries see, against torch (test_queries_before_the_tail).
    "test_queries_see_images_and_text_but_not_what_ends_the_prompt": ("twin", DIFFERENT),
    "test_cached_decoding_equals_decoding_at_once": ("twin", CACHED),
    # Of all families every day: the same programs at a tiny size, and the parameters' shapes at full size.
    "test_full_size_shapes": ("name", DIFFERENT),
}
"""Tests of what the shared parts do, whatever the family -> the parameter that names it, and the families of ordinary
tests; the rest of the families are in the slow tests."""


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        parameter, ordinary = OF_DIFFERENT.get(getattr(item, "originalname", ""), ("", set()))
        name = params.get(parameter)
        if name is not None and registry.get(name).model_type not in ordinary:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def kosmos() -> Twin:
    config = registry.get("kosmos-2").tiny()
    model = randomize(torch_model(config))
    return Twin(config, model, from_torch(config, model.state_dict()))
