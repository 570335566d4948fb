"""Matrix products. `Kernel` says how a matrix is stored; `Einsum`, `Dense` and `Embed` are all that multiply by one."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Storage = Literal["float", "int8", "w8a8"]
AttentionKernel = Literal["auto", "xla", "cudnn"]
"""See `Kernel`."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters: kernel + scale * lora_a @ lora_b. rank 0: none.

    kind: lora: scale = alpha / rank (Hu et al. 2021, arXiv:2106.09685). rslora: alpha / sqrt(rank), which keeps large
      ranks learning (Kalajdzievski 2023, arXiv:2312.03732). dora: as lora, and each output channel has a length of its
      own (Liu et al. 2024, arXiv:2402.09353): `lora_m` times the kernel's own, whatever the adapters add.
    dropout: share of the adapters' inputs that is dropped in training.
    """

    rank: int = 0
    alpha: float = 16.0
    kind: Literal["lora", "rslora", "dora"] = "lora"
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """Factor of lora_a @ lora_b."""
        return self.alpha / (self.rank**0.5 if self.kind == "rslora" else self.rank)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How matrices are stored, with or without low-rank adapters beside them, and how layers compute.

    float: float32, cast to the type of the activations where it is used.
    int8: whole numbers, and beside them `scale`, one float32 per output channel: matrix = int8 * scale. Initialised as
      zeros; the values come from `weights.quantize`. They have no gradient, adapters do (Dettmers et al. 2023,
      arXiv:2305.14314).
    w8a8: stored as int8, and what they are multiplied by is rounded to int8, too, at every product: each token has a
      scale of its own, its largest value / 127 (dynamic, per token; Yao et al. 2022, arXiv:2206.01861). Sums are
      int32. For control alone: rounding has no gradient.
    """

    storage: Storage = "float"
    lora: Lora = Lora()
    joint: bool = False
    """Queries, keys and values of self-attention come from one matrix, `qkv`; see `nn.attention.joint`."""
    attention: AttentionKernel = "auto"
    """What computes attention in sixteen bits; see `nn.attended.by`."""

    def as_float(self) -> Kernel:
        """The same with matrices in floating point, for those in which rounding costs much and saves little."""
        return dataclasses.replace(self, storage="float")

    def matrix(
        self,
        module: nn.Module,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        init: nn.initializers.Initializer,
        *,
        channels: tuple[int, ...],
        name: str = "kernel",
    ) -> Matrix:
        """Make the parameters of a matrix in the calling module, or find them there.

        They are `name`, and where they apply `scale`, `lora_a` (contracted axes, R), `lora_b` (R, added axes) and
        `lora_m` (added axes), which share the prefix of `name` ("input_kernel": "input_scale").

        Args:
          module: the calling one.
          axes: logical name of each axis; None is never split over devices.
          channels: the axes that multiplying adds to the output; the last ones, unless there are no adapters.
        """
        prefix, split, lora = name[: name.rfind("_") + 1], min(channels), self.lora

        def make(name: str, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
            return module.param(name, nn.with_logical_partitioning(init, axes), shape)

        if self.storage != "float":
            values = make(name, _zeros_int8, shape, axes)
            # 1 along contracted axes: the matrix is the product, and what was contracted is seen from the shapes.
            is_channel = [axis in channels for axis in range(len(shape))]
            sizes = tuple(size if keep else 1 for size, keep in zip(shape, is_channel))
            names = tuple(axis if keep else None for axis, keep in zip(axes, is_channel))
            scale = make(f"{prefix}scale", nn.initializers.ones_init(), sizes, names)
        else:
            values, scale = make(name, init, shape, axes), None
        rounds = self.storage == "w8a8"
        if lora.rank == 0:
            return Matrix(values, scale, channels, rounds=rounds)
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=tuple(range(split)), out_axis=-1
        )
        a = make(f"{prefix}lora_a", init, (*shape[:split], lora.rank), (*axes[:split], "lora"))
        # Zero, so that training starts from the model without adapters.
        b = make(f"{prefix}lora_b", nn.initializers.zeros_init(), (lora.rank, *shape[split:]), ("lora", *axes[split:]))
        ones = nn.initializers.ones_init()
        gain = make(f"{prefix}lora_m", ones, shape[split:], axes[split:]) if lora.kind == "dora" else None
        key = module.make_rng("dropout") if lora.dropout and module.has_rng("dropout") else None
        return Matrix(values, scale, channels, Adapters(a, b, lora.scale, gain, lora.dropout, key), rounds)


def _zeros_int8(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.int8)


