"""Predict the recorded actions: what every policy is for."""

from __future__ import annotations

import dataclasses

import jax

from robovlms_jax.policies.tasks import base
from robovlms_jax.policies.vla import VLA, Outputs


@dataclasses.dataclass(frozen=True)
class ActionTask:
    """The head's own loss on the action chunks of all windows."""

    weight: float = 1.0
    name: str = "actions"
    metrics: tuple[str, ...] = ()

    def __call__(self, model: VLA, outputs: Outputs, example: base.Example) -> tuple[jax.Array, base.Metrics]:
        return model.outputs.loss(outputs.prediction, example.actions, example.mask, example.count)
