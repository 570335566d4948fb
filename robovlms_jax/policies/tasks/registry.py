"""Which tasks a configuration asks for."""

from __future__ import annotations

from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.tasks.actions import ActionTask
from robovlms_jax.policies.tasks.ahead import AheadTask
from robovlms_jax.policies.tasks.base import Task
from robovlms_jax.policies.tasks.caption import CaptionTask
from robovlms_jax.policies.tasks.clip import ClipTask
from robovlms_jax.policies.tasks.forward import ForwardTask
from robovlms_jax.policies.tasks.scene import SceneTask


def make(config: PolicyConfig) -> tuple[Task, ...]:
    """The actions, and what `policy.auxiliary` switches on."""
    auxiliary = config.auxiliary
    tasks: list[Task] = [ActionTask()]
    if auxiliary.forward.loss_weight:
        tasks.append(ForwardTask(auxiliary.forward.loss_weight))
    if auxiliary.clip.weights:
        tasks.append(ClipTask(auxiliary.clip.loss_weight))
    if auxiliary.ahead.loss_weight:
        tasks.append(AheadTask(auxiliary.ahead.loss_weight))
    if auxiliary.scene.loss_weight:
        tasks.append(SceneTask(auxiliary.scene.loss_weight))
    if auxiliary.caption_weight:
        tasks.append(CaptionTask(auxiliary.caption_weight))
    return tuple(tasks)