class Adapters(NamedTuple):
    """What stands beside a matrix (see `Lora`). gain: `lora_m`, or None. key: of dropout; None: nothing is dropped."""

    a: jax.Array
    b: jax.Array
    scale: float
    gain: jax.Array | None = None
    dropout: float = 0.0
    key: jax.Array | None = None

    def dropped(self, x: jax.Array) -> jax.Array:
        """The adapters' inputs, some of them 0 in training and the others larger by as much."""
        if self.key is None:
            return x
        keep = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)

    def lengths(self, kernel: jax.Array) -> jax.Array:
        """What each output channel is multiplied by, for its length to be `gain` times that of `kernel`. Only `gain`
        has a gradient, as DoRA's authors have it."""
        contracted = tuple(range(self.a.ndim - 1))
        kernel = kernel.astype(jnp.float32)
        adapted = kernel + self.scale * jnp.tensordot(self.a, self.b, axes=1).astype(jnp.float32)
        before, after = (jnp.sqrt(jnp.sum(x * x, axis=contracted)) for x in (kernel, adapted))
        return self.gain * jax.lax.stop_gradient(before / jnp.maximum(after, 1e-12))


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Parameters of one matrix, ready to be multiplied by; made by `Kernel.matrix`.

    values: float or int8. scale: float32, of size 1 along contracted axes, or None. channels: the other axes.
    rounds: what is multiplied is rounded to int8 before (w8a8); adapters see it unrounded.
    """

    values: jax.Array
    scale: jax.Array | None
    channels: tuple[int, ...]
    adapters: Adapters | None = None
    rounds: bool = False

    def einsum(self, equation: str, x: jax.Array, dtype: Any = None) -> jax.Array:
        """einsum(equation, x, matrix), computed in the type of `x`; the result has this type or `dtype`.

        The output ends in the axes that the matrix adds, in its order. Letter R is the adapters'.
        """
        if self.scale is None:
            y = jnp.einsum(equation, x, self.values.astype(x.dtype), preferred_element_type=dtype)
        else:
            # After the product, where there are fewest numbers to scale; XLA fuses the cast into what reads the matrix.
            # int8 fits into every floating type without rounding. What adapters are trained beside is kept for the
            # backward pass, so it is rounded once more there to the type of the activations, at half the memory.
            whole = jnp.float32 if self.adapters is None else x.dtype
            y = (
                self._einsum_int8(equation, x)
                if self.rounds
                else jnp.einsum(equation, x, self.values.astype(x.dtype), preferred_element_type=whole)
            )
            y = (y * self.scale.reshape([self.scale.shape[axis] for axis in self.channels])).astype(dtype or x.dtype)
        if self.adapters is not None:
            a, b = (adapter.astype(x.dtype) for adapter in self.adapters[:2])
            inputs, letters, outputs = re.split(",|->", equation)
            split = min(self.channels)
            shared = "".join(letter for letter in inputs if letter in outputs)
            low = jnp.einsum(f"{inputs},{letters[:split]}R->{shared}R", self.adapters.dropped(x), a)
            y += self.adapters.scale * jnp.einsum(f"{shared}R,R{letters[split:]}->{outputs}", low, b)
            if self.adapters.gain is not None:
                kernel = self.values if self.scale is None else self.values * self.scale
                y = (y * self.adapters.lengths(kernel)).astype(y.dtype)
        return y

    def _einsum_int8(self, equation: str, x: jax.Array) -> jax.Array:
        """float32: the product of int8 tokens and the int8 matrix, summed in int32, times the tokens' scales."""
        inputs, letters, _ = re.split(",|->", equation)
        contracted = [letter for axis, letter in enumerate(letters) if axis not in self.channels]
        # Counted from the right where an ellipsis stands before them.
        axes = tuple(inputs.index(letter) - (len(inputs) if "..." in inputs else 0) for letter in contracted)
        rounded, scale = quantize_tokens(x, axes)
        y = jnp.einsum(equation, rounded, self.values, preferred_element_type=jnp.int32)
        kept = jnp.squeeze(scale, axes)
        return y.astype(jnp.float32) * kept.reshape(*kept.shape, *[1] * len(self.channels))

    def rows(self, ids: jax.Array) -> jax.Array:
        """matrix[ids] along the first axis, which has a scale each: int32[...] -> float[..., D]; NaN outside."""
        within, split = _looked_up_within(ids.shape, self.values.shape)
        ids = within(ids)
        rows = jnp.take(self.values, ids, axis=0)
        rows = rows if self.scale is None else rows * jnp.take(self.scale, ids, axis=0)
        return split(rows)


def _looked_up_within(ids: tuple[int, ...], table: tuple[int, ...]) -> tuple[Callable, Callable]:
    """How a look-up in a table [V, D] that is split over devices stays among those that split it: functions for the ids
    before it and for the rows behind it.

    Devices that hold parts of D for each other exchange their ids, look up their part for all of them, and exchange the
    parts for whole rows of their own. The gradient goes the same way back, every device adds it to its own part of
    the table, and the parts are added over the copies of the table. Left to itself, XLA may send the rows' gradients of
    all copies to every device: traffic that grows with the number of devices.
    """
    batch, embed = (_mesh_axes(name) for name in ("batch", "embed"))
    sizes = jax.sharding.get_abstract_mesh().shape
    ways = [math.prod(sizes.get(axis, 1) for axis in axes) for axes in (batch, embed)]
    if len(ids) < 2 or not batch or ids[0] % ways[0] or table[-1] % ways[1]:
        return lambda x: x, lambda x: x
    copies, rest = tuple(axis for axis in batch if axis not in embed), [None] * (len(ids) - 1)
    place = jax.lax.with_sharding_constraint

    def split(rows: jax.Array) -> jax.Array:
        rows = place(rows, PartitionSpec(copies, *rest, embed))
        return place(rows, PartitionSpec(batch, *rest, None))

    return lambda x: place(x, PartitionSpec(copies, *rest)), split


