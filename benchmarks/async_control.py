"""Asynchronous control on PlayTable: success and jerk by how a late policy is driven.

    python -m benchmarks.async_control --checkpoint runs/playtable_fixtures

Every trial is run with answers that come 0 to 400 ms late, on the simulator's clock. All ways but the event-triggered
ones ask for a chunk every `horizon` ticks, so they differ in nothing else. Prints JSON.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import machine
from robovlms_jax import cli
from robovlms_jax.control.asynchronous import AsyncConfig
from robovlms_jax.control.delayed import AsynchronousBatch
from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.evaluation import chains, rollout
from robovlms_jax.evaluation.rollout_metrics import Rate
from robovlms_jax.load import load_batched_policy
from robovlms_jax.playtable.env import PlayTables
from robovlms_jax.runs.load import load_config

RATE_HZ, METRES = 30.0, 0.02
WAYS = ("wait", "switch", "blend", "event", "roll_forward", "vjp", "identity", "prefix")
"""wait: synchronous. switch: naive asynchronous. vjp, identity, prefix: real-time chunking, flow heads only."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Drive a checkpoint that answers late."""

    checkpoint: str
    """Run directory of a policy for PlayTable's fixtures, with chunks of at least `horizon` and the largest delay."""
    ways: tuple[str, ...] = ("wait", "switch", "blend", "event", "roll_forward")
    delays_ms: tuple[int, ...] = (0, 100, 200, 400)
    horizon: int = 12
    """Ticks between two questions."""
    trials: int = 80
    """Single tasks, taking turns, from random states; the same for every way and delay."""
    tables: int = 40
    max_steps: int = 160
    uncertainty: float = 0.0
    """Way event: ask early where a coming action's uncertainty is above this; 0: by queue and picture alone."""
    picture_change: float = 0.15
    """Way event: ask early where a picture changed by more than this."""
    num_samples: int = 0
    """Flow heads: chunks drawn for the uncertainty."""
    seed: int = 0
    """Of the resampling for intervals."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file, after every measurement."""

    def __post_init__(self):
        unknown = sorted(set(self.ways) - set(WAYS))
        if unknown:
            raise ValueError(f"ways has unknown {unknown}; known: {', '.join(WAYS)}.")
        if min(self.horizon, self.trials, self.tables, self.max_steps) < 1 or min(self.delays_ms, default=-1) < 0:
            raise ValueError(
                "horizon, trials, tables and max_steps must be positive, delays_ms 0 or more, at least one."
            )


class Recorded:
    """PlayTables that remember the translations each slot executed. episodes: one list per episode."""

    def __init__(self, tables: PlayTables):
        self._tables = tables
        self.name, self.size, self.about, self.robot = tables.name, tables.size, tables.about, tables.robot
        self.infos, self.observe, self.restart = tables.infos, tables.observe, tables.restart
        self.episodes: list[list[np.ndarray]] = []
        self._under_way: dict[int, list[np.ndarray]] = {}

    def reset(self, slots: Sequence[int], starts: Sequence[Any]) -> list[Any]:
        for slot in slots:
            self._under_way[slot] = []
            self.episodes.append(self._under_way[slot])
        return self._tables.reset(slots, starts)

    def step(self, slots: Sequence[int], actions: np.ndarray) -> list[Any]:
        for slot, action in zip(slots, actions, strict=True):
            self._under_way[slot].append(np.array(action[:3]))
        return self._tables.step(slots, actions)


def way_config(way: str, delay: int, args: Args) -> AsyncConfig:
    """How the policy is driven; `delay` in ticks is known, as it is after the first answers."""
    common = {"delay": delay, "ask_below": max(args.horizon - delay, 0)}
    if way == "event":
        events = {"picture_change": args.picture_change, "uncertainty": args.uncertainty, "min_interval": 4}
        return AsyncConfig("switch", delay=delay, **events)
    if way in ("vjp", "identity", "prefix"):
        return AsyncConfig("freeze", tell=True, **common)
    if way == "roll_forward":
        return AsyncConfig("freeze", roll_forward=True, **common)
    return AsyncConfig(way, **common)


