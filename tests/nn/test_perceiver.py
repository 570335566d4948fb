"""The resampler against transformers' IDEFICS one."""

from __future__ import annotations

import dataclasses
import types

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from robovlms_jax.nn.perceiver import Perceiver, PerceiverConfig
from robovlms_jax.weights import convert, rules
from tests.weights.array_source import ArraySource

torch = pytest.importorskip("torch")

CONFIG = PerceiverConfig(num_latents=5, depth=2, num_heads=3, head_dim=4)
WIDTH, TOKENS = 8, 11


def oracle() -> torch.nn.Module:
    """transformers' resampler with random weights and Flamingo's activation."""
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    torch.manual_seed(0)
    config = types.SimpleNamespace(
        perceiver_config=types.SimpleNamespace(qk_layer_norms_perceiver=False),
        vision_config=types.SimpleNamespace(embed_dim=WIDTH),
    )
    module = IdeficsPerceiverResampler(config, WIDTH, CONFIG.depth, CONFIG.num_heads, CONFIG.head_dim, 5)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for _, mlp in module.blocks:
        mlp.act = torch.nn.GELU()
    return module.eval()


def in_upstreams_names(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Its state dict as open_flamingo and upstream call the same tensors; keys and values are one matrix there."""
    state = {name: x.numpy() for name, x in module.state_dict().items()}
    named = {"r.latents": state["latents"]}
    for part in ("weight", "bias"):
        named[f"r.norm.{part}"] = state[f"layer_norm.{part}"]
    for layer in range(CONFIG.depth):
        here, there = f"blocks.{layer}", f"r.layers.{layer}"
        for part in ("weight", "bias"):
            named[f"{there}.0.norm_media.{part}"] = state[f"{here}.0.context_layer_norm.{part}"]
            named[f"{there}.0.norm_latents.{part}"] = state[f"{here}.0.latents_layer_norm.{part}"]
            named[f"{there}.1.0.{part}"] = state[f"{here}.1.ln.{part}"]
        named[f"{there}.0.to_q.weight"] = state[f"{here}.0.q_proj.weight"]
        named[f"{there}.0.to_kv.weight"] = np.concatenate([state[f"{here}.0.{x}_proj.weight"] for x in "kv"])
        named[f"{there}.0.to_out.weight"] = state[f"{here}.0.output_proj.weight"]
        named[f"{there}.1.1.weight"] = state[f"{here}.1.fc.weight"]
        named[f"{there}.1.3.weight"] = state[f"{here}.1.c_proj.weight"]
    return named


def test_numbers_and_names_are_those_of_published_resamplers(exact_matmul):
    module, x = oracle(), np.random.default_rng(0).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)
    ours = Perceiver(CONFIG)
    shapes = nn.unbox(jax.eval_shape(ours.init, jax.random.key(0), x)["params"])
    device = SingleDeviceSharding(jax.devices()[0])
    params = convert.load_params(
        rules.perceiver("r", "r"),
        ArraySource(in_upstreams_names(module), "toy"),
        {"r": shapes},
        {"r": jax.tree.map(lambda _: device, shapes)},
    )["r"]
    with torch.no_grad():
        expected = module(torch.tensor(x)).numpy()
    found = jax.jit(ours.apply)({"params": params}, x)
    assert found.shape == (2, 5, WIDTH)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("field", ["num_latents", "depth", "num_heads"])
def test_sizes_that_mean_nothing_are_refused(field):
    with pytest.raises(ValueError, match=f"perceiver {field}=0"):
        dataclasses.replace(CONFIG, **{field: 0})
