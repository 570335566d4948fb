"""Attention in sixteen bits: the values and gradients of plain attention, from fewer and cheaper products."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.nn import attended as kernels
from robovlms_jax.nn import attention, stack
from robovlms_jax.nn.attended import Dropout, attended
from robovlms_jax.parallel import gpu


def drawn(batch, heads, group, rows, columns, masked, seed=0):
    """q float32[B, S, N, H], keys and values [B, K, T, H], a mask with a row that sees nothing, and a cotangent."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, rows, heads * group, 4), (batch, heads, columns, 4), (batch, heads, columns, 4)]
    q, keys, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    mask = jnp.asarray(rng.random((batch, rows, columns)) < 0.7).at[0, 0].set(False) if masked else None
    return q, keys, values, mask, jnp.asarray(rng.normal(size=q.shape), jnp.float32)


def own(q, keys, values, mask, drop=None):
    heads = keys.shape[1]
    grouped = jnp.swapaxes(q, 1, 2).reshape(q.shape[0], heads, -1, q.shape[1], q.shape[3])
    return jnp.moveaxis(attended(grouped, keys, values, mask, drop), 3, 1).reshape(q.shape)


def with_gradients(function, arrays, cotangent):
    def both(arrays):
        y, back = jax.vjp(function, *arrays)
        return y, *back(cotangent.astype(y.dtype))

    return [np.asarray(x, np.float32) for x in jax.jit(both)(arrays)]


@pytest.mark.parametrize(
    ("sizes", "masked", "rate"),
    [((2, 2, 2, 13, 21), True, 0.0), ((1, 2, 1, 1, 9), True, 0.0), ((2, 3, 2, 16, 16), False, 0.4)],
)
def test_values_and_gradients_are_those_of_plain_attention(sizes, masked, rate):
    # In float32, where rounding hides no mistake: rows and columns that are padded and not, keys that queries share,
    # weights that are dropped (in a size without padding, so that both draw the same).
    *arrays, mask, cotangent = drawn(*sizes, masked)
    key = jax.random.PRNGKey(0)
    drops = [Dropout(rate, key), Dropout(rate, jax.random.split(key, 1)[0])] if rate else [None, None]
    plain = with_gradients(lambda q, k, v: attention.attend(q, [(k, v)], mask, drop=drops[0]), arrays, cotangent)
    found = with_gradients(lambda q, k, v: own(q, k, v, mask, drops[1]), arrays, cotangent)
    for x, y in zip(found, plain, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    # Where no gradient is asked for, another program makes the values.
    np.testing.assert_allclose(jax.jit(lambda *x: own(*x, mask, drops[1]))(*arrays), plain[0], atol=1e-5)


def test_gradients_in_bfloat16_are_as_near_the_exact_ones_as_those_of_products_in_float32():
    *arrays, mask, cotangent = drawn(2, 4, 1, 61, 61, True)
    half = [x.astype(jnp.bfloat16) for x in arrays]
    attend = lambda q, k, v: attention.attend(q, [(k, v)], mask)  # noqa: E731
    exact = with_gradients(attend, [x.astype(jnp.float32) for x in half], cotangent.astype(jnp.bfloat16))
    # With a bias attention is differentiated automatically.
    biased = lambda q, k, v: attention.attend(q, [(k, v)], mask, jnp.zeros((1, 4, 61, 61)))  # noqa: E731
    automatic = with_gradients(biased, half, cotangent)
    for x, y, z in zip(with_gradients(attend, half, cotangent), automatic, exact, strict=True):
        assert np.abs(x - z).mean() < 1.25 * np.abs(y - z).mean() < 0.05 * np.abs(z).mean()


def products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield [x.aval.dtype for x in equation.invars]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_no_product_is_made_of_float32_and_none_again_that_the_gradient_does_not_need():
    # Two forward, and behind them: scores again, and the gradients of weights, queries, keys and values.
    *arrays, mask, _ = drawn(1, 2, 1, 16, 16, True)
    layer = jax.checkpoint(lambda q, k, v: attention.attend(q, [(k, v)], mask).sum(), policy=stack.POLICIES["dots"])
    traced = jax.make_jaxpr(jax.grad(layer, (0, 1, 2)))(*[x.astype(jnp.bfloat16) for x in arrays])
    assert list(products(traced.jaxpr)) == [[jnp.bfloat16, jnp.bfloat16]] * 7


def constants_of_loops(jaxpr):
    """Shapes of what each loop that is traced reads in every turn and never changes."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            settings = equation.params
            # Since jax 0.11.2 a tree of three: constants, what is carried, what is cut up.
            constants = settings["num_consts"] if "num_consts" in settings else len(settings["ft_in"].unpack()[0])
            yield [x.aval.shape for x in equation.invars[:constants]]


@pytest.mark.parametrize("masked", [True, False])
def test_loops_over_layers_read_no_constants_as_large_as_scores(masked):
    # JAX makes what no layer changes in front of the loop. Fails where masks or the numbers beside them are broadcast
    # there, each an array that a GPU reads from memory in every turn.
    rows, heads = 45, 4

    def loss(layers, x, mask, keys):
        def turn(x, layer):
            weights, key = layer
            q = (x @ weights).reshape(3, rows, heads, 8)
            k = jnp.swapaxes(q, 1, 2)
            y = attention.attend(q, [(k, k)], mask, drop=Dropout(0.1, key))
            return y.reshape(x.shape), None

        turn = jax.checkpoint(turn, prevent_cse=False, policy=stack.POLICIES["dots"])
        return jax.lax.scan(turn, x, (layers, jax.random.split(keys, len(layers))))[0].astype(jnp.float32).sum()

    layers, x = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in [(6, 32, 32), (3, rows, 32)])
    mask = jax.ShapeDtypeStruct((3, rows, rows), bool) if masked else None
    jaxpr = jax.make_jaxpr(jax.grad(loss))(layers, x, mask, jax.random.key(0)).jaxpr
    loops = list(constants_of_loops(jaxpr))
    assert len(loops) == 2
    assert max(math.prod(shape) for shapes in loops for shape in shapes) < 3 * heads * rows * rows


HERE = "cudnn" if jax.default_backend() == "gpu" else "xla"
"""What computes the library's attention where the tests run; what is handed to it is the same."""


@pytest.mark.parametrize("masked", ["not", "rows", "columns"])
def test_the_librarys_attention_is_ours_with_its_gradient(masked):
    # Fails if keys and values are handed over in another order, if padding is attended to, or a mask is lost.
    rows, columns = (13, 13) if masked == "not" else (13, 21)
    rng = np.random.default_rng(0)
    shapes = [(2, rows, 4, 64), (2, 2, columns, 64), (2, 2, columns, 64), (2, rows, 4, 64)]
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    q, mask = q / 8, None
    if masked != "not":
        mask = jnp.asarray(rng.random((2, rows, columns)) < 0.7).at[:, :, 0].set(True) if masked == "rows" else 17
    exact = with_gradients(
        lambda q, k, v: attention.attend(q, [(k, v)], mask), [x.astype(jnp.float32) for x in (q, k, v)], cotangent
    )
    found = with_gradients(lambda q, k, v: kernels.fused(q, k, v, mask, HERE), [q, k, v], cotangent)
    for x, y in zip(found, exact, strict=True):
        np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max())


