"""The closed loop of a training run: demonstrations recorded before it, rollouts on PlayTable during and after it."""

from __future__ import annotations

import concurrent.futures
import logging
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from robovlms_jax import cores
from robovlms_jax.control.execution import ExecutedBatch
from robovlms_jax.envs.calvin import task_chains
from robovlms_jax.evaluation import chains, filing, filmed, rollout, rollout_metrics
from robovlms_jax.evaluation.config import RolloutConfig
from robovlms_jax.evaluation.report import films as film_files
from robovlms_jax.evaluation.report import rerun_file
from robovlms_jax.evaluation.report import rollouts as rollout_report
from robovlms_jax.evaluation.rollout import SuccessCriterion, Trial
from robovlms_jax.parallel import distributed
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.playtable import recording as recordings
from robovlms_jax.playtable.config import DemonstrationConfig
from robovlms_jax.playtable.env import PlayTables
from robovlms_jax.policies.serving import BatchedVLAPolicy, EncodeText
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import ahead, robots
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import seals
from robovlms_jax.training.state import TrainState

logger = logging.getLogger(__name__)


def ensure_demonstrations(config: DemonstrationConfig, root: str) -> None:
    """Record demonstrations to `root` unless they are there; a recording that was stopped goes on.

    Raises:
      ValueError, FileExistsError: `root` holds demonstrations recorded otherwise, or something else.
    """
    if jax.process_index() == 0:
        logger.info("%d chains of scripted demonstrations on PlayTable in %s", config.episodes, root)
        begin = time.perf_counter()
        recording = recordings.RecordConfig(**vars(config), out=root, pack=True)
        counts = recordings.record(recording) | {"seconds": time.perf_counter() - begin}
        logger.info("%(recorded)d of %(attempted)d succeeded, %(frames)d frames, %(seconds)d s", counts)
    distributed.barrier("demonstrations")


def playtable_trials(config: RolloutConfig, train_scenes: Sequence[str] = (), *, held_out: bool = False) -> list[Trial]:
    """What is asked: single tasks, or the first official chains."""
    if config.tasks:
        chosen = chains.single_tasks(config.tasks, config.trials)
    else:
        chosen = task_chains.official_chains()[: config.trials]
    return chains.chain_trials(chosen, scene=config.scene, train_scenes=train_scenes, held_out=held_out)


class ClosedLoop:
    """Holds what does not change between rollouts: tables, trials, and where to write."""

    def __init__(self, model: VLA, mesh: Mesh, config: ExperimentConfig, encode: EncodeText, output: pathlib.Path):
        rollouts = config.rollouts
        if rollouts.rrd:
            rerun_file.require()  # not after hours of training
        self._model, self._mesh, self._config, self._encode = model, mesh, rollouts, encode
        self._run = output
        scenes = config.demonstrations.scenes if config.demonstrations.episodes else ()
        self._scenes, self._trials = scenes, playtable_trials(rollouts, scenes)
        self._criterion = SuccessCriterion(max_steps=rollouts.max_steps)
        size = min(rollouts.tables, len(self._trials))
        self._tables = PlayTables(
            rollouts.scene, size, image_sizes=dict(zip(("static", "wrist"), rollouts.image_size, strict=True))
        )
        robots.require_same(config.policy, self._tables.robot, f"{self._tables.name} is driven as")
        self._policy: BatchedVLAPolicy | None = None
        self._ready: ahead.Wait = ahead.nothing

    def prepare(self, beside: ahead.Beside, abstract: TrainState) -> None:
        """Compile what rollouts and their films need, beside other work. abstract: shapes and shardings of states."""
        self._ready = beside.start("rollouts", lambda: self._compile(abstract))

    def _compile(self, abstract: TrainState) -> None:
        slots, trials = range(self._tables.size), self._trials[: self._tables.size]
        self._tables.reset(slots, [trial.start for trial in trials])
        seen = self._tables.observe(slots)
        self._tables.step(slots, np.tile(np.float32([*[0.0] * 6, 1.0]), (len(slots), 1)))
        if self._config.films:
            self._tables.views(slots[:1])[0]()
        params = ahead.placed(abstract.served, SingleDeviceSharding(self._mesh.local_devices[0]))
        policy = BatchedVLAPolicy(self._model, params, self._encode, slots=self._tables.size)
        policy.reset(slots, [trial.instructions[0] for trial in trials])
        policy.compile({camera: image.shape[:2] for camera, image in seen[0].images.items()})
        self._policy = policy

    def numbers(self, state: TrainState) -> dict[str, float]:
        """Roll the policy out, in the first process; the others wait. Returns `score` (tasks in a row on average), and,
        there, success per task under task/NAME."""
        acting = self._acting(state)
        if jax.process_index() != 0:
            distributed.barrier("rollouts")
            return {"score": distributed.from_first(0.0)}
        executed = ExecutedBatch(acting, self._config.execution)
        logger.info("%d rollouts on %s", len(self._trials), self._tables.name)
        results = list(rollout.run(executed, self._tables, self._trials, self._criterion))
        summary = rollout_metrics.summarize(results)
        distributed.barrier("rollouts")
        return {"score": distributed.from_first(summary.average_length.value)} | {
            f"task/{name}": rate.value for name, rate in summary.per_task.items()
        }

    def report(self, state: TrainState, checkpoint: pathlib.Path) -> str:
        """Roll out, write a folder of rollouts/ (tables, results, films), and return a Markdown section for the run's
        report. In the first process; elsewhere the section is empty.

        Args:
          checkpoint: the step directory that holds `state`; what it holds names the folder (`evaluation.filing`).
        """
        acting = self._acting(state)
        if jax.process_index() != 0:
            return ""
        identity = seals.identity(checkpoint).label
        conditions = {
            "checkpoint": identity,
            "image_size": list(self._config.image_size),
            "protocol": {"scene": self._config.scene, "tasks": list(self._config.tasks), "scenes": list(self._scenes)},
        }
        name = f"{self._tables.name}-{self._config.execution.label.replace(' ', '_')}"
        conditions["protocol"] |= self._config.execution.conditions() | {"max_steps": self._config.max_steps}
        output = filing.place(self._run / "rollouts", name, conditions)
        kept = filmed.FailuresFirst(self._trials, self._config.films)
        evaluation = chains.evaluate(
            acting,
            self._tables,
            self._trials,
            output,
            chains.Settings(f"{self._run}, {identity}", self._config.execution, self._criterion, conditions),
            films=kept.films,
        )
        films = kept.recordings()
        paths = [output / f"film_{recording.trial.index:04d}" for recording in films]
        with concurrent.futures.ThreadPoolExecutor(cores.usable()) as pool:  # they are drawn outside Python's lock
            list(pool.map(film_files.write_film, films, paths))
        title = f"{evaluation.setup['env']}, closed loop"
        rollout_report.write_report(
            output,
            [evaluation],
            title=title,
            films=sorted(output.glob("film_*")),
            recordings=films,
            rrd=output / "rollouts.rrd" if self._config.rrd else "",
        )
        strips = output / "strips.png"
        if films:
            film_files.draw_strips(films).save(strips)
        return rollout_report.section(evaluation, output.relative_to(self._run).as_posix(), strips=strips.exists())

    def _acting(self, state: TrainState) -> BatchedVLAPolicy:
        self._ready()
        params = meshes.whole(state.served, self._mesh)
        if self._policy is None:
            self._policy = BatchedVLAPolicy(self._model, params, self._encode, slots=self._tables.size)
        self._policy.params = params  # the compiled step is kept
        return self._policy
