"""Normalisation layers. Statistics and result are computed in float32, then cast back to the type of the input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

NormKind = Literal["layer", "layer_no_bias", "rms", "rms_plus_one"]
NORMS: tuple[NormKind, ...] = ("layer", "layer_no_bias", "rms", "rms_plus_one")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normalized(epsilon: float, is_centered: bool, x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis; not centered: the mean is taken as 0.

    Its gradient keeps x and two numbers of each row. Automatic differentiation keeps arrays as large as x, and reads
    and writes some twenty of them: a tenth of the twin's training step on a CPU.

    Args:
      x: float[..., D]; computed in float32. scale: float32[D]. bias: float32[D], or None.
    Returns:
      As x, in its type.
    """
    return _forward(epsilon, is_centered, x, scale, bias)[0]


def _forward(
    epsilon: float, is_centered: bool, x: jax.Array, scale: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True) if is_centered else None
    y = y - mean if is_centered else y
    factor = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    y = y * factor * scale
    return (y if bias is None else y + bias).astype(x.dtype), (x, mean, factor, scale, bias)


def _backward(
    epsilon: float, is_centered: bool, saved: tuple[Any, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, mean, factor, scale, bias = saved
    y, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    y = (y - mean if is_centered else y) * factor
    product, size = dy * y, x.shape[-1]
    dx = dy * scale - y * (_of_rows(product, scale) / size)
    if is_centered:
        dx -= _of_rows(dy, scale) / size
    return (factor * dx).astype(x.dtype), _of_columns(product), None if bias is None else _of_columns(dy)


normalized.defvjp(_forward, _backward)


def _plain(epsilon: float, is_centered: bool, x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    return _forward(epsilon, is_centered, x, scale, bias)[0]


def _chosen(x: jax.Array) -> Callable[..., jax.Array]:
    """`normalized`, or the same differentiated automatically: in sixteen bits, which is for GPUs and TPUs, XLA puts
    most of that into the kernels around it, and the written gradient has more to read
    (benchmarks/results/plans/cudnn_before_after.json)."""
    return _plain if jnp.dtype(x.dtype).itemsize == 2 else normalized


def _of_rows(x: jax.Array, weights: jax.Array) -> jax.Array:
    """float32[..., 1]: sums of float32[..., D], weighted by float32[D]. XLA's products are quicker than its sums on
    CPUs; elsewhere they may be rounded to fewer bits."""
    return jax.lax.platform_dependent(
        *(x, weights),
        cpu=lambda x, weights: (x @ weights)[..., None],
        default=lambda x, weights: (x * weights).sum(-1, keepdims=True),
    )


def _of_columns(x: jax.Array) -> jax.Array:
    """float32[D]: sums of float32[..., D] over all rows."""

    def by_product(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        return jnp.ones(len(rows), x.dtype) @ rows

    return jax.lax.platform_dependent(x, cpu=by_product, default=lambda x: x.sum(tuple(range(x.ndim - 1))))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis (Ba et al. 2016)."""

    epsilon: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)), shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",)), shape)
        return _chosen(x)(self.epsilon, True, x, scale, bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean of squares + epsilon) * scale over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

    With `plus_one` the stored scale is the distance from one, as Gemma has it.
    """

    epsilon: float
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros_init() if self.plus_one else nn.initializers.ones_init()
        scale = self.param("scale", nn.with_logical_partitioning(init, ("norm",)), (x.shape[-1],))
        return _chosen(x)(self.epsilon, False, x, scale + 1 if self.plus_one else scale, None)


def make_norm(kind: NormKind, epsilon: float, name: str | None = None) -> nn.Module:
    """The norm a tower's configuration names."""
    if kind in ("layer", "layer_no_bias"):
        return LayerNorm(epsilon, use_bias=kind == "layer", name=name)
    return RMSNorm(epsilon, plus_one=kind == "rms_plus_one", name=name)
