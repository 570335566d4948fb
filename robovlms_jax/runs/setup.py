"""What a configuration amounts to on this machine and this dataset: opened, checked against each other, announced."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from robovlms_jax.actions import statistics
from robovlms_jax.data import base as datasets
from robovlms_jax.data import cutting, excerpts, language, mirror, mixing, opening, order, represented, samples, sensors
from robovlms_jax.data import statistics as data_statistics
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel.config import DistributedConfig
from robovlms_jax.policies import embodiments as views
from robovlms_jax.policies import objective
from robovlms_jax.policies.serving import EncodeText
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import (
    build,
    chaining,
    closed_loop,
    embodiments,
    further,
    questions,
    resuming,
    robots,
    steps,
    validation,
)
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import checkpoints, consolidation, stages, state
from robovlms_jax.weights import peft

logger = logging.getLogger(__name__)

LARGE = 100_000_000
"""Parameters of a model that nobody means to train from random numbers without being told so."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a configuration amounts to on this machine and this dataset; no parameters yet."""

    config: ExperimentConfig
    """With everything resolved that depends on the data."""
    train: samples.SegmentSource
    validation: samples.SegmentSource | None
    """None: no episode there is annotated (`validation.open_split`)."""
    backbone: build.Backbone
    encode: EncodeText
    model: VLA
    mesh: Mesh
    stages: tuple[stages.Stage, ...]
    abstracts: tuple[state.TrainState, ...]
    """Shapes and shardings of what each stage trains."""
    num_params: int
    questions: questions.Sources
    """About pictures, where data.vl names any."""
    others: Mapping[str, samples.SegmentSource]
    """Demonstrations of other robots and further ones, where data.others and data.further name any."""
    point: resuming.Point | None = None
    """Where a resumed run goes on."""

    @property
    def first(self) -> int:
        """The stage that this start begins with, or goes on in."""
        return self.point.stage if self.point else 0

    @property
    def sources(self) -> dict[str, order.Source]:
        """What batches are drawn from, by name."""
        return {objective.ROBOT: self.train, **self.others, **self.questions.training}

    def rows(self, stage: stages.Stage) -> dict[str, int]:
        """Source -> segments of each of the stage's batches, over all hosts."""
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"] * self.config.train.accumulation
        return stages.rows(stage, self.config.segments_per_batch, ways)

    def batch_shapes(self, stage: stages.Stage) -> dict[str, Any]:
        """Source -> shapes of each of the stage's batches, over all hosts."""
        shapes = {}
        for source, size in self.rows(stage).items():
            row = self.sources[source].evaluation_batch(np.array([samples.PADDING]))  # nothing is read
            shapes[source] = jax.tree.map(lambda x, size=size: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), row)
        return shapes


def prepare(config: ExperimentConfig, point: resuming.Point | None = None) -> Setup:
    """Open everything a run needs and check that it fits together. Raises what the parts raise; compiles nothing.

    Args:
      config: with a `point`, settled with it (`resuming.settle`).
      point: where a resumed run goes on; whatever gives its parameters a meaning comes from there.
    """
    config.validate(jax.device_count())
    if config.optimizer.ewc and point is None:
        consolidation.path_of(checkpoints.run_of(checkpoints.locate(config.train.init_from)))
    config = dataclasses.replace(config, distributed=DistributedConfig())  # differs between processes, done with
    opened = {"training": opening.open_split(config.data, "training"), "validation": validation.open_split(config.data)}
    config = dataclasses.replace(config, policy=robots.as_recorded(config.policy, opened["training"]))
    opened = {
        split: None if x is None else represented.represented(x, config.policy.representation)
        for split, x in opened.items()
    }
    others, more = embodiments.open_datasets(config), further.open_datasets(config)
    learned = (opened["training"], *others.values(), *more.values())
    validated = validation.sentences(opened["validation"])
    variation = language.of_data(config.data, learned, validated)
    sentences = language.every([episode for dataset in learned for episode in dataset.episodes], variation)
    if config.data.augment.mirror:
        sentences += [mirror.words(text) for text in sentences]
    instructions = [*sentences, *validated, *_asked(config)]
    collections = questions.open_collections(config, known=config.demonstrations.episodes > 0)
    # A vocabulary is made of no sentence that is only asked: neither of the validation split's nor of rollouts'.
    backbone = _open_backbone(config, point, [*sentences, *collections.texts])
    length = config.data.text_length or backbone.longest(instructions)

    def encode(instruction: str) -> tuple[np.ndarray, np.ndarray]:
        return backbone.encode(instruction, length)

    embed = _sentence_embeddings(config, instructions)
    training = source_of(config, opened["training"], encode, variation, embed, mirrored=True)
    held_out = opened["validation"]
    validation_split = None if held_out is None else source_of(config, held_out, encode, embed_sentence=embed)
    config = embodiments.with_others(_resolved(config, point, training, length), others, training_actions)
    config = build.with_action_ids(config, backbone.tokenizer)
    asked = questions.sources_of(config, collections, backbone)
    beside = {name: _of_other(config, name, dataset, encode, variation) for name, dataset in others.items()}
    beside |= {
        n: source_of(further.view(config, n), x, encode, variation, embed, mirrored=True) for n, x in more.items()
    }
    return _planned(config, _Data(training, validation_split, asked, beside), backbone, encode, point)


