"""Softmax attention in sixteen bits, with a gradient that keeps what FlashAttention's keeps: queries, keys, values and
results, and of each row of scores the largest and the weights' total (Dao et al. 2022, arXiv:2205.14135, algorithm 4).

Left to automatic differentiation, scores are asked for in float32, so their gradients come in it, and both products
behind these become float32's; and rematerialisation makes the results again although they are known. Rows and columns
are padded to multiples of `MULTIPLE`, as XLA pads operands of products for NVIDIA's matrix units: it copies every array
of scores to do so, and here queries, keys and values are padded, which are smaller. Towers pad their tokens (`spare`),
so that their other products need no padding, either.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MULTIPLE = 8
"""Numbers of 16 bits, of which NVIDIA's matrix units read as many at a time."""
SAVED = "attended"
"""What the gradient needs beside queries, keys and values, by this name, for policies of rematerialisation."""


_CUDNN = contextvars.ContextVar("cudnn", default=False)


@contextlib.contextmanager
def on_cudnn(there: bool) -> Iterator[None]:
    """Whether the devices that what is traced inside is for have cuDNN, for those who leave the choice to `by`."""
    token = _CUDNN.set(there)
    try:
        yield
    finally:
        _CUDNN.reset(token)


def by(kernel: str, shape: tuple[int, ...]) -> bool:
    """Whether `fused` is to compute the attention of queries of `shape` [B, S, N, H], in sixteen bits.

    kernel: xla: never. cudnn: wherever it can. auto: the same on devices that have it (`on_cudnn`).

    Measured on an H200 (benchmarks/results/attention_h200.json) it takes half the time of XLA's kernels at 64 and 72
    channels, but at 256 channels 1.7 times as much with the gradient; and it drops no weights.
    """
    fits = shape[1] > 1 and shape[3] % 8 == 0 and shape[3] <= 128
    return fits and (kernel == "cudnn" or (kernel == "auto" and _CUDNN.get()))


