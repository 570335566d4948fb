"""What every training experiment does: open the data, build the policy, train, evaluate, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from robovlms_jax import ending
from robovlms_jax.data import base as datasets
from robovlms_jax.data import loading, sources
from robovlms_jax.evaluation.report import offline as offline_report
from robovlms_jax.evaluation.report import rerun_file
from robovlms_jax.parallel import cpu, distributed
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.runs import ahead, build, chaining, closed_loop, logs, questions, resuming, steps, validation
from robovlms_jax.runs import setup as setups
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import to_dict
from robovlms_jax.training import (
    checkpoints,
    consolidation,
    directory,
    guards,
    hooks,
    loop,
    metrics,
    provenance,
    stages,
    state,
    stopping,
)

logger = logging.getLogger(__name__)

ERRORS = (
    ValueError,
    OSError,
    ImportError,
    guards.CorruptDataError,
    loop.LoaderError,
    guards.DivergedError,
    checkpoints.UnwrittenError,
    datasets.CorruptFrameError,
)
"""What settings, data or a disk are the reason of, and words are enough for: a program that trains ends with these."""

REAL_THING = """\
For the real thing, pass the dataset and the published weights (any preset's field can be overridden the same way):

    python -m experiments.calvin_abcd --preset kosmos_lstm \\
        --data.root data/task_ABCD_D --backbone.weights hf://microsoft/kosmos-2-patch14-224

How to get and pack CALVIN: data/README.md. `--help-all` explains every field."""


def run(name: str, config: ExperimentConfig, *, title: str = "CALVIN", closing: str = REAL_THING) -> bool:
    """Train and report, together with the run's other processes where there are any. `name` is the preset's and `title`
    the experiment's, for the report, which ends with `closing`.

    False: SIGTERM ended it before its last step and it is saved; what would come after it does not begin then, because
    whoever sends SIGTERM waits for seconds only. Errors of the user end the process with a message and status 1."""
    logs.to_stderr()
    cpu.keep_freed_memory()
    try:
        with distributed.joined(**vars(config.distributed)):
            if jax.process_index() != 0:
                logging.getLogger().setLevel(logging.WARNING)
            return _finished(name, config, title, closing)
    except KeyboardInterrupt:
        ending.stop(stopping.words(pathlib.Path(config.train.output)))
    except ERRORS as error:
        logger.debug("where it happened", exc_info=True)
        unnamed = isinstance(error, OSError) and error.errno is not None and error.filename is None
        sys.exit(f"error: {error}{f' (the run writes to {config.train.output})' if unnamed else ''}")


def train(name: str, config: ExperimentConfig, *, title: str = "CALVIN", closing: str = REAL_THING) -> pathlib.Path:
    """The whole run; returns its directory. Raises what the parts raise, and KeyboardInterrupt after Ctrl-C."""
    _finished(name, config, title, closing)
    return pathlib.Path(config.train.output)


def _finished(name: str, config: ExperimentConfig, title: str, closing: str) -> bool:
    with stopping.Interrupts() as interrupts:
        finished = _run(name, config, title, closing, interrupts)
        if interrupts.asked:
            raise KeyboardInterrupt
        return finished


def require_consistent(config: ExperimentConfig) -> None:
    """What can be said of a run without demonstrations, which take minutes to record. Raises ValueError, OSError:
    fields do not fit each other, or pictures with text cannot be opened."""
    config.validate(jax.device_count())
    require_collections(config)


def require_collections(config: ExperimentConfig) -> None:
    """Raises ValueError, OSError: pictures with text cannot be opened, or the policy has no use for them."""
    questions.open_collections(config)


def _run(name: str, config: ExperimentConfig, title: str, closing: str, interrupts: stopping.Interrupts) -> bool:
    begin = time.perf_counter()
    output = pathlib.Path(config.train.output)
    checkpoints.require_free(output, resume=config.train.resume)
    directory.require_writable(output)
    require_packages(config)
    directory.keep_programs(config.train.compilation_cache)
    point = resuming.open_point(output) if config.train.resume else None
    if point:
        config = resuming.settle(point, config)
    with _collecting_rarely():
        if config.demonstrations.episodes:
            require_consistent(config)
            closed_loop.ensure_demonstrations(config.demonstrations, config.data.root)
        setup = setups.prepare(config, point)
        setups.announce(name, setup)
        setups.require_memory(setup)
    with directory.claim(output):
        checkpoints.require_free(output, resume=config.train.resume)  # another run may have ended there meanwhile
        finished = _train(setup, Report(name, title, closing, begin), output, interrupts)
    if finished and jax.process_index() == 0:
        logger.info("report: %s (the same as text: report.md)\n\n%s\n", output / "report.html", closing)
    return finished


def require_packages(config: ExperimentConfig) -> None:
    """Raise ImportError where something is asked for that is not installed: before demonstrations are recorded."""
    metrics.require_wandb(config.train.wandb_project)
    if config.rollouts.trials and config.rollouts.rrd:
        rerun_file.require()


@contextlib.contextmanager
def _collecting_rarely() -> Iterator[None]:
    """Tracing makes small objects by the million, few of them in circles. Python's default, a look at them every 700
    new ones and at all of them every 70 000, is a quarter of its time (docs/log.md, 2026-11-26)."""
    usual = gc.get_threshold()
    gc.set_threshold(max(100_000, usual[0]), *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


class Report(NamedTuple):
    """What the report says beside numbers: names of the preset and the experiment, its last paragraph, and when the run
    began, on `time.perf_counter`."""

    name: str
    title: str
    closing: str
    begin: float


def _train(setup: setups.Setup, report: Report, output: pathlib.Path, interrupts: stopping.Interrupts) -> bool:
    """False: stopped by a signal before the last step."""
    with ahead.beside(setup.mesh) as beside:
        return _train_beside(beside, setup, report, output, interrupts)


def _train_beside(
    beside: ahead.Beside, setup: setups.Setup, report: Report, output: pathlib.Path, interrupts: stopping.Interrupts
) -> bool:
    config = setup.config
    serving = {"config": to_dict(config), "assets": dict(setup.backbone.assets)}
    checkpointer = checkpoints.Checkpointer(
        output, keep=config.train.keep_checkpoints, serving=serving, always=[stage.end for stage in setup.stages]
    )
    if setup.point:
        _require_order(setup)
    with _collecting_rarely():
        programs = _programs(setup, beside)
        train_state = _restored(setup, checkpointer) if setup.point else _begin(setup)
    began = int(train_state.step)
    provenance.write_record(output, report.name, to_dict(config))
    writer = metrics.open_writers(config.train.wandb_project, to_dict(config), output, int(train_state.step))
    evaluator = validation.evaluator(setup.model, setup.mesh, config, setup.validation, setup.encode, setup.train)
    examiner = questions.Examiner(setup.model, setup.mesh, config, setup.questions.validation)
    tables = _closed_loop(setup, output)
    for needed_last in (tables, evaluator) if tables else (evaluator,):
        needed_last.prepare(beside, setup.abstracts[-1])
    services = hooks.Services(
        train=config.train,
        checkpointer=checkpointer,
        position=lambda step: {"next_step": step},
        writer=writer,
        describe=lambda source, index: setup.sources[source].describe(index),
        max_corrupt_share=config.data.max_corrupt_share,
        evaluate=lambda state: {**evaluator.numbers(state), **examiner.numbers(state)},
        roll_out=tables.numbers if tables else None,
        roll_out_every=config.rollouts.every,
        select_best=config.rollouts.select == "best",
    )
    with contextlib.closing(checkpointer), contextlib.closing(writer):
        train_state, finished = _train_stages(setup, programs, train_state, services)
        finished = finished and not interrupts.asked  # it may come while the last step is saved
        if finished:
            section = tables.report(*_chosen(train_state, checkpointer, config)) if tables else ""
            facts = setups.facts(report.name, setup) | {"seconds": round(time.perf_counter() - report.begin, 1)}
            if began:
                facts["this start went on after step"] = began
            if int(train_state.step) > began:  # else nothing was trained in this start
                facts["time in the training loop"] = str(services.goodput)
            logger.info("writing the report: errors on the validation split, whole episodes, pictures")
            learned = examiner.numbers(train_state)
            facts |= {name.replace("_", " of ", 1): round(value, 4) for name, value in learned.items()}
            numbers, found = evaluator.compare(train_state)
            writer.write(config.train.steps, {f"validation/{key}": value for key, value in (learned | numbers).items()})
            if jax.process_index() == 0:
                title = f"{'PlayTable' if config.demonstrations.episodes else report.title}: {report.name}"
                offline_report.write_report(
                    output, found, title=title, facts=facts, closing=report.closing, closed_loop=section
                )
    return finished


class Program(NamedTuple):
    """A stage's training step. ready: returns when it is compiled, if it is ahead."""

    step: Callable[[state.TrainState, Mapping[str, Any]], tuple[state.TrainState, Mapping[str, jax.Array]]]
    ready: ahead.Wait


def _programs(setup: setups.Setup, beside: ahead.Beside) -> dict[int, Program]:
    """By number of the stage, of those that are left; compiled beside what comes before their first step."""
    programs = {}
    for stage in setup.stages[setup.first :]:
        abstract = setup.abstracts[stage.index]
        step = steps.make_step(setup.config, setup.model, abstract, setup.mesh, stage)
        batch = ahead.placed(setup.batch_shapes(stage), meshes.batched(setup.mesh))
        ready = beside.start("the training step", functools.partial(_compile, step, abstract, batch))
        programs[stage.index] = Program(step, ready)
    return programs


def _compile(step: Any, abstract: state.TrainState, batch: Any) -> None:
    step.lower(abstract, batch).compile()


def _train_stages(
    setup: setups.Setup, programs: Mapping[int, Program], train_state: state.TrainState, services: hooks.Services
) -> tuple[state.TrainState, bool]:
    """The stages that are left, one after the other; False: stopped by a signal."""
    finished = True
    for stage in setup.stages[setup.first :]:
        if stage.index > setup.first:
            train_state = state.resplit(train_state, stage.trainable, stage.tx, setup.mesh)
        if int(train_state.step) == stage.end < setup.stages[-1].end:
            continue  # resumed where it had ended
        rows = setup.rows(stage)
        if len(setup.stages) > 1:
            logger.info(
                "stage %s: steps %d to %d, trains %s parameters",
                *(stage.name, stage.begin + 1, stage.end, f"{build.count(train_state.trainable):,}"),
            )
        for remark in stages.remarks(stage, rows):
            logger.warning(remark)
        if len(rows) > 1:  # whole segments, so not always in the proportion that was asked for
            logger.info("every batch has segments of %s", ", ".join(f"{name} {n}" for name, n in rows.items()))
        train_state, finished = _train_stage(setup, stage, programs[stage.index], train_state, services)
        if not finished:
            break
    return train_state, finished


def _train_stage(
    setup: setups.Setup, stage: stages.Stage, program: Program, train_state: state.TrainState, services: hooks.Services
) -> tuple[state.TrainState, bool]:
    """`loop.fit` over what is left of a stage."""
    config, mesh, start = setup.config, setup.mesh, int(train_state.step)
    order = sources.fingerprints(setup.sources, setup.rows(stage), stage.seed)
    logger.info("reading ahead, to see how fast batches come")
    if config.data.num_workers == -1:  # the choice is for all of the run, the measurement not to be disturbed
        program.ready()
    setup, rate = _loader_rate(setup, stage, start)
    services = dataclasses.replace(
        services,
        loader_rate=rate,
        position=lambda step: {"next_step": step, "order": order, "stage": stage.position(step)},
    )
    if start < stage.end:  # else it is finished, and only its report is left
        logger.info("compiling the training step; large models take minutes, step %d follows", start + 1)

    def train_step(current: state.TrainState, batch: Any) -> tuple[state.TrainState, Mapping[str, jax.Array]]:
        with services.goodput.spent_on("compile"):
            program.ready()
        return program.step(current, meshes.put_batch(batch, mesh))

    schedule = loop.Schedule(stage.end, setup.stages[-1].end, config.train.log_every, config.train.checkpoint_every)
    with contextlib.closing(_batches(setup, stage, start)) as batches:
        return loop.fit(
            train_state,
            services.timed(batches),
            train_step,
            schedule=schedule,
            hooks=services.hooks(train_state, schedule),
        )


def _closed_loop(setup: setups.Setup, output: pathlib.Path) -> closed_loop.ClosedLoop | None:
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


def _batches(setup: setups.Setup, stage: stages.Stage, start: int) -> sources.SourceBatches:
    """The stage's batches, the first one that of step `start` + 1 of the run."""
    data = setup.config.data
    return sources.train_batches(
        setup.sources,
        setup.rows(stage),
        seed=stage.seed,
        start_step=start - stage.begin,
        process=meshes.batch_share(setup.mesh),
        num_threads=data.num_threads,
        prefetch=data.prefetch,
        num_workers=data.num_workers,
    )


def _loader_rate(setup: setups.Setup, stage: stages.Stage, start: int) -> tuple[setups.Setup, float]:
    """With data.num_workers decided, and the windows/s that reading ahead with it brought, over all hosts."""
    config = setup.config

    def with_workers(count: int) -> setups.Setup:
        data = dataclasses.replace(config.data, num_workers=count)
        return dataclasses.replace(setup, config=dataclasses.replace(config, data=data))

    given = config.data.num_workers
    count, rates = loading.choose_workers(
        lambda count: _batches(with_workers(count), stage, start),
        config.train.batch_size,
        candidates=None if given == -1 else [given],
        seconds=1.0 if given == -1 else 0.3,
    )
    if given == -1:
        tried = ", ".join(f"{workers}: {rate:.0f}" for workers, rate in rates.items())
        logger.info("data.num_workers %d reads fastest (windows/s by number of workers: %s)", count, tried)
    return with_workers(count), rates[count]


def _begin(setup: setups.Setup) -> state.TrainState:
    """The state before the first step."""
    config = setup.config
    logger.info("%s", "reading backbone.weights" if config.backbone.weights else "making the first parameters")
    params = build.init_params(setup.model, setup.mesh, config.train.seed, setup.backbone)
    if config.train.init_from:
        params = chaining.take_over(params, config.train.init_from)
    params = build.rounded(setup.model, setup.mesh, params)
    distributed.barrier("parameters")  # reading and compiling take processes differently long; what follows meets them
    stage = setup.stages[0]
    # The state owns the arrays now and its step donates them.
    begun = state.create(params, stage.trainable, stage.tx, config.train.seed, setup.mesh)
    if not stage.optimizer.ewc:
        return begun
    fisher = consolidation.read(checkpoints.run_of(checkpoints.locate(config.train.init_from)))
    fisher = consolidation.floored(fisher, stage.optimizer.ewc_floor)
    return begun.replace(opt_state=consolidation.with_fisher(begun.opt_state, fisher))


def _restored(setup: setups.Setup, checkpointer: checkpoints.Checkpointer) -> state.TrainState:
    """The state that a resumed run goes on with."""
    stage, abstract = setup.stages[setup.first], setup.abstracts[setup.first]
    return resuming.restore(checkpointer, setup.point, abstract, stage.optimizer)


def _require_order(setup: setups.Setup) -> None:
    """Raise ValueError where other batches would follow than would have, unless that is what was asked for."""
    stage = setup.stages[setup.first]
    fingerprints = sources.fingerprints(setup.sources, setup.rows(stage), stage.seed)
    try:
        sources.require_same_order(setup.point.order, fingerprints)
    except ValueError as error:
        if not setup.config.train.allow_new_order:
            raise
        logger.warning("with train.allow_new_order: %s", str(error).partition(". ")[0])
