"""Parameters drawn one by one are those of one program that draws them all."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from robovlms_jax.parallel import cpu
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.runs import build, drawing
from tests import toy

RUNS_ONCE = {"compiler_options": cpu.options("run_once", "cpu")}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        table = self.param("table", nn.initializers.normal(0.3), (3, x.shape[-1]))
        return nn.LayerNorm()(nn.Dense(x.shape[-1])(x)) + table[0], None


class Everything(nn.Module):
    """Distributions, layers in a loop, and what is drawn otherwise."""

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        x, _ = nn.scan(Block, **axes)()(x, None)
        x = nn.Dense(1100, kernel_init=nn.initializers.xavier_uniform(), bias_init=nn.initializers.constant(0.5))(x)
        self.param("normal", nn.with_logical_partitioning(nn.initializers.normal(1.0), ("embed",)), (7,))
        self.param("own", lambda key, shape: jax.random.uniform(key, shape, minval=-0.1, maxval=0.2), (2, 5))
        for name, (init, *how) in LEFT.items():
            self.param(name, init, *how)
        return x


def each_its_own_key(key, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(jax.random.split(key, shape[0]))


def last(key, shape):
    return jax.lax.scan(lambda _, key: (jax.random.normal(key, shape), None), np.zeros(shape), jax.random.split(key))[0]


LEFT = {
    "rotation": (nn.initializers.orthogonal(), (4, 4)),
    "half": (nn.initializers.normal(1.0), (3,), np.float16),
    "half of one": (lambda key, shape: jnp.ones(shape, np.float16) * np.float16(0.1), (3,)),
    "several keys": (each_its_own_key, (2, 3)),
    "a scale for each": (lambda key, shape: jax.random.normal(key, shape) * np.arange(3, dtype=np.float32), (2, 3)),
    "copies": (lambda key, shape: jnp.broadcast_to(jax.random.normal(key, shape[1:]), shape), (2, 3)),
    "the last of a loop": (last, (2,)),
    "no array": (lambda key: jnp.sqrt(jnp.float32(2.0)),),
}
"""Parameters that are not followed back: of other types, by several keys, cut and put together."""


def test_every_parameter_is_that_of_one_program_to_the_bit():
    def init(key):
        return Everything().init(key, np.zeros((1, 8), np.float32))["params"]

    together = flatten_dict(meshes.unbox(jax.jit(init, **RUNS_ONCE)(jax.random.key(5))), sep="/")
    traced = drawing.trace(init)
    drawn = drawing.draw(traced, 5, together)
    assert together.keys() - drawn.keys() == LEFT.keys(), "left to the caller"
    for path, x in drawn.items():
        np.testing.assert_array_equal(x, together[path], err_msg=path)
    first = drawn["ScanBlock_0/table"]
    assert not np.array_equal(first[0], first[1]), "each layer has its own"
    assert drawing.draw(traced, 5, ["normal"]).keys() == {"normal"}
    assert not np.array_equal(drawing.draw(traced, 6, ["normal"])["normal"], drawn["normal"])


@pytest.mark.parametrize(
    ("setting", "value"), [("jax_threefry_partitionable", False), ("jax_default_prng_impl", "rbg")]
)
def test_where_few_numbers_are_not_the_first_of_many_nothing_is_drawn(setting, value):
    traced = drawing.trace(lambda key: {"x": jax.random.normal(key, (3,))})
    before = getattr(jax.config, setting)
    try:
        jax.config.update(setting, value)
        assert drawing.draw(traced, 0, ["x"]) == {}
    finally:
        jax.config.update(setting, before)
    assert drawing.draw(traced, 0, ["x"]).keys() == {"x"}


def test_a_policy_is_drawn_without_a_program_of_its_own_and_what_is_too_large_by_one(monkeypatch):
    model, mesh = toy.make_model(), meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    shapes = flatten_dict(build.abstract_params(model, mesh)[0], sep="/")
    large = "backbone/text/embed/table"
    loaded = {path: np.zeros(x.shape, x.dtype) for path, x in shapes.items() if path.startswith("backbone/vision/")}
    programs = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda function, **kw: programs.append(function.__name__) or jit(function, **kw))
    whole = flatten_dict(build.fill_params(model, mesh, 0, loaded), sep="/")
    assert "rest" not in programs
    assert all(whole[path] is x for path, x in loaded.items())
    given = {path: x for path, x in whole.items() if path != large}
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "SIZES", (shapes[large].size - 1,))
        again = flatten_dict(build.fill_params(model, mesh, 0, given), sep="/")
    assert "rest" in programs and again.keys() == whole.keys()
    np.testing.assert_array_equal(again[large], whole[large])
    # On other devices, and of large models, nothing is drawn here.
    monkeypatch.setattr(jax, "jit", lambda function, **_: lambda key: {large: function.__name__})
    for module, name, value in ((build.meshes, "platform", lambda _: "tpu"), (build, "FEW", shapes[large].size)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            made = flatten_dict(build.fill_params(model, mesh, 0, given), sep="/")
        assert made[large] == "rest"
