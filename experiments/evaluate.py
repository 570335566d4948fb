"""Roll a trained policy out in a simulator: CALVIN's chains of five tasks, or a SimplerEnv task.

    python -m experiments.evaluate --checkpoint runs/playtable_fixtures --chains 160
    python -m experiments.evaluate --checkpoint runs/kosmos_lstm --env calvin --calvin_root calvin --protocol official

On playtable, what the run's own rollouts were is asked again unless flags say otherwise: tasks, scene, picture sizes,
execution and steps come from the checkpoint. Results are kept trial by trial in the output directory: the same command
goes on where it was stopped. The report is rollouts.md there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from robovlms_jax import cli, hub
from robovlms_jax.control.asynchronous import AsyncConfig
from robovlms_jax.control.delayed import AsynchronousBatch
from robovlms_jax.control.execution import Execution
from robovlms_jax.control.robot import CALVIN, RobotSpec
from robovlms_jax.envs import simpler, vector
from robovlms_jax.envs.calvin import adapter as calvin
from robovlms_jax.envs.calvin import task_chains
from robovlms_jax.envs.calvin import tasks as calvin_tasks
from robovlms_jax.evaluation import chains, filing
from robovlms_jax.evaluation.report import films as film_files
from robovlms_jax.evaluation.report import rollouts as rollout_report
from robovlms_jax.evaluation.rollout import Films, Recording, SuccessCriterion, Trial
from robovlms_jax.parallel import cpu
from robovlms_jax.playtable.env import PlayTables
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.runs import load, logs, robots
from robovlms_jax.training import checkpoints, seals

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to roll out, where, and how often."""

    checkpoint: str
    """Run directory or one of its checkpoints/<step> folders."""
    env: Literal["playtable", "calvin", "simpler"] = "playtable"
    """playtable: the embedded simulator (its numbers are not CALVIN's). calvin: a checkout of the real one."""
    out: str = ""
    """Where results go. Empty: rollouts/ of the run, or of a checkpoint that was copied alone; there a folder for every
    checkpoint (its step and a fingerprint of its content) and in it one for every setup."""
    protocol: Literal["custom", "official"] = "custom"
    """official: CALVIN's benchmark as published: all 1000 chains, its own validation sentences, the first action of
    every chunk, 360 steps per task (calvin). custom: what the other fields say."""
    chains: int = 100
    """How many of the 1000 official chains (the first ones), or of a SimplerEnv task's layouts; 0: all."""
    tasks: tuple[str, ...] = ()
    """Instead of chains: this many trials of single tasks, taking turns, from random initial states they are possible
    in (playtable, calvin)."""
    max_steps: int = 360
    """Control steps per task of a chain."""
    execution: Execution = Execution()
    asynchronous: AsyncConfig = AsyncConfig()
    """With a latency: when the policy is asked and how its late answers follow each other, in place of `execution`."""
    latency_ms: float = -1.0
    """How late every answer of the policy comes, on the simulator's clock; below 0: there is no such clock, simulator
    and policy wait for each other, and `asynchronous` is not read."""
    scene: Literal["A", "B", "C", "D"] = "D"
    """Table to evaluate on (playtable, and calvin without a split)."""
    train_scenes: tuple[str, ...] = ()
    """Scenes the policy was trained on, to tell seen from unseen in the report."""
    held_out: bool = False
    """Ask in wordings that training data never use. Without it, calvin asks the benchmark's own validation sentences
    where calvin_root has them (a checkout of mees/calvin), and everything else is asked in wordings of training."""
    processes: int = 2
    """Environments side by side: one simulator process each (calvin, simpler), or tables in one jitted call
    (playtable)."""
    films: int = 2
    """Rollouts to film."""
    weights: load.Weights | None = None
    """How the backbone's parameters are kept, such as int8; None: in the type that it computes in."""
    image_size: tuple[int, int] = (200, 84)
    """Pixels of playtable's static and wrist camera; what the training data had."""
    calvin_root: str = ""
    """Checkout of mees/calvin or mees/calvin_env (docs/calvin.md)."""
    calvin_split: str = ""
    """Folder of a published split, whose stored cameras are then used."""
    egl: bool = False
    """Render CALVIN on the GPU."""
    fresh_process: bool = False
    """Start CALVIN's process anew for every chain, so that a chain run again repeats itself to the last bit."""
    simulator_python: str = sys.executable
    """Interpreter for the simulator's processes, if this one lacks its packages."""
    simpler_task: str = "widowx_spoon_on_towel"
    """Task of SimplerEnv."""
    simpler_statistics: str = ""
    """JSON with the training data's action quantiles q01 and q99, as OpenVLA and RoboVLMs publish them, for policies
    that act in units of these. Empty: the policy acts in metres and radians, as those that were trained here do."""

    def __post_init__(self):
        for field in ("chains", "films"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")
        if self.processes < 1:
            raise ValueError(f"processes={self.processes} must be at least 1.")
        if self.latency_ms >= 0 and self.execution != Execution():
            raise ValueError("execution and latency_ms exclude each other: with a latency, `asynchronous` says it all.")
        if self.latency_ms < 0 and self.asynchronous != AsyncConfig():
            raise ValueError("asynchronous is read with latency_ms of 0 or more alone; set it.")
        unknown = sorted(set(self.tasks) - set(calvin_tasks.TASKS))
        if unknown:
            raise ValueError(f"tasks has unknown {unknown}; known: {', '.join(calvin_tasks.TASKS)}.")
        if self.env == "calvin" and not self.calvin_root:
            raise ValueError("env calvin needs calvin_root, a checkout of mees/calvin_env (see docs/calvin.md).")
        for field in dataclasses.fields(self):
            owner = ONLY_FOR.get(field.name, self.env)
            if self.env != owner and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} is for env {owner}; {self.env} has no use for it.")
        if self.protocol == "official":
            _require_official(self)


