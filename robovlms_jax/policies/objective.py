"""From a raw batch to the training loss: preprocessing and augmentation, targets of every window, the head's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from robovlms_jax.config import PolicyConfig
from robovlms_jax.inputs import images
from robovlms_jax.policies import history as histories
from robovlms_jax.policies.vla import VLA
from robovlms_jax.types import Batch, Inputs

Metrics = dict[str, jax.Array]
Augmentation = images.Augmentation


def prepare(
    inputs: Inputs,
    spec: images.ImageSpec,
    cameras: tuple[str, ...],
    *,
    key: jax.Array | None = None,
    shifts: Mapping[str, int] | None = None,
    augment: images.Augmentation | None = None,
) -> Inputs:
    """uint8 frames of any size -> normalised float32[B, G, size, size, 3], on the device.

    With `key`, each camera is changed as `augment` says and shifted randomly by up to `shifts[camera]` pixels, the same
    way in all frames of a segment.
    """
    prepared = {}
    for index, camera in enumerate(cameras):
        x = images.resize(inputs.images[camera], spec.size, spec.interpolation)
        if key is not None and augment is not None:
            x = images.augment(jax.random.fold_in(jax.random.fold_in(key, len(cameras)), index), x, augment)
        x = images.normalize(x, spec.mean, spec.std)
        if key is not None:
            x = images.random_shift(jax.random.fold_in(key, index), x, (shifts or {}).get(camera, 0))
        prepared[camera] = x
    return inputs.replace(images=prepared)


def targets(batch: Batch, config: PolicyConfig) -> tuple[jax.Array, jax.Array]:
    """Normalised action chunks of all windows and which of their entries count.

    Returns:
      float32[B * K, W, C, A] (arm in [-1, 1], gripper as recorded) and bool[B * K, W, C]; with history `video` only
      the newest step of each window is asked for actions.
    """
    steps = _history(config).steps
    mask = histories.windows(batch.action_mask, config.chunk)  # the chunk of frame g starts at the frame's own action
    # A padding step has features of nothing; it is not asked for actions.
    mask &= batch.inputs.step_mask[..., None]
    return steps(chunks(batch, config)), steps(mask) & batch.window_mask.reshape(-1, 1, 1)


def chunks(batch: Batch, config: PolicyConfig) -> jax.Array:
    """Normalised action chunk of every frame, float32[B, G, C, A]."""
    return histories.windows(config.normalizer.normalize(batch.actions), config.chunk)


def _history(config: PolicyConfig) -> histories.History:
    return histories.make(config.history, window=config.window, cameras=len(config.cameras))


def loss(
    model: VLA,
    params: Any,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    count: jax.Array | None = None,
    shifts: Mapping[str, int] | None = None,
    augment: images.Augmentation | None = None,
) -> tuple[jax.Array, Metrics]:
    """Training loss and metrics of a batch.

    Args:
      key: PRNG key for augmentation and dropout; None turns both off.
      count: entries that count in the whole batch when `batch` is a micro-batch of it (`valid_entries`); None: this
        batch.
      shifts: camera -> pixels of random shift.
      augment: other changes to the images.
    Returns:
      float32[] loss, metrics as float32[] sums over `count`.
    """
    actions, mask = targets(batch, model.config)
    image_key, dropout = (None, None) if key is None else jax.random.split(key)
    cameras = model.config.cameras
    inputs = prepare(batch.inputs, model.vlm.image, cameras, key=image_key, shifts=shifts, augment=augment)
    prediction, head = _apply(model, params, batch.replace(inputs=inputs), dropout)
    return head.loss(prediction, actions, mask, mask.sum().astype(jnp.float32) if count is None else count)


def predict(model: VLA, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, Metrics]:
    """Evaluation: predicted and recorded actions in dataset units, which entries count, and the metrics' sums.

    Returns:
      predicted and recorded float32[B * K, W, C, A], mask bool[B * K, W, C], metrics with sums (not means) and `count`.
      Tokens of an autoregressive policy are predicted from recorded ones before them; `act` has only its own.
    """
    actions, mask = targets(batch, model.config)
    inputs = prepare(batch.inputs, model.vlm.image, model.config.cameras)
    prediction, head = _apply(model, params, batch.replace(inputs=inputs), None)
    _, metrics = head.loss(prediction, actions, mask, jnp.float32(1.0))
    predicted = model.config.normalizer.unnormalize(head.actions(prediction))
    recorded = _history(model.config).steps(histories.windows(batch.actions, model.config.chunk))
    return predicted, recorded, mask, metrics | {"count": mask.sum().astype(jnp.float32)}


def valid_entries(batch: Batch, config: PolicyConfig) -> jax.Array:
    """float32[]: entries of the batch that count in the loss."""
    return targets(batch, config)[1].sum().astype(jnp.float32)


def _apply(model: VLA, params: Any, batch: Batch, dropout: jax.Array | None) -> tuple[Any, Any]:
    rngs = {} if dropout is None else {"dropout": dropout}
    bound = model.bind({"params": params}, rngs=rngs)
    actions = chunks(batch, model.config) if model.config.is_autoregressive else None
    return bound(batch.inputs, deterministic=dropout is None, actions=actions), bound.head
