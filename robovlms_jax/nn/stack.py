"""Layers as one compiled step: applied in a scan, their parameters stacked along a leading axis named `layers`.

A control step reads every weight once, and a loop over stacked weights copies each layer's out of the stack before it
multiplies by them. So what is served lies layer by layer (`parted`), and its layers are compiled one by one
(`unrolled`).
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.nn import attended

Remat = Literal["none", "dots", "offload", "full"]
"""What the backward pass computes again instead of keeping it. none: nothing. dots: all but long products with
parameters and results of attention. offload: the same, but what dots keeps lies in the host's memory meanwhile. full:
everything from each layer's input on."""

UNROLLED = 4
"""Up to so many layers are compiled one by one. What a scan keeps for the backward pass is copied into stacks and out
again; that is a sixth of a small policy's training step, and four layers take no longer to compile than a scan."""


STACKED = re.compile(r"^(?P<tower>.*?)/\w*layers/")
"""Of paths ("/"-joined) of parameters that are stacked."""
_OF_NORMS = re.compile(r"norm[^/]*/(scale|bias)$")
_ONE_BY_ONE = contextvars.ContextVar("one_by_one", default=False)


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """Layers that are traced inside are compiled one by one, however many; for programs without gradients, which have
    nothing to rematerialise."""
    token = _ONE_BY_ONE.set(True)
    try:
        yield
    finally:
        _ONE_BY_ONE.reset(token)


def parted(params: Mapping[str, Any], *, take: bool = False) -> dict[str, Any]:
    """Parameters (nested) with a tuple of arrays, one per layer, in place of each stack. Those that are parted stay so.
    Stacks of norms' stay whole: what multiplies number by number reads its layer out of them at no cost, and calling a
    program takes a microsecond per array.

    take: the stacks are deleted one after the other, so that no second copy of all of them is made; whoever else holds
      them cannot use them any more.
    """

    def part(x: Any) -> Any:
        if isinstance(x, tuple):
            return x
        layers = tuple(jnp.unstack(x))
        if take:
            jax.block_until_ready(layers)
            x.delete()
        return layers

    flat = flatten_dict(dict(params), sep="/")
    apart = {path for path in flat if STACKED.match(path) and not _OF_NORMS.search(path)}
    return unflatten_dict({path: part(x) if path in apart else x for path, x in flat.items()}, sep="/")


def joined(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `parted`; what is not parted is left as it is. In a compiled program nothing is copied where
    layers are taken out of the stack again one by one."""

    def join(x: Any) -> Any:
        return jnp.stack(x) if isinstance(x, tuple) else x

    return jax.tree.map(join, dict(params), is_leaf=lambda x: isinstance(x, tuple))


def _one_by_one(length: int, remat: Remat) -> bool:
    """Whether so many layers are compiled one by one."""
    return _ONE_BY_ONE.get() or (length <= UNROLLED and remat == "none")  # others need the loop, see below


SHORT = 256
"""Sums over up to so many numbers are cheaper to compute again than to write and read, in sixteen bits on a GPU or TPU
(some 300 FLOPs per byte): products with the second matrices of adapters, as large as those that they stand beside."""


def _is_kept(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **parameters):
        return False
    (contracted, _), _ = parameters["dimension_numbers"]
    return math.prod(operands[0].shape[axis] for axis in contracted) > SHORT


_DOTS_TO_HOST = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
_ATTENDED_TO_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=(),
    names_which_can_be_offloaded=(attended.SAVED,),
    offload_src="device",
    offload_dst="pinned_host",
)


def _to_host(primitive: Any, *operands: Any, **parameters: Any) -> Any:
    policy = _DOTS_TO_HOST if _is_kept(primitive, *operands, **parameters) else _ATTENDED_TO_HOST
    return policy(primitive, *operands, **parameters)


_either = jax.checkpoint_policies.save_from_both_policies

POLICIES: Mapping[Remat, Callable[..., Any]] = {
    "dots": _either(
        _is_kept, _either(attended.is_fused, jax.checkpoint_policies.save_only_these_names(attended.SAVED))
    ),
    "offload": _to_host,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What rematerialisation keeps of a layer, its input apart, and where."""


def scan_layers(
    step: Callable, block: nn.Module, x: jax.Array, layers: Any = None, *, length: int, unused: int = 0, remat: Remat
) -> tuple[jax.Array, Any]:
    """Apply `step(block, x, layer) -> (x, layer)` `length` times; each layer has its own parameters and dropout.

    Args:
      step: may close over anything all layers share (masks, flags).
      layers: pytree with a leading axis L that is handed to and collected from the layers (a cache), or None.
      unused: layers at the end that have parameters but are not applied.
      remat: what the backward pass computes again.
    """
    apply = step

    def step(block, x, layer):
        # Each device works on its own samples. Left to itself, the compiler splits the width instead wherever that is
        # how the parameters are split, and every device then keeps activations of the whole batch.
        x = nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1)))
        return apply(block, x, layer)

    if remat != "none" and not _ONE_BY_ONE.get():
        # A scan is its own barrier against common-subexpression elimination, so the slower built-in one is not needed.
        step = nn.remat(step, prevent_cse=False, policy=POLICIES[remat])

    def scan(block, x, layers, length):
        return nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=length,
            unroll=length if _one_by_one(length, remat) else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(block, x, layers)

    if not unused or block.is_initializing():
        return scan(block, x, layers, length)

    def first(params):
        return jax.tree.map(lambda leaf: leaf[: length - unused], params)

    applied = nn.map_variables(lambda *args: scan(*args, length - unused), "params", trans_in_fn=first)
    return applied(block, x, layers)