def _resolved(
    config: ExperimentConfig, point: resuming.Point | None, source: samples.SegmentSource, length: int
) -> ExperimentConfig:
    """With everything filled in that depends on the training data; of a resumed run, compared with them.

    length: tokens that fit every prompt.
    """
    actions, values = training_actions(config, source.dataset)
    if point:
        resuming.compare_statistics(config.policy, values, actions)
        config = config.resolve(source.num_windows, length)
        resuming.require_steps(point, config)
        return config
    config = config.resolve(source.num_windows, length, values)
    policy = config.policy
    if not getattr(policy.head, "quantile_edges", ()):  # those of the run that this one begins with stay
        policy = policy.with_bins(actions)
    if policy.proprio.enabled and policy.proprio.is_default:
        policy = policy.with_state(excerpts.state_sample(source.dataset, 1_000))
    return dataclasses.replace(config, policy=policy)


class _Data(NamedTuple):
    """Everything that batches are made of."""

    training: samples.SegmentSource
    validation: samples.SegmentSource | None
    questions: questions.Sources
    others: dict[str, samples.SegmentSource]


def _planned(
    config: ExperimentConfig,
    data: _Data,
    backbone: build.Backbone,
    encode: EncodeText,
    point: resuming.Point | None,
) -> Setup:
    """The setup of a resolved configuration and opened data, its stages checked against the model."""
    mesh = meshes.make_mesh(config.mesh_sizes(jax.device_count()))
    model = build.make_model(config, backbone.vlm)
    shapes, shardings = build.abstract_params(model, mesh)
    if backbone.adapter is not None:
        vlm = backbone.vlm
        peft.require_fits(backbone.adapter, shapes["backbone"], vlm.rules, vlm.lora, config.backbone.weights)
    planned = stages.plan(config.train, config.optimizer)
    stages.check(planned, flatten_dict(shapes, sep="/"))
    questions.check(planned, config, flatten_dict(shapes, sep="/"))
    for stage in planned:
        build.require_floats(shapes, stage.trainable, stage.name)
    losses = [steps.make_loss(config, model, stage) for stage in planned]  # raises what a stage's weights have wrong
    setup = Setup(
        config=config,
        train=data.training,
        validation=data.validation,
        backbone=backbone,
        encode=encode,
        model=model,
        mesh=mesh,
        stages=planned,
        abstracts=tuple(state.abstract(shapes, shardings, x.trainable, x.tx, mesh) for x in planned),
        num_params=build.count(shapes),
        questions=data.questions,
        others=data.others,
        point=point,
    )
    for stage, loss in list(zip(planned, losses, strict=True))[setup.first :]:
        stages.require_reached(
            stage, loss, flatten_dict(shapes, sep="/"), setup.batch_shapes(stage), several=len(planned) > 1
        )
    return setup