def fused(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array | int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Softmax attention by cuDNN's kernel, which keeps no scores (FlashAttention). A row of `mask` without any True
    makes finite numbers without a meaning.

    Args:
      q: bfloat16 or float16[B, S, N, H], scaled. keys, values: [B, K, T, H] of the same type.
      mask: as `attended` takes it.
    Returns:
      [B, S, N, H] in the type of q.
    """
    rows, columns, lengths = spare(q.shape[1], q.dtype), spare(keys.shape[2], q.dtype), None
    if isinstance(mask, int) or (mask is None and columns):
        count = mask if isinstance(mask, int) else keys.shape[2]
        mask, lengths = None, jnp.full(len(q), count, jnp.int32)
    if mask is not None:  # it becomes a bias, whose gradient asks for even numbers of tokens
        mask = jnp.pad(mask, ((0, 0), (0, rows), (0, columns)))[:, None]
    keys, values = (jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, columns), (0, 0), (0, 0))) for x in (keys, values))
    y = jax.nn.dot_product_attention(
        jnp.pad(q, ((0, 0), (0, rows), (0, 0), (0, 0))),
        *(keys, values),
        mask=mask,
        scale=1.0,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    y = y[:, : q.shape[1]]
    # What comes behind would be made to follow the kernel's own order of axes: a norm over all heads as three kernels,
    # for its rows lie in pieces there, instead of one.
    return jax.lax.optimization_barrier(y.reshape(*y.shape[:2], -1)).reshape(y.shape)


def is_fused(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """A policy of rematerialisation (`jax.checkpoint`) that keeps what `fused` makes by cuDNN: results, and a number of
    each row of scores. Else the kernel would run once more for the gradient. JAX gives them no name for policies, so
    they are known by their primitive's; under another one they are made again, as everything without a name."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Of attention's weights: a share `rate` of them is 0, the others are larger by as much. key: as of jax.random."""

    rate: float
    key: jax.Array

    def __call__(self, weights: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(self.key, 1 - self.rate, weights.shape)
        return weights / (1 - self.rate) * kept  # a selection's zeros would be an array of their own, see `_behind`


def spare(size: int, dtype: jnp.dtype) -> int:
    """Slots to put behind `size` tokens, so that products of them are made of whole multiples; 0 in 32 bits."""
    return -size % MULTIPLE if jnp.dtype(dtype).itemsize == 2 and size > MULTIPLE else 0


def attended(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array | int | None,
    drop: Dropout | None = None,
) -> jax.Array:
    """Sums of values, weighted by the softmax of scores.

    Args:
      q: bfloat16 or float16[B, K, G, S, H], scaled. keys, values: [B, K, T, H] of the same type.
      mask: bool[B, S, T], True = may attend; a number: so many keys, the first ones, are no padding; None = all. A row
        without any True averages all values.
      drop: None: no weights are dropped. The gradient draws the same ones again.
    Returns:
      [B, K, G, S, H] in the type of q.
    """
    shape = q.shape
    length, mask = (mask, None) if isinstance(mask, int) else (keys.shape[2], mask)
    rows, columns = spare(shape[3], q.dtype), spare(keys.shape[2], q.dtype)
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, rows), (0, columns)))
    keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, columns), (0, 0))) for x in (keys, values))
    # One axis for all rows that share keys: products over two would be made of transposed copies.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, rows), (0, 0))).reshape(*shape[:2], -1, shape[4])
    key, rate = (None, 0.0) if drop is None else (drop.key, drop.rate)
    y = _attended(length, rate, q, keys, values, mask, key)
    return y.reshape(*shape[:3], -1, shape[4])[..., : shape[3], :]


def _product(x: jax.Array, y: jax.Array, over: tuple[int, int], dtype: Any = None) -> jax.Array:
    """The products, over one axis of each, of the matrices at the ends of two arrays [B, K, ., .]."""
    axes = (((over[0],), (over[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=dtype)


def _behind(first: jax.Array, *others: Any) -> tuple[jax.Array, ...]:
    """`others` as arrays that are known no sooner than `first`. For the gradient of a loop over layers JAX makes
    whatever no layer changes in front of it: masks and numbers, each as large as all scores (a selection's operands are
    of one shape), written there and read in every turn. What is behind something of the layer is made where it is used,
    inside of the kernel that uses it."""
    return jax.lax.optimization_barrier((first, *(jnp.asarray(x) for x in others)))[1:]


def _by_mask(mask: jax.Array, x: jax.Array, otherwise: jax.Array | float) -> jax.Array:
    """`x` [B, K, G * S, T] where `mask` [B, S, T] says so; otherwise: a number, or as the mask."""
    parts = x.reshape(*x.shape[:2], -1, *mask.shape[1:])
    otherwise = jnp.asarray(otherwise, x.dtype)
    return jnp.where(mask[:, None, None], parts, otherwise[:, None, None] if otherwise.ndim else otherwise).reshape(
        x.shape
    )


def _scores(q: jax.Array, keys: jax.Array) -> jax.Array:
    """float32[B, K, G * S, T], not masked: whoever reads them masks what it makes of them. Masked ones would be
    another array to be written and read."""
    return _product(q, keys, (3, 3), jnp.float32)


def _largest(scores: jax.Array, count: int, mask: jax.Array | None) -> jax.Array:
    if mask is not None:
        scores = _by_mask(mask, scores, _behind(mask, jnp.finfo(scores.dtype).min)[0])
    return scores[..., :count].max(-1, keepdims=True)


def _weights(scores: jax.Array, largest: jax.Array, count: int, mask: jax.Array | None) -> jax.Array:
    """Not yet divided by their total."""
    weights, is_key = jnp.exp(scores - largest), jnp.arange(scores.shape[-1]) < count
    if mask is None:
        if count == scores.shape[-1]:
            return weights
        is_key, zero = _behind(largest, is_key, jnp.zeros((), weights.dtype))
        return jnp.where(is_key, weights, zero)
    return _by_mask(mask, weights, ~mask.any(-1, keepdims=True) & is_key)  # a row that sees nothing averages all


def _dropped(weights: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    return weights if key is None else Dropout(rate, key)(weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attended(count: int, rate: float, *arrays: jax.Array | None) -> jax.Array:
    """[B, K, G * S, H]. Of the keys, `count` are no padding. arrays: q [B, K, G * S, H], keys, values, mask, key.

    Where no gradient is asked for, weights are divided by their total before their product: XLA makes one kernel for
    GPUs of that, which reads scores once, and three of what `_forward` does.
    """
    q, keys, values, mask, key = arrays
    scores, is_key = _scores(q, keys), jnp.arange(keys.shape[2]) < count
    if mask is not None:
        scores = _by_mask(mask, scores, jnp.finfo(scores.dtype).min)  # a row that sees nothing averages all
    if count < keys.shape[2]:
        scores = jnp.where(is_key, scores, -jnp.inf)
    weights = _dropped(jax.nn.softmax(scores, axis=-1), rate, key)
    return _product(weights.astype(q.dtype), values, (3, 2))


def _forward(
    count: int,
    rate: float,
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array | None,
    key: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    scores = _scores(q, keys)
    here = None if mask is None else _behind(q, mask)[0]
    largest = _largest(scores, count, here)
    weights = _weights(scores, largest, count, here)
    total = weights.sum(-1, keepdims=True)
    y = (_product(_dropped(weights, rate, key).astype(q.dtype), values, (3, 2)) / total).astype(q.dtype)
    y, largest, total = (checkpoint_name(found, SAVED) for found in (y, largest, total))
    return y, (q, keys, values, mask, key, y, largest, total)


def _backward(
    count: int, rate: float, saved: tuple[jax.Array | None, ...], dy: jax.Array
) -> tuple[jax.Array | None, ...]:
    q, keys, values, mask, key, y, largest, total = saved
    weights = _weights(_scores(q, keys), largest, count, mask)  # of 1 / total dy takes care
    dy = (dy / total).astype(q.dtype)
    dweights = _dropped(_product(dy, values, (3, 3)).astype(jnp.float32), rate, key)
    mean = (dy.astype(jnp.float32) * y).sum(-1, keepdims=True)
    dscores = weights * (dweights - mean)
    dscores = (dscores if mask is None else _by_mask(mask, dscores, 0)).astype(q.dtype)
    dvalues = _product(_dropped(weights, rate, key).astype(q.dtype), dy, (2, 2))
    return _product(dscores, keys, (3, 2)), _product(dscores, q, (2, 2)), dvalues, None, None


_attended.defvjp(_forward, _backward)
