"""How a run's policy plays CALVIN's table, as its configuration says: what programs playing a checkpoint begin with."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from robovlms_jax.control.execution import Execution
from robovlms_jax.runs.config import ExperimentConfig

log = logging.getLogger(__name__)

Config = TypeVar("Config")


class Played(NamedTuple):
    """By the run's own rollouts where it had some, else by its demonstrations, else CALVIN's usual numbers.

    asked: single tasks of the rollouts; empty: chains. tasks: those, or else the demonstrated ones; empty: nobody said.
    unseen_scene: where it is asked. scenes: where it learned. image_size: px of static and wrist camera.
    horizon: actions executed of every chunk.
    """

    asked: tuple[str, ...]
    tasks: tuple[str, ...]
    unseen_scene: str
    scenes: tuple[str, ...]
    max_steps: int
    image_size: tuple[int, int]
    execution: Execution
    horizon: int

    def asking(self, env: str = "playtable") -> dict[str, Any]:
        """As `evaluate` and `compare` name what they ask in a simulator. image_size is playtable's alone: the cameras
        of the real one have sizes of their own."""
        asked = {
            "tasks": self.asked,
            "scene": self.unseen_scene,
            "max_steps": self.max_steps,
            "image_size": self.image_size,
            "execution": self.execution,
        }
        return asked if env == "playtable" else {name: x for name, x in asked.items() if name != "image_size"}


def of(experiment: ExperimentConfig) -> Played:
    """What a checkpoint's configuration (`load.load_config`) says."""
    rollouts, shown = experiment.rollouts, experiment.demonstrations
    source: Any = shown if shown.episodes and not rollouts.trials else rollouts
    asked = rollouts.tasks if rollouts.trials else shown.tasks if shown.episodes else ()
    return Played(
        asked=asked,
        tasks=asked or shown.tasks,
        unseen_scene=rollouts.scene if source is rollouts else shown.validation_scene,
        scenes=shown.scenes,
        max_steps=source.max_steps,
        image_size=source.image_size,
        execution=rollouts.execution,
        horizon=rollouts.execution.executed(experiment.policy.chunk),
    )


def say_no_retry(own: Played) -> None:
    """For what plays a checkpoint's policy and does not try again, as the run's own rollouts did."""
    if own.execution.retry.on:
        log.warning("the run's own rollouts were %s; here nothing is tried again", own.execution.label)


def filled(config: Config, experiment: ExperimentConfig, names: Sequence[str]) -> Config:
    """`config`, a dataclass, with what a checkpoint knows in those of the fields `names` that are empty or 0; says what
    that was."""
    own = of(experiment)
    taken = {name: getattr(own, name) for name in names if not getattr(config, name)}
    if taken:
        log.info("as in the checkpoint's run: %s", ", ".join(f"{name} {_words(x)}" for name, x in taken.items()))
    if "horizon" in taken:
        say_no_retry(own)
    return dataclasses.replace(config, **taken)  # type: ignore[type-var]


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
