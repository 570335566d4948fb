"""Rollouts of a checkpoint that are recorded to be compared."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib

from robovlms_jax import json_files, schema
from robovlms_jax.playtable.scene import check_name, random_tables
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.rl import behaviours, rollouts, segments, starts
from robovlms_jax.rl.config import BehaviourConfig
from robovlms_jax.runs import load, played
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import require
from robovlms_jax.training import checkpoints, seals

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
        for field in ("random_scenes", "max_steps", "horizon", "spread", "seed"):
            require(getattr(self, field) >= 0, f"record.{field}={getattr(self, field)} must not be negative.")
        require(
            len(self.image_size) in (0, 2) and all(size >= 1 for size in self.image_size),
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


def require_possible(config: TryingConfig, policy: PolicyConfig) -> None:
    """Raise ValueError for a policy, tasks or tables that cannot be tried, before anything is made for them."""
    rollouts.require_playable(policy)
    behaviours.make(policy, config.behaviour)
    for name in config.scenes:
        check_name(name)
    starts.draw(config.tasks, config.scenes, 1, config.seed)


def record(checkpoint: str | pathlib.Path, config: TryingConfig) -> segments.Rollouts:
    """Make them. checkpoint: a run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME.

    Raises ValueError, FileNotFoundError that say what is wrong with the checkpoint or the tasks.
    """
    model, params, encode = load.open_model(checkpoint, weights="float32")
    config = resolved(config, load.load_config(checkpoint))
    require_possible(config, model.config)
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
    made = schema.to_dict(config) | {"checkpoint": seals.identity(checkpoints.locate(checkpoint)).label}
    return dataclasses.replace(found, made=json.dumps(made))


def require_asked_for(found: segments.Rollouts, path: pathlib.Path, checkpoint: str, config: TryingConfig) -> None:
    """Raise ValueError where rollouts of `path` were made otherwise than those who ask for them say. checkpoint: empty:
    any. config: fields as they are without being given say nothing."""
    usual = schema.to_dict(TryingConfig())
    asked = {name: x for name, x in schema.to_dict(config).items() if x != usual[name]}
    if checkpoint:
        asked["checkpoint"] = seals.identity(checkpoints.locate(checkpoint)).label
    if not asked:
        return
    if not found.made:
        log.warning("%s does not say how its rollouts were made; %s not compared", path, ", ".join(asked))
        return
    differing = json_files.differences(json.loads(found.made), json.loads(json.dumps(asked)), sorted(asked))
    require(
        not differing,
        f"{path} has rollouts that were made otherwise ({differing}); leave these out to go on with them, or choose "
        "another --out.",
    )
