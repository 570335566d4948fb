"""Importing the package registers every backbone."""

from robovlms_jax.backbones import kosmos2

__all__ = ["kosmos2"]
