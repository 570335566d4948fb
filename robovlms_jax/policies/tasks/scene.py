"""See where things are (`policy.auxiliary.scene`)."""

from __future__ import annotations

import dataclasses

import jax

from robovlms_jax.policies.histories.base import merge
from robovlms_jax.policies.tasks import base
from robovlms_jax.policies.vla import VLA, Outputs


@dataclasses.dataclass(frozen=True)
class SceneTask:
    """Huber loss of numbers about each window's newest frame, told from its pictures' tokens."""

    weight: float
    name: str = "scene"
    metrics: tuple[str, ...] = ("loss_scene", "off_scene")

    def __call__(self, model: VLA, outputs: Outputs, example: base.Example) -> tuple[jax.Array, base.Metrics]:
        hidden = model.history.windows(outputs.hidden[..., outputs.tokens.slot("image"), :])[:, -1]
        errors, off = model.auxiliary.scene_errors(hidden, merge(example.batch.scene, 0))
        mean = base.mean_over_actions(errors, example)
        return mean, {"loss_scene": mean, "off_scene": base.mean_over_actions(off, example)}
