"""Answers to questions about pictures, word by word: what keeps a policy's backbone a vision-language model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from robovlms_jax.inputs import images
from robovlms_jax.policies.vla import VLA
from robovlms_jax.types import Pairs

Metrics = dict[str, jax.Array]
NAME = "vl"
"""What a stage's weights call the task."""


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerLoss:
    """Cross-entropy of the answers' tokens, each from everything before it, through the language model's head. A loss
    on batches of one source (`objective.SourceLoss`).

    Pictures are not augmented: shifts, colours and erased parts would make answers wrong.
    """

    model: VLA
    weight: float = 1.0

    def count(self, batch: Pairs) -> jax.Array:
        """float32[]: tokens to be said."""
        return jnp.maximum(batch.answer_mask.sum(), 1).astype(jnp.float32)

    def __call__(
        self, params: Any, batch: Pairs, key: jax.Array | None = None, count: jax.Array | None = None
    ) -> tuple[jax.Array, Metrics]:
        """The weighted loss, and metrics: `loss` before its weight, `token_accuracy`. All are sums over `count`."""
        count = self.count(batch) if count is None else count
        errors, right = self._said(params, batch, key)
        loss = errors.sum() / count
        return self.weight * loss, {"loss": loss, "token_accuracy": right.sum() / count}

    def predict(self, params: Any, batch: Pairs) -> Metrics:
        """Sums over the batch, float32[] each: `loss` and `tokens`; `right` and `answers`, samples whose answers are
        right to the last token, as greedy decoding would say them, out of how many."""
        errors, right = self._said(params, batch, None)
        answered = batch.answer_mask.any(axis=1)
        correct = answered & (right | ~batch.answer_mask).all(axis=1)
        sums = {
            "loss": errors.sum(),
            "tokens": batch.answer_mask.sum(),
            "right": correct.sum(),
            "answers": answered.sum(),
        }
        return {name: x.astype(jnp.float32) for name, x in sums.items()}

    def _said(self, params: Any, batch: Pairs, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Of every token to be said: its cross-entropy float32[B, A], zero where there is none, and bool[B, A], whether
        it is the likeliest."""
        spec = self.model.vlm.image
        bound = self.model.bind({"params": params}, rngs={} if key is None else {"dropout": key})
        pictures = images.normalize(images.resize(batch.images, spec.size, spec.interpolation), spec.mean, spec.std)
        first = jnp.where(batch.answer_mask, batch.answer_slots, batch.text_ids.shape[1]).min(axis=1, keepdims=True)
        tokens = bound.backbone.embed_conversation(
            pictures,
            batch.text_ids,
            batch.image_slots,
            batch.text_mask,
            jnp.arange(batch.text_ids.shape[1]) < first,
            None if batch.question_ids is None else (batch.question_ids, batch.question_mask),
            deterministic=key is None,
        )
        hidden, _ = bound.backbone.decode(tokens, deterministic=key is None)
        # Logits of the answers' slots alone: vocabularies are large, and answers short.
        before = jnp.take_along_axis(hidden, batch.answer_slots[..., None] - 1, axis=1)
        ids = jnp.take_along_axis(batch.text_ids, batch.answer_slots, axis=1)
        logits = bound.backbone.logits(before)
        errors = optax.losses.softmax_cross_entropy_with_integer_labels(logits, ids)
        return jnp.where(batch.answer_mask, errors, 0.0), batch.answer_mask & (logits.argmax(-1) == ids)
