"""How much memory a training step will take on each device, before anything is compiled.

Parameters, optimizer state and gradients follow from shapes and sharding rules and are exact. Activations are counted
on the jaxpr of the gradient, traced for the part of a micro-batch that one device works on: values live from where they
are made to their last reader, elementwise operations are part of whoever reads them (as XLA fuses them), a loop keeps
what it stacks. That is a model of a compiler, not the compiler; `of_program` is what XLA says once it has compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from robovlms_jax.training import step
from robovlms_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one device while a training step runs.

    parameters, optimizer: as long as the run lasts. gradients: of trainable parameters; twice with accumulation, where
    the sum waits while a micro-batch's own are made. activations: the most that is alive between forward and backward
    pass, layers' gathered weights included. batch: one batch as the host delivers it. host: what waits in the host's
    memory for the backward pass, no part of the total.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    batch: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.activations + self.batch

    def parts(self) -> dict[str, int]:
        """By name, the total with them; without the host's where nothing lies there."""
        parts = {**dataclasses.asdict(self), "total": self.total}
        return parts if self.host else {name: size for name, size in parts.items() if name != "host"}

    def __str__(self) -> str:
        return ", ".join(f"{name} {readable(size)}" for name, size in self.parts().items())


def readable(size: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def bytes_per_device(tree: Any, platform: str = "") -> int:
    """Bytes of the shards that one device holds of arrays (or jax.ShapeDtypeStruct with shardings).

    platform: "tpu": with the padding of its tiles.
    """
    return sum(_padded(x.sharding.shard_shape(x.shape), platform) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.cache
def _padded(shape: tuple[int, ...], platform: str) -> int:
    """Numbers of an array with padding.

    A TPU's memory is laid out in tiles of 8 x 128 numbers, smaller ones where an axis is shorter than 8. Which two axes
    lie along the tiles the compiler chooses; it was seen to choose those with which padding is least.
    """
    size = math.prod(shape)
    if platform != "tpu" or not size:
        return size
    if len(shape) < 2:
        return _up(size, _LANES)
    short = [_up(n, min(_ROWS, 1 << (n - 1).bit_length())) / n for n in shape]
    pairs = ((along, across) for along in range(len(shape)) for across in range(len(shape)) if along != across)
    return round(size * min(_up(shape[along], _LANES) / shape[along] * short[across] for along, across in pairs))


_ROWS, _LANES = 8, 128


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def estimate(
    loss_fn: step.Loss,
    state: TrainState,
    batch: Any,
    *,
    batch_ways: int,
    accumulation: int = 1,
    platform: str = "",
    traced: core.ClosedJaxpr | None = None,
) -> Estimate:
    """Memory of `training.step.make_train_step` with the same arguments. Traces, compiles nothing.

    Args:
      state: arrays, or `training.state.abstract`.
      batch: shapes of the whole batch, leading axis B; divides by batch_ways * accumulation.
      batch_ways: devices that the batch is split over, mesh.data * mesh.fsdp. Activations are counted as if mesh.tensor
        split none of them, which is too much where it is larger than 1.
      platform: "tpu": arrays are padded to tiles; others have no padding.
      traced: `trace` of the same arguments, where there is one already; it is the same for every mesh on which a device
        has as many rows.
    """
    if traced is None:
        traced = trace(loss_fn, state, batch, ways=batch_ways * accumulation)
    gradients = bytes_per_device(state.trainable, platform)
    rows = jax.tree.leaves(_rows(batch, batch_ways))
    return Estimate(
        parameters=bytes_per_device((state.trainable, state.frozen), platform),
        optimizer=bytes_per_device(state.opt_state, platform),
        gradients=gradients * (1 if accumulation == 1 else 2),
        activations=_activations(traced, state, platform),
        host=_activations(traced, state, platform, host=True) if _uses_host(traced.jaxpr) else 0,
        batch=sum(_padded(x.shape, platform) * x.dtype.itemsize for x in rows),
    )


def trace(loss_fn: step.Loss, state: TrainState, batch: Any, *, ways: int) -> core.ClosedJaxpr:
    """The gradient by one of `ways` equal parts of a batch, as traced."""
    key, micro = jax.eval_shape(lambda: jax.random.PRNGKey(0)), _rows(batch, ways)
    return jax.make_jaxpr(functools.partial(step.gradients, loss_fn))(
        state.trainable, state.frozen, micro, key, jax.eval_shape(loss_fn.count, micro)
    )


def _rows(batch: Any, ways: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // ways, *x.shape[1:]), x.dtype), batch)


def of_program(compiled: jax.stages.Compiled) -> dict[str, int]:
    """XLA's own plan of a compiled program, bytes on one device.

    arguments and results lie outside the program (donated: results that take an argument's place); temporaries are all
    else; peak is what is alive at a time at most: arguments + results - donated + temporaries. host: temporaries in the
    host's memory, where there are any.
    """
    memory = compiled.memory_analysis()
    out = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "donated": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    lasting = out["arguments"] + out["results"] - out["donated"]
    # libtpu reports more temporaries than it makes room for, by half in KOSMOS-2's training step on a v5p, and refuses
    # programs by its peak (docs/log.md, 2026-11-26). The peak of a GPU is the sum, that of a CPU leaves out much.
    devices = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))[0].device_set
    if next(iter(devices)).platform == "tpu":
        out["temporaries"] = memory.peak_memory_in_bytes - lasting
    out["peak"] = lasting + out["temporaries"]
    return out | ({"host": memory.host_temp_size_in_bytes} if memory.host_temp_size_in_bytes else {})


def alive(traced: core.ClosedJaxpr) -> int:
    """Most bytes alive at a time in any traced program, its arguments and results apart."""
    return math.ceil(_peak(traced.jaxpr, _Lying(), free_results=True))


def _activations(traced: core.ClosedJaxpr, state: TrainState, platform: str, *, host: bool = False) -> int:
    """Most bytes alive at a time, apart from arguments and from results (the gradients). host: in its memory."""
    # What has a parameter's shape (its type cast for a product, part of its gradient) lies as the parameter does.
    shards: dict[tuple[int, ...], float] = {}
    for x in (*state.trainable.values(), *state.frozen.values()):
        share = math.prod(x.sharding.shard_shape(x.shape)) / max(math.prod(x.shape), 1)
        shards[x.shape] = max(share, shards.get(x.shape, 0.0))
    return math.ceil(_peak(traced.jaxpr, _Lying(shards, platform, host), free_results=True))


@dataclasses.dataclass(frozen=True)
class _Lying:
    """How values lie on one device. shards: shape -> share of such an array that lies there; others lie there whole.
    host: what lies in the host's memory is counted, and nothing else."""

    shards: Mapping[tuple[int, ...], float] = dataclasses.field(default_factory=dict)
    platform: str = ""
    host: bool = False

    def bytes(self, aval: Any) -> float:
        if _is_on_host(aval) != self.host:
            return 0.0
        shape = tuple(aval.shape)
        return self.shards.get(shape, 1.0) * _padded(shape, self.platform) * getattr(aval.dtype, "itemsize", 4)


def _is_on_host(aval: Any) -> bool:
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host


def _uses_host(jaxpr: core.Jaxpr) -> bool:
    """Whether anything is kept in the host's memory, as loops return it."""
    values = {var: _Value(var.aval) for var in (*jaxpr.invars, *jaxpr.constvars)}
    return any(_is_on_host(value.aval) for operation in _flatten(jaxpr, values) for value in operation.makes)


# Operations that XLA computes inside the loop of whoever reads them; what they read is then read there.
_ELEMENTWISE = """
    abs add add_any and broadcast_in_dim ceil clamp cos convert_element_type copy copy_p cumsum div eq erf erf_inv
    erfc exp exp2 expm1 floor ge gt integer_pow iota is_finite le log log1p logistic lt max min mul ne neg not or pad
    pow random_bits random_wrap random_unwrap real reduce_precision rem rev round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin slice sqrt square stop_gradient sub tan tanh transpose
    xor"""
_FUSED = frozenset(_ELEMENTWISE.split())
# The same bytes under another shape.
_ALIASES = frozenset({"reshape", "squeeze", "expand_dims", "optimization_barrier", "bitcast_convert_type"})
_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin"})
# Calls that XLA inlines, and the parameter that holds what they call.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


@dataclasses.dataclass
class _Operation:
    name: str
    reads: list[Any]
    makes: list[Any]
    params: Mapping[str, Any]
    operands: Sequence[Any] = ()  # abstract values of all it is applied to, in order, constants included


class _Value:
    """One result of one operation."""

    def __init__(self, aval: Any):
        self.aval = aval


def _flatten(jaxpr: core.Jaxpr, values: dict[Any, _Value]) -> Iterator[_Operation]:
    """Operations in order, calls inlined. `values` gets what every variable stands for."""
    for eqn in jaxpr.eqns:
        reads = [None if isinstance(x, core.Literal) else values[x] for x in eqn.invars]
        name = eqn.primitive.name
        if name in _CALLS and _CALLS[name] in eqn.params:
            inner = _body(eqn.params[_CALLS[name]])
            inside: dict[Any, _Value] = {var: _Value(var.aval) for var in inner.constvars}
            inside.update(
                (var, _Value(var.aval) if value is None else value)
                for var, value in zip(inner.invars, reads, strict=True)
            )
            yield from _flatten(inner, inside)
            for var, result in zip(eqn.outvars, inner.outvars, strict=True):
                values[var] = _Value(var.aval) if isinstance(result, core.Literal) else inside[result]
            continue
        for var in eqn.outvars:
            values[var] = _Value(var.aval)
        operands = [x.aval for x in eqn.invars]
        read = [x for x in reads if x is not None]
        yield _Operation(name, read, [values[var] for var in eqn.outvars], eqn.params, operands)


def _body(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> core.Jaxpr:
    """What a parameter of an operation holds: closed over its constants, or, since jax 0.11, not."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _peak(
    jaxpr: core.Jaxpr,
    lying: _Lying,
    *,
    free_results: bool = False,
    sliced: Sequence[int] = (),
) -> float:
    """Most bytes alive at a time inside `jaxpr`, its arguments apart.

    Args:
      free_results: results are counted elsewhere.
      sliced: arguments that a loop cuts out of larger arrays, for which a place is needed.
    """
    arguments = [_Value(var.aval) for var in jaxpr.invars]
    values = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= {var: _Value(var.aval) for var in jaxpr.constvars}
    cut = [arguments[index] for index in sliced]
    operations = [_Operation("slice", [], [value], {}) for value in cut]
    operations += list(_flatten(jaxpr, values))
    results = [values[var] for var in jaxpr.outvars if not isinstance(var, core.Literal)]

    # What is written to memory: everything an operation that does not fuse makes or reads, and the results.
    stored = {id(value) for value in results}
    for operation in operations:
        if operation.name not in _FUSED | _ALIASES:
            stored.update(id(value) for value in operation.makes)
        if operation.name not in _FUSED | _ALIASES | _REDUCTIONS:
            stored.update(id(value) for value in operation.reads)
    # The stored values behind every value: itself, or what it is computed from on the fly.
    behind: dict[int, tuple[_Value, ...]] = {}
    for operation in operations:
        sources = {id(x): x for value in operation.reads for x in behind.get(id(value), ())}
        for value in operation.makes:
            alias = operation.name in _ALIASES and operation.reads
            behind[id(value)] = (value,) if id(value) in stored and not alias else tuple(sources.values())
    last: dict[int, int] = {}
    for index, operation in enumerate(operations):
        for value in operation.reads:
            last.update((id(x), index) for x in behind.get(id(value), ()))
    returned = {id(x): x for value in results for x in behind.get(id(value), ())}
    last.update((name, len(operations)) for name in returned)

    def size(value: _Value) -> float:
        if (free_results and id(value) in returned) or not hasattr(value.aval, "shape"):
            return 0
        return lying.bytes(value.aval)

    ends: dict[int, list[_Value]] = {}
    alive = highest = 0.0
    for index, operation in enumerate(operations):
        made = [x for value in operation.makes for x in behind[id(value)] if x is value]
        alive += sum(size(value) for value in made)
        for value in made:
            ends.setdefault(last.get(id(value), index), []).append(value)
        highest = max(highest, alive + _inside(operation, dataclasses.replace(lying, shards={})))
        alive -= sum(size(value) for value in ends.pop(index, ()))
    return highest


_ON_THE_WAY = 2
"""Turns of a loop whose values are on their way to the host or back beside the turn that runs: with so many, estimates
are 9 % (eight H100) and 15 % (16 v5e) below the compilers' peaks of KOSMOS-2's step, 14 and 22 % with none."""


def _exchanged(body: core.Jaxpr, lying: _Lying) -> float:
    """Bytes of a device that a turn of a loop sends to the host, or fetches from it."""
    host = dataclasses.replace(lying, shards={}, host=True)
    outside = (var.aval for var in (*body.invars, *body.outvars) if not isinstance(var, core.Literal))
    return sum(host.bytes(aval) for aval in outside if hasattr(aval, "shape"))


def _inside(operation: _Operation, lying: _Lying) -> float:
    """Bytes that an operation needs while it runs, its results apart."""
    params = operation.params
    if operation.name == "scan":
        body = _body(params["jaxpr"])
        # What one turn cuts out of a larger array has an axis less than that array. Told by shapes, because jax 0.11
        # renamed the parameters that count constants and carries.
        pairs = zip(operation.operands, body.invars, strict=True)
        sliced = [i for i, (whole, var) in enumerate(pairs) if whole.ndim > var.aval.ndim]
        return _peak(body, lying, sliced=sliced) + (0 if lying.host else _ON_THE_WAY * _exchanged(body, lying))
    if operation.name == "while":
        return _peak(_body(params["body_jaxpr"]), lying)
    if operation.name == "cond":
        return max(_peak(_body(branch), lying) for branch in params["branches"])
    return 0.0
