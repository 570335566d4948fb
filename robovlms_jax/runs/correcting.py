"""Corrections: an expert takes over where a policy has got to, recorded as demonstrations that training reads."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from typing import Any, Literal

import jax
import numpy as np

from robovlms_jax import bars, schema
from robovlms_jax.control import robot as robot_specs
from robovlms_jax.control.execution import ExecutedBatch
from robovlms_jax.envs.calvin import adapter
from robovlms_jax.playtable import demonstrations, splits, takeovers
from robovlms_jax.playtable.real import leading
from robovlms_jax.playtable.real import recording as real_recording
from robovlms_jax.rl import segments
from robovlms_jax.rl.config import BehaviourConfig
from robovlms_jax.runs import load, played, robots, trying
from robovlms_jax.schema import require
from robovlms_jax.training import checkpoints, seals
from robovlms_jax.training.directory import claim

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
@schema.checked("correct")
class CorrectionConfig:
    """Whose states are corrected, and how often."""

    checkpoint: str = ""
    """A policy that drives PlayTable: a run directory or one of its checkpoints/<step> folders."""
    out: str = "data/corrections"
    """Directory to make: a training split as demonstrations have it (data.further.roots)."""
    record: trying.TryingConfig = trying.TryingConfig(count=400, behaviour=BehaviourConfig(spread=(0.05,)))
    """The policy's rollouts."""
    takeovers: int = 2
    """For each rollout, at control steps that are drawn."""
    of: Literal["failed", "all"] = "failed"
    """Rollouts that are taken over. An expert makes a new plan, which begins by moving the hand out of the way; shown
    where a policy had a handle already, it teaches to let go of it (docs/reinforcement.md)."""
    max_steps: int = 0
    """Control steps that an expert may take; 0: as in the checkpoint's own rollouts or demonstrations."""
    pack: bool = True
    """Write the packed layout (data/README.md) instead of one npz per frame."""
    seed: int = 0

    def __post_init__(self):
        require(self.takeovers >= 1, f"correct.takeovers={self.takeovers} must be at least 1.")
        for field in ("max_steps", "seed"):
            require(getattr(self, field) >= 0, f"correct.{field}={getattr(self, field)} must not be negative.")


def record(config: CorrectionConfig) -> dict[str, int]:
    """Roll the policy out, take over, write what experts did. A call that was stopped goes on.

    Returns takeovers attempted, recorded, and frames.
    Raises:
      ValueError, OSError: as `trying.record` and `playtable.recording.record`.
    """
    require(config.checkpoint != "", "correct.checkpoint is empty; name the policy whose states are corrected.")
    trained = load.load_config(config.checkpoint)
    config = played.filled(config, trained, ("max_steps",))
    config = dataclasses.replace(config, record=trying.resolved(config.record, trained))
    trying.require_possible(config.record, trained.policy)
    out = pathlib.Path(config.out)
    settings = json.loads(json.dumps(schema.to_dict(config)))
    settings = {name: value for name, value in settings.items() if name not in ("out", "checkpoint")}
    settings["identity"] = seals.identity(checkpoints.locate(config.checkpoint)).label
    path = splits.directory(out, "training") / segments.FILE

    def play(numbers: list[int], bar: bars.Bar) -> splits.Chains:
        if not path.exists():
            trying.record(config.checkpoint, config.record).save(path)
        found = segments.load(path)
        renderer = demonstrations.Renderer(found.kinds, config.record.image_size)
        taken = takeovers.Takeovers(
            renderer.scenes,
            cases(found, config),
            tables=config.record.tables,
            max_steps=config.max_steps,
            seed=config.seed,
        )
        taken.numbers = numbers
        taken.watch = lambda steps: bar.say(f"{steps} steps simulated")
        return demonstrations.rendered(taken, renderer)

    splits.require_ours(out)
    with claim(out):
        sentences = splits.own_sentences(held_out=False)
        journal = splits.Journal(path.parent, settings, sentences)
        count = config.record.count * config.takeovers
        size = config.record.image_size
        splits.record(journal, out / "training", count, size, play, pack=config.pack, unit="takeover")
        return journal.counts()


def record_real(config: real_recording.RealRecordConfig) -> dict[str, int]:
    """`real_recording.record`, with the policy that `config.checkpoint` names, executed as in its own rollouts.

    Raises as that, and ValueError, OSError: there is no such checkpoint, or it is for another robot than CALVIN's.
    """
    directory = checkpoints.locate(config.checkpoint, strict=True)
    adapter.find_checkout(config.calvin_root)
    splits.require_ours(pathlib.Path(config.out))
    trained = load.load_config(directory)
    robots.require_same(trained.policy, robot_specs.CALVIN, "the simulator is driven as")
    execution = trained.rollouts.execution
    execution.require(trained.policy.robot)

    def policy() -> ExecutedBatch:
        log.info("loading the policy of %s; its first look compiles it", directory)
        return ExecutedBatch(load.load_batched_policy(directory, config.processes, weights=config.weights), execution)

    label = seals.identity(directory).label
    leader = leading.Leader(policy, slots=config.processes, steps=config.lead_steps, label=label)
    try:
        return real_recording.record(config, leader)
    finally:
        log.info("of %d tasks that the policy began it did %d itself", leader.asked, leader.done)


def cases(found: segments.Rollouts, config: CorrectionConfig) -> list[takeovers.Case]:
    """`takeovers` for every rollout there is, of those that are taken over in turn, at steps that are drawn without the
    last, after which it was over. Raises ValueError where none failed."""
    rows = np.flatnonzero(~np.asarray(found.success)) if config.of == "failed" else np.arange(len(found))
    require(
        len(rows) > 0,
        f"all {len(found)} rollouts did their tasks: there is nothing to correct. Record more (correct.record.count), "
        "with more noise (correct.record.behaviour.spread), or take over anywhere (correct.of all), in another --out.",
    )
    out = []
    for number in range(len(found) * config.takeovers):
        row = int(rows[number % len(rows)])
        first = int(found.offsets[row])
        step = int(np.random.default_rng([config.seed, number]).integers(found.steps(row)))
        at: list[Any] = [jax.tree.map(lambda x, i=i: x[i], found.states) for i in (first + step, first)]
        out.append(takeovers.Case(found.kinds.index(found.scenes[row]), found.tasks[row], *at))
    return out
