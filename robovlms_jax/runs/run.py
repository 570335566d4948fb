"""What every training experiment does: open the data, build the policy, train, evaluate, report."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from robovlms_jax.actions import statistics
from robovlms_jax.data import base as datasets
from robovlms_jax.data import excerpts, language, loading, mixing, opening, order, samples, sensors
from robovlms_jax.data import statistics as data_statistics
from robovlms_jax.parallel import cpu, distributed
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel.config import DistributedConfig
from robovlms_jax.policies.serving import EncodeText
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build, chaining, closed_loop, resuming, robots, steps, validation
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import to_dict
from robovlms_jax.training import (
    checkpoints,
    directory,
    goodput,
    loop,
    metrics,
    optimizer,
    provenance,
    state,
    stopping,
)

logger = logging.getLogger(__name__)

REAL_THING = """\
For the real thing, pass the dataset and the published weights (any preset's field can be overridden the same way):

    python -m experiments.calvin_abcd --preset kosmos_lstm \\
        --data.root data/task_ABCD_D --backbone.weights hf://microsoft/kosmos-2-patch14-224

How to get and pack CALVIN: data/README.md. `--help` explains every field."""


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
    abstract: state.TrainState
    """Shapes and shardings of what will be trained."""
    num_params: int
    point: resuming.Point | None = None
    """Where a resumed run goes on."""


def run(name: str, config: ExperimentConfig, *, title: str = "CALVIN", closing: str = REAL_THING) -> None:
    """Train and report, together with the run's other processes where there are any. `name` is the preset's and `title`
    the experiment's, for the report, which ends with `closing`.

    Errors of the user end the process with a message and status 1."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True
    )
    for noisy in ("absl", "orbax", "grain", "jax._src", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Orbax logs every error that it raises, too, several times and with all frames.
    logging.getLogger("absl").addFilter(lambda record: record.exc_info is None)
    cpu.keep_freed_memory()
    try:
        with distributed.joined(**vars(config.distributed)):
            if jax.process_index() != 0:
                logging.getLogger().setLevel(logging.WARNING)
            train(name, config, title=title, closing=closing)
    except KeyboardInterrupt:
        logger.warning("%s", stopping.words(pathlib.Path(config.train.output)))
        sys.exit(stopping.STATUS)
    except (
        ValueError,
        OSError,
        ImportError,
        loop.CorruptDataError,
        loop.LoaderError,
        loop.DivergedError,
        checkpoints.UnwrittenError,
        datasets.CorruptFrameError,
    ) as error:
        logger.debug("where it happened", exc_info=True)
        unnamed = isinstance(error, OSError) and error.errno is not None and error.filename is None
        sys.exit(f"error: {error}{f' (the run writes to {config.train.output})' if unnamed else ''}")


def prepare(config: ExperimentConfig, point: resuming.Point | None = None) -> Setup:
    """Open everything a run needs and check that it fits together. Raises what the parts raise; compiles nothing.

    Args:
      config: with a `point`, settled with it (`resuming.settle`).
      point: where a resumed run goes on; whatever gives its parameters a meaning comes from there.
    """
    config.validate(jax.device_count())
    config = dataclasses.replace(config, distributed=DistributedConfig())  # differs between processes, done with
    opened = {"training": opening.open_split(config.data, "training"), "validation": validation.open_split(config.data)}
    config = dataclasses.replace(config, policy=robots.as_recorded(config.policy, opened["training"]))
    variation = language.read(config.data.paraphrases) if config.data.vary_language else None
    sentences = language.every(opened["training"].episodes, variation)
    instructions = [*sentences, *validation.sentences(opened["validation"]), *_asked(config)]
    if point:
        backbone = chaining.backbone_of(config.backbone, point, instructions)
    elif config.train.init_from:
        backbone = chaining.open_backbone(config.backbone, config.train.init_from)
    else:
        backbone = build.open_backbone(config.backbone, instructions)
    length = config.data.text_length or backbone.longest(instructions)

    def encode(instruction: str) -> tuple[np.ndarray, np.ndarray]:
        return backbone.encode(instruction, length)

    embed = _sentence_embeddings(config, instructions)
    training = _source(config, opened["training"], encode, variation, embed)
    held_out = opened["validation"]
    validation_split = None if held_out is None else _source(config, held_out, encode, embed_sentence=embed)
    actions, values = _training_actions(config, opened["training"])
    if point:
        resuming.compare_statistics(config.policy, values, actions)
        config = config.resolve(training.num_windows, length)
        resuming.require_steps(point, config)
    else:
        config = config.resolve(training.num_windows, length, values)
        policy = config.policy.with_bins(actions)
        if policy.proprio.enabled and policy.proprio.is_default:
            policy = policy.with_state(excerpts.state_sample(opened["training"], 1_000))
        config = dataclasses.replace(config, policy=policy)
    config = build.with_action_ids(config, backbone.tokenizer)
    mesh = meshes.make_mesh(config.mesh_sizes(jax.device_count()))
    model = build.make_model(config, backbone.vlm)
    shapes, shardings = build.abstract_params(model, mesh)
    tx = optimizer.make_optimizer(config.optimizer, config.train.steps)
    return Setup(
        config=config,
        train=training,
        validation=validation_split,
        backbone=backbone,
        encode=encode,
        model=model,
        mesh=mesh,
        abstract=state.abstract(shapes, shardings, config.train.trainable, tx, mesh),
        num_params=build.count(shapes),
        point=point,
    )


def train(name: str, config: ExperimentConfig, *, title: str = "CALVIN", closing: str = REAL_THING) -> pathlib.Path:
    """The whole run; returns its directory. Raises what the parts raise, and KeyboardInterrupt after Ctrl-C."""
    with stopping.Interrupts() as interrupts:
        output = _run(name, config, title, closing, interrupts)
        if interrupts.asked:
            raise KeyboardInterrupt
        return output


def _run(
    name: str, config: ExperimentConfig, title: str, closing: str, interrupts: stopping.Interrupts
) -> pathlib.Path:
    begin = time.perf_counter()
    output = pathlib.Path(config.train.output)
    checkpoints.require_free(output, resume=config.train.resume)
    directory.require_writable(output)
    directory.keep_programs(config.train.compilation_cache)
    point = resuming.open_point(output) if config.train.resume else None
    if point:
        config = resuming.settle(point, config)
    if config.demonstrations.episodes:
        closed_loop.ensure_demonstrations(config.demonstrations, config.data.root)
    setup = prepare(config, point)
    _announce(name, setup)
    _require_memory(setup)
    with directory.claim(output):
        checkpoints.require_free(output, resume=config.train.resume)  # another run may have ended there meanwhile
        finished = _train(name, setup, output, title, closing, begin, interrupts)
    if finished and jax.process_index() == 0:
        logger.info("report: %s\n\n%s\n", output / "report.md", closing)
    return output


def _train(
    name: str,
    setup: Setup,
    output: pathlib.Path,
    title: str,
    closing: str,
    begin: float,
    interrupts: stopping.Interrupts,
) -> bool:
    """False: stopped by a signal before the last step. `begin`: when the run began, on `time.perf_counter`."""
    config = setup.config
    serving = {"config": to_dict(config), "assets": dict(setup.backbone.assets)}
    checkpointer = checkpoints.Checkpointer(output, keep=config.train.keep_checkpoints, serving=serving)
    fingerprint = order.order_fingerprint(
        setup.train, segments_per_batch=config.segments_per_batch, seed=config.train.seed
    )
    if setup.point:
        _require_order(setup, fingerprint)
        train_state = resuming.restore(checkpointer, setup.point, setup.abstract, config)
    else:
        train_state = _begin(setup)
    provenance.write_record(output, name, to_dict(config))
    start = int(train_state.step)
    writer = metrics.open_writers(config.train.wandb_project, to_dict(config), output, start)
    evaluator = validation.evaluator(setup.model, setup.mesh, config, setup.validation, setup.encode)
    tables = _closed_loop(setup, output)
    train_step = steps.make_step(config, setup.model, train_state, setup.mesh)
    spent = goodput.Goodput()
    config, rate = _loader_rate(config, setup.train, start, setup.mesh)
    batches = _batches(config, setup.train, start, setup.mesh)
    with contextlib.closing(checkpointer), contextlib.closing(writer), contextlib.closing(batches):
        train_state, finished = loop.fit(
            train_state,
            batches,
            train_step,
            config=loop.LoopConfig(
                config.train,
                config.data.max_corrupt_share,
                config.rollouts.every,
                config.rollouts.select == "best",
            ),
            mesh=setup.mesh,
            checkpointer=checkpointer,
            data_state=lambda next_step: {"next_step": next_step, "order": fingerprint},
            writer=writer,
            evaluate=evaluator.numbers,
            describe=lambda index: _describe(setup.train.dataset, index),
            loader_rate=rate,
            roll_out=tables.numbers if tables else None,
            goodput=spent,
        )
        finished = finished and not interrupts.asked  # it may come while the last step is saved
        if finished:

            def write(values: Mapping[str, float]) -> None:
                writer.write(config.train.steps, {f"validation/{key}": value for key, value in values.items()})

            section = tables.report(*_chosen(train_state, checkpointer, config)) if tables else ""
            facts = _facts(name, setup) | {"seconds": round(time.perf_counter() - begin, 1)}
            facts["time in the training loop"] = str(spent)
            data = "PlayTable" if config.demonstrations.episodes else title
            evaluator.report(train_state, write, output, f"{data}: {name}", facts, closing, section)
    return finished


def _asked(config: ExperimentConfig) -> list[str]:
    """What rollouts will ask: a small dataset need not hold every wording, and prompts must have room for it."""
    if not config.rollouts.trials:
        return []
    return [text for trial in closed_loop.playtable_trials(config.rollouts) for text in trial.instructions]


def _closed_loop(setup: Setup, output: pathlib.Path) -> closed_loop.ClosedLoop | None:
    if not setup.config.rollouts.trials:
        return None
    encode = setup.backbone.encoder(setup.config.data.text_length)  # wordings of rollouts may be longer than the data's
    return closed_loop.ClosedLoop(setup.model, setup.mesh, setup.config, encode, output)


def _chosen(
    current: state.TrainState, checkpointer: checkpoints.Checkpointer, config: ExperimentConfig
) -> tuple[state.TrainState, pathlib.Path]:
    """The state that the run directory stands for, and the step directory that holds it."""
    run = pathlib.Path(config.train.output)
    if config.rollouts.select == "best":
        return checkpointer.restore_best(current), checkpoints.locate(run)
    return current, run / checkpoints.FOLDER / str(int(current.step))


def _facts(name: str, setup: Setup) -> dict[str, Any]:
    return {
        "preset": name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "parameters": setup.num_params,
        "trainable parameters": build.count(setup.abstract.trainable),
        "steps": setup.config.train.steps,
        "windows per step": setup.config.train.batch_size,
    }


def _announce(name: str, setup: Setup) -> None:
    config = setup.config
    logger.info(
        "preset %s: %d x %s, mesh %s, %s parameters, %s trainable, %s",
        *(name, jax.device_count(), jax.devices()[0].device_kind, dict(setup.mesh.shape)),
        *(f"{setup.num_params:,}", f"{build.count(setup.abstract.trainable):,}", config.backbone.dtype),
    )
    if setup.train.dataset.groups:
        groups = setup.train.dataset.groups
        windows = setup.train.segments.groups([group.num_episodes for group in groups])[1]
        logger.info("mixture:\n%s", mixing.shares(groups, windows.tolist()))
    logger.info(
        "%d training and %d validation windows; %d steps of %d windows in %d segments",
        *(setup.train.num_windows, setup.validation.num_windows if setup.validation else 0),
        *(config.train.steps, config.train.batch_size, config.segments_per_batch),
    )


def _require_memory(setup: Setup) -> None:
    """Say how much memory the run will take. Raises ValueError where its devices say that they have far less."""
    row = setup.train.evaluation_batch(np.array([samples.PADDING]))  # nothing is read
    size = setup.config.segments_per_batch
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), row)
    estimate = steps.memory_of(setup.config, setup.model, setup.abstract, batch)
    logger.info("memory on each device, estimated: %s", estimate)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")  # CPUs say nothing
    if limit:
        steps.require_room(setup.config, setup.model, setup.abstract, batch, limit, estimate)