def test_what_follows_the_librarys_kernel_does_not_follow_its_order_of_axes():
    # Rows of all heads behind a barrier, padded tokens left out. Fails without it: a norm became three kernels.
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in [(2, 13, 4, 64), (2, 4, 21, 64)])
    traced = jax.make_jaxpr(lambda q, k: kernels.fused(q, k, k, 17, "xla"))(q, k)
    barriers = [x.outvars[0].aval.shape for x in traced.eqns if x.primitive.name == "optimization_barrier"]
    assert barriers == [(2, 13, 4 * 64)] and traced.out_avals[0].shape == q.shape


@pytest.mark.parametrize(("remat", "forward"), [("dots", 1), ("full", 2)])
def test_the_librarys_kernel_runs_once_more_for_the_gradient_only_where_nothing_is_kept(remat, forward):
    def layer(q, k, v):
        return kernels.fused(jnp.sin(q), k, v, 257).astype(jnp.float32).sum()

    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in [(2, 264, 4, 64), *[(2, 4, 264, 64)] * 2]]
    gradient = jax.jit(jax.grad(jax.checkpoint(layer, policy=stack.POLICIES[remat]), (0, 1, 2)))
    with gpu.cudnn_of_described():
        traced = gradient.trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
    calls = [str(traced.jaxpr).count(f"dot_product_attention_{way}_wrapper[") for way in ("fwd", "bwd")]
    assert calls == [forward, 1]


def test_who_computes_attention_is_said_or_left_to_the_device():
    layer, wide, single = (2, 13, 4, 64), (2, 13, 4, 256), (2, 1, 4, 64)
    assert kernels.by("cudnn", layer) and not kernels.by("xla", layer) and not kernels.by("auto", layer)
    with kernels.on_cudnn(True):
        assert kernels.by("auto", layer) and not kernels.by("xla", layer)
        assert not kernels.by("auto", wide) and not kernels.by("auto", single)
