"""Decisions per second of a policy on PlayTable: the host's loop against one program.   python -m benchmarks.rollouts

Both play the same trials with the same policy, one after the other in turns, so that load from elsewhere meets both: a
policy's look at its two pictures, the chunk it decides on, and the control steps that are executed of it. `host` is
`evaluation.rollout` with `BatchedVLAPolicy` and `PlayTables`; `device` is `rl.rollouts.Player`, one `lax.scan`. The
policy is the twin of the default preset with random parameters, or a checkpoint's. Nobody succeeds in `max_steps`, so
all tables stay busy, and only whole trials are counted. Prints JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from benchmarks import machine
from experiments import calvin_abcd
from robovlms_jax import cli
from robovlms_jax.control.execution import ExecutedBatch, Execution
from robovlms_jax.evaluation import chains, rollout
from robovlms_jax.parallel import cpu
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.playtable.env import PlayTables
from robovlms_jax.policies.serving import BatchedVLAPolicy
from robovlms_jax.rl import rollouts
from robovlms_jax.runs import build, load


@dataclasses.dataclass(frozen=True)
class Args:
    """Time rollouts of a policy."""

    tables: tuple[int, ...] = (1, 16)
    """Side by side; each number is measured by itself."""
    checkpoint: str = ""
    """A run on PlayTable; empty: the default preset's policy, not trained."""
    image_size: tuple[int, int] = (96, 64)
    """Pixels of the static and the wrist picture."""
    horizon: int = 5
    """Actions executed per decision."""
    max_steps: int = 40
    """Control steps of every trial."""
    devices: int = 1
    """CPU devices that the tables of `device` are split over, each a program of its own; useful up to a core each."""
    repeats: int = 3
    """Measurements of either, in turns; the fastest counts, all are kept."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""

    def __post_init__(self):
        numbers = (*self.tables, *self.image_size, self.horizon, self.max_steps, self.devices, self.repeats)
        if not self.tables or min(numbers) < 1:
            raise ValueError("tables, image_size, horizon, max_steps, devices and repeats must be positive.")


def main(args: Args) -> None:
    """Print the result as JSON."""
    cpu.keep_freed_memory()
    if args.devices > 1:
        jax.config.update("jax_num_cpu_devices", args.devices)
    model, params, encode = _policy(args.checkpoint)
    sizes = dict(zip(("static", "wrist"), args.image_size, strict=True))
    execution, criterion = Execution("receding", horizon=args.horizon), rollout.SuccessCriterion(args.max_steps)
    found: dict[str, Any] = {}
    for count in args.tables:
        trials = chains.chain_trials(chains.single_tasks(("lift_red_block_table",), count))
        player = rollouts.Player(model, encode, count, sizes, execution, criterion, jax.devices()[: args.devices])
        envs, policy = PlayTables("D", count, image_sizes=sizes), BatchedVLAPolicy(model, params, encode, slots=count)
        executed = ExecutedBatch(policy, execution)
        host = functools.partial(rollout.run, executed, envs, trials, criterion)
        found[str(count)] = _measured(
            {"host": host, "device": functools.partial(player.results, params, trials)}, args.horizon, args.repeats
        )
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name != "out"}
    machine.report({"tables": found, "settings": settings, "parameters": build.count(params)}, args.out)


def _measured(
    ways: dict[str, Callable[[], Iterable[rollout.TrialResult]]], horizon: int, repeats: int
) -> dict[str, Any]:
    """Name -> decisions/s, of the fastest run and of each; and how many times the first the second is."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Any] = {}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            begin = time.perf_counter()
            decisions = sum(-(-result.steps[0] // horizon) for result in run())
            took = time.perf_counter() - begin
            if turn:
                rates[name].append(decisions / took)
            else:
                found[f"{name}_first_seconds"] = took  # most of it compiling
    found |= {f"{name}_decisions_per_s": max(each) for name, each in rates.items()}
    found |= {f"{name}_all": each for name, each in rates.items()}
    first, second = ways
    return found | {"ratio": max(rates[second]) / max(rates[first])}


def _policy(checkpoint: str) -> tuple[Any, Any, Any]:
    """Model, parameters, and what encodes instructions."""
    if checkpoint:
        return load.open_model(checkpoint)
    config = calvin_abcd.FIXTURES
    backbone = build.open_backbone(config.backbone, ["lift the red block"])
    model = build.make_model(config, backbone.vlm)
    params = build.init_params(model, meshes.make_mesh((1, 1, 1), jax.devices()[:1]), 0, backbone)
    return model, params, lambda text: (np.arange(4, 12, dtype=np.int32), np.ones(8, bool))


if __name__ == "__main__":
    main(cli.read(Args))