def jerk(translations: list[np.ndarray]) -> float:
    """Root mean square of the commanded jerk in m/s^3; nan for fewer than three actions."""
    if len(translations) < 3:
        return math.nan
    velocity = np.array(translations) * METRES * RATE_HZ
    return float(np.sqrt(np.square(np.diff(velocity, 2, axis=0)).sum(-1).mean())) * RATE_HZ**2


def mean_interval(values: np.ndarray, seed: int) -> dict[str, float]:
    """Mean and its 95 % interval by resampling trials."""
    values = values[~np.isnan(values)]
    if not len(values):
        return {"mean": math.nan, "low": math.nan, "high": math.nan}
    draws = np.random.default_rng(seed).choice(values, (2000, len(values))).mean(1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


class Counted:
    """A policy that counts how often it is asked."""

    def __init__(self, policy: Any):
        self._policy, self.robot, self.asked = policy, policy.robot, 0

    def reset(self, slots: Sequence[int], instructions: Sequence[str]) -> None:
        self._policy.reset(slots, instructions)

    def act(self, observations: Sequence[Observation], slots: Sequence[int]) -> list[ActionChunk]:
        self.asked += len(slots)
        return self._policy.act(observations, slots)


def measure(policy: Any, way: str, delay_ms: int, args: Args, tasks: tuple[str, ...], sizes: tuple[int, int]) -> dict:
    """One cell of the table."""
    delay = math.ceil(delay_ms / 1000 * RATE_HZ - 1e-9)
    static, wrist = sizes
    envs = Recorded(PlayTables("D", min(args.tables, args.trials), image_sizes={"static": static, "wrist": wrist}))
    counted = Counted(policy)
    driven = AsynchronousBatch(counted, way_config(way, delay, args), delay)
    trials = chains.chain_trials(chains.single_tasks(tasks, args.trials), scene="D")
    begin = time.perf_counter()
    results = list(rollout.run(driven, envs, trials, rollout.SuccessCriterion(max_steps=args.max_steps)))
    won = np.array([result.success[0] for result in results])
    steps = np.array([result.steps[0] for result in results], float)
    rate = Rate(int(won.sum()), len(won))
    ticks = sum(map(len, envs.episodes))
    counts: collections.Counter[str] = driven.counts
    return {
        "success": {"mean": rate.value, "low": rate.interval[0], "high": rate.interval[1]},
        "jerk_m_s3": mean_interval(np.array([jerk(episode) for episode in envs.episodes]), args.seed),
        "seconds_of_successes": mean_interval(steps[won] / RATE_HZ, args.seed),
        "asked_per_100_ticks": 100 * counted.asked / ticks,
        "held_share": counts["held"] / max(counts["ticks"], 1),
        "mean_age_ticks": counts["age"] / max(counts["ticks"] - counts["held"], 1),
        "trials": len(won),
        "clock_seconds": time.perf_counter() - begin,
    }


def main(args: Args) -> None:
    """Print the result as JSON."""
    logging.getLogger("robovlms_jax").setLevel(logging.ERROR)
    experiment = load_config(args.checkpoint)
    if experiment.policy.chunk < args.horizon + math.ceil(max(args.delays_ms) / 1000 * RATE_HZ - 1e-9):
        raise ValueError(
            f"chunks of {experiment.policy.chunk} actions do not cover horizon={args.horizon} and the delay."
        )
    result: dict[str, Any] = {"settings": {k: v for k, v in dataclasses.asdict(args).items() if k != "out"}, "ways": {}}
    result["policy"] = {"head": type(experiment.policy.head).__name__, "chunk": experiment.policy.chunk}
    rollouts = experiment.rollouts
    slots = min(args.tables, args.trials)
    for way in args.ways:
        head: dict[str, Any] = {"num_samples": args.num_samples} if args.num_samples and way == "event" else {}
        if way in ("vjp", "identity", "prefix"):
            head["guidance"] = way
        policy = load_batched_policy(args.checkpoint, slots, policy={"head": head} if head else None)
        cells = result["ways"].setdefault(way, {})
        for delay_ms in args.delays_ms:
            cells[str(delay_ms)] = measure(policy, way, delay_ms, args, rollouts.tasks, rollouts.image_size)
            if args.out is not None:
                args.out.write_text(json.dumps(result, indent=2) + "\n")
    machine.report(result, args.out)


if __name__ == "__main__":
    main(cli.read(Args))
