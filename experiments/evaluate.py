"""Roll a trained policy out in a simulator: PlayTable, which is built in, CALVIN or SimplerEnv.

    python -m experiments.evaluate --checkpoint runs/playtable_fixtures --chains 160
    python -m experiments.evaluate --checkpoint runs/kosmos_lstm --env calvin --calvin_root calvin --protocol official
    python -m experiments.evaluate --checkpoint runs/kosmos_lstm --env calvin --calvin_root calvin --ray.workers 32

What the run's own rollouts were is asked again unless flags say otherwise: tasks, scene, execution and steps come from
the checkpoint, on playtable picture sizes, too; `--tasks` with nothing behind it asks chains. The official protocol
decides all of it itself. Results are kept trial by trial in the output directory: the same command
goes on where it was stopped. The report is rollouts.md there. With --ray.workers the trials are played on the machines
of a Ray cluster, each worker with a policy and `processes` simulators of its own (docs/clusters.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments import evaluation_settings
from robovlms_jax import cli, ending, hub
from robovlms_jax.control.delayed import AsynchronousBatch
from robovlms_jax.control.execution import BatchedPolicy
from robovlms_jax.control.robot import CALVIN, RobotSpec
from robovlms_jax.envs import simpler, vector
from robovlms_jax.envs.calvin import adapter as calvin
from robovlms_jax.envs.calvin import task_chains
from robovlms_jax.evaluation import chains, filing, filmed
from robovlms_jax.evaluation.report import films as film_files
from robovlms_jax.evaluation.report import rerun_file
from robovlms_jax.evaluation.report import rollouts as rollout_report
from robovlms_jax.evaluation.rollout import SuccessCriterion, Trial, TrialResult
from robovlms_jax.nn import stack
from robovlms_jax.parallel import cpu
from robovlms_jax.playtable.env import PlayTables
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.serving import BatchedVLAPolicy
from robovlms_jax.rl import rollouts
from robovlms_jax.runs import load, logs, robots
from robovlms_jax.training import checkpoints, seals

log = logging.getLogger(__name__)

CANDIDATES = 25
"""First trials that are filmed to choose from, for each film: pictures of a slow simulator cost time."""


def evaluate(config: evaluation_settings.EvaluateConfig) -> pathlib.Path:
    """Run the evaluation and write its report; returns the report's path."""
    if config.protocol == "official":
        config = dataclasses.replace(config, **evaluation_settings.OFFICIAL)
    rerun_file.check(config.rrd)
    directory = checkpoints.locate(config.checkpoint, strict=True)
    trials, criterion = _trials(config)
    conditions = _conditions(config, trials, seals.identity(directory).label)
    output = _output(config, directory, conditions)
    log.info(
        "%s: %d trials, execution %s%s, phrasing %s; results go to %s",
        *(
            config.env,
            len(trials),
            config.execution.label,
            _late(config),
            trials[0].labels.get("phrasing", "the task's own"),
            output,
        ),
    )
    saved = load.load_config(directory)
    _require_robot(config, saved.policy, saved.data.dataset)
    config.execution.require(saved.policy.robot)
    settings = chains.Settings(
        f"{config.checkpoint}, {conditions['checkpoint']}{_late(config)}", config.execution, criterion, conditions
    )
    kept = filmed.FailuresFirst(trials[: CANDIDATES * config.films], config.films)
    if config.ray.workers:
        from experiments import evaluation_workers  # which imports this module

        with evaluation_workers.players(config, criterion, kept.films.trials, kept.films.keep) as players:
            evaluation = chains.evaluate(None, players.simulators, trials, output, settings, play=players.play)
    else:
        with acting(config, criterion) as (policy, envs, play):
            evaluation = chains.evaluate(policy, envs, trials, output, settings, films=kept.films, play=play)
            if isinstance(policy, AsynchronousBatch):
                log.info("asynchronous control: %s", dict(policy.counts))
    recordings = kept.recordings()
    for recording in recordings:
        film_files.write_film(recording, output / f"film_{recording.trial.index:04d}")
    paths, title = sorted(output.glob("film_*")), f"{evaluation.setup['env']}, closed loop"
    log.info("writing the report")
    return rollout_report.write_report(
        output, [evaluation], title=title, films=paths, recordings=recordings, rrd=config.rrd
    )


Play = Callable[[Sequence[Trial]], Iterator[TrialResult]]


