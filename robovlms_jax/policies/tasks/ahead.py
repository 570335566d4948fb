"""Predict how far the robot will have moved (`policy.auxiliary.ahead`)."""

from __future__ import annotations

import dataclasses

import jax

from robovlms_jax.policies.histories.base import merge
from robovlms_jax.policies.tasks import base
from robovlms_jax.policies.vla import VLA, Outputs


@dataclasses.dataclass(frozen=True)
class AheadTask:
    """Huber loss of the movements from each window's newest step to `offsets` later ones."""

    weight: float
    name: str = "ahead"
    metrics: tuple[str, ...] = ("loss_ahead", "off_ahead")

    def __call__(self, model: VLA, outputs: Outputs, example: base.Example) -> tuple[jax.Array, base.Metrics]:
        errors, off = model.auxiliary.movement_errors(outputs.features[:, -1], merge(example.batch.ahead, 0))
        mean = base.mean_over_actions(errors, example)
        return mean, {"loss_ahead": mean, "off_ahead": base.mean_over_actions(off, example)}
