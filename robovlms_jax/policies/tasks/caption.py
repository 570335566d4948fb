"""Keep describing the picture (`policy.auxiliary.caption_weight`), so that the backbone stays a language model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from robovlms_jax.policies import auxiliary
from robovlms_jax.policies.tasks import base
from robovlms_jax.policies.vla import VLA, Outputs


@dataclasses.dataclass(frozen=True)
class CaptionTask:
    """Cross-entropy of the prompt given the images before it."""

    weight: float
    name: str = "caption"
    metrics: tuple[str, ...] = ("loss_caption",)

    def __call__(self, model: VLA, outputs: Outputs, example: base.Example) -> tuple[jax.Array, base.Metrics]:
        inputs, windows = example.batch.inputs, len(outputs.features)
        # The first step: in one sequence, later ones could copy their prompt from it.
        hidden, tokens = jax.tree.map(lambda x: x[:, 0], (outputs.hidden, outputs.tokens))
        ids, mask = (jnp.repeat(x, len(hidden) // len(x), axis=0) for x in (inputs.text_ids, inputs.text_mask))
        errors = auxiliary.caption_errors(hidden, tokens, ids, mask, model.backbone.logits)
        mean = base.mean_over_actions(jnp.repeat(errors, windows // len(errors), axis=0), example)
        return mean, {"loss_caption": mean}