@contextlib.contextmanager
def acting(
    config: evaluation_settings.EvaluateConfig, criterion: SuccessCriterion
) -> Iterator[tuple[BatchedPolicy, vector.VectorEnv, Play | None]]:
    """The policy as it is asked, its simulators, and what plays trials without either being asked (on_device)."""
    policy = load.load_batched_policy(
        checkpoints.locate(config.checkpoint), slots=config.processes, weights=config.weights
    )
    with environments(config) as envs:
        if config.latency_ms >= 0:
            late = AsynchronousBatch(policy, config.asynchronous, _latency_ticks(config, policy.robot))
            yield late, envs, None
        else:
            yield policy, envs, _player(config, policy, criterion) if config.on_device else None


def _output(
    config: evaluation_settings.EvaluateConfig, directory: pathlib.Path, conditions: dict[str, Any]
) -> pathlib.Path:
    """Where the results go."""
    name = _folder_name(config)
    if config.out:
        return filing.choose(pathlib.Path(config.out), name, conditions)
    run = checkpoints.run_of(directory)
    if hub.is_name(config.checkpoint):  # the hub's cache is no place for results
        run = pathlib.Path("runs") / hub.parse(config.checkpoint)[0].replace("/", "_")
    return filing.place(run / "rollouts", name, conditions)


def _player(config: evaluation_settings.EvaluateConfig, policy: BatchedVLAPolicy, criterion: SuccessCriterion) -> Play:
    """Plays trials in one program. Raises ValueError for a policy or an execution that only the host's loop has."""
    sizes = dict(zip(("static", "wrist"), config.image_size, strict=True))
    player = rollouts.Player(policy.model, policy.encode_text, config.processes, sizes, config.execution, criterion)
    policy.params = stack.joined(policy.params)  # its own step is not asked here: one copy is enough
    return lambda trials: player.results(policy.params, trials)


def _require_robot(config: evaluation_settings.EvaluateConfig, policy: PolicyConfig, dataset: str) -> None:
    """Raise ValueError where the simulator is another robot than the policy's; lists what differs.

    Args:
      dataset: data.dataset of the training.
    """
    if config.env != "simpler":
        robots.require_same(policy, CALVIN, f"env {config.env} is driven as")
    elif policy.robot == CALVIN and dataset != "calvin":  # a checkpoint older than descriptions says CALVIN's
        in_quantiles = policy.action_scaling == "bounds"  # converted ones; others took their bounds from data in metres
        if in_quantiles != bool(config.simpler_statistics):
            acts = "units of its training data's quantiles; pass" if in_quantiles else "metres and radians; leave out"
            raise ValueError(f"the checkpoint, which describes no robot, acts in {acts} simpler_statistics.")
        log.warning("the checkpoint describes no robot; that it is %s's is not checked", config.simpler_task)
    else:
        scaled = bool(config.simpler_statistics)
        found = simpler.robot(config.simpler_task, scaled=scaled)
        how = "with" if scaled else "without"
        robots.require_same(policy, found, f"env simpler {how} simpler_statistics is driven as")


def _late(config: evaluation_settings.EvaluateConfig) -> str:
    """For reports and the log."""
    return "" if config.latency_ms < 0 else f", answers {config.latency_ms:g} ms late, seam {config.asynchronous.seam}"


def _latency_ticks(config: evaluation_settings.EvaluateConfig, robot: RobotSpec) -> int:
    """Raises ValueError for a robot whose rate is not known."""
    if not robot.rate_hz:
        raise ValueError(f"latency_ms needs the robot's rate, which {robot.name!r} does not say.")
    return math.ceil(config.latency_ms / 1000 * robot.rate_hz - 1e-9)


def _folder_name(config: evaluation_settings.EvaluateConfig) -> str:
    name = f"{config.env}-{config.scene if config.env != 'simpler' else config.simpler_task}"
    name += ("-single" if config.tasks else "") + ("-fresh" if config.fresh_process else "")
    name += "-official" if config.protocol == "official" else ""
    words = ("-held_out" if config.held_out else "") + (f"-{config.weights}" if config.weights else "")
    if config.latency_ms >= 0:
        return f"{name}-{config.asynchronous.seam}-{config.latency_ms:g}ms{words}"
    return f"{name}-{config.execution.label.replace(' ', '_')}{words}"


_ASIDE = (
    *("checkpoint", "out", "chains", "processes", "films", "rrd", "on_device", "ray"),
    *("calvin_root", "calvin_split", "simulator_python", "weights"),
)
"""Fields that results do not depend on, or not by their text (who is asked how often, and where things lie), and what
results that were stored earlier do not name."""