def _training_actions(
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


def _source(
    config: ExperimentConfig,
    dataset: datasets.Dataset,
    encode: EncodeText,
    variation: language.Variation | None = None,
    embed_sentence: Callable[[str], np.ndarray] | None = None,
) -> samples.SegmentSource:
    cut = samples.Cut(
        window=config.policy.window,
        chunk=config.policy.chunk,
        windows_per_segment=config.data.windows_per_segment,
        left_pad=config.data.left_pad,
        goal_relabelling=config.data.compat_goal_relabelling,
        future_frames=config.policy.auxiliary.future_frames,
    )
    return samples.SegmentSource(
        dataset,
        cut,
        cameras=config.policy.cameras,
        encode_text=encode,
        sensors=[sensors.make(sensor.reading) for sensor in config.policy.all_sensors],
        embed_sentence=embed_sentence,
        variation=variation,
    )


def _batches(config: ExperimentConfig, source: samples.SegmentSource, start: int, mesh: Mesh) -> Any:
    return loading.train_batches(
        source,
        segments_per_batch=config.segments_per_batch,
        seed=config.train.seed,
        start_step=start,
        process=meshes.batch_share(mesh),
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
        num_workers=config.data.num_workers,
    )


def _loader_rate(
    config: ExperimentConfig, source: samples.SegmentSource, start: int, mesh: Mesh
) -> tuple[ExperimentConfig, float]:
    """With data.num_workers decided, and the windows/s the loader then delivers over all hosts, from reading ahead."""

    def with_workers(count: int) -> ExperimentConfig:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=count))

    given = config.data.num_workers
    count, rates = loading.choose_workers(
        lambda count: _batches(with_workers(count), source, start, mesh),
        config.train.batch_size,
        candidates=None if given == -1 else [given],
        seconds=1.0,
    )
    if given == -1:
        tried = ", ".join(f"{workers}: {rate:.0f}" for workers, rate in rates.items())
        logger.info("data.num_workers %d reads fastest (windows/s by number of workers: %s)", count, tried)
    return with_workers(count), rates[count]


def _begin(setup: Setup) -> state.TrainState:
    """The state before the first step."""
    config = setup.config
    params = build.init_params(setup.model, setup.mesh, config.train.seed, setup.backbone)
    if config.train.init_from:
        params = chaining.take_over(params, config.train.init_from)
    distributed.barrier("parameters")  # reading and compiling take processes differently long; what follows meets them
    tx = optimizer.make_optimizer(config.optimizer, config.train.steps)
    # The state owns the arrays now and its step donates them.
    return state.create(params, config.train.trainable, tx, config.train.seed, setup.mesh)


def _require_order(setup: Setup, fingerprint: Mapping[str, Any]) -> None:
    """Raise ValueError where other batches would follow than would have, unless that is what was asked for."""
    try:
        order.require_same_order(setup.point.order, fingerprint)
    except ValueError as error:
        if not setup.config.train.allow_new_order:
            raise
        logger.warning("with train.allow_new_order: %s", str(error).partition(". ")[0])


def _describe(dataset: datasets.Dataset, index: int) -> str:
    episode = dataset.episodes[index]
    return f"{dataset.name} episode {index} ({episode.task}, frames {episode.start} to {episode.end})"
