"""Go on with a run: everything that gives its parameters a meaning comes from the checkpoint, and `resume_rules`
say which settings may be others than before."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.parallel.config import DistributedConfig
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.discrete import DiscreteHeadConfig
from robovlms_jax.runs import resume_rules, saved
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import from_dict, to_dict
from robovlms_jax.training import checkpoints, items, optimizer, stages
from robovlms_jax.training.config import OptimizerConfig
from robovlms_jax.training.state import TrainState

logger = logging.getLogger(__name__)


class Difference(NamedTuple):
    """A field whose saved value differs from the current one."""

    path: str
    saved: Any
    current: Any

    def __str__(self) -> str:
        saved, current = (text if len(text) <= 80 else text[:77] + "..." for text in (repr(x) for x in self[1:]))
        return f"{self.path}: {saved} in the checkpoint, {current} now"


def differing_fields(saved: Any, current: Any, prefix: str = "") -> list[Difference]:
    """Where two configuration dictionaries differ. Of two kinds of heads only that; lists about whose
    items there are rules are compared by name, where names and order are the same."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        names = sorted({*saved, *current})
        if saved.get("kind") != current.get("kind"):
            names = ["kind"]
        return [
            line
            for name in names
            for line in differing_fields(saved.get(name), current.get(name), f"{prefix}.{name}" if prefix else name)
        ]
    names = _names(saved) if any(rule.covers(f"{prefix}.*.name") for rule in resume_rules.RULES) else []
    if names and names == _names(current):
        pairs = zip(names, saved, current, strict=True)
        return [line for name, was, now in pairs for line in differing_fields(was, now, f"{prefix}.{name}")]
    return [] if saved == current else [Difference(prefix, saved, current)]


def _names(items: Any) -> list[str]:
    """Of a list of dictionaries with names; else none."""
    named = isinstance(items, list) and all(isinstance(item, Mapping) and "name" in item for item in items)
    return [item["name"] for item in items] if named else []


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a run goes on, and what it has to go on with.

    directory: of the step. config: the resolved configuration. assets: the backbone's small files. order: what
    determines the batches to come, by source. stage: number of the stage that made the step, from 0.
    """

    directory: pathlib.Path
    config: ExperimentConfig
    assets: Mapping[str, str]
    order: Mapping[str, Any]
    stage: int = 0

    @property
    def step(self) -> int:
        """Steps made."""
        return int(self.directory.name)


def open_point(run: str | pathlib.Path) -> Point:
    """The newest complete checkpoint of a run; its parameters are not read yet.

    Raises FileNotFoundError, ValueError: there is none, or something in it is missing or damaged.
    """
    directory = checkpoints.resume_point(run)
    config, assets = saved.read_checkpoint(directory)
    position = items.read_position(directory)
    stage = position.get("stage", {}).get("index", 0)  # runs of release 0.1 had one
    return Point(directory, config, assets, position["order"], stage)


def settle(point: Point, config: ExperimentConfig) -> ExperimentConfig:
    """`config` to go on with from `point`: what it leaves to the data is taken from the checkpoint.

    Nothing is opened for it, so that a mistake is told at once. What may change and matters is logged.

    Raises:
      ValueError: settings differ that may not (`RULES`); names each with both values, and what to do.
    """
    config = _fill(point.config, config)
    found = [(difference, resume_rules.rule_of(difference.path)) for difference in _differences(point.config, config)]
    allowed = {"free", "said", "kept"} | ({"order"} if config.train.allow_new_order else set())
    refused = [(difference, rule) for difference, rule in found if rule.kind not in allowed]
    if refused:
        raise ValueError(_refusal(point, refused))
    for difference, rule in found:
        if rule.kind != "free":
            kept = "; the checkpoint's is kept" if rule.kind == "kept" else ""
            logger.warning("resuming with %s%s: %s", difference, kept, rule.reason)
    kept = {difference.path: difference.saved for difference, rule in found if rule.kind == "kept"}
    require_steps(point, config)
    return _replaced(config, kept)


def require_steps(point: Point, config: ExperimentConfig) -> None:
    """Raise ValueError where fewer steps are asked for than were made."""
    if config.train.steps < point.step:
        raise ValueError(
            f"train.steps={config.train.steps} is less than the {point.step} steps that {point.directory} has made, "
            f"and its history is not rewritten. Pass --train.steps {point.step} or more; from an earlier step, start a "
            f"new run with --train.init_from {point.directory.parent}/STEP and another --out."
        )


def _refusal(point: Point, refused: Iterable[tuple[Difference, resume_rules.Rule]]) -> str:
    kinds, lines = set(), []
    for difference, rule in refused:
        kinds.add(rule.kind)
        lines.append(f"  {difference} ({rule.reason})")
    ways = ["pass the checkpoint's values (a resumed run needs the flags that it was started with)"]
    if kinds == {"order"}:
        ways.append("give up going on bit for bit with --train.allow_new_order")
    run = point.directory.parent.parent
    ways.append(f"begin a new stage with these settings: --train.init_from {run} and another --out")
    return (
        f"--train.resume goes on with {point.directory}, and these settings are not its own:\n"
        + "\n".join(lines)
        + "\nEither "
        + ", or ".join(ways)
        + "."
    )


def _differences(saved: ExperimentConfig, current: ExperimentConfig) -> list[Difference]:
    return differing_fields(to_dict(saved), to_dict(current))


def _replaced(config: ExperimentConfig, values: Mapping[str, Any]) -> ExperimentConfig:
    plain = to_dict(config)
    for path, value in values.items():
        *parts, name = path.split(".")
        inner = plain
        for part in parts:
            inner = inner[part]
        inner[name] = value
    return from_dict(ExperimentConfig, plain)


def _fill(saved: ExperimentConfig, config: ExperimentConfig) -> ExperimentConfig:
    """What `config` leaves to the data, as the checkpoint has it. Epochs become steps later, when the data are open."""
    policy, theirs, train, optimizer = config.policy, saved.policy, config.train, config.optimizer
    if policy.robot == robots.CALVIN != theirs.robot:  # the default: as the data say
        policy = dataclasses.replace(policy, robot=theirs.robot, **_bounds_of(policy, theirs))
    if policy.proprio.is_default and not theirs.proprio.is_default and policy.robot != robots.CALVIN:
        told = {"center": theirs.proprio.center, "scale": theirs.proprio.scale}
        policy = dataclasses.replace(policy, proprio=dataclasses.replace(policy.proprio, **told))
    policy = dataclasses.replace(policy, **_bounds_of(policy, theirs))
    if not policy.others:  # left to the data
        policy = dataclasses.replace(policy, others=theirs.others, shared=theirs.shared)
    if isinstance(policy.head, DiscreteHeadConfig) and isinstance(theirs.head, DiscreteHeadConfig):
        edges, end = policy.head.quantile_edges, policy.head.vocab_end
        if policy.head.binning == "quantile" and policy.head.num_bins == theirs.head.num_bins:
            edges = edges or theirs.head.quantile_edges
        head = dataclasses.replace(policy.head, quantile_edges=edges, vocab_end=end or theirs.head.vocab_end)
        policy = dataclasses.replace(policy, head=head)
    if train.epochs:
        train = dataclasses.replace(train, steps=saved.train.steps)
    if optimizer.warmup_epochs:
        warmup = {"warmup_steps": saved.optimizer.warmup_steps, "warmup_epochs": 0.0}
        optimizer = dataclasses.replace(optimizer, **warmup)
    return dataclasses.replace(
        config,
        policy=policy,
        train=train,
        optimizer=optimizer,
        data=dataclasses.replace(config.data, text_length=config.data.text_length or saved.data.text_length),
        distributed=DistributedConfig(),
    )


def _bounds_of(policy: PolicyConfig, theirs: PolicyConfig) -> dict[str, tuple[float, ...]]:
    """The checkpoint's bounds of actions, where `policy` leaves them to the data in the same way."""
    given, default = (policy.action_low, policy.action_high), (PolicyConfig.action_low, PolicyConfig.action_high)
    if policy.action_scaling == theirs.action_scaling != "bounds" and given == default:
        return {"action_low": theirs.action_low, "action_high": theirs.action_high}
    return {}


