"""What few_shot, continual and adapt have in common: an experiment's preset to begin with, and how a protocol ends.

What only a run needs is imported by what runs: it takes longer than everything else that --help needs (as launch.py).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robovlms_jax import cli, ending, programs, schema
from robovlms_jax.control import robot as control
from robovlms_jax.envs.calvin.tasks import TASKS
from robovlms_jax.parallel import cpu
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.runs import logs
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.search import queue, space
from robovlms_jax.strategies import protocol, support

logger = logging.getLogger(__name__)

SCALES = (
    *("action_scaling", "action_num_std", "action_low", "action_high", "action_mean", "action_std", "action_mu"),
    *("proprio.center", "proprio.scale", "head.quantile_edges"),
)
"""Fields of `PolicyConfig` that say what numbers of actions and state mean, which other data would give anew."""


def preset(experiment: str, start: str, fixed: Sequence[str], owner: str) -> ExperimentConfig:
    """The preset `start` of a module of `experiments`, with "FIELD=VALUE" texts applied.

    owner: whose settings these are, for messages. Raises ValueError that names the setting.
    """
    try:
        presets = importlib.import_module(f"experiments.{experiment}").PRESETS
    except (ImportError, AttributeError) as error:
        known = {program.module: program for words in programs.present().values() for program in words.values()}
        known = [module for module, program in known.items() if program.settings == "PRESETS"]
        raise ValueError(
            f"{owner}.experiment={experiment!r} is no experiment with presets ({error})"
            f"{schema.nearest(experiment, known)} There are: {', '.join(known)}."
        ) from None
    if start not in presets:
        hint = schema.nearest(start, presets)
        raise ValueError(
            f"{owner}.start={start!r} is no preset of {experiment}{hint} Choose with --start: {', '.join(presets)}."
        )
    found = presets[start]
    if not isinstance(getattr(found, "experiment", found), ExperimentConfig):
        raise ValueError(
            f"{owner}.experiment={experiment!r} trains no policy of its own (its presets are {type(found).__name__}); "
            "name an experiment that does, such as calvin_abcd."
        )
    return cli.read(found, argv=space.flags(space.fixed(fixed, owner)))


def begun_with(base: str, start: ExperimentConfig, fixed: Sequence[str], owner: str) -> ExperimentConfig:
    """The preset with what gives the parameters of the run `base` a meaning: its policy, how its backbone computes, and
    its adapters. What is taken is logged. Of a run for another robot than the preset's data come from, scales and
    cameras are not taken: they mean nothing here.

    Raises:
      FileNotFoundError, ValueError: no such run; `fixed` sets such a field to another value; or PlayTable's pictures
        have another size, which `fixed` does not choose.
    """
    from robovlms_jax.runs import chaining, load

    chosen = space.fixed(fixed, owner)
    found = chaining.differences(load.load_config(base), start)
    there, here = found.pop(chaining.PICTURES, (None, None))
    if there and not {chaining.PICTURES, "demonstrations.image_size"} & set(chosen):
        pixels = " ".join(map(str, there))
        raise ValueError(
            f"{owner}.base={base} learned from PlayTable's pictures of {there[0]} and {there[1]} px (static, wrist), "
            f"and {owner}.start records and asks {here[0]} and {here[1]} px. Choose with {owner}.fixed: "
            f"'{chaining.PICTURES}={pixels}' 'demonstrations.image_size={pixels}' as there, with a data.root for them."
        )
    taken = {name: pair[0] for name, pair in found.items() if name.startswith("backbone.")}
    changed = cli.override(start, **taken, **going_on(base))
    if other := _other_robot(load.load_config(base), start):
        logger.warning("%s is another robot's, so scales and cameras are those of %s.start: %s", base, owner, other)
        policy = dataclasses.replace(changed.policy, robot=start.policy.robot, cameras=start.policy.cameras, others=())
        changed = cli.override(start, **taken, **{"train.init_from": base, "policy": rescaled(policy, start.policy)})
        found.pop("policy.cameras", None)
    scales = tuple(f"policy.{name}" for name in SCALES)
    refused = [
        f"{name}={value(start, name)} (there {value(changed, name)})"
        for name in chosen
        if name.startswith(("policy.", "backbone.")) and name not in scales
        if value(start, name) != value(changed, name)
    ]
    if refused:
        raise ValueError(
            f"{owner}.fixed sets {', '.join(refused)}, and the parameters of {owner}.base={base} go on as they were "
            "learned. Leave these fields out, or name another base."
        )
    seen = {name: pair[0] for name, pair in found.items() if name.startswith("policy.")}
    if taken | seen:
        logger.info("as in %s: %s", base, ", ".join(f"{name} {x}" for name, x in (taken | seen).items()))
    return changed


def _other_robot(earlier: ExperimentConfig, start: ExperimentConfig) -> str:
    """What differs between a run's robot and the one that the preset's data come from; empty: they are the same, or the
    run is older than descriptions of robots."""
    from robovlms_jax.data import opening
    from robovlms_jax.runs import robots

    if earlier.policy.robot == control.CALVIN and earlier.data.dataset != "calvin":
        return ""
    recorded = start.demonstrations.episodes > 0
    robot = control.CALVIN if recorded else opening.open_split(start.data, "training").robot
    try:
        robots.require_same(earlier.policy, robot, "the demonstrations are by")
    except ValueError as error:
        return str(error)
    return ""


def policy_of(base: str | pathlib.Path) -> PolicyConfig:
    """A run's policy, to go on with: its scales stay, and are not taken from new data."""
    from robovlms_jax.runs import load

    return dataclasses.replace(load.load_config(base).policy, action_scaling="bounds")


