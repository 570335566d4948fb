"""Stacked layers: apart and together again, in a loop and one by one."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import unbox
from flax.traverse_util import flatten_dict

from robovlms_jax.nn import stack
from robovlms_jax.runs import build
from tests import toy

DEPTH, WIDTH = stack.UNROLLED + 2, 6


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(0.5), (WIDTH, WIDTH))
        return jnp.tanh(x @ kernel)


class Tower(nn.Module):
    remat: stack.Remat = "none"

    @nn.compact
    def __call__(self, x):
        layer = Layer(name="layers")
        return stack.scan_layers(lambda layer, x, _: (layer(x), None), layer, x, length=DEPTH, remat=self.remat)[0]


@pytest.fixture(scope="module")
def tower():
    x = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)
    params = unbox(jax.jit(Tower().init)(jax.random.key(0), x))["params"]
    return {"tower": params, "head": {"kernel": jnp.ones((WIDTH, 3))}}, x


def served(params, x, remat="none"):
    with stack.unrolled():
        return Tower(remat).apply({"params": stack.joined(params)["tower"]}, x)


def test_parameters_are_the_same_after_they_were_apart(tower):
    params, _ = tower
    apart = stack.parted(params)
    assert [x.shape for x in apart["tower"]["layers"]["kernel"]] == [(WIDTH, WIDTH)] * DEPTH
    assert apart["head"] == params["head"]  # no stack
    again = stack.parted(apart)  # stays apart
    for found in (stack.joined(apart), stack.joined(again), stack.joined(params)):
        jax.tree.map(np.testing.assert_array_equal, found, params)


def test_stacks_of_norms_stay_whole():
    # A program is called with as many arrays; theirs are read for free.
    params = {"layers": {"attn_norm": {"scale": jnp.ones((DEPTH, 3))}, "up": {"bias": jnp.ones((DEPTH, 3))}}}
    apart = stack.parted({"tower": params})["tower"]["layers"]
    assert apart["attn_norm"]["scale"].shape == (DEPTH, 3) and len(apart["up"]["bias"]) == DEPTH


def test_taking_the_stacks_leaves_one_copy(tower):
    params = jax.tree.map(jnp.copy, tower[0])
    apart = stack.parted(params, take=True)
    assert params["tower"]["layers"]["kernel"].is_deleted() and not params["head"]["kernel"].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, stack.joined(apart), tower[0])


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_layers_one_by_one_compute_what_the_loop_does(tower, remat):
    params, x = tower
    expected = Tower().apply({"params": params["tower"]}, x)
    np.testing.assert_allclose(jax.jit(served, static_argnums=2)(stack.parted(params), x, remat), expected, rtol=1e-5)


def test_weights_that_lie_apart_are_read_where_they_lie(tower):
    # Fails if layers run in a loop, or if a stack is made of them first: each would be copied in every step.
    params, x = tower
    apart = jax.jit(served).lower(stack.parted(params), x).compile().as_text()
    loop = jax.jit(lambda params, x: Tower().apply({"params": params["tower"]}, x)).lower(params, x).compile().as_text()
    stacked = re.escape(f"f32[{DEPTH},{WIDTH},{WIDTH}]")
    assert re.search(stacked, loop) and " while(" in loop
    assert not re.search(stacked, apart) and " while(" not in apart


def test_what_is_stacked_is_known_by_its_path():
    # `parted` and the optimizer's rates by layer go by it.
    axes = flatten_dict(nn.get_partition_spec(build._traced(toy.make_model()).shapes), sep="/")
    named = {path for path, spec in axes.items() if len(spec) and spec[0] == "layers"}
    assert named and named == {path for path in axes if stack.STACKED.match(path)}


def test_what_adapters_add_is_made_again_and_not_kept_beside_what_they_stand_beside(capsys):
    # Fails if a layer with adapters keeps two arrays of its output's size where one without keeps one.
    def layer(x, kernel, a, b):
        return jnp.sin(x @ kernel + (x @ a) @ b).sum()

    shapes = ((8, 512), (512, 640), (512, 4), (4, 640))
    arrays = [jnp.ones(shape) for shape in shapes]
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(layer, policy=stack.POLICIES["dots"]), *arrays)
    kept = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    assert [line.split()[0] for line in kept if "640" in line] == ["f32[8,640]"]
