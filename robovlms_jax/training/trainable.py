"""What trains: parameters are split by path before differentiation, so frozen ones have no gradient and no optimizer
state."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax.traverse_util import unflatten_dict
from jax.extend import core

Leaf = TypeVar("Leaf")


def split(params: dict[str, Leaf], patterns: Sequence[str]) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Flat "/"-joined parameters -> (trainable, frozen): trainable is what any pattern is found in.

    Raises:
      ValueError: naming every pattern that matches no parameter, with the nearest paths.
    """
    idle = [pattern for pattern in patterns if not any(re.search(pattern, path) for path in params)]
    if idle:
        near = {pattern: _nearest(pattern, params) for pattern in idle}
        hints = [f"{pattern!r}" + (f" (near: {found})" if found else "") for pattern, found in near.items()]
        raise ValueError(
            f"trainable has patterns that match no parameter: {', '.join(hints)}. "
            f"Paths begin with {sorted({path.split('/')[0] for path in params})}, for example {next(iter(params))}."
        )
    chosen = {path for path in params if any(re.search(pattern, path) for pattern in patterns)}
    return {path: x for path, x in params.items() if path in chosen}, {
        path: x for path, x in params.items() if path not in chosen
    }


def _nearest(pattern: str, paths: Collection[str]) -> list[str]:
    """Parts of paths that read most like the pattern without its signs: "^haed/" is near "head"."""
    parts = [path.split("/") for path in paths]
    known = {"/".join(names[:end]) for names in parts for end in range(1, len(names) + 1)}
    known |= {name for names in parts for name in names}
    return difflib.get_close_matches(re.sub(r"[^\w/]", "", pattern).strip("/"), sorted(known), n=3, cutoff=0.5)


def require_reached(
    loss: Callable[..., tuple[jax.Array, Any]], params: Mapping[str, Any], batch: Any, patterns: Sequence[str]
) -> None:
    """Refuse a pattern by which nothing would learn, such as that of a head whose task is switched off: the loss does
    not depend on any parameter that it matches, and weight decay alone would move them. Traces, compiles nothing.

    Args:
      loss: (nested parameters, batch, key) -> (float32[], anything).
      params: path -> array or its shape. batch: shapes.
      patterns: each matches some parameter (`split`).
    Raises:
      ValueError: naming the patterns.
    """
    matches = {pattern: {path for path in params if re.search(pattern, path)} for pattern in patterns}
    partial = {pattern: paths for pattern, paths in matches.items() if len(paths) < len(params)}
    if not partial:  # some parameter is always reached
        return
    trained = set().union(*partial.values())
    reached = _reached(
        loss, {p: params[p] for p in trained}, {p: x for p, x in params.items() if p not in trained}, batch
    )
    idle = {pattern: sorted(paths) for pattern, paths in partial.items() if not paths & reached}
    if idle:
        listed = ", ".join(f"{pattern!r} ({paths[0]}{', ...' if paths[1:] else ''})" for pattern, paths in idle.items())
        raise ValueError(
            f"train.trainable has patterns of parameters that no active task depends on, so that they would learn "
            f"nothing: {listed}. Leave these patterns out, or give their task a weight."
        )


def _reached(
    loss: Callable[..., tuple[jax.Array, Any]], trainable: dict[str, Any], frozen: dict[str, Any], batch: Any
) -> set[str]:
    """Paths of `trainable` that have a gradient. The gradient of whatever the loss does not depend on is a constant."""

    def value(trainable: dict[str, Any], frozen: dict[str, Any], batch: Any, key: jax.Array) -> jax.Array:
        return loss(unflatten_dict({**frozen, **trainable}, sep="/"), batch, key)[0]

    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    jaxpr = jax.make_jaxpr(jax.grad(value))(trainable, frozen, batch, key).jaxpr
    varying = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(x in varying for x in equation.invars if isinstance(x, core.Var)):
            varying.update(equation.outvars)
    # Dictionaries are flattened in the order of their sorted keys.
    return {
        path
        for path, x in zip(sorted(trainable), jaxpr.outvars, strict=True)
        if isinstance(x, core.Var) and x in varying
    }
