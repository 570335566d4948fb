"""Layers as one compiled step: applied in a scan, their parameters stacked along a leading axis named `layers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

UNROLLED = 4
"""Up to so many layers are compiled one by one. What a scan keeps for the backward pass is copied into stacks and out
again; that is a sixth of a small policy's training step, and four layers take no longer to compile than a scan."""


def scan_layers(
    step: Callable, block: nn.Module, x: jax.Array, layers: Any = None, *, length: int, unused: int = 0, remat: bool
) -> tuple[jax.Array, Any]:
    """Apply `step(block, x, layer) -> (x, layer)` `length` times; each layer has its own parameters and dropout.

    Args:
      step: may close over anything all layers share (masks, flags).
      layers: pytree with a leading axis L that is handed to and collected from the layers (a cache), or None.
      unused: layers at the end that have parameters but are not applied.
      remat: recompute activations in the backward pass and keep only the matrix products with parameters.
    """
    apply = step

    def step(block, x, layer):
        # Each device works on its own samples. Left to itself, the compiler splits the width instead wherever that is
        # how the parameters are split, and every device then keeps activations of the whole batch.
        x = nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1)))
        return apply(block, x, layer)

    if remat:
        # A scan is its own barrier against common-subexpression elimination, so the slower built-in one is not needed.
        step = nn.remat(step, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)

    def scan(block, x, layers, length):
        return nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=length,
            unroll=length if length <= UNROLLED and not remat else 1,  # remat needs the loop, see above
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(block, x, layers)

    if not unused or block.is_initializing():
        return scan(block, x, layers, length)

    def first(params):
        return jax.tree.map(lambda leaf: leaf[: length - unused], params)

    applied = nn.map_variables(lambda *args: scan(*args, length - unused), "params", trans_in_fn=first)
    return applied(block, x, layers)
