"""FLOPs of traced programs: of matrix products and convolutions, loops counted; everything else is nothing.

What the model needs, the numerator of MFU (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), where the trace holds
no rematerialisation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

from robovlms_jax.training import step
from robovlms_jax.training.state import TrainState


def of_step(loss_fn: step.Loss, state: TrainState, batch: Any) -> float:
    """One update of the whole batch (shapes), on all devices together. Traces, compiles nothing. `loss_fn` is of a
    model without rematerialisation."""
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    traced = jax.make_jaxpr(functools.partial(step.gradients, loss_fn))(
        state.trainable, state.frozen, batch, key, jax.eval_shape(loss_fn.count, batch)
    )
    return sum(count for _, count, _ in products(traced.jaxpr))


def products(jaxpr: core.Jaxpr, names: str = "", times: int = 1) -> Iterator[tuple[str, float, bool]]:
    """(names around it, FLOPs, whether of int8 with int8) of every matrix product and convolution. A loop of unknown
    length counts once; of branches the one with most."""
    for equation in jaxpr.eqns:
        here = f"{names}/{equation.source_info.name_stack}"
        count = _flops(equation)
        if count:
            yield here, times * count, all(x.aval.dtype == np.int8 for x in equation.invars[:2])
        turns = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        inner = [list(products(body, here, turns)) for body in _bodies(equation.params)]
        if equation.primitive.name == "cond":
            inner = [max(inner, key=lambda branch: sum(count for _, count, _ in branch))]
        for part in inner:
            yield from part


def _bodies(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if isinstance(item, core.Jaxpr):
                yield item


def _flops(equation: Any) -> float:
    name = equation.primitive.name
    if name not in ("dot_general", "conv_general_dilated"):
        return 0.0
    left, right = (x.aval.shape for x in equation.invars[:2])
    out = math.prod(equation.outvars[0].aval.shape)
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2.0 * out * math.prod(left[axis] for axis in contracted)
    channels = right[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * out * math.prod(right) / channels
