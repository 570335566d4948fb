"""A policy's model and parameters in the form that control steps compute fastest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from robovlms_jax.nn import attention, stack
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build


def model(model: VLA) -> VLA:
    """The same policy with queries, keys and values by one product (`nn.attention.joint`); adapters prevent it."""
    return VLA(model.config, dataclasses.replace(model.vlm, joint=model.vlm.lora_rank == 0))


def parameters(served: VLA, params: Mapping[str, Any], *, take: bool = False) -> dict[str, Any]:
    """Parameters of the model that `served` was made of (nested, layers stacked), as `served` has them, with a tuple
    of arrays, one per layer, in place of each stack (`nn.stack.parted`).

    take: those given are deleted one after the other, so that no second copy of all of them is made.
    """
    mesh = AbstractMesh((1, 1, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    shapes, _ = build.abstract_params(served, mesh)
    return stack.parted(attention.joint(params, shapes, take=take), take=take)
