"""The training step and its memory as a configuration says."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from robovlms_jax.nn.stack import Remat
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies import answers, embodiments, objective
from robovlms_jax.policies.tasks import base, registry
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import further, questions
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import memory, stages, step
from robovlms_jax.training.memory import Estimate, readable
from robovlms_jax.training.state import TrainState

logger = logging.getLogger(__name__)


def make_loss(config: ExperimentConfig, model: VLA, stage: stages.Stage | None = None) -> objective.LossBySource:
    """What a configuration's policy is trained by in a stage, source by source. Raises ValueError: its weights are of
    unknown tasks or sources, or leave nothing to learn."""
    stage = stage or stages.plan(config.train, config.optimizer)[0]
    changes = {"shifts": config.data.shifts, "augment": config.data.augment}
    losses: dict[str, objective.SourceLoss] = {}
    answering = (answers.NAME,) if config.data.vl.paths else ()
    weights = {name: x for name, x in stage.weights.items() if name not in answering}
    tasks = registry.make(config.policy)
    with _naming(stage):
        base.require_known(tasks, weights)
        if any(stage.sources.get(name) for name in (objective.ROBOT, *config.data.further.names)):
            tasks = base.reweigh(tasks, weights)
    if stage.sources.get(objective.ROBOT):
        losses[objective.ROBOT] = objective.RobotLoss(model, tasks=tasks, **changes)
    for other in config.policy.others:
        if stage.sources.get(other.name):
            with _naming(stage, f", source {other.name!r}"):
                losses[other.name] = _of_other(model, other.name, weights, changes)
    more, between = further.losses(config, stage, objective.RobotLoss(model, tasks=tasks, **changes))
    losses = {**losses, **more, **questions.losses(config, model, stage)}
    return objective.LossBySource(losses, between, config.train.source_weights)


@contextlib.contextmanager
def _naming(stage: stages.Stage, more: str = "") -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"train.stages, stage {stage.name!r}{more}: {error}") from None


def _of_other(
    model: VLA, name: str, weights: Mapping[str, float], changes: Mapping[str, Any]
) -> embodiments.OtherRobotLoss:
    """The loss on another robot's demonstrations, of those of the policy's tasks that its view has."""
    seen = VLA(embodiments.view(model.config, name), model.vlm)
    tasks = registry.make(seen.config)
    tasks = base.reweigh(tasks, {task.name: weights[task.name] for task in tasks if task.name in weights})
    return embodiments.OtherRobotLoss(model.config, name, objective.RobotLoss(seen, tasks=tasks, **changes))


def make_step(
    config: ExperimentConfig, model: VLA, state: TrainState, mesh: Mesh, stage: stages.Stage | None = None
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, step.Metrics]]:
    """`make_train_step` as a configuration says; `state` may be `training.state.abstract`. stage: None: the first."""
    stage = stage or stages.plan(config.train, config.optimizer)[0]
    return step.make_train_step(
        make_loss(config, model, stage),
        stage.tx,
        stage.learning_rate,
        state,
        mesh,
        accumulation=config.train.accumulation,
        skip_nonfinite=config.train.on_nonfinite == "skip",
        tuned=config.train.compiler_options == "auto",
    )


def memory_of(
    config: ExperimentConfig,
    model: VLA,
    state: TrainState,
    batch: Mapping[str, Any],
    stage: stages.Stage | None = None,
    *,
    platform: str = "",
) -> Estimate:
    """`estimate` of a configuration's step (`make_step`) on the mesh that `state` lies on.

    platform: of the devices, where the mesh is an abstract one; "": one without padding.
    """
    mesh = state.step.sharding.mesh
    ways = mesh.shape
    return memory.estimate(
        make_loss(config, model, stage),
        state,
        batch,
        batch_ways=ways["data"] * ways["fsdp"],
        accumulation=config.train.accumulation,
        platform=meshes.platform(mesh) if isinstance(mesh, Mesh) else platform,
    )


SLACK = 1.25
"""What an estimate may exceed the memory by before a run is refused: it has been up to 1.11 times XLA's own plan."""