def going_on(base: str | pathlib.Path) -> dict[str, Any]:
    """Fields of a configuration that begins with a run's parameters, policy and scales."""
    return {"train.init_from": str(base), "policy": policy_of(base), "data.compat_second_norm": False}


def rescaled(policy: PolicyConfig, scales: PolicyConfig) -> PolicyConfig:
    """`policy` with the `SCALES` of another one, or with what that has them measured by."""
    plain = {name: getattr(scales, name) for name in SCALES if "." not in name}
    proprio = dataclasses.replace(policy.proprio, center=scales.proprio.center, scale=scales.proprio.scale)
    head = policy.head
    if hasattr(head, "quantile_edges"):
        alike = getattr(scales.head, "num_bins", 0) == head.num_bins
        head = dataclasses.replace(head, quantile_edges=scales.head.quantile_edges if alike else ())
    return dataclasses.replace(policy, **plain, proprio=proprio, head=head)


def value(config: Any, name: str) -> Any:
    """Of a dotted field."""
    return functools.reduce(getattr, name.split("."), config)


def require_each_once(owner: str, **lists: Sequence[Any]) -> None:
    """Raise ValueError that names the field of `owner` and what it has more than once: its runs would be made twice."""
    for field, values in lists.items():
        twice = sorted({value for value in values if list(values).count(value) > 1})
        schema.require(not twice, f"{owner}.{field} has {twice} more than once.")


def demonstrations(config: ExperimentConfig, tasks: Sequence[str] = ()) -> dict[str, list[tuple[int, int]]]:
    """Task -> the demonstrations of the training split; recorded before, where the preset records them. What can be
    said of the runs without them is said first (`run.require_consistent`).

    tasks: that must be among them.
    """
    from robovlms_jax.data import opening
    from robovlms_jax.runs import closed_loop, run

    run.require_consistent(config)
    if config.demonstrations.episodes:
        support.require_tasks(config.demonstrations.tasks or tuple(TASKS), tasks)
        closed_loop.ensure_demonstrations(config.demonstrations, config.data.root)
    return support.by_task(opening.open_split(config.data, "training").episodes)


def settings_of(config: Any, *aside: str) -> dict[str, Any]:
    """What results depend on, as JSON values: all fields but where they lie."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "report", *aside)}


def trials(config: Any, jobs: Callable[[], Sequence[protocol.Job]]) -> list[queue.Trial]:
    """Run the jobs that `config.out` has no result of; those that there are then.

    With `config.report` none is run, and `jobs`, for which demonstrations may have to be recorded, is not asked.
    Raises ValueError where there is nothing to report of.
    """
    queue.require_out(config.out)
    out = pathlib.Path(config.out)
    return queue.finished(out) if config.report else protocol.work(out, jobs(), settings_of(config))


JUDGES = ("experiments.evaluate", *(f"robovlms_jax.runs.{name}" for name in ("cost", "domains", "fisher")))
"""What is needed when runs of hours have ended. Imported before the first begins: what is missing is told then, and
what changes on disk meanwhile does not matter."""


def main(work: Callable[[Any], pathlib.Path], presets: Mapping[str, Any], default: str, description: str) -> None:
    """The command line of a protocol."""
    logs.to_stderr(libraries=logging.ERROR)
    cpu.keep_freed_memory()
    config = cli.parse(presets, default, description=description)[1]
    from robovlms_jax.runs import run

    for module in JUDGES:
        importlib.import_module(module)
    try:
        path = work(config)
    except KeyboardInterrupt:
        ending.stop("finished trials are kept, and the same command goes on where it was.")
    except run.ERRORS as error:
        sys.exit(f"error: {error}")
    ending.show(f"report: {path}")
