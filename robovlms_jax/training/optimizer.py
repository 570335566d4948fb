"""AdamW with the schedules upstream and the paper use."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from robovlms_jax.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate. Warm-up multiplies by min(1, step / warmup_steps), as upstream's `constant` schedule
    does."""

    def scale(step):
        if config.schedule == "cosine":
            cosine = optax.cosine_decay_schedule(1.0, max(steps - config.warmup_steps, 1), alpha=config.min_scale)
            return cosine(jnp.maximum(step - config.warmup_steps, 0))
        if config.schedule == "step":
            return config.step_factor ** (step // config.step_every)
        return 1.0

    def schedule(step):
        warmup = optax.linear_schedule(0.0, 1.0, config.warmup_steps)(step) if config.warmup_steps else 1.0
        return config.learning_rate * warmup * scale(step)

    return schedule


def rewrap(opt_state: Any, *, clipped: bool, clips: bool) -> Any:
    """The state of an optimizer that clips, or does not, made from that of one that did (`clipped`) or did not; the
    moments are the same."""
    if clipped == clips:
        return opt_state
    return (optax.EmptyState(), opt_state) if clips else opt_state[1]


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping (when asked), then AdamW with decoupled weight decay on every parameter."""
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
