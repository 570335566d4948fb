"""Actions <-> bins <-> vocabulary ids. Pure functions on NumPy or jax arrays; loss, decoding and reports call the same.

Bins are upstream's (policy_head/action_tokenizer.py): `num_bins` edges from low to high by linspace, an action belongs
to the last edge that is not above it, and stands for the middle between that edge and the next. No token is added:
the last ids of the vocabulary, counted down from its end, get a new meaning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from robovlms_jax.types import Array

VOCABULARY_OFFSET = 10
"""Ids at the end of the vocabulary that upstream keeps free."""


@dataclasses.dataclass(frozen=True)
class UniformBins:
    """Equal bins over [low, high], the same for every action dimension."""

    num_bins: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self):
        if self.num_bins < 2 or not self.low < self.high:
            raise ValueError(f"bins need num_bins >= 2 and low < high; got {self}.")

    @property
    def edges(self) -> np.ndarray:
        """float64[num_bins]."""
        return np.linspace(self.low, self.high, self.num_bins)

    @property
    def centers(self) -> np.ndarray:
        """float64[num_bins - 1], middles between neighbouring edges."""
        return (self.edges[1:] + self.edges[:-1]) / 2


@dataclasses.dataclass(frozen=True)
class QuantileBins:
    """Bins of each dimension's own, with equally many training actions in each: fine where actions are frequent.

    table: rows are action dimensions, each `num_bins` edges in ascending order; equal edges make empty bins.
    """

    table: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        lengths = {len(row) for row in self.table}
        if len(lengths) != 1 or min(lengths) < 2 or any(list(row) != sorted(row) for row in self.table):
            raise ValueError(f"quantile bins need rows of equally many ascending edges, two or more; got {self.table}.")

    @classmethod
    def of(cls, actions: np.ndarray, num_bins: int, binary: Sequence[int]) -> QuantileBins:
        """Edges at evenly spaced quantiles of normalised actions float[N, A]; the columns `binary` have equal bins."""
        table = np.quantile(np.asarray(actions, np.float64), np.linspace(0, 1, num_bins), axis=0).T
        table[list(binary)] = UniformBins(num_bins).edges
        return cls(tuple(map(tuple, table.tolist())))

    @property
    def num_bins(self) -> int:
        """Edges per dimension."""
        return len(self.table[0])

    @property
    def edges(self) -> np.ndarray:
        """float64[A, num_bins]."""
        return np.array(self.table, np.float64)

    @property
    def centers(self) -> np.ndarray:
        """float64[A, num_bins - 1], middles between neighbouring edges."""
        return (self.edges[:, 1:] + self.edges[:, :-1]) / 2


Bins = UniformBins | QuantileBins


def discretize(actions: Array, bins: Bins) -> Array:
    """Actions to bin numbers.

    Args:
      actions: float[..., A], normalised (any shape for uniform bins); values outside the edges are clipped.
    Returns:
      int32[...] in [0, num_bins); only the last edge itself is in the last bin. `undiscretize` errs by at most half a
      bin.
    """
    xp = actions.__array_namespace__()
    exact = bins.edges
    edges = exact.astype(actions.dtype)
    # As float32, an edge may lie below what it stands for; then a value equal to it must still count as below.
    edges = np.where(edges < exact, np.nextafter(edges, np.asarray(np.inf, edges.dtype)), edges)
    # How many edges are not above? Edge by edge, without an axis of edges: XLA makes one loop of this together with the
    # normalisation before it and the ids after it, and writes nothing in between.
    count = xp.zeros(actions.shape, np.int32)
    for edge in np.moveaxis(edges, -1, 0):
        count = count + (actions >= edge)
    return xp.clip(count - 1, 0, bins.num_bins - 1).astype(np.int32)


def undiscretize(numbers: Array, bins: Bins) -> Array:
    """Bin numbers int[...] to bin centres float32[...]. The last edge has no bin above it and joins the last centre."""
    xp = numbers.__array_namespace__()
    return _look_up(xp, bins.centers.astype(np.float32), xp.clip(numbers, 0, bins.num_bins - 2))


def _look_up(xp: Any, table: np.ndarray, columns: Array) -> Array:
    """table[columns], or table[dimension, columns] where each dimension has a row."""
    if table.ndim == 1:
        return xp.asarray(table)[columns]
    rows = np.arange(len(table), dtype=np.int32)
    return xp.asarray(table.reshape(-1))[columns + rows * table.shape[1]]


def to_ids(numbers: Array, vocab_end: int) -> Array:
    """Bin numbers to vocabulary ids: bin 0 is `vocab_end` - 1, larger actions have smaller ids."""
    return vocab_end - 1 - numbers


def from_ids(ids: Array, vocab_end: int) -> Array:
    """Inverse of `to_ids`. An id that stands for no action gives a number outside [0, num_bins): see `is_action_id`."""
    return vocab_end - 1 - ids


def is_action_id(ids: Array, vocab_end: int, num_bins: int) -> Array:
    """bool[...]: whether an id stands for a bin."""
    return (ids < vocab_end) & (ids >= vocab_end - num_bins)


def vocabulary_end(tokenizer: Any) -> int:
    """One past the last action id: what upstream's tokenizer calls its original size.

    Its vocabulary without added tokens, less its special tokens, less `VOCABULARY_OFFSET`.
    """
    named = [name for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)]
    # transformers 5 calls them extra, 4 additional; either way each counts.
    further = getattr(tokenizer, "extra_special_tokens", None) or getattr(tokenizer, "additional_special_tokens", None)
    return tokenizer.vocab_size - len(named) - len(further or ()) - VOCABULARY_OFFSET
