"""Do mirrored samples help a base that is told left or right?   python -m benchmarks.mirror --out searches/mirror

Policies of the driving simulator (docs/navigation.md) learn from a few of the expert's drives, without odometry, whose
mirror image is not described: drives to both sides, or the same number to the left alone; as recorded, or with half of
the samples mirrored (`data.augment.mirror`). Each is driven without a safety layer, as often to the left as to the
right, in rooms and words of its own. Goes on where it was stopped; prints JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
from typing import Any

from benchmarks import machine
from experiments import navigation, protocols
from robovlms_jax import cli
from robovlms_jax.driving.config import DrivesConfig, RecordingConfig
from robovlms_jax.runs import driving, load, logs
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.search import queue, report, space
from robovlms_jax.strategies import protocol, support
from robovlms_jax.training import checkpoints, seals

SIDES = ("left", "right")


@dataclasses.dataclass(frozen=True)
class Args:
    """Train and drive policies with and without mirrored samples."""

    out: pathlib.Path = pathlib.Path("searches/mirror")
    """Folder of the runs."""
    root: str = "data/navigation_few"
    """Drives, recorded there before unless they are there."""
    recorded: int = 96
    """Drives to draw from; scenarios take turns."""
    drives: int = 24
    """Drives that each policy learns from."""
    shares: tuple[float, ...] = (0.0, 0.5)
    """Of mirrored samples."""
    seeds: int = 3
    """Of parameters, order of batches and the draw of drives."""
    steps: int = 1200
    """Optimizer steps of 32 windows."""
    trials: int = 80
    """Drives that each policy is asked for, a quarter of each kind of room."""
    fixed: tuple[str, ...] = ()
    """Further fields, "train.compilation_cache=DIR"."""


def jobs(args: Args) -> list[protocol.Job]:
    """Both sides or the left alone, each share, each seed."""
    recording = RecordingConfig(episodes=args.recorded, validation_episodes=16)
    driving.ensure_recorded(recording, args.root)
    start = navigation.worded(cli.override(navigation.SMALL, **{"data.root": args.root})).experiment
    start = cli.read(start, argv=space.flags(space.fixed(args.fixed, "mirror")))
    available = protocols.demonstrations(start)
    found = []
    for seed in range(args.seeds):
        for shown in ("both sides", "left alone"):
            tasks = sorted(task for task in available if shown == "both sides" or task.endswith("_left"))
            drawn = support.draw(available, tasks, args.drives // len(tasks), seed)
            listed = support.write(args.out / "support" / f"{shown.replace(' ', '_')}_{seed}.json", drawn)
            for share in args.shares:
                config = functools.partial(_configured, start, args.steps, seed, listed, share)
                judge = functools.partial(_driven, args.trials)
                found.append(protocol.Job({"drives": shown, "mirror": f"{share:g}"}, seed, config, judge))
    return found


def _configured(
    start: ExperimentConfig, steps: int, seed: int, listed: str, share: float, base: pathlib.Path | None
) -> ExperimentConfig:
    return cli.override(
        start,
        **{
            "policy.proprio.enabled": False,
            "data.episode_list": listed,
            "data.augment.mirror": share,
            "train.seed": seed,
            "train.steps": steps,
            "train.batch_size": 32,
            "train.checkpoint_every": steps,
            "optimizer.warmup_steps": min(start.optimizer.warmup_steps, steps // 10),
            "evaluation.batches": 2,
            "evaluation.episodes": 0,
        },
    )


def _driven(trials: int, run: pathlib.Path) -> dict[str, Any]:
    """ "value": success over all; "left", "right": of the drives that were told so."""
    config = DrivesConfig(trials=trials, rooms=trials)
    policy = load.load_batched_policy(run, trials)
    identity = seals.identity(checkpoints.locate(run)).label
    found = driving.drive(policy, config, run / "drives", identity).results

    def share(side: str) -> float:
        chosen = [result.success[0] for result in found if result.tasks[0].endswith(side)]
        return sum(chosen) / len(chosen)

    success, free = driving.Drives("bare", "", found).rates()
    sides = {side: share(f"_{side}") for side in SIDES}
    return {"value": success.value, "free": free.value, "trials": success.attempts, **sides}


def rows(args: Args, trials: list[queue.Trial]) -> list[dict[str, Any]]:
    """A record per variant: of each seed, with mean and half of an interval of 95 %."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for trial in trials:
        if trial.status != "done":
            continue
        result = protocol.result(args.out, trial.number)
        row = found.setdefault(tuple(trial.setting.values()), {**trial.setting, "trials_each": result["trials"]})
        for name, field in (("success", "value"), *((side, side) for side in SIDES), ("no_collision", "free")):
            row.setdefault(name, []).append(round(result[field], 4))
    for row in found.values():
        for name in ("success", *SIDES):
            row[f"{name}_mean"] = round(sum(row[name]) / len(row[name]), 4)
            if len(row[name]) > 1:
                row[f"{name}_half_width"] = round(report.half_width_of(row[name]), 4)
    return list(found.values())


def main(args: Args) -> None:
    names = ("recorded", "drives", "shares", "seeds", "steps", "trials")
    settings = {name: getattr(args, name) for name in names}
    trials = protocol.work(args.out, jobs(args), settings)
    print(json.dumps({"machine": machine.describe(), "settings": settings, "rows": rows(args, trials)}, indent=1))


if __name__ == "__main__":
    logs.to_stderr(libraries=logging.ERROR)
    main(cli.read(Args))
