"""Elastic weight consolidation: parameters that earlier tasks need are held where they are (EWC, Kirkpatrick et al.
2017, arXiv:1612.00796).

To the loss is added weight / 2 * sum F (p - p*)^2: p* the parameters at the beginning of the run, F their Fisher
information in what was learned before. Its gradient is exact and counts in the clipped norm; the logged loss is the
data's alone.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robovlms_jax import atomic, npz

FILE = "fisher.npz"
"""In a run's directory: path -> float32 array as the parameter."""


class HeldState(NamedTuple):
    """optimizer: the state of what it is around. fisher, anchor: F and p*, flat, as the trainable parameters."""

    optimizer: Any
    fisher: Any
    anchor: Any


def held(inner: optax.GradientTransformation, weight: float) -> optax.GradientTransformation:
    """`inner` on gradients with the term's own. F begins with zeros (`with_fisher`), p* with the first parameters."""

    def init(params):
        return HeldState(inner.init(params), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.copy, params))

    def update(grads, state, params=None):
        pulled = jax.tree.map(lambda g, f, p, a: g + weight * f * (p - a), grads, state.fisher, params, state.anchor)
        updates, optimizer = inner.update(pulled, state.optimizer, params)
        return updates, state._replace(optimizer=optimizer)

    return optax.GradientTransformation(init, update)


def with_fisher(opt_state: Any, fisher: Mapping[str, np.ndarray]) -> Any:
    """An optimizer's state, one that averages around it or not, with F as measured. What was not measured, such as new
    adapters, is not held.

    Raises ValueError: nothing fits, or a shape differs.
    """
    if not isinstance(opt_state, HeldState):
        return opt_state._replace(optimizer=with_fisher(opt_state.optimizer, fisher))
    known = {path: x for path, x in fisher.items() if path in opt_state.fisher}
    wrong = [path for path, x in known.items() if x.shape != opt_state.fisher[path].shape]
    if wrong or not known:
        raise ValueError(
            f"optimizer.ewc: {FILE} is of another model: {wrong[:3] or sorted(fisher)[:3]} does not fit the trainable "
            f"parameters {sorted(opt_state.fisher)[:3]} ..."
        )
    placed = {path: jax.device_put(jnp.asarray(x), opt_state.fisher[path].sharding) for path, x in known.items()}
    return opt_state._replace(fisher={**opt_state.fisher, **placed})


def floored(fisher: Mapping[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """F with no number below `share` times the mean of all; 0 changes nothing."""
    mean = sum(float(x.sum(dtype=np.float64)) for x in fisher.values()) / max(sum(x.size for x in fisher.values()), 1)
    return {path: np.maximum(x, np.float32(share * mean)) for path, x in fisher.items()}


def path_of(run: pathlib.Path) -> pathlib.Path:
    """The file of a run. Raises FileNotFoundError that says how it is made."""
    path = run / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"optimizer.ewc holds what {run} learned, and there is no {path}: experiments.continual measures it after "
            "every task, as runs/fisher.py does for any run."
        )
    return path


def read(run: pathlib.Path) -> dict[str, np.ndarray]:
    """What the file of a run holds. Raises as `path_of`, and ValueError for a damaged file."""
    return npz.read(path_of(run))


def write(run: pathlib.Path, fisher: Mapping[str, np.ndarray]) -> None:
    """The file, whole or not at all."""
    with atomic.replacing(run / FILE) as file:
        np.savez(file, **fisher)


def added(earlier: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], decay: float) -> dict[str, np.ndarray]:
    """F of all tasks so far: `decay` times that of the earlier ones, and the new one (online EWC, Schwarz et al. 2018,
    arXiv:1805.06370)."""
    paths = {**earlier, **new}
    return {path: decay * earlier.get(path, 0.0) + new.get(path, np.float32(0.0)) for path in paths}
