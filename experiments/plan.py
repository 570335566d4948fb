"""How much memory and time a training run would take on each device, without having the devices.

python -m experiments.plan --backbone paligemma-3b-224 --mesh.fsdp 8 --train.batch_size 128
python -m experiments.plan --preset kosmos_lstm_lora --compile     # also XLA's own plan, compiled for CPUs: minutes
python -m experiments.plan --preset paligemma_lstm --control_on orin-nx-16      # a control step there: memory, latency
python -m experiments.plan --preset kosmos_lstm --target v5p:2x2x2 --mesh.fsdp 8   # compiled for it: all that is known

The presets of all training programs can be planned, those of other ones than calvin_abcd by PROGRAM/PRESET
(lerobot/so100). Fields are given as to a training run; no dataset or weights are opened.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
import time
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from experiments import bridge, calvin_abcd, google_robot, lerobot, libero, oxe_pretrain
from robovlms_jax import atomic, bars, cli, ending, upstream
from robovlms_jax.backbones import registry
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel import targets
from robovlms_jax.parallel.config import MeshConfig
from robovlms_jax.policies import objective
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.discrete import DiscreteHeadConfig
from robovlms_jax.policies.sensors import base as sensors
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build, compiled, edge, further, steps
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import memory, stages, state
from robovlms_jax.types import Batch, Inputs

TEXT_LENGTH = 32
"""Prompt tokens where data.text_length leaves them to the dataset; CALVIN's longest prompt needs 16 to 24."""
IMAGE_SIZE = (224, 224)
"""Pixels of a stored frame where neither data.image_size nor policy.robot says."""


@dataclasses.dataclass(frozen=True)
class PlanConfig(ExperimentConfig):
    """An experiment, and how to plan it."""

    devices: int = 0
    """Devices to plan for. 0: as many as the mesh names, one where it names none."""
    memory_gib: float = 0.0
    """Memory of one device, such as 80. A plan that takes far more is refused, with the nearest accumulation and remat
    that do not. 0: anything goes."""
    compile: bool = False
    """Also compile the step, for as many pretended CPUs, and say what XLA plans. A GPU's or TPU's compiler plans
    otherwise; on a CPU bfloat16 products are computed in float32, which takes more."""
    target: str = ""
    """Compile for these accelerators, which need not be here: v5p:2x2x2 (also v4, v5e, v6e; 2xv5p:2x2x2: two slices),
    h100:8 or a100:8x4 (cards x hosts; also h200, b200; orin:1, a Jetson). Needs the extra plan-tpu or plan-gpu, and
    minutes for large models."""
    programs: tuple[Literal["training", "control"], ...] = ("training", "control")
    """What is compiled for `target`."""
    compiled: str = "runs/plans"
    """Folder that keeps what compilers said about programs for targets, so that none is compiled twice. Empty: none."""
    control_on: str = ""
    """Plan a control step on this computer instead of training: orin-nx-16, agx-orin-64 or thor-t5000."""
    out: str = ""
    """Also write the result to this file, as JSON."""