def _mesh_axes(name: str) -> tuple[str, ...]:
    """Mesh axes of a logical one by the rules under which a program is traced; none outside of a mesh."""
    axes = dict(nn.get_logical_axis_rules()).get(name) or ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def quantize_tokens(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """float[...] -> int8[...] and float32 scales, of size 1 along `axes`, along which the largest value is 127.

    x = int8 * scale, at most scale / 2 away from what it was; tokens of zeros stay zeros, tokens that are not finite
    have a scale that is not, so that their products are not finite either.
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axes, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x / scale).astype(jnp.int8), scale


class Einsum(nn.Module):
    """einsum(equation, x, kernel) + bias, computed in the type of `x`.

    The kernel lists the axes it contracts with `x` first, then the axes it adds: "BSD,DNH->BSNH", "BSNH,NHD->BSD".
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical name of each kernel axis; None is never split over devices."""
    use_bias: bool = False
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, letters, outputs = re.split(",|->", self.equation)
        split = sum(letter not in outputs for letter in letters)  # axes before it are contracted, the others added
        if any(letter in outputs for letter in letters[:split]) or not outputs.endswith(letters[split:]):
            raise ValueError(
                f"Einsum {self.equation!r}: kernel axes must be the contracted ones, then the output's last ones."
            )
        contracted, added = tuple(range(split)), tuple(range(split, len(letters)))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=contracted, out_axis=added)
        y = self.kernel.matrix(self, self.shape, self.axes, init, channels=added).einsum(self.equation, x)
        if not self.use_bias:
            return y
        bias = _bias(self.param, self.shape[split:], self.axes[split:], x)
        # Along one axis: over several, XLA for GPUs writes an array of biases as large as the result for the product to
        # read; along one they are a part of the product's kernel.
        return (y.reshape(*y.shape[: y.ndim - bias.ndim], -1) + bias.reshape(-1)).reshape(y.shape)


class Dense(nn.Module):
    """x @ kernel + bias over the last axis, computed in the type of `x`."""

    features: int
    axes: tuple[str | None, str | None]
    """Logical names of the kernel's axes, input and output; the bias has the second."""
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float[..., features]."""
        shape = (x.shape[-1], self.features)
        matrix = self.kernel.matrix(self, shape, self.axes, self.kernel_init, channels=(1,))
        y = matrix.einsum("...D,DF->...F", x)
        return y + _bias(self.param, shape[1:], self.axes[1:], x) if self.use_bias else y


def _bias(param: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...], x: jax.Array) -> jax.Array:
    return param("bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), axes), shape).astype(x.dtype)


class Embed(nn.Module):
    """Token table: look-up going in, tied logits coming out. Without adapters, whatever `kernel` says."""

    vocab_size: int
    width: int
    kernel: Kernel = Kernel()

    def setup(self):
        plain = dataclasses.replace(self.kernel, lora=Lora())
        init, shape = nn.initializers.normal(self.width**-0.5), (self.vocab_size, self.width)
        self.matrix = plain.matrix(self, shape, ("vocab", "embed"), init, channels=(0,), name="table")

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32[...] -> float32[..., D]. An id outside the table gives NaN."""
        return self.matrix.rows(ids)

    def logits(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float32[..., V]."""
        return self.matrix.einsum("...D,VD->...V", x, dtype=jnp.float32)


def merge_lora(params: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
    """The same network without adapters: they are multiplied out into the kernels beside them.

    Args:
      params: nested dict of parameters, layers stacked or not.
      lora: what the modules were built with; its scale is not stored in the parameters.
    Raises:
      ValueError: a kernel is int8, which the product does not fit into: merge first, quantise afterwards.
    """
    merged = {name: merge_lora(value, lora) if isinstance(value, Mapping) else value for name, value in params.items()}
    for prefix in [name.removesuffix("lora_a") for name in merged if name.endswith("lora_a")]:
        a, b, kernel = merged.pop(f"{prefix}lora_a"), merged.pop(f"{prefix}lora_b"), merged[f"{prefix}kernel"]
        if not jnp.issubdtype(kernel.dtype, jnp.floating):
            raise ValueError(
                f"{prefix}kernel {list(kernel.shape)} is {kernel.dtype}: adapters are merged into float kernels; "
                "merge before quantising."
            )
        gain = merged.pop(f"{prefix}lora_m", None)
        merge = functools.partial(_merged, scale=lora.scale)
        if a.ndim + b.ndim - 2 > kernel.ndim:  # besides R, all share the axis of stacked layers
            merge = jax.vmap(merge)
        merged[f"{prefix}kernel"] = merge(kernel, a, b, gain)
    return merged


def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, gain: jax.Array | None, *, scale: float) -> jax.Array:
    merged = kernel + scale * jnp.tensordot(a, b, axes=1)
    return merged if gain is None else merged * Adapters(a, b, scale, gain).lengths(kernel)