def _of_other(
    config: ExperimentConfig,
    name: str,
    dataset: datasets.Dataset,
    encode: EncodeText,
    variation: language.Variation | None,
) -> samples.SegmentSource:
    """Another robot's demonstrations as its view of the policy reads them."""
    policy, data = views.view(config.policy, name), embodiments.data_of(config.data, name)
    return source_of(dataclasses.replace(config, policy=policy, data=data), dataset, encode, variation, mirrored=True)


def _open_backbone(config: ExperimentConfig, point: resuming.Point | None, sentences: list[str]) -> build.Backbone:
    """From where the run goes on or begins: a checkpoint, another run, or published weights."""
    if point:
        return chaining.backbone_of(config.backbone, point, sentences)
    if config.train.init_from:
        chaining.say_differences(config, config.train.init_from)
        return chaining.open_backbone(config.backbone, config.train.init_from)
    return build.open_backbone(config.backbone, sentences)


def _asked(config: ExperimentConfig) -> list[str]:
    """What rollouts will ask: a small dataset need not hold every wording, and prompts must have room for it."""
    if not config.rollouts.trials:
        return []
    return [text for trial in closed_loop.playtable_trials(config.rollouts) for text in trial.instructions]


def training_actions(
    config: ExperimentConfig, dataset: datasets.Dataset
) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
    """A sample, and its statistics; what looks wrong about them is said, or refused (data.check_actions)."""
    by_data = config.policy.action_scaling != "bounds" or getattr(config.policy.head, "binning", "") == "quantile"
    # Published layouts have a file per frame: enough of them for the question at hand.
    actions, openings = excerpts.action_sample(dataset, 20_000 if by_data else 1_000)
    values = statistics.summarize(actions) if dataset.statistics is None else dataset.statistics.action
    if config.data.compat_second_norm:
        values = data_statistics.shrink(values, 0.65)
    if isinstance(dataset, mixing.MixtureDataset):  # each in its own units; openings of several robots do not compare
        for part in dataset.parts:
            _check_actions(config, part.dataset, part.statistics.action, *excerpts.action_sample(part.dataset, 1_000))
    else:
        _check_actions(config, dataset, values, actions, openings)
    if config.data.augment.mirror:
        values = robots.mirror_of(config.policy, config.data.augment, dataset.robot).statistics(values)
    return actions, values


def _check_actions(
    config: ExperimentConfig,
    dataset: datasets.Dataset,
    values: Mapping[str, np.ndarray],
    actions: np.ndarray,
    openings: np.ndarray | None,
) -> None:
    """Say, or refuse, what looks wrong about one dataset's actions: their statistics and a sample of them."""
    gripper = dataset.robot.binary
    findings = statistics.lint(
        values,
        by_quantiles=config.policy.action_scaling == "quantile",
        commands=actions[:, gripper[0]] if len(gripper) == 1 else None,
        widths=openings,
        units=dataset.action_units if len(dataset.action_units) == len(dataset.robot.scaled) else None,
        robot=dataset.robot,
    )
    statistics.enforce(findings, dataset.name, refuse=config.data.check_actions == "refuse")


def _sentence_embeddings(config: ExperimentConfig, sentences: list[str]) -> Callable[[str], np.ndarray] | None:
    """Instruction -> float32[E] by CLIP, for the loss that keeps features near it; None where that is off."""
    clip = config.policy.auxiliary.clip
    if not clip.weights:
        return None
    known = build.embed_sentences(clip.weights, sentences)
    width = len(known[sentences[0]])
    if width != clip.dim:
        raise ValueError(
            f"{clip.weights} embeds sentences in {width} numbers; pass --policy.auxiliary.clip.dim {width}."
        )
    return known.__getitem__