Step = Callable[[nn.Module, jax.Array, Any], tuple[jax.Array, Any]]


def scan_groups(
    steps: tuple[Step, Step],
    blocks: tuple[nn.Module, nn.Module],
    x: jax.Array,
    layers: tuple[Any, Any],
    *,
    length: int,
    every: int,
    remat: Remat,
) -> tuple[jax.Array, tuple[Any, Any]]:
    """`scan_layers` with a layer of a second kind before every `every`-th of the first; both kinds keep their stacks.

    Args:
      steps, blocks, layers: of the `length` layers, and of the length / every between them; see `scan_layers`.
    """
    groups = length // every
    if length % every:
        raise ValueError(f"{length} layers are no multiple of {every}, after which one of another kind follows.")
    if blocks[0].is_initializing():  # makes the same parameters; what comes out is not looked at
        x, more = scan_layers(steps[1], blocks[1], x, layers[1], length=groups, remat=remat)
        x, new = scan_layers(steps[0], blocks[0], x, layers[0], length=length, remat=remat)
        return x, (new, more)

    def apply(step: Step, block: nn.Module, params: Any, x: jax.Array, layer: Any, key: Any) -> tuple[jax.Array, Any]:
        rngs = {} if key is None else {"dropout": key}
        x = nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1)))  # as in `scan_layers`
        return nn.apply(lambda module: step(module, x, layer), block.clone(parent=None, name=None))(params, rngs=rngs)

    def group(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        (params, layer), (between, cached), keys = inputs
        new = []
        for i in range(every):
            if i == every - 1:
                x, more = apply(steps[1], blocks[1], between, x, cached, None if keys is None else keys[every])
            one, one_layer = jax.tree.map(lambda leaf, i=i: leaf[i], (params, layer))
            x, found = apply(steps[0], blocks[0], one, x, one_layer, None if keys is None else keys[i])
            new.append(found)
        return x, (jax.tree.map(lambda *leaves: jnp.stack(leaves), *new), more)

    def regroup(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(groups, every, *leaf.shape[1:]), tree)

    if remat != "none" and not _ONE_BY_ONE.get():
        group = jax.checkpoint(group, prevent_cse=False, policy=POLICIES[remat])
    keys = None
    if blocks[0].has_rng("dropout"):
        keys = jax.random.split(blocks[0].make_rng("dropout"), (groups, every + 1))
    params, between = ({"params": block.variables["params"]} for block in blocks)
    inputs = (regroup((params, layers[0])), (between, layers[1]), keys)
    unroll = groups if _one_by_one(length, remat) else 1
    x, (new, more) = jax.lax.scan(group, x, inputs, length=groups, unroll=unroll)
    return x, (jax.tree.map(lambda leaf: leaf.reshape(length, *leaf.shape[2:]), new), more)