def plan(config: PlanConfig) -> dict[str, Any]:
    """Estimate as plain JSON values, bytes on one device.

    Raises:
      ValueError: the configuration cannot be, or no such target.
      ModuleNotFoundError: the target's compiler is not installed.
    """
    target = targets.parse(config.target) if config.target else None
    if target and (config.compile or config.control_on):
        raise ValueError("target compiles for accelerators, compile for CPUs, control_on estimates: give one of them.")
    if target and config.devices not in (0, target.count):
        raise ValueError(f"devices={config.devices}, but target={config.target} has {target.count}: leave devices out.")
    sizes = config.mesh_sizes(config.devices or (target.count if target else named_devices(config.mesh)))
    config.validate(math.prod(sizes))
    begin = time.perf_counter()
    subject = describe(config, sizes[0] * sizes[1] * config.train.accumulation)
    config, model, batch = subject.config, subject.model, subject.batch
    text_length = config.data.text_length or TEXT_LENGTH
    if config.control_on:
        control = edge.plan(config, model.vlm, config.control_on, text_length)
        return {"backbone": config.backbone.name, "control": control}
    if target:
        return compile_for(target, subject, sizes)
    if config.compile:
        mesh = meshes.make_mesh(sizes)
    else:
        mesh = AbstractMesh(sizes, meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    abstract = compiled.abstract_state(config, model, mesh)
    estimate = steps.memory_of(config, model, abstract, batch)
    if config.memory_gib:
        steps.require_room(config, model, abstract, batch, int(config.memory_gib * 2**30), estimate)
    result = {
        "backbone": config.backbone.name,
        "mesh": dict(zip(meshes.AXES, sizes, strict=True)),
        "parameters": build.count({**abstract.trainable, **abstract.frozen}),
        "trainable_parameters": build.count(abstract.trainable),
        "windows_per_step": config.train.batch_size,
        "segments_per_device": config.segments_per_batch // (sizes[0] * sizes[1] * config.train.accumulation),
        "text_length": text_length,
        "bytes_per_device": estimate.parts(),
        "seconds_to_estimate": round(time.perf_counter() - begin, 2),
    }
    return result | ({"xla": compile_step(config, model, abstract, batch, mesh)} if config.compile else {})


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is planned: a configuration that needs no data, its model, and shapes of its batch over all devices."""

    config: PlanConfig
    model: VLA
    batch: dict[str, Batch]


def describe(config: PlanConfig, ways: int = 1) -> Subject:
    """With stand-ins for what comes from a dataset, a tokenizer or weights.

    Args:
      ways: devices that split the batch x micro-batches.
    Raises:
      ValueError: batches of a source are of shapes that only its data say.
    """
    vlm = build.with_settings(config.backbone, registry.get(config.backbone.name))
    config = dataclasses.replace(config, policy=_without_data(config.policy, vlm.text.vocab_size))
    text = vlm.text_shape(config.data.text_length or TEXT_LENGTH)
    rows = stages.rows(stages.plan(config.train, config.optimizer)[0], config.segments_per_batch, ways)
    if unknown := sorted(set(rows) - {objective.ROBOT, *config.data.further.names}):
        raise ValueError(
            f"batches of {', '.join(unknown)} are of shapes that only data say, and a plan reads none; plan without "
            "them: --train.sources robot 1"
        )
    batches = {source: describe_batch(further.view(config, source), text) for source in rows}
    return Subject(config, build.make_model(config, vlm), steps.resized(batches, rows))


def compile_for(target: targets.Target, subject: Subject, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """What `target`'s compiler makes of the training step and the control step; see `runs.compiled`."""
    config, model, batch = subject.config, subject.model, subject.batch
    mesh = meshes.make_mesh(sizes, targets.devices(target))
    place = compiled.Place(target, mesh, pathlib.Path(config.compiled) if config.compiled else None)
    plans: dict[str, Any] = {}
    if "training" in config.programs:
        plans["training"] = compiled.training(place, config, model, batch)
    if "control" in config.programs:
        plans["control"] = compiled.control(place, config, model.vlm, config.data.text_length or TEXT_LENGTH)
    return {
        "target": target.name,
        "backbone": config.backbone.name,
        "mesh": dict(zip(meshes.AXES, sizes, strict=True)),
        "windows_per_step": config.train.batch_size,
        "windows_per_segment": config.data.windows_per_segment,
        "accumulation": config.train.accumulation,
        "remat": model.vlm.remat,
        "chip": {name: x for name, x in dataclasses.asdict(target.figures).items() if name != "description"},
        "plans": plans,
    }


def _without_data(policy: PolicyConfig, vocabulary: int) -> PolicyConfig:
    """With stand-ins for what comes from a dataset or a tokenizer, which no shape depends on."""
    head = policy.head
    if isinstance(head, DiscreteHeadConfig):
        head = dataclasses.replace(head, vocab_end=head.vocab_end or vocabulary, binning="uniform")
    return dataclasses.replace(policy, head=head, action_scaling="bounds")


def named_devices(mesh: MeshConfig) -> int:
    """Devices that the sizes other than -1 make."""
    return math.prod(size for size in (mesh.data, mesh.fsdp, mesh.tensor) if size != -1)


def describe_batch(config: ExperimentConfig, text: tuple[int, ...]) -> Batch:
    """Shapes of one batch over all devices, where the dataset is not at hand to tell. text: of one prompt."""
    policy, segments = config.policy, config.segments_per_batch
    frames = policy.window + config.data.windows_per_segment - 1
    steps, future = frames + policy.chunk - 1, policy.auxiliary.future_frames
    side, ahead, scene = config.data.image_size, policy.auxiliary.ahead, policy.auxiliary.scene

    def images(count: int) -> dict[str, jax.ShapeDtypeStruct]:
        known = {camera.name: (camera.height, camera.width) for camera in policy.robot.cameras if camera.height}
        sizes = {camera: (side, side) if side else known.get(camera, IMAGE_SIZE) for camera in policy.cameras}
        return {camera: leaf(np.uint8, count, *size, 3) for camera, size in sizes.items()}

    def leaf(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((segments, *shape), dtype)

    return Batch(
        inputs=Inputs(
            images=images(frames),
            text_ids=leaf(np.int32, *text),
            text_mask=leaf(np.bool_, *text),
            step_mask=leaf(np.bool_, frames),
            **jax.tree.map(lambda x: leaf(x.dtype, *x.shape[1:]), sensors.blank(policy.all_sensors, 1, frames)),
        ),
        actions=leaf(np.float32, steps, policy.action_dim),
        action_mask=leaf(np.bool_, steps),
        window_mask=leaf(np.bool_, config.data.windows_per_segment),
        episode=leaf(np.int32),
        corrupt=leaf(np.int32),
        future=images(future) if future else None,
        future_mask=leaf(np.bool_, future) if future else None,
        sentence=leaf(np.float32, policy.auxiliary.clip.dim) if policy.auxiliary.clip.weights else None,
        ahead=leaf(np.float32, config.data.windows_per_segment, len(ahead.offsets), len(policy.moving))
        if ahead.loss_weight
        else None,
        scene=leaf(np.float32, config.data.windows_per_segment, len(scene.columns)) if scene.loss_weight else None,
    )


def compile_step(
    config: ExperimentConfig,
    model: VLA,
    train_state: state.TrainState,
    batch: dict[str, Batch],
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """XLA's plan of the step a run would compile, bytes on one device."""
    split = meshes.batched(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), batch)
    begin = time.perf_counter()
    with bars.waiting("compiling for CPUs, which takes minutes for large models"):
        compiled = steps.make_step(config, model, train_state, mesh).lower(train_state, batch).compile()
    return memory.of_program(compiled) | {"seconds_to_compile": round(time.perf_counter() - begin, 1)}


def show_control(backbone: str, control: dict[str, Any]) -> str:
    """A control step's plan as a table to read."""
    lines = [
        f"{backbone}: a control step on {control['computer']} ({control['memory'] / 1e9:g} GB), prompts of "
        f"{control['text_length']} tokens",
        control["source"],
    ]
    for weights, found in control["weights"].items():
        sizes = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in found["bytes"].items())
        what = "weights and activations in int8" if weights == "w8a8" else f"weights in {weights}"
        lines += [f"{what}: {sizes}", f"  cannot be faster than {found['floor_ms']:.1f} ms:"]
        lines += [
            f"  {name:<10}{stage['flops'] / 1e9:>9.1f} GFLOP {stage['bytes'] / 1e9:>6.2f} GB "
            f"{stage['floor_ms']:>7.1f} ms, bound by {stage['bound']}"
            for name, stage in found["stages"].items()
        ]
    return "\n".join(lines)


def show(result: dict[str, Any]) -> str:
    """The result as a table to read."""
    if "target" in result:
        return compiled.show(targets.parse(result["target"]), result["mesh"], result["plans"])
    if "control" in result:
        return show_control(result["backbone"], result["control"])
    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    lines = [
        f"{result['backbone']}: {result['parameters']:,} parameters, {result['trainable_parameters']:,} trainable",
        f"mesh {mesh}; {result['windows_per_step']} windows per step, {result['segments_per_device']} segments per "
        f"device at a time, prompts of {result['text_length']} tokens",
        "on each device, estimated:",
    ]
    lines += [f"  {name:<12}{memory.readable(size):>12}" for name, size in result["bytes_per_device"].items()]
    if "xla" in result:
        plan = dict(result["xla"])
        seconds = plan.pop("seconds_to_compile")
        lines.append(f"on each device, as XLA compiles for CPUs ({seconds} s):")
        lines += [f"  {name:<12}{memory.readable(size):>12}" for name, size in plan.items()]
    return "\n".join(lines)


def presets() -> dict[str, PlanConfig]:
    """CALVIN's by their names, the other experiments' as experiment/name."""
    others = {"bridge": bridge, "google_robot": google_robot, "libero": libero, "oxe_pretrain": oxe_pretrain}
    known = {f"{title}/{name}": config for title, room in others.items() for name, config in room.PRESETS.items()}
    for name, robot in lerobot.ROBOTS.items():  # what a recording would say of the robot
        known[f"lerobot/{name}"] = cli.override(lerobot.PRESETS[name], **{"policy.robot": robot})
    return {name: _planned(config) for name, config in (calvin_abcd.PRESETS | known).items()}


def _planned(config: ExperimentConfig) -> PlanConfig:
    return PlanConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


def main() -> None:
    """Errors of the user end the process with a message and status 1."""
    _, config = cli.parse(
        presets(),
        "kosmos_lstm",
        description=__doc__,
        read_json=lambda path: _planned(upstream.load_experiment(path)),
    )
    # No accelerator is asked for, or needed.
    jax.config.update("jax_platforms", "cpu")
    if config.compile:
        jax.config.update("jax_num_cpu_devices", config.devices or named_devices(config.mesh))
    print(f"{config.backbone.name}: describing model and batch, which takes seconds", file=sys.stderr, flush=True)
    try:
        result = plan(config)
        if config.out:
            atomic.write_text(pathlib.Path(config.out), json.dumps(result, indent=2) + "\n")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    ending.show(show(result))


if __name__ == "__main__":
    main()
