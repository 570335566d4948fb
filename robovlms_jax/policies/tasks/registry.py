"""Which tasks a configuration asks for."""

from __future__ import annotations

from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.tasks.actions import ActionTask
from robovlms_jax.policies.tasks.base import Task
from robovlms_jax.policies.tasks.caption import CaptionTask
from robovlms_jax.policies.tasks.clip import ClipTask
from robovlms_jax.policies.tasks.forward import ForwardTask


def make(config: PolicyConfig) -> tuple[Task, ...]:
    """The actions, and what `policy.auxiliary` switches on."""
    asked = config.auxiliary
    tasks: list[Task] = [ActionTask()]
    if asked.forward.loss_weight:
        tasks.append(ForwardTask(asked.forward.loss_weight))
    if asked.clip.weights:
        tasks.append(ClipTask(asked.clip.loss_weight))
    if asked.caption_weight:
        tasks.append(CaptionTask(asked.caption_weight))
    return tuple(tasks)
