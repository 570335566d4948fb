"""Keep features near the instruction's embedding by CLIP (`policy.auxiliary.clip`, upstream's CLIP-norm loss)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from robovlms_jax.policies.tasks import base
from robovlms_jax.policies.vla import VLA, Outputs


@dataclasses.dataclass(frozen=True)
class ClipTask:
    """Smooth L1 between every step's pooled, projected features and the sentence's embedding."""

    weight: float
    name: str = "clip"
    metrics: tuple[str, ...] = ("loss_clip",)

    def __call__(self, model: VLA, outputs: Outputs, example: base.Example) -> tuple[jax.Array, base.Metrics]:
        sentence, windows = example.batch.sentence, len(outputs.features)
        sentence = jnp.repeat(sentence, windows // len(sentence), axis=0)
        mean = base.mean_over_actions(model.auxiliary.clip_alignment_loss(outputs.features, sentence), example)
        return mean, {"loss_clip": mean}
