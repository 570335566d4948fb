"""Traffic between devices stays what it is when there are more of them. Each test is a process with eight of them."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.nn import linear
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel import program_costs
from tests.processes import run_python

WORDS, WIDTH, LENGTH, ROWS = 4096, 64, 8, 4


def lookup(sizes: tuple[int, int, int]) -> tuple[meshes.Mesh, jax.stages.Wrapped, tuple[jax.ShapeDtypeStruct, ...]]:
    """The gradient of a look-up by its table, of ROWS prompts on each device; it takes the table, ids and weights."""
    mesh, embed = meshes.make_mesh(sizes, jax.devices()[: int(np.prod(sizes))]), linear.Embed(WORDS, WIDTH)
    batch, ids = ROWS * sizes[0] * sizes[1], jnp.zeros((1, 1), jnp.int32)
    shapes, places = meshes.abstract_params(lambda: embed.init(jax.random.key(0), ids), mesh)

    def loss(params, ids, weights):
        with meshes.constrained(mesh):
            return (embed.apply(params, ids) * weights).sum()

    split = meshes.batched(mesh)
    gradient = jax.jit(jax.grad(loss), in_shardings=(places, split, split), out_shardings=places)
    leaf = jax.ShapeDtypeStruct
    return mesh, gradient, (shapes, leaf((batch, LENGTH), jnp.int32), leaf((batch, LENGTH, WIDTH), jnp.float32))


def held(sizes: tuple[int, int, int]) -> dict[tuple, int]:
    """(kind, axes, type) -> bytes that one device has of a collective's operand or, where it gathers, result."""
    mesh, gradient, given = lookup(sizes)
    found: dict[tuple, int] = {}
    for x in program_costs.of_text(gradient.lower(*given).compile().as_text(), mesh.size).collectives:
        key = (x.kind, x.axes(dict(mesh.shape)), x.dtype)
        found[key] = found.get(key, 0) + x.times * x.operand * (x.ways if x.kind == "all-gather" else 1)
    return found


def assert_the_same_traffic() -> None:
    # Left to itself XLA gathered the gradients of all prompts on every device: 32 KiB here with four devices, 64 with
    # eight, 252 MB of PaliGemma's on 64 chips.
    four, eight = held((2, 2, 1)), held((4, 2, 1))
    assert four == eight
    assert not any("data" in axes and kind != "all-reduce" for kind, axes, _ in eight)
    # The one thing that goes over copies of the model is the device's own part of the table's gradient.
    assert eight["all-reduce", ("data",), "f32"] == WORDS * WIDTH // 2 * 4


def assert_the_same_gradient(sizes: tuple[int, int, int]) -> None:
    _, gradient, (shapes, ids, weights) = lookup(sizes)
    rng = np.random.default_rng(0)
    words = rng.integers(0, WORDS, ids.shape, np.int32)
    words[:, 1] = words[:, 0]  # twice the same
    factors = rng.normal(size=weights.shape).astype(np.float32)
    expected = np.zeros((WORDS, WIDTH))
    np.add.at(expected, words, factors)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    np.testing.assert_allclose(gradient(params, words, factors)["params"]["table"], expected, atol=1e-5)


def assert_the_same_rows(ids: tuple[int, ...], width: int, *, splits: bool) -> None:
    """On two copies of two halves of a table. splits: whether the look-up says where its ids and rows lie."""
    mesh, embed = meshes.make_mesh((2, 2, 1), jax.devices()[:4]), linear.Embed(16, width)
    words = np.arange(np.prod(ids), dtype=np.int32).reshape(ids) % 16
    params = meshes.unbox(embed.init(jax.random.key(0), words))

    def look(params, words):
        with meshes.constrained(mesh):
            return embed.apply(params, words)

    look = jax.jit(look)
    np.testing.assert_array_equal(look(params, words), params["params"]["table"][words])
    assert ("sharding_constraint" in str(jax.make_jaxpr(look)(params, words))) == splits, (ids, width)


def test_the_gradient_of_a_lookup_costs_a_device_the_same_however_many_copies_of_the_model_there_are():
    code = "from tests.parallel import test_collectives as t; t.assert_the_same_traffic()"
    run_python("-c", code, JAX_NUM_CPU_DEVICES="8")


def test_a_split_lookup_has_the_rows_and_the_gradient_of_a_whole_one_and_what_does_not_divide_is_not_split():
    code = """
    from tests.parallel import test_collectives as t
    t.assert_the_same_rows((4, 5), 6, splits=True)
    t.assert_the_same_rows((3, 5), 6, splits=False)  # three prompts on four devices
    t.assert_the_same_rows((4, 5), 7, splits=False)  # two halves of seven columns
    t.assert_the_same_rows((4,), 6, splits=False)  # words of no prompt
    for sizes in ((2, 2, 2), (8, 1, 1), (1, 8, 1)):
        t.assert_the_same_gradient(sizes)
    """
    run_python("-c", inspect.cleandoc(code), JAX_NUM_CPU_DEVICES="8")
