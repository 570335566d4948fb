"""Actions <-> bins <-> vocabulary ids. Pure functions on NumPy or jax arrays; loss, decoding and reports call the same.

Bins are upstream's (policy_head/action_tokenizer.py): `num_bins` edges from low to high by linspace, an action belongs
to the last edge that is not above it, and stands for the middle between that edge and the next. No token is added:
the last ids of the vocabulary, counted down from its end, get a new meaning.
"""

from __future__ import annotations

import dataclasses
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


def discretize(actions: Array, bins: UniformBins) -> Array:
    """Actions to bin numbers.

    Args:
      actions: float[...], normalised; values outside [low, high] are clipped.
    Returns:
      int32[...] in [0, num_bins); only `high` itself is in the last bin. `undiscretize` errs by at most half a bin.
    """
    xp = actions.__array_namespace__()
    edges = bins.edges.astype(actions.dtype)
    # As float32, an edge may lie below what it stands for; then a value equal to it must still count as below.
    edges = np.where(edges < bins.edges, np.nextafter(edges, np.asarray(np.inf, edges.dtype)), edges)
    # Compared with every edge: 256 comparisons fuse into whatever makes the actions, a search does not.
    number = (actions[..., None] >= xp.asarray(edges)).sum(-1) - 1
    return xp.clip(number, 0, bins.num_bins - 1).astype(np.int32)


def undiscretize(numbers: Array, bins: UniformBins) -> Array:
    """Bin numbers int[...] to bin centres float32[...]. The last edge has no bin above it and joins the last centre."""
    xp = numbers.__array_namespace__()
    centers = xp.asarray(bins.centers.astype(np.float32))
    return centers[xp.clip(numbers, 0, bins.num_bins - 2)]


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
