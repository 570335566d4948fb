"""Rollouts of a checkpoint that are recorded to be compared."""

from __future__ import annotations

import dataclasses
import logging
import pathlib

from robovlms_jax import schema
from robovlms_jax.playtable.scene import random_tables
from robovlms_jax.rl import segments, starts
from robovlms_jax.rl.config import BehaviourConfig
from robovlms_jax.runs import load, played
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import require

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
@schema.checked("record")
class TryingConfig:
    """Which rollouts of a policy."""

    tasks: tuple[str, ...] = ()
    """Empty: those of the checkpoint's own rollouts or demonstrations."""
    scenes: tuple[str, ...] = ()
    """Tables, which take turns; empty: those that the checkpoint learned on."""
    random_scenes: int = 0
    """This many more tables, the first of those that demonstrations.random_scenes draws."""
    count: int = 96
    """Rollouts."""
    spread: float = 0.25
    """Metres by which the hand is moved at the beginning, at most."""
    max_steps: int = 0
    """Control steps of a rollout; 0: as in the checkpoint's own rollouts or demonstrations."""
    horizon: int = 0
    """Actions executed of every predicted chunk; 0: as in the checkpoint's own rollouts."""
    image_size: tuple[int, ...] = ()
    """Pixels of static and wrist camera; empty: what the policy was trained with."""
    tables: int = 16
    """Side by side."""
    behaviour: BehaviourConfig = BehaviourConfig(spread=(0.2,))
    """How the policy tries things out: rollouts must differ to be compared."""
    seed: int = 0

    def __post_init__(self):
        for field in ("count", "tables"):
            require(getattr(self, field) >= 1, f"record.{field}={getattr(self, field)} must be at least 1.")
        for field in ("random_scenes", "max_steps", "horizon"):
            require(getattr(self, field) >= 0, f"record.{field}={getattr(self, field)} must not be negative.")
        require(
            len(self.image_size) in (0, 2),
            f"record.image_size={self.image_size}: expected pixels of the static and of the wrist camera, or nothing.",
        )


def resolved(config: TryingConfig, experiment: ExperimentConfig) -> TryingConfig:
    """With what the checkpoint of this configuration knows where `config` leaves it open. Raises ValueError."""
    config = played.filled(config, experiment, ("tasks", "scenes", "max_steps", "horizon", "image_size"))
    require(
        len(config.tasks) > 0,
        "record.tasks is empty, and the checkpoint's rollouts and demonstrations name none; name the tasks to try.",
    )
    return config


def record(checkpoint: str | pathlib.Path, config: TryingConfig) -> segments.Rollouts:
    """Make them. checkpoint: a run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME.

    Raises ValueError, FileNotFoundError that say what is wrong with the checkpoint or the tasks.
    """
    model, params, encode = load.open_model(checkpoint, weights="float32")
    config = resolved(config, load.load_config(checkpoint))
    tables = (*config.scenes, *random_tables(0, config.random_scenes))
    trials = starts.draw(config.tasks, tables, config.count, config.seed, spread=config.spread)
    how = segments.Trying(
        config.behaviour,
        min(config.tables, config.count),
        tuple(zip(("static", "wrist"), config.image_size, strict=True)),
        min(config.horizon, model.config.chunk),
        config.max_steps,
    )
    found = segments.roll_out(model, params, encode, trials, how, config.seed)
    log.info("%d rollouts, %d succeeded", len(found), found.success.sum())
    return found
