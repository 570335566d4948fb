"""From a raw batch to the training loss: preprocessing and augmentation, targets of every window, the head's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.inputs import images
from robovlms_jax.inputs.config import AugmentConfig
from robovlms_jax.policies import auxiliary
from robovlms_jax.policies.config import AuxiliaryConfig, PolicyConfig
from robovlms_jax.policies.histories import base, registry
from robovlms_jax.policies.vla import VLA
from robovlms_jax.types import Batch, Inputs

Metrics = dict[str, jax.Array]


def prepare(
    inputs: Inputs,
    spec: images.ImageSpec,
    cameras: tuple[str, ...],
    *,
    key: jax.Array | None = None,
    shifts: Mapping[str, int] | None = None,
    augment: AugmentConfig | None = None,
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
    steps = registry.make(config).steps
    mask = base.windows(batch.action_mask, config.chunk)  # the chunk of frame g starts at the frame's own action
    # A padding step has features of nothing; it is not asked for actions.
    mask &= batch.inputs.step_mask[..., None]
    return steps(chunks(batch, config)), steps(mask) & batch.window_mask.reshape(-1, 1, 1)


def chunks(batch: Batch, config: PolicyConfig) -> jax.Array:
    """Normalised action chunk of every frame, float32[B, G, C, A]."""
    return base.windows(config.normalizer.normalize(batch.actions), config.chunk)


def loss(
    model: VLA,
    params: Any,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    count: jax.Array | None = None,
    shifts: Mapping[str, int] | None = None,
    augment: AugmentConfig | None = None,
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
    batch = _prepared(model, batch, key=image_key, shifts=shifts, augment=augment)
    count = mask.sum().astype(jnp.float32) if count is None else count
    prediction, head, errors = _apply(model, params, batch, dropout)
    value, metrics = head.loss(prediction, actions, mask, count)
    return _add(value, metrics, errors, mask, count, model.config.auxiliary)


def predict(model: VLA, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, Metrics]:
    """Evaluation: predicted and recorded actions in dataset units, which entries count, and the metrics' sums.

    Returns:
      predicted and recorded float32[B * K, W, C, A], mask bool[B * K, W, C], metrics with sums (not means) and `count`.
      Tokens of an autoregressive policy are predicted from recorded ones before them; `act` has only its own.
    """
    actions, mask = targets(batch, model.config)
    one = jnp.float32(1.0)
    prediction, head, errors = _apply(model, params, _prepared(model, batch), None)
    _, metrics = _add(*head.loss(prediction, actions, mask, one), errors, mask, one, model.config.auxiliary)
    predicted = model.config.normalizer.unnormalize(head.actions(prediction))
    recorded = registry.make(model.config).steps(base.windows(batch.actions, model.config.chunk))
    return predicted, recorded, mask, metrics | {"count": mask.sum().astype(jnp.float32)}


def valid_entries(batch: Batch, config: PolicyConfig) -> jax.Array:
    """float32[]: entries of the batch that count in the loss."""
    return targets(batch, config)[1].sum().astype(jnp.float32)


def _prepared(model: VLA, batch: Batch, **augmentation: Any) -> Batch:
    """With frames as the model takes them; those that follow the segment are shifted along with it."""
    inputs, frames = batch.inputs, batch.inputs.step_mask.shape[1]
    if batch.future is None:
        return batch.replace(inputs=prepare(inputs, model.vlm.image, model.config.cameras, **augmentation))
    longer = {c: jnp.concatenate([x, batch.future[c]], axis=1) for c, x in inputs.images.items() if c in batch.future}
    whole = prepare(inputs.replace(images=longer), model.vlm.image, model.config.cameras, **augmentation)
    seen, future = ({c: x[:, part] for c, x in whole.images.items()} for part in (slice(frames), slice(frames, None)))
    return batch.replace(inputs=inputs.replace(images=seen), future=future)


def _lessons(batch: Batch, config: PolicyConfig) -> auxiliary.Lessons:
    """What the auxiliary losses compare with; `batch` as `_prepared` returns it."""
    if not config.auxiliary.forward.loss_weight:
        return auxiliary.Lessons(sentence=batch.sentence)
    frames, windows = batch.inputs.step_mask.shape[1], batch.window_mask.shape[1]
    newest = config.window - 1 + np.arange(windows)
    chosen = newest[:, None] + np.array(config.auxiliary.forward.offsets)  # [K, O]
    future = {
        camera: base.merge(jnp.concatenate([x, batch.future[camera]], axis=1)[:, chosen], 0)
        for camera, x in batch.inputs.images.items()
    }
    # Within a segment, frame g is one of its own as long as frame g - 1 was learned from; beyond, the loader says so.
    real = jnp.concatenate([batch.action_mask[:, :1], batch.action_mask[:, : frames - 1], batch.future_mask], axis=1)
    real = jnp.stack([real[:, chosen]] * len(config.cameras), axis=-1)  # [B, K, O, cameras]
    if batch.inputs.image_mask is not None:  # an episode without a camera has no frames of it to foresee
        has = jnp.stack([batch.inputs.image_mask[camera][:, newest] for camera in config.cameras], axis=-1)
        real &= has[:, :, None]
    return auxiliary.Lessons(future, base.merge(real, 0), batch.sentence)


def _add(
    loss: jax.Array,
    metrics: Mapping[str, jax.Array],
    errors: Mapping[str, jax.Array],
    mask: jax.Array,
    count: jax.Array,
    config: AuxiliaryConfig,
) -> tuple[jax.Array, Metrics]:
    """The auxiliary losses on top, each weighing windows (or steps) by how many of their actions count."""
    if not errors:
        return loss, dict(metrics)
    weights = {
        "forward": config.forward.loss_weight,
        "clip": config.clip.loss_weight,
        "caption": config.caption_weight,
    }
    means = {}
    for name, error in errors.items():
        entries = mask.sum(axis=tuple(range(error.ndim, mask.ndim)))
        means[name] = (error * entries).sum() / count
    loss = loss + sum(weights[name] * mean for name, mean in means.items())
    return loss, {**metrics, "loss": loss, **{f"loss_{name}": mean for name, mean in means.items()}}


def _apply(
    model: VLA, params: Any, batch: Batch, dropout: jax.Array | None
) -> tuple[Any, Any, Mapping[str, jax.Array]]:
    """Predictions, the head they are of, and errors of auxiliary losses; `batch` as `_prepared` returns it."""
    rngs = {} if dropout is None else {"dropout": dropout}
    bound = model.bind({"params": params}, rngs=rngs)
    actions = chunks(batch, model.config) if model.config.is_autoregressive else None
    if not model.config.auxiliary.enabled:
        return bound(batch.inputs, deterministic=dropout is None, actions=actions), bound.head, {}
    lessons = _lessons(batch, model.config)
    prediction, errors = bound.learn(batch.inputs, lessons, deterministic=dropout is None, actions=actions)
    return prediction, bound.head, errors