def source_of(
    config: ExperimentConfig,
    dataset: datasets.Dataset,
    encode: EncodeText,
    variation: language.Variation | None = None,
    embed_sentence: Callable[[str], np.ndarray] | None = None,
    *,
    mirrored: bool = False,
) -> samples.SegmentSource:
    """The dataset's samples as the configuration asks for them; mirrored: as many as it says are, for training."""
    augment, auxiliary = config.data.augment, config.policy.auxiliary
    cut = cutting.Cut(
        window=config.policy.window,
        chunk=config.policy.chunk,
        windows_per_segment=config.data.windows_per_segment,
        left_pad=config.data.left_pad,
        skip_still=config.data.skip_still,
        goal_relabelling=config.data.compat_goal_relabelling,
        future_frames=auxiliary.future_frames,
        ahead=auxiliary.ahead.offsets if auxiliary.ahead.loss_weight else (),
        moving=config.policy.moving,
        scene=auxiliary.scene.numbers,
    )
    return samples.SegmentSource(
        dataset,
        cut,
        cameras=config.policy.cameras,
        encode_text=encode,
        sensors=[sensors.make(sensor.reading) for sensor in config.policy.all_sensors],
        embed_sentence=embed_sentence,
        variation=variation,
        mirrored=robots.mirror_of(config.policy, augment, dataset.robot) if mirrored and augment.mirror else None,
    )


def announce(name: str, setup: Setup) -> None:
    config = setup.config
    logger.info(
        "preset %s: %d x %s, mesh %s, %s parameters, %s trainable, %s",
        *(name, jax.device_count(), jax.devices()[0].device_kind, dict(setup.mesh.shape)),
        *(f"{setup.num_params:,}", f"{build.count(setup.abstracts[setup.first].trainable):,}", config.backbone.dtype),
    )
    if not config.backbone.weights and not config.train.init_from and not setup.point and setup.num_params > LARGE:
        logger.warning(
            "backbone.weights is empty: all %.1f billion parameters start from random numbers, from which "
            "demonstrations alone teach little. Pass --backbone.weights, such as "
            "hf://microsoft/kosmos-2-patch14-224 for kosmos-2.",
            setup.num_params / 1e9,
        )
    idle = stages.undrawn(setup.stages, [name for name in setup.sources if name != objective.ROBOT])
    if idle:
        logger.warning("nothing is learned from %s: no share of a batch is theirs (train.sources)", ", ".join(idle))
    learned = setup.abstracts[setup.first].trainable
    if config.backbone.lora_rank and any(x.startswith("backbone/") and "/lora_" not in x for x in learned):
        logger.warning(
            "backbone.lora_rank=%d adds adapters, and the backbone's own parameters learn beside them; for adapters "
            "alone pass --train.trainable lora_ ^head/ ^readout/",
            config.backbone.lora_rank,
        )
    if setup.train.dataset.groups:
        groups = setup.train.dataset.groups
        windows = setup.train.segments.groups([group.num_episodes for group in groups])[1]
        logger.info("mixture:\n%s", mixing.shares(groups, windows.tolist()))
    logger.info(
        "%d training and %d validation windows; %d steps of %d windows, which share %d runs of frames (segments)",
        *(setup.train.num_windows, setup.validation.num_windows if setup.validation else 0),
        *(config.train.steps, config.train.batch_size, config.segments_per_batch),
    )


def _memory_limit() -> int | None:
    """Bytes that each device of this process may use: as it says, of CPUs their share of the machine's memory; None
    where neither is known."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    return limit


def require_memory(setup: Setup) -> None:
    """Say how much memory the run will take. Raises ValueError where its devices say that they have far less."""
    limit = _memory_limit()
    for stage, abstract in list(zip(setup.stages, setup.abstracts, strict=True))[setup.first :]:
        batch = setup.batch_shapes(stage)
        estimate = steps.memory_of(setup.config, setup.model, abstract, batch, stage)
        where = f", stage {stage.name}" if len(setup.stages) > 1 else ""
        logger.info("memory on each device%s, estimated: %s", where, estimate)
        if limit:
            steps.require_room(setup.config, setup.model, abstract, batch, limit, estimate, stage)


def facts(name: str, setup: Setup) -> dict[str, Any]:
    return {
        "preset": name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "parameters": setup.num_params,
        "trainable parameters": build.count(setup.abstracts[setup.first].trainable),
        "steps": setup.config.train.steps,
        "windows per step": setup.config.train.batch_size,
    }