ONLY_FOR = {
    **dict.fromkeys(("calvin_split", "egl", "fresh_process"), "calvin"),
    "image_size": "playtable",
    "simpler_statistics": "simpler",
}
"""Field -> the one env that reads it."""

OFFICIAL = {"chains": 0, "execution": Execution("first")}
OFFICIAL_LABEL = "official (1000 chains, the benchmark's sentences, first action of every chunk, 360 steps per task)"


def _require_official(config: EvaluateConfig) -> None:
    """Nothing that was asked for contradicts the protocol, which sets chains and execution itself."""
    defaults = {field.name: field.default for field in dataclasses.fields(EvaluateConfig)}
    allowed = {
        "env": ("calvin",),
        "tasks": ((),),
        "held_out": (False,),
        "scene": ("D",),
        "max_steps": (defaults["max_steps"],),
        "chains": (defaults["chains"], 0, 1000),
        "latency_ms": (defaults["latency_ms"],),
        "execution": (defaults["execution"], OFFICIAL["execution"]),
    }
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise _contradicts(name, getattr(config, name))


def _require_official_flags(config: EvaluateConfig, arguments: Sequence[str]) -> None:
    """`_require_official` for what was typed although it is a field's default, as `--chains 100` is."""
    typed = {"chains": config.chains in (0, 1000), "execution.mode": config.execution.mode == "first"}
    for name, fits in typed.items():
        if not fits and cli.names_flag(arguments, name):
            raise _contradicts(name, config.chains if name == "chains" else config.execution.mode)


def _contradicts(name: str, value: Any) -> ValueError:
    return ValueError(
        f"protocol official does not go with {name}={value!r}: it is all 1000 chains on scene D of env calvin, with "
        f"execution.mode first and 360 steps per task. Leave {name} out, or choose protocol custom."
    )


def evaluate(config: EvaluateConfig) -> pathlib.Path:
    """Run the evaluation and write its report; returns the report's path."""
    if config.protocol == "official":
        config = dataclasses.replace(config, **OFFICIAL)
    directory = checkpoints.locate(config.checkpoint)
    trials, criterion = _trials(config)
    conditions = _conditions(config, trials, seals.identity(directory).label)
    name = _folder_name(config)
    if config.out:
        output = filing.choose(pathlib.Path(config.out), name, conditions)
    else:
        run = checkpoints.run_of(directory)
        if hub.is_name(config.checkpoint):  # the hub's cache is no place for results
            run = pathlib.Path("runs") / hub.parse(config.checkpoint)[0].replace("/", "_")
        output = filing.place(run / "rollouts", name, conditions)
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
    policy = load.load_batched_policy(directory, slots=config.processes, weights=config.weights)
    _require_robot(config, policy.model.config, load.load_config(directory).data.dataset)

    recordings: list[Recording] = []

    def keep(recording: Recording) -> None:
        recordings.append(recording)
        film_files.write_film(recording, output / f"film_{recording.trial.index:04d}")

    with _envs(config) as envs:
        driven = policy
        if config.latency_ms >= 0:
            driven = AsynchronousBatch(policy, config.asynchronous, _latency_ticks(config, policy.robot))
        evaluation = chains.evaluate(
            driven,
            envs,
            trials,
            output,
            chains.Settings(
                f"{config.checkpoint}, {conditions['checkpoint']}{_late(config)}",
                config.execution,
                criterion,
                conditions,
            ),
            films=Films([trial.index for trial in trials[: config.films]], keep),
        )
        if config.latency_ms >= 0:
            log.info("asynchronous control: %s", dict(driven.counts))
    title = f"{evaluation.setup['env']}, closed loop"
    films = sorted(output.glob("film_*"))
    return rollout_report.write_report(output, [evaluation], title=title, films=films, recordings=recordings)


def _require_robot(config: EvaluateConfig, policy: PolicyConfig, dataset: str) -> None:
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


def _late(config: EvaluateConfig) -> str:
    """For reports and the log."""
    return "" if config.latency_ms < 0 else f", answers {config.latency_ms:g} ms late, seam {config.asynchronous.seam}"


