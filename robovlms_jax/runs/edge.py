"""What a control step needs on a small computer, without having it: memory, and the time below which it cannot run.

The floor is the roofline (Williams et al. 2009) of each stage, one after the other: the larger of its matrix products
over the peak of the type they are computed in, and its weights over the memory's bandwidth (activations are taken to
stay in caches). Products of int8 with int8 are counted at twice bfloat16's rate, as Orin's data sheets give it; Thor's
gives it for FP8. Programs reach about half of it; what a particular one reaches has to be measured there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, AxisType

from robovlms_jax import schema
from robovlms_jax.backbones import base as backbones
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies import serving
from robovlms_jax.policies.sensors import base as sensors
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import flops as flops_of
from robovlms_jax.training import memory
from robovlms_jax.weights import quantize


@dataclasses.dataclass(frozen=True)
class Computer:
    """memory: bytes, shared with the operating system. bandwidth: bytes/s. flops: of dense bfloat16 products per
    second. source: of the figures."""

    memory: float
    bandwidth: float
    flops: float
    source: str


COMPUTERS = {
    "orin-nx-16": Computer(
        16e9,
        102.4e9,
        15e12,
        "NVIDIA, Jetson Orin NX series data sheet: 102.4 GB/s; the GPU's 60 sparse int8 TOPS are 15 dense bfloat16 "
        "TFLOP/s",
    ),
    "agx-orin-64": Computer(
        64e9,
        204.8e9,
        42.5e12,
        "NVIDIA, Jetson AGX Orin series data sheet: 204.8 GB/s; the GPU's 170 sparse int8 TOPS are 42.5 dense bfloat16 "
        "TFLOP/s",
    ),
    "thor-t5000": Computer(
        128e9,
        273e9,
        258e12,
        "NVIDIA, Jetson T5000 data sheet: 273 GB/s; 2070 sparse FP4 TFLOP/s are 258 dense bfloat16 TFLOP/s",
    ),
}

STAGES = ("vision", "connector", "text", "head")
"""Parts that run one after the other. connector: whatever of the backbone is neither tower. head: all outside it."""


def plan(config: ExperimentConfig, vlm: backbones.VLMConfig, computer: str, text_length: int) -> dict[str, Any]:
    """One control step of one robot, pictures in the model's size, bfloat16 computation; plain JSON values.

    Args:
      vlm: the backbone, published or of a checkpoint.
      text_length: prompt tokens.
    Returns:
      computer and, per kind of weights, bytes of weights, carry and activations, and per stage FLOPs, bytes read and
      the floor in milliseconds.
    Raises:
      ValueError: no such computer.
    """
    if computer not in COMPUTERS:
        hint = schema.nearest(computer, COMPUTERS)
        raise ValueError(f"control_on={computer!r} is unknown{hint} Computers: {', '.join(COMPUTERS)}.")
    machine = COMPUTERS[computer]
    kinds = {}
    for weights in ("bfloat16", "int8", "w8a8"):
        vlm = dataclasses.replace(vlm, dtype="bfloat16", storage="float" if weights == "bfloat16" else weights)
        kinds[weights] = _step(build.make_model(config, vlm), machine, text_length)
    return {"computer": computer, **dataclasses.asdict(machine), "text_length": text_length, "weights": kinds}


def _step(model: VLA, machine: Computer, text_length: int) -> dict[str, Any]:
    given = arguments(model, text_length)
    traced = jax.make_jaxpr(lambda *x: serving.control_step(model, *x))(*given)
    flops, seconds = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    for names, count, whole in flops_of.products(traced.jaxpr):
        stage, rate = _stage(names), INT8_RATE if whole else 1.0
        flops[stage] += count
        seconds[stage] += count / (rate * machine.flops)
    read = _weights_read(given[0], tied=model.config.readout == "token")
    stages = {
        stage: {
            "flops": flops[stage],
            "bytes": read[stage],
            "floor_ms": 1e3 * max(seconds[stage], read[stage] / machine.bandwidth),
            "bound": "compute" if seconds[stage] > read[stage] / machine.bandwidth else "memory",
        }
        for stage in STAGES
    }
    sizes = {
        "weights": _bytes(given[0]),
        "carry": _bytes(given[1]),
        "activations": memory.alive(traced),
    }
    total = sum(sizes.values())
    return {
        "bytes": {**sizes, "total": total},
        "stages": stages,
        "floor_ms": sum(stage["floor_ms"] for stage in stages.values()),
    }


def arguments(model: VLA, text_length: int) -> list[Any]:
    """Shapes of what `serving.control_step` takes after the model."""
    leaf = jax.ShapeDtypeStruct
    mesh = AbstractMesh((1, 1, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    shapes, _ = build.abstract_params(model, mesh)
    params = jax.tree.map(lambda x: leaf(x.shape, x.dtype), shapes)
    if model.vlm.storage == "float":  # int8: the model says what is stored how
        params = jax.tree.map(lambda x, dtype: leaf(x.shape, dtype), params, quantize.stored_types(shapes, "bfloat16"))
    carry = jax.eval_shape(lambda params: model.init_carry(1, params, text_length), params)
    size = model.vlm.image.size
    images = {camera: leaf((1, size, size, 3), np.uint8) for camera in model.config.cameras}
    text = [leaf((1, *model.vlm.text_shape(text_length)), dtype) for dtype in (np.int32, np.bool_)]
    extras = jax.tree.map(lambda x: leaf(x.shape, x.dtype), sensors.blank(model.config.all_sensors, 1, 1))
    return [params, carry, images, *text, leaf((1,), np.bool_), extras]


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _weights_read(params: Mapping[str, Any], *, tied: bool) -> dict[str, int]:
    """Bytes per stage. Of a table of words only a few rows are read, unless it also says the words."""
    read = dict.fromkeys(STAGES, 0)
    for path, x in flatten_dict(params, sep="/").items():
        if tied or not path.endswith("/table"):
            read[_stage(path)] += _bytes(x)
    return read


def _stage(path: str) -> str:
    """Which stage a parameter, or an operation under these names, belongs to."""
    names = path.split("/")
    if not any(name.startswith("backbone") for name in names):
        return "head"
    return next((stage for stage in ("connector", "vision", "text") if stage in names), "connector")


INT8_RATE = 2.0
"""Products of int8 per product of bfloat16."""
