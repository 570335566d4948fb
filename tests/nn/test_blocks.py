"""Norm, MLP and sinusoids against torch or their definition."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from robovlms_jax.nn.mlp import ACTIVATIONS, MLP
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.positions import sinusoid


def test_layer_norm_equals_torch_and_keeps_the_type():
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 7)).astype(np.float32)
    scale, bias = np.linspace(0.5, 2, 7, dtype=np.float32), np.linspace(-1, 1, 7, dtype=np.float32)
    params = {"params": {"scale": scale, "bias": bias}}
    expected = torch.nn.functional.layer_norm(
        torch.tensor(x), (7,), torch.tensor(scale), torch.tensor(bias), 0.1
    ).numpy()
    np.testing.assert_allclose(LayerNorm(0.1).apply(params, x), expected, atol=1e-5)
    low = LayerNorm(0.1).apply(params, jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, atol=0.05)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_the_same_name_in_transformers(name):
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](x), ACT2FN[name](torch.tensor(x)).numpy(), atol=1e-6)


@pytest.mark.parametrize("inner_norm", [None, 1e-5])
def test_mlp(exact_matmul, inner_norm):
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    module = MLP(8, "gelu", inner_norm)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    params = jax.tree.map(lambda p: np.random.default_rng(1).normal(0.1, 0.3, p.shape).astype(np.float32), shapes)
    p = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), params)
    y = torch.nn.functional.gelu(torch.tensor(x) @ p["up"]["kernel"] + p["up"]["bias"])
    if inner_norm is not None:
        y = torch.nn.functional.layer_norm(y, (8,), p["inner_norm"]["scale"], p["inner_norm"]["bias"], inner_norm)
    y = y @ p["down"]["kernel"] + p["down"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), y.numpy(), atol=1e-5)


def test_sinusoids_follow_their_definition():
    found = sinusoid(jnp.asarray([[0, 5, 2500]]), 8)
    for row, position in enumerate((0, 5, 2500)):
        angles = [(position + 2) * math.exp(-math.log(10_000) * i / 3) for i in range(4)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        np.testing.assert_allclose(found[0, row], expected, atol=2e-4)  # float32 of an angle near 2500