def _conditions(config: evaluation_settings.EvaluateConfig, trials: list[Trial], checkpoint: str) -> dict[str, Any]:
    """Everything that results depend on, as JSON values."""
    asked = {name: value for name, value in dataclasses.asdict(config).items() if name not in _ASIDE}
    asked["execution"] = config.execution.conditions()
    if config.latency_ms < 0:  # as results of versions that had no latency
        del asked["latency_ms"], asked["asynchronous"]
    if config.calvin_split:
        asked["calvin_split"] = pathlib.Path(config.calvin_split).name  # its stored cameras
    if config.weights:
        asked["weights"] = config.weights
    if config.simpler_statistics:
        asked["simpler_statistics"] = np.stack(simpler.read_quantiles(config.simpler_statistics)).tolist()
    labels = {name: value for name, value in trials[0].labels.items() if name != "scene"}
    return json.loads(
        json.dumps(
            {"checkpoint": checkpoint, "image_size": asked.pop("image_size"), "protocol": asked, "asked": labels}
        )
    )


def _trials(config: evaluation_settings.EvaluateConfig) -> tuple[list[Trial], SuccessCriterion]:
    if config.env == "simpler":
        criterion = chains.simpler_criterion(config.simpler_task)
        return chains.simpler_trials(config.simpler_task, config.chains or None), criterion
    chosen = chains.single_tasks(config.tasks, config.chains) if config.tasks else task_chains.official_chains()
    trials = chains.chain_trials(
        chosen[: config.chains or None],
        scene=config.scene,
        train_scenes=config.train_scenes,
        held_out=config.held_out,
        sentences=benchmark_sentences(config),
    )
    if config.protocol == "official":
        trials = [
            dataclasses.replace(t, labels={**t.labels, "protocol": evaluation_settings.OFFICIAL_LABEL}) for t in trials
        ]
    # CALVIN's released checker differs from the written rules in one task; published numbers were judged by it.
    judge = {"completed": calvin.completed_in_each} if config.env == "calvin" else {}
    return trials, SuccessCriterion(max_steps=config.max_steps, **judge)


def benchmark_sentences(config: evaluation_settings.EvaluateConfig) -> dict[str, str] | None:
    """CALVIN's own validation sentences, where they are to be asked. Raises FileNotFoundError, ValueError."""
    if config.env != "calvin" or config.held_out:
        return None
    if config.protocol == "official" or calvin.has_validation_instructions(config.calvin_root):
        return calvin.validation_instructions(config.calvin_root)
    log.warning(
        "calvin_root %s has no validation sentences of the benchmark (they come with github.com/mees/calvin): tasks "
        "are asked in this project's own training wordings, and results say so.",
        config.calvin_root,
    )
    return None


@contextlib.contextmanager
def environments(config: evaluation_settings.EvaluateConfig) -> Iterator[vector.VectorEnv]:
    """The simulators, `config.processes` of them; closed at the end."""
    if config.env == "playtable":
        static, wrist = config.image_size
        yield PlayTables(config.scene, config.processes, image_sizes={"static": static, "wrist": wrist})
        return
    with contextlib.ExitStack() as stack:
        workers = []
        for _ in range(config.processes):
            if config.env == "calvin":
                worker = calvin.calvin_env(
                    config.calvin_root,
                    scene=config.scene,
                    split=config.calvin_split,
                    use_egl=config.egl,
                    python=config.simulator_python,
                    fresh_process=config.fresh_process,
                )
            else:
                given = config.simpler_statistics
                low, high = simpler.read_quantiles(given) if given else simpler.METRES
                worker = simpler.simpler_env(config.simpler_task, low=low, high=high, python=config.simulator_python)
            stack.callback(worker.close)
            workers.append(worker)
        yield vector.EnvPool(workers)


def main() -> None:
    logs.to_stderr(absl=logging.ERROR)
    try:
        start = evaluation_settings.of_checkpoint(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    config = cli.read(start, description=__doc__)

    def work() -> pathlib.Path:
        if config.on_device:
            cpu.device_per_core()
        evaluation_settings.say_taken(config, start)
        if config.protocol == "official":
            evaluation_settings.require_official_flags(config, sys.argv[1:])
        return evaluate(config)

    reported(work)


def reported(work: Callable[[], pathlib.Path]) -> None:
    """Run trials and log where their report is. What the user can mend, and Ctrl-C, end the process with a message."""
    cpu.keep_freed_memory()
    try:
        report = work()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        ending.stop("finished trials are kept, and the same command goes on with the others.")
    page = report.with_suffix(".html")
    if page.exists():
        log.info("report: %s (the same as text: %s)", page, report)
    else:
        log.info("report: %s", report)


if __name__ == "__main__":
    main()
