"""Roll a trained policy out in a simulator: CALVIN's chains of five tasks, or a SimplerEnv task.

    python -m experiments.evaluate --checkpoint runs/sample --env playtable --chains 20
    python -m experiments.evaluate --checkpoint runs/kosmos_lstm --env calvin --calvin_root calvin --processes 8

Results are kept trial by trial in the output directory: the same command goes on where it was stopped. The report is
rollouts.md there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import Annotated, Literal

import tyro

from robovlms_jax.envs import calvin, simpler, vector
from robovlms_jax.envs import tasks as calvin_tasks
from robovlms_jax.envs.playtable.env import PlayTables
from robovlms_jax.evaluation import chains, rollout_report
from robovlms_jax.evaluation.execution import Execution
from robovlms_jax.evaluation.rollout import Recording, Rules, Trial
from robovlms_jax.load import load_batched_policy
from robovlms_jax.parallel import host_memory


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to roll out, where, and how often."""

    checkpoint: str
    """Run directory or one of its checkpoints/<step> folders."""
    env: Literal["playtable", "calvin", "simpler"] = "playtable"
    """playtable: the embedded simulator (its numbers are not CALVIN's). calvin: a checkout of the real one."""
    output: str = ""
    """Where results go; one directory per setup. Empty: <checkpoint>/rollouts/<env>-<execution>[-held_out]."""
    chains: int = 100
    """How many of the 1000 official chains (the first ones), or of a SimplerEnv task's layouts; 0: all."""
    tasks: tuple[str, ...] = ()
    """Instead of chains: this many trials of single tasks, taking turns, from random initial states they are possible
    in (playtable, calvin)."""
    max_steps: int = 360
    """Control steps per task of a chain."""
    execution: Execution = Execution()
    scene: Literal["A", "B", "C", "D"] = "D"
    """Table to evaluate on (playtable, and calvin without a split)."""
    train_scenes: tuple[str, ...] = ()
    """Scenes the policy was trained on, to tell seen from unseen in the report."""
    held_out: bool = False
    """Ask in wordings that training data never use."""
    processes: int = 2
    """Environments side by side: one simulator process each (calvin, simpler), or tables in one jitted call
    (playtable)."""
    films: int = 2
    """Rollouts to film."""
    image_size: tuple[int, int] = (200, 84)
    """Pixels of playtable's static and wrist camera; what the training data had."""
    calvin_root: str = ""
    """Checkout of mees/calvin or mees/calvin_env (docs/calvin.md)."""
    calvin_split: str = ""
    """Folder of a published split, whose stored cameras are then used."""
    egl: bool = False
    """Render CALVIN on the GPU."""
    simulator_python: str = sys.executable
    """Interpreter for the simulator's processes, if this one lacks its packages."""
    simpler_task: str = "widowx_spoon_on_towel"
    """Task of SimplerEnv."""
    simpler_statistics: str = ""
    """JSON with the training data's action quantiles q01 and q99, as OpenVLA and RoboVLMs publish them."""

    def __post_init__(self):
        for field in ("chains", "films"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")
        if self.processes < 1:
            raise ValueError(f"processes={self.processes} must be at least 1.")
        unknown = sorted(set(self.tasks) - set(calvin_tasks.TASKS))
        if unknown:
            raise ValueError(f"tasks has unknown {unknown}; known: {', '.join(calvin_tasks.TASKS)}.")
        if self.env == "calvin" and not self.calvin_root:
            raise ValueError("env calvin needs calvin_root, a checkout of mees/calvin_env (see docs/calvin.md).")
        if self.env == "simpler" and not self.simpler_statistics:
            raise ValueError(
                "env simpler needs simpler_statistics, the JSON with the training data's action quantiles."
            )


def evaluate(config: EvaluateConfig) -> pathlib.Path:
    """Run the evaluation and write its report; returns the report's path."""
    output = pathlib.Path(config.output or _default_output(config))
    trials, rules = _trials(config)
    policy = load_batched_policy(config.checkpoint, slots=config.processes)

    def keep(recording: Recording) -> None:
        rollout_report.write_film(recording, output / f"film_{recording.trial.index:04d}")

    with _envs(config) as envs:
        evaluation = chains.evaluate(
            policy,
            envs,
            trials,
            output,
            policy_name=str(config.checkpoint),
            execution=config.execution,
            rules=rules,
            film=[trial.index for trial in trials[: config.films]],
            on_recording=keep,
        )
    title = f"{evaluation.setup['env']}, closed loop"
    return rollout_report.write_report(output, [evaluation], title=title, films=sorted(output.glob("film_*")))


def _default_output(config: EvaluateConfig) -> pathlib.Path:
    name = f"{config.env}-{config.scene if config.env != 'simpler' else config.simpler_task}"
    name += "-single" if config.tasks else ""
    words = "-held_out" if config.held_out else ""
    return pathlib.Path(config.checkpoint) / "rollouts" / f"{name}-{config.execution.label.replace(' ', '_')}{words}"


def _trials(config: EvaluateConfig) -> tuple[list[Trial], Rules]:
    if config.env == "simpler":
        rules = chains.simpler_rules(config.simpler_task)
        return chains.simpler_trials(config.simpler_task, config.chains or None), rules
    chosen = chains.single_tasks(config.tasks, config.chains) if config.tasks else calvin_tasks.official_chains()
    trials = chains.chain_trials(
        chosen[: config.chains or None], scene=config.scene, train_scenes=config.train_scenes, held_out=config.held_out
    )
    # CALVIN's released checker differs from the written rules in one task; published numbers were judged by it.
    judge = {"completed": calvin.completed_in_each} if config.env == "calvin" else {}
    return trials, Rules(max_steps=config.max_steps, **judge)


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
                )
            else:
                low, high = simpler.read_quantiles(config.simpler_statistics)
                worker = simpler.simpler_env(config.simpler_task, low=low, high=high, python=config.simulator_python)
            stack.callback(worker.close)
            workers.append(worker)
        yield vector.EnvPool(workers)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.ERROR)
    config = tyro.cli(Annotated[EvaluateConfig, tyro.conf.AvoidSubcommands], description=__doc__)
    host_memory.keep_freed_memory()
    try:
        report = evaluate(config)
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
    logging.getLogger(__name__).info("report: %s", report)


if __name__ == "__main__":
    main()
