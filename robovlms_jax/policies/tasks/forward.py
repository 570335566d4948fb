"""Predict the frames to come (`policy.auxiliary.forward`), as GR-1 does (arXiv:2312.13139)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.histories.base import merge
from robovlms_jax.policies.tasks import base
from robovlms_jax.policies.vla import VLA, Outputs
from robovlms_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class ForwardTask:
    """Squared error of the frames `offsets` steps after each window's newest one, of every camera."""

    weight: float
    name: str = "forward"
    metrics: tuple[str, ...] = ("loss_forward",)

    def __call__(self, model: VLA, outputs: Outputs, example: base.Example) -> tuple[jax.Array, base.Metrics]:
        future, real = targets(example.batch, model.config)
        errors = model.auxiliary.forward_prediction_loss(outputs.features[:, -1], future, real)
        mean = base.mean_over_actions(errors, example)
        return mean, {"loss_forward": mean}


def targets(batch: Batch, config: PolicyConfig) -> tuple[dict[str, jax.Array], jax.Array]:
    """The frames that are to be predicted from every window, and which of them were recorded.

    Args:
      batch: prepared.
    Returns:
      camera -> float[B * K, O, size, size, 3] at the O configured offsets, and bool[B * K, O, cameras].
    """
    frames, windows = batch.inputs.step_mask.shape[1], batch.window_mask.shape[1]
    newest = config.window - 1 + np.arange(windows)
    chosen = newest[:, None] + np.array(config.auxiliary.forward.offsets)  # [K, O]
    future = {
        camera: merge(jnp.concatenate([x, batch.future[camera]], axis=1)[:, chosen], 0)
        for camera, x in batch.inputs.images.items()
    }
    # Within a segment, frame g is one of its own as long as frame g - 1 was learned from; beyond, the loader says so.
    real = jnp.concatenate([batch.action_mask[:, :1], batch.action_mask[:, : frames - 1], batch.future_mask], axis=1)
    real = jnp.stack([real[:, chosen]] * len(config.cameras), axis=-1)  # [B, K, O, cameras]
    if batch.inputs.image_mask is not None:  # an episode without a camera has no frames of it to predict
        has = jnp.stack([batch.inputs.image_mask[camera][:, newest] for camera in config.cameras], axis=-1)
        real &= has[:, :, None]
    return future, merge(real, 0)