def restore(
    checkpointer: checkpoints.Checkpointer, point: Point, abstract: TrainState, settings: OptimizerConfig
) -> TrainState:
    """The state that a run goes on from, in the shapes and shardings of `abstract` (`state.abstract`): parameters are
    made nowhere before. Gradients may be clipped, or parameters averaged, from now on or no more, as the stage's
    `settings` say."""
    before = stages.plan(point.config.train, point.config.optimizer)[point.stage].optimizer

    def rewrapped(state: TrainState, before: OptimizerConfig, now: OptimizerConfig) -> TrainState:
        return state.replace(opt_state=optimizer.rewrap(state.opt_state, state.trainable, before=before, now=now))

    restored, _ = checkpointer.restore(rewrapped(abstract, settings, before))
    logger.info("resumed after step %d", int(restored.step))
    return rewrapped(restored, before, settings)


def compare_statistics(policy: PolicyConfig, action: Mapping[str, Any], actions: np.ndarray) -> list[str]:
    """Log, and return, what today's training actions would make otherwise than the checkpoint's, which stays.

    Args:
      policy: the checkpoint's.
      action: statistics, as `PolicyConfig.with_statistics` takes them.
      actions: float[N, A], dataset units.
    """
    today = policy.with_statistics(action)
    said = [
        f"policy.{name} stays {getattr(policy, name)}, and would be {getattr(today, name)}"
        for name in ("action_low", "action_high")
        if not np.allclose(getattr(today, name), getattr(policy, name), rtol=1e-4, atol=1e-6)
    ]
    if isinstance(policy.head, DiscreteHeadConfig) and policy.head.binning == "quantile":
        edges = policy.with_bins(actions).head.quantile_edges
        if not np.allclose(edges, policy.head.quantile_edges, rtol=1e-4, atol=1e-6):
            said.append("policy.head.quantile_edges stay, and would be others")
    if said:
        logger.warning("by today's training actions: %s", "; ".join(said))
    return said
