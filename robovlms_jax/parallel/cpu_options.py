"""Compiler options for single programs on CPUs, where another choice than XLA's own was measured to be faster."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

PRODUCTS_ALONE: Mapping[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
"""Only products of matrices go to XLA's library of kernels (YNNPACK), each alone; XLA itself hands over sums and what
lies between, too. Faster for many small arrays: the twin's training step by a fifth to a third, forty tables' step by
1.7; its forward pass alone and PlayTable's pictures gain nothing (docs/log.md, 2026-11-22)."""

OLDER_GENERATOR: Mapping[str, Any] = {"xla_cpu_use_fusion_emitters": False}
"""XLA's older code generator: for programs of hundreds of kernels on a few numbers each. The twin's training step takes
three times as long to compile with it."""

UNOPTIMIZED: Mapping[str, Any] = {"xla_backend_optimization_level": 0}
"""For programs that run for less time, in all, than it takes to optimise them."""


def known(*options: Mapping[str, Any]) -> dict[str, Any] | None:
    """`compiler_options` for `jax.jit`: of these options, together, those that the installed XLA has; elsewhere than on
    CPUs, or if it has none of them, None. Starts JAX's devices."""
    if jax.default_backend() != "cpu":
        return None
    return {name: value for some in options for name, value in some.items() if _is_known(name, value)} or None


def jit(*options: Mapping[str, Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `jax.jit` with the `known` ones of these options, asked for when the function is first called, so that
    importing it starts no device. What it makes cannot be called inside another `jit`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = functools.cache(lambda: jax.jit(function, compiler_options=known(*options)))

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return compiled()(*args)

        return call

    return decorate


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.jit(lambda x: x + 1, compiler_options={name: value})(0)
        return True
    return False
