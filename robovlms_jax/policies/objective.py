"""From a raw batch to the training loss: preprocessing and augmentation, targets of every window, the tasks' losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from robovlms_jax.inputs import images
from robovlms_jax.inputs.config import AugmentConfig
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.policies.histories import base as histories
from robovlms_jax.policies.tasks import base, registry
from robovlms_jax.policies.vla import VLA, Outputs
from robovlms_jax.types import Batch, Inputs

Metrics = dict[str, jax.Array]

ROBOT = "robot"
"""The source of batches that every policy has: its robot's demonstrations."""
NOT_INSULATED = ("caption", "scene")
"""Tasks on them that teach the backbone under policy.insulate, too: they are about words and pictures."""


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


class SourceLoss(Protocol):
    """The loss on batches of one source."""

    def count(self, batch: Any) -> jax.Array:
        """float32[]: entries of the batch that count in the loss."""
        ...

    def __call__(
        self, params: Any, batch: Any, key: jax.Array | None = None, count: jax.Array | None = None
    ) -> tuple[jax.Array, Metrics]:
        """As `RobotLoss`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class LossBySource:
    """The loss on batches of several sources, a dictionary of one batch each: the weighted sum of theirs.

    weights: source -> weight of its loss, which is a mean over its own rows; 1 where a source is not named.
    between: name -> a loss on the batches of several sources at once, whose `count` and arguments are as `SourceLoss`
      has them, with the whole dictionary in place of one batch.
    """

    losses: Mapping[str, SourceLoss]
    between: Mapping[str, SourceLoss] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def count(self, batches: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Source, or name of a loss between sources -> entries that count."""
        counts = {source: loss.count(batches[source]) for source, loss in self.losses.items()}
        return counts | {name: loss.count(batches) for name, loss in self.between.items()}

    def __call__(
        self,
        params: Any,
        batches: Mapping[str, Any],
        key: jax.Array | None = None,
        count: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """Loss and metrics. Metric `loss` is the weighted sum; beside several sources the first one's own is
        `loss_SOURCE`, and all metrics of the others are `NAME_SOURCE`, without weights.

        Each source draws its own random numbers; the first those that it would draw alone.
        """
        total, metrics = None, {}
        for index, (source, loss) in enumerate(self.losses.items()):
            own = key if key is None or index == 0 else jax.random.fold_in(key, index)
            value, found = loss(params, batches[source], own, None if count is None else count[source])
            if index:
                found = {f"{name}_{source}": x for name, x in found.items()}
            elif len(self.losses) > 1:
                found = {**found, f"loss_{source}": found["loss"]}
            weight = self.weights.get(source, 1.0)
            value = value if weight == 1 else weight * value
            total, metrics = (value if total is None else total + value), {**metrics, **found}
        for index, (name, loss) in enumerate(self.between.items(), start=len(self.losses)):
            own = None if key is None else jax.random.fold_in(key, index)
            value, found = loss(params, batches, own, None if count is None else count[name])
            total, metrics = total + value, {**metrics, **found}
        return total, {**metrics, "loss": total}


@dataclasses.dataclass(frozen=True, eq=False)
class RobotLoss:
    """The loss on a robot's demonstrations: all tasks on one forward pass.

    tasks: None: those that the policy's configuration asks for.
    shifts: camera -> pixels of random shift. augment: other changes to the images.
    """

    model: VLA
    tasks: tuple[base.Task, ...] | None = None
    shifts: Mapping[str, int] | None = None
    augment: AugmentConfig | None = None

    def count(self, batch: Batch) -> jax.Array:
        """float32[]: entries of the batch that count in the loss."""
        return _targets(self.model, batch)[1].sum().astype(jnp.float32)

    def __call__(
        self, params: Any, batch: Batch, key: jax.Array | None = None, count: jax.Array | None = None
    ) -> tuple[jax.Array, Metrics]:
        """Training loss and metrics of a batch.

        Args:
          key: PRNG key for augmentation and dropout; None turns both off.
          count: entries that count in the whole batch when `batch` is a micro-batch of it (`count`); None: this batch.
        Returns:
          float32[] loss, metrics as float32[] sums over `count`.
        """
        actions, mask = _targets(self.model, batch)
        image_key, dropout = (None, None) if key is None else jax.random.split(key)
        batch = _prepared(self.model, batch, key=image_key, shifts=self.shifts, augment=self.augment)
        count = mask.sum().astype(jnp.float32) if count is None else count
        example = base.Example(batch, actions, mask, count)
        if not self.model.config.insulate:
            return self._sum(*_forward(self.model, params, batch, dropout), example)
        other = tuple(task for task in self._tasks if task.name in NOT_INSULATED)
        acted = tuple(task for task in self._tasks if task.name not in NOT_INSULATED)
        total, metrics = jnp.float32(0.0), {}
        for tasks, own in ((acted, insulated(params)), (other, params)):
            if tasks:
                value, found = self._sum(*_forward(self.model, own, batch, dropout), example, tasks)
                total, metrics = total + value, {**metrics, **found}
        return total, {**metrics, "loss": total}

    def predict(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, Metrics]:
        """Evaluation: predicted and recorded actions in dataset units, which entries count, and the metrics' sums.

        Returns:
          predicted and recorded float32[B * K, W, C, A], mask bool[B * K, W, C], metrics with sums (not means) and
          `count`. Tokens of an autoregressive policy are predicted from recorded ones before them; `act` has only its
          own.
        """
        config = self.model.config
        actions, mask = _targets(self.model, batch)
        prepared = _prepared(self.model, batch)
        bound, outputs = _forward(self.model, params, prepared, None)
        _, metrics = self._sum(bound, outputs, base.Example(prepared, actions, mask, jnp.float32(1.0)))
        predicted = config.normalizer.unnormalize(bound.outputs.actions(outputs.prediction))
        recorded = self.model.history.steps(histories.windows(batch.actions, config.chunk))
        return predicted, recorded, mask, metrics | {"count": mask.sum().astype(jnp.float32)}

    def confidence(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, heads.Spread | None]:
        """What is compared to calibrate a policy: predicted and recorded actions float32[B * K, C, A] of each window's
        newest step, normalised; which of them count, bool[B * K, C]; and the head's spread. Tokens of an autoregressive
        policy are predicted as in `predict`.
        """
        actions, mask = _targets(self.model, batch)
        bound, outputs = _forward(self.model, params, _prepared(self.model, batch), None)
        predicted, spread = bound.outputs.actions(outputs.prediction), bound.spread(outputs.prediction)
        return jax.tree.map(lambda x: x[:, -1], (predicted, actions, mask, spread))

    @property
    def _tasks(self) -> tuple[base.Task, ...]:
        return registry.make(self.model.config) if self.tasks is None else self.tasks

    def _sum(
        self, bound: VLA, outputs: Outputs, example: base.Example, tasks: tuple[base.Task, ...] | None = None
    ) -> tuple[jax.Array, Metrics]:
        """The tasks' weighted sum; None: all of them."""
        parts, metrics = [], {}
        for task in self._tasks if tasks is None else tasks:
            value, found = task(bound, outputs, example)
            parts.append(value if task.weight == 1 else task.weight * value)
            metrics |= found
        first, *rest = parts
        loss = first + sum(rest) if rest else first
        return loss, {**metrics, "loss": loss}


def insulated(params: Any) -> Any:
    """The same parameters, the backbone's without a gradient. What runs through the backbone still has one, so that
    action queries and sensors learn what to put in."""
    return {**params, "backbone": jax.lax.stop_gradient(params["backbone"])}


def robot(model: VLA, **settings: Any) -> LossBySource:
    """What a policy is trained by when demonstrations are its only source; `settings` as `RobotLoss` takes them."""
    return LossBySource({ROBOT: RobotLoss(model, **settings)})


def _targets(model: VLA, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Normalised action chunks of all windows, and which of their entries count, as `tasks.base.Example` has them.

    Arms lie in [-1, 1], grippers are as recorded. With history `video` only the newest step of each window is asked for
    actions.
    """
    steps = model.history.steps
    mask = histories.windows(batch.action_mask, model.config.chunk)  # the chunk of frame g starts at its own action
    # Features of a padding step mean nothing; its actions are left out of the loss.
    mask &= batch.inputs.step_mask[..., None]
    return steps(_chunks(model, batch)), steps(mask) & batch.window_mask.reshape(-1, 1, 1)


def _chunks(model: VLA, batch: Batch) -> jax.Array:
    """Normalised action chunk of every frame, float32[B, G, C, A]."""
    return histories.windows(model.config.normalizer.normalize(batch.actions), model.config.chunk)


def _prepared(
    model: VLA,
    batch: Batch,
    key: jax.Array | None = None,
    shifts: Mapping[str, int] | None = None,
    augment: AugmentConfig | None = None,
) -> Batch:
    """With frames as the model takes them; those that follow the segment are shifted along with it."""
    inputs, frames = batch.inputs, batch.inputs.step_mask.shape[1]
    spec, cameras, how = model.vlm.image, model.config.cameras, {"key": key, "shifts": shifts, "augment": augment}
    if batch.future is None:
        return batch.replace(inputs=prepare(inputs, spec, cameras, **how))
    longer = {c: jnp.concatenate([x, batch.future[c]], axis=1) for c, x in inputs.images.items() if c in batch.future}
    whole = prepare(inputs.replace(images=longer), spec, cameras, **how)
    seen, future = ({c: x[:, part] for c, x in whole.images.items()} for part in (slice(frames), slice(frames, None)))
    return batch.replace(inputs=inputs.replace(images=seen), future=future)


def _forward(model: VLA, params: Any, batch: Batch, dropout: jax.Array | None) -> tuple[VLA, Outputs]:
    """The one forward pass, and the model bound to its parameters; `batch` as `_prepared` returns it."""
    bound = model.bind({"params": params}, rngs={} if dropout is None else {"dropout": dropout})
    actions = _chunks(model, batch) if model.config.is_autoregressive else None
    return bound, bound.train_outputs(batch.inputs, deterministic=dropout is None, actions=actions)
