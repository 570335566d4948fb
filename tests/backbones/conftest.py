"""Hugging Face's own models, tiny and random, beside ours."""

from __future__ import annotations

import pytest
import torch
import transformers

from robovlms_jax.backbones import base
from tests.backbones.oracle import Twin, from_torch


@pytest.fixture(scope="session")
def kosmos() -> Twin:
    config = base.get("kosmos-2").tiny()
    torch_model = transformers.Kosmos2ForConditionalGeneration(transformers.Kosmos2Config(**base.to_hf_config(config)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in torch_model.named_parameters():
            is_norm = any(word in name for word in ("norm", "_ln")) and name.endswith("weight")
            value.copy_(torch.randn(value.shape, generator=generator) * 0.05 + is_norm)
    torch_model = torch_model.float().eval()
    return Twin(config, torch_model, from_torch(config, torch_model.state_dict()))