def require_room(
    config: ExperimentConfig,
    model: VLA,
    state: TrainState,
    batch: Mapping[str, Any],
    limit: int,
    found: Estimate | None = None,
    stage: stages.Stage | None = None,
) -> Estimate:
    """The estimate of a step, where devices of `limit` bytes have room for it; a warning where that is uncertain.

    Args:
      batch, stage: as `memory_of`.
      found: `memory_of` of the same arguments, where known already.
    Raises:
      ValueError: no room; names the nearest train.accumulation with each backbone.remat with which there is, if any.
    """
    found = memory_of(config, model, state, batch, stage) if found is None else found
    tensor = state.step.sharding.mesh.shape["tensor"]
    surely = found.total - found.activations + found.activations / tensor  # estimates take no notice of mesh.tensor
    if found.total <= limit:
        return found
    text = f"this takes about {readable(found.total)} on a device that has {readable(limit)} ({found})"
    if surely <= SLACK * limit:
        logger.warning("%s; it may run out of memory.", text)
        return found
    ways: dict[str, str] = {}  # by remat, the first that fits
    for words, estimate in smaller(config, model, state, batch, stage):
        if estimate.total <= limit:
            ways.setdefault(words.partition("--backbone.remat")[2], f"{words} ({readable(estimate.total)})")
    if ways:
        listed = " or ".join(ways.values())
        raise ValueError(f"{text}. With {listed} there is room.")
    raise ValueError(
        f"{text}. Neither train.accumulation nor backbone.remat makes enough room; set a larger mesh.fsdp, a smaller "
        "train.batch_size, or train fewer parameters (train.trainable, backbone.lora_rank)."
    )


_LESS: Mapping[Remat, tuple[Remat, ...]] = {"none": ("dots", "full"), "dots": ("full",), "offload": (), "full": ()}
"""backbone.remat -> others that take less memory of the device, those that compute less again first."""


def smaller(
    config: ExperimentConfig,
    model: VLA,
    state: TrainState,
    batch: Mapping[str, Any],
    stage: stages.Stage | None = None,
    *,
    platform: str = "",
) -> Iterator[tuple[str, Estimate]]:
    """The same update in less memory: ("--flag value ...", estimate), least change first; traced one by one. What
    lies in the host's memory is not among them: how fast it comes back is the machine's.
    batch, stage, platform: as `memory_of`."""
    stage = stage or stages.plan(config.train, config.optimizer)[0]
    ways, total = state.step.sharding.mesh.shape, sum(_rows(source) for source in batch.values())
    devices = ways["data"] * ways["fsdp"]
    for remat in ("", *_LESS[model.vlm.remat]):
        words = f" --backbone.remat {remat}" if remat else ""
        changed = dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, remat=remat or model.vlm.remat))
        for parts in range(config.train.accumulation, total // devices + 1):
            units, rest = divmod(total, devices * parts)
            # Every micro-batch has rows of every source.
            if rest or units < len(batch) or (parts == config.train.accumulation and not words):
                continue
            train = dataclasses.replace(config.train, accumulation=parts)
            shared = resized(batch, stages.rows(stage, total, devices * parts))
            flag = f"--train.accumulation {parts}" if parts > config.train.accumulation else ""
            less = dataclasses.replace(config, train=train)
            yield (flag + words).strip(), memory_of(less, changed, state, shared, stage, platform=platform)


def _rows(source: Any) -> int:
    return jax.tree.leaves(source)[0].shape[0]


def resized(batch: Mapping[str, Any], rows: Mapping[str, int]) -> dict[str, Any]:
    """The shapes with as many rows of each source."""
    return {
        name: jax.tree.map(lambda x, name=name: jax.ShapeDtypeStruct((rows[name], *x.shape[1:]), x.dtype), source)
        for name, source in batch.items()
    }
