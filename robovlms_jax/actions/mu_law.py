"""Mu-law companding: resolution where actions are small. Pure functions on NumPy or jax arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robovlms_jax.types import Array


def compress(x: Array, mu: float) -> Array:
    """sign(x) ln(1 + mu |x|) / ln(1 + mu): [-1, 1] onto itself, steep at 0 (ITU-T G.711 with mu = 255).

    Args:
      x: float[...]; beyond [-1, 1] the formula goes on.
      mu: positive; the larger, the steeper.
    """
    xp = x.__array_namespace__()
    return xp.sign(x) * xp.log1p(mu * xp.abs(x)) / xp.log1p(xp.asarray(mu, dtype=x.dtype))


def expand(x: Array, mu: float) -> Array:
    """Inverse of `compress`: sign(x) ((1 + mu)^|x| - 1) / mu."""
    xp = x.__array_namespace__()
    return xp.sign(x) * xp.expm1(xp.abs(x) * xp.log1p(xp.asarray(mu, dtype=x.dtype))) / mu
