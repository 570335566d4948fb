"""Closed-loop control steps per second, by environments side by side.   python -m benchmarks.evaluation

Runs the loop behind every rollout (`evaluation.rollout`) on PlayTable with a policy that costs nothing, so that the
simulator, its pictures and the loop are what is timed; a real policy's time (`benchmarks.policy_step`) comes on top.
`tables` are tables in one jitted call; `processes` are simulators in processes of their own, as CALVIN needs them, here
with one PlayTable each. Prints JSON; rates are per second of the clock.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import machine
from robovlms_jax import cli, cores
from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.envs import process, vector
from robovlms_jax.envs.calvin import task_chains
from robovlms_jax.evaluation import chains, rollout
from robovlms_jax.playtable.env import PlayTables


@dataclasses.dataclass(frozen=True)
class Args:
    """Time rollouts."""

    tables: tuple[int, ...] = (1, 4, 16)
    """Tables in one jitted call; each number is measured by itself."""
    processes: tuple[int, ...] = (1, 2)
    """Simulator processes; each number is measured by itself."""
    chunks: tuple[int, ...] = (1, 10)
    """Actions executed per request, so per picture."""
    image_size: tuple[int, int] = (96, 64)
    """Pixels of the static and the wrist picture."""
    steps: int = 100
    """Control steps of every environment per measurement."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file, after every measurement."""

    def __post_init__(self):
        if min((*self.tables, *self.processes, *self.chunks, *self.image_size, self.steps), default=0) < 1:
            raise ValueError("tables, processes, chunks, image_size and steps must be positive.")
        if not self.chunks:
            raise ValueError("chunks must name at least one number.")


class Idle:
    """A batched policy that sways the open hand: `chunk` actions per request, at no cost."""

    def __init__(self, chunk: int):
        self._actions = np.tile(np.array([0.2, 0, 0, 0, 0, 0, 1], np.float32), (chunk, 1))

    def reset(self, slots: Sequence[int], instructions: Sequence[str]) -> None:
        """Nothing is remembered."""

    def act(self, observations: Sequence[Observation], slots: Sequence[int]) -> list[ActionChunk]:
        self._actions[:, 0] *= -1
        return [ActionChunk(self._actions) for _ in slots]


def main(args: Args) -> None:
    """Print the result as JSON."""
    static, wrist = args.image_size
    sizes = {"static": static, "wrist": wrist}
    result: dict[str, Any] = {"tables": {}, "processes": {}, "usable_cores": cores.usable()}
    result["settings"] = {name: value for name, value in dataclasses.asdict(args).items() if name != "out"}

    def keep(kind: str, count: int, envs: vector.VectorEnv) -> None:
        result[kind][str(count)] = {f"chunk_{chunk}": _measure(envs, chunk, args.steps) for chunk in args.chunks}
        if args.out is not None:
            args.out.write_text(json.dumps(result, indent=2) + "\n")

    for count in args.tables:
        keep("tables", count, PlayTables("D", count, image_sizes=sizes))
    for count in args.processes:
        workers = []
        try:
            for _ in range(count):
                factory = "robovlms_jax.playtable.env:PlayTable"
                kwargs = {"scene": "D", "image_sizes": sizes}
                workers.append(process.ProcessEnv(factory, kwargs, timeout_s=600, start_timeout_s=600))
            keep("processes", count, vector.EnvPool(workers))
        finally:
            for worker in workers:
                worker.close()
    machine.report(result, args.out)


def _measure(envs: vector.VectorEnv, chunk: int, steps: int) -> dict[str, float]:
    """Control steps of all environments per second, and the seconds before, most of them compiling."""
    seconds = {}
    for name, length in (("warm_up", chunk + 1), ("measured", steps)):
        chosen = task_chains.official_chains()[: envs.size]
        # one task that an idle hand never does, so that every environment takes all the steps
        trials = [
            dataclasses.replace(t, tasks=t.tasks[:1], instructions=t.instructions[:1])
            for t in chains.chain_trials(chosen)
        ]
        begin = time.perf_counter()
        results = list(rollout.run(Idle(chunk), envs, trials, rollout.SuccessCriterion(max_steps=length)))
        seconds[name] = time.perf_counter() - begin
        assert [r.steps for r in results] == [(length,)] * envs.size
    return {"steps_per_s": envs.size * steps / seconds["measured"], "warm_up_seconds": seconds["warm_up"]}


if __name__ == "__main__":
    main(cli.read(Args))
