"""Pictures of two sources shall look alike to a policy: a loss on the distance of their features' statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from robovlms_jax.backbones import base as backbones
from robovlms_jax.policies import objective, vla
from robovlms_jax.types import Batch, Inputs


def moments_apart(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far two sets of features are apart: squared distance of their means over D, and squared Frobenius distance of
    their covariances over 4 D^2 (Deep CORAL, Sun and Saenko 2016, arXiv:1607.01719, equation 1).

    Args:
      first, second: float[n, D] and float[m, D], two rows at least.
    Returns:
      float32[] each.
    """
    means, covariances = zip(*(_moments(x.astype(jnp.float32)) for x in (first, second)), strict=True)
    width = first.shape[-1]
    mean = jnp.square(means[0] - means[1]).sum() / width
    return mean, jnp.square(covariances[0] - covariances[1]).sum() / (4 * width**2)


def shares_apart(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `moments_apart`, in units of the first set's own, so that features of different policies can be compared: the
    squared distance of the means over the sum of its variances, and the squared Frobenius distance of the covariances
    over the squared norm of its own. 0: alike; 1: as far apart as the first set's features are from each other."""
    (mean, covariance), (other_mean, other_covariance) = (_moments(x.astype(jnp.float32)) for x in (first, second))
    return (
        jnp.square(mean - other_mean).sum() / jnp.trace(covariance),
        jnp.square(covariance - other_covariance).sum() / jnp.square(covariance).sum(),
    )


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = x.mean(axis=0)
    apart = x - mean
    return mean, apart.T @ apart / (len(x) - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class AlignmentLoss:
    """`moments_apart` of the tokens of all pictures of two sources' batches; gradients reach the vision tower and what
    connects it. A loss between sources (`objective.LossBySource`).

    loss: on either source's batches; says how pictures are prepared and changed. sources: their names.
    """

    loss: objective.RobotLoss
    sources: tuple[str, str]
    weight: float

    def count(self, batches: Mapping[str, Batch]) -> jax.Array:
        """float32[]: segments of the second source."""
        return jnp.float32(len(batches[self.sources[1]].episode))

    def __call__(
        self,
        params: Any,
        batches: Mapping[str, Batch],
        key: jax.Array | None = None,
        count: jax.Array | None = None,
    ) -> tuple[jax.Array, objective.Metrics]:
        """The weighted sum of both distances, and each as a metric. Statistics are a micro-batch's own; micro-batches
        count by their segments."""
        keys = (None, None) if key is None else jax.random.split(key)
        tokens = [self._tokens(params, batches[source], key) for source, key in zip(self.sources, keys, strict=True)]
        share = 1.0 if count is None else self.count(batches) / count
        means, covariances = (share * x for x in moments_apart(*tokens))
        name = self.sources[1]
        found = {f"means_apart_{name}": means, f"covariances_apart_{name}": covariances}
        return self.weight * (means + covariances), found

    def _tokens(self, params: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        """float[n, D] of all pictures, in the order of the policy's cameras."""
        return picture_tokens(
            self.loss.model, params, batch.inputs, key=key, shifts=self.loss.shifts, augment=self.loss.augment
        )


def picture_tokens(model: vla.VLA, params: Any, inputs: Inputs, **changed: Any) -> jax.Array:
    """float[n, D]: tokens of all pictures uint8[B, G, height, width, 3], in the order of the policy's cameras. changed:
    as `objective.prepare` takes it; without, no picture is."""
    inputs = objective.prepare(inputs, model.vlm.image, model.config.cameras, **changed)
    images = {camera: x.reshape(-1, *x.shape[2:]) for camera, x in inputs.images.items()}
    encoded = backbones.build(model.vlm).apply({"params": params["backbone"]}, images, method="encode_images")
    tokens = jax.tree.leaves(encoded)[0]  # with DeepStack there are more behind them
    return tokens.reshape(-1, tokens.shape[-1])