def _latency_ticks(config: EvaluateConfig, robot: RobotSpec) -> int:
    """Raises ValueError for a robot whose rate is not known."""
    if not robot.rate_hz:
        raise ValueError(f"latency_ms needs the robot's rate, which {robot.name!r} does not say.")
    return math.ceil(config.latency_ms / 1000 * robot.rate_hz - 1e-9)


def _folder_name(config: EvaluateConfig) -> str:
    name = f"{config.env}-{config.scene if config.env != 'simpler' else config.simpler_task}"
    name += ("-single" if config.tasks else "") + ("-fresh" if config.fresh_process else "")
    name += "-official" if config.protocol == "official" else ""
    words = ("-held_out" if config.held_out else "") + (f"-{config.weights}" if config.weights else "")
    if config.latency_ms >= 0:
        return f"{name}-{config.asynchronous.seam}-{config.latency_ms:g}ms{words}"
    return f"{name}-{config.execution.label.replace(' ', '_')}{words}"


_ASIDE = (
    *("checkpoint", "out", "chains", "processes", "films"),
    *("calvin_root", "calvin_split", "simulator_python", "weights"),
)
"""Fields that results do not depend on, or not by their text (who is asked how often, and where things lie), and what
results that were stored earlier do not name."""


def _conditions(config: EvaluateConfig, trials: list[Trial], checkpoint: str) -> dict[str, Any]:
    """Everything that results depend on, as JSON values."""
    asked = {name: value for name, value in dataclasses.asdict(config).items() if name not in _ASIDE}
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


def _trials(config: EvaluateConfig) -> tuple[list[Trial], SuccessCriterion]:
    if config.env == "simpler":
        criterion = chains.simpler_criterion(config.simpler_task)
        return chains.simpler_trials(config.simpler_task, config.chains or None), criterion
    chosen = chains.single_tasks(config.tasks, config.chains) if config.tasks else task_chains.official_chains()
    trials = chains.chain_trials(
        chosen[: config.chains or None],
        scene=config.scene,
        train_scenes=config.train_scenes,
        held_out=config.held_out,
        sentences=_benchmark_sentences(config),
    )
    if config.protocol == "official":
        trials = [dataclasses.replace(t, labels={**t.labels, "protocol": OFFICIAL_LABEL}) for t in trials]
    # CALVIN's released checker differs from the written rules in one task; published numbers were judged by it.
    judge = {"completed": calvin.completed_in_each} if config.env == "calvin" else {}
    return trials, SuccessCriterion(max_steps=config.max_steps, **judge)


def _benchmark_sentences(config: EvaluateConfig) -> dict[str, str] | None:
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
def _envs(config: EvaluateConfig) -> Iterator[vector.VectorEnv]:
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


def of_checkpoint(arguments: Sequence[str]) -> EvaluateConfig | type[EvaluateConfig]:
    """The settings that a command line starts from: those of the run's own rollouts, where the checkpoint that it names
    had any and they are for the env that it names; else the defaults.

    Raises FileNotFoundError, ValueError: there is no such checkpoint, or it cannot be read.
    """
    checkpoint = cli.value_of(arguments, "checkpoint")
    if checkpoint is None or {"--help", "-h"} & set(arguments):
        return EvaluateConfig
    start = EvaluateConfig(checkpoint)
    if (cli.value_of(arguments, "env") or start.env) != "playtable":
        return EvaluateConfig
    run = load.load_config(checkpoint)
    if not run.rollouts.trials:
        return start
    names = ("tasks", "scene", "max_steps", "image_size", "execution")
    if cli.value_of(arguments, "latency_ms") is not None:
        names = tuple(name for name in names if name != "execution")  # `asynchronous` says it
    own = {name: getattr(run.rollouts, name) for name in names}
    own["processes"] = min(run.rollouts.tables, run.rollouts.trials)
    if run.demonstrations.episodes:
        own["train_scenes"] = run.demonstrations.scenes
    return dataclasses.replace(start, **own)


def _say_taken(config: EvaluateConfig, start: EvaluateConfig | type[EvaluateConfig]) -> None:
    """One line in the log on what the checkpoint decided."""
    if isinstance(start, type):
        return
    defaults = EvaluateConfig(config.checkpoint)
    taken = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if getattr(defaults, field.name) != value == getattr(start, field.name):
            words = value.label if isinstance(value, Execution) else " ".join(map(str, np.atleast_1d(value)))
            taken.append(f"{field.name} {words}")
    if taken:
        log.info("as in the run's own rollouts: %s", ", ".join(taken))


def main() -> None:
    logs.to_stderr(absl=logging.ERROR)
    try:
        start = of_checkpoint(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    config = cli.read(start, description=__doc__)
    cpu.keep_freed_memory()
    try:
        _say_taken(config, start)
        if config.protocol == "official":
            _require_official_flags(config, sys.argv[1:])
        report = evaluate(config)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        log.warning("stopped by Ctrl-C; finished trials are kept, and the same command goes on with the others.")
        sys.exit(130)
    log.info("report: %s", report)


if __name__ == "__main__":
    main()
