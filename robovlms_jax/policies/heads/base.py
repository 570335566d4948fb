"""What every action head shares: its registered configuration and the contract `VLA` and the training step rely on.

A head is one file with two classes: a frozen config dataclass and a Flax module, joined by `register`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Base of all head configurations; its concrete type chooses the head."""


class ActionHead(Protocol):
    """Features of observed steps in, action chunks out. `N` is any number of windows (batch times windows per segment).

    Attributes `window`, `chunk`, `action_dim` and `config` are set by `build`. No memory inside: carries are
    arguments and results.
    """

    def __call__(self, features: jax.Array, step_mask: jax.Array) -> Any:
        """float[N, W, Q, D], bool[N, W] -> prediction whose leaves begin with [N, W, C]."""

    def loss(
        self, prediction: Any, actions: jax.Array, mask: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Loss and metrics, each a sum over True entries of `mask` divided by `count`.

        actions: float[N, W, C, A], arm normalised to [-1, 1], gripper -1 or 1. mask: bool[N, W, C].
        count: float[], True entries of the whole batch `mask` is a part of, so that micro-batches add up to the batch.
        """

    def actions(self, prediction: Any) -> jax.Array:
        """float[..., C, A]: arm in [-1, 1], gripper exactly -1 or 1."""

    def init_carry(self, batch: int) -> Any:
        """The carry before the first step of an episode."""

    def step(self, features: jax.Array, carry: Any) -> tuple[Any, Any]:
        """float[batch, Q, D] of the newest step -> (prediction with leaves [batch, C, ...], new carry).

        Equals the last step of `__call__` over the most recent min(t, W) features, at constant cost per call.
        """


_REGISTRY: dict[str, tuple[type[HeadConfig], Callable[..., ActionHead]]] = {}


def register(kind: str, config_type: type[HeadConfig]) -> Callable:
    """Class decorator: `@register("lstm", LSTMHeadConfig)` on the Flax module makes the head available to every
    experiment."""

    def decorate(module: type) -> type:
        if kind in _REGISTRY:
            raise ValueError(f"head {kind!r} is registered already, by {_REGISTRY[kind][1].__name__}.")
        _REGISTRY[kind] = (config_type, module)
        return module

    return decorate


def kinds() -> list[str]:
    """Names of all registered heads."""
    return sorted(_REGISTRY)


def kind_of(config_type: type[HeadConfig]) -> str:
    """Registered name of a config class."""
    for kind, (known, _) in _REGISTRY.items():
        if known is config_type:
            return kind
    raise ValueError(f"{config_type.__name__} belongs to no registered head; registered: {kinds()}.")


def config_of(kind: str) -> type[HeadConfig]:
    """Config class of a registered head."""
    if kind not in _REGISTRY:
        raise ValueError(f"no head {kind!r}; registered: {kinds()}. Import the file that registers it first.")
    return _REGISTRY[kind][0]


def build(
    config: HeadConfig,
    *,
    window: int,
    chunk: int,
    action_dim: int,
    feature_dim: int,
    num_queries: int,
    name: str | None = None,
) -> Any:
    """The Flax module for a head configuration. `feature_dim` is D of the features, `num_queries` their Q."""
    module = _REGISTRY[kind_of(type(config))][1]
    return module(
        config=config,
        window=window,
        chunk=chunk,
        action_dim=action_dim,
        feature_dim=feature_dim,
        num_queries=num_queries,
        name=name,
    )
