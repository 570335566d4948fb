"""Speed of the embedded play table.   python -m benchmarks.simulator

Steps a batch of tables with experts' actions and renders both cameras of each after every step, all on one device, and
prints JSON. On a CPU pin the process to one core to get numbers per core:
`taskset -c 0 python -m benchmarks.simulator`. On a busy machine the rates `per_cpu_s`, per second of the process's own
computing time, say what the core could do alone; the others are per second of the clock. Both are medians.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, starts
from robovlms_jax import cli, cores
from robovlms_jax.envs.calvin import walking
from robovlms_jax.playtable import env
from robovlms_jax.playtable.experts import plans, waypoints
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.scene import DRAWER, SCENES, stack_scenes

CALVIN_RENDERED_STEPS_PER_S = 18.7
"""The real environment with its CPU renderer at 200/84 px, both cameras, one core of a small machine."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Time batches of tables."""

    tables: tuple[int, ...] = (1, 16, 256)
    """Batch sizes; each is measured by itself."""
    large: bool = False
    """Also 4096 tables; always done on an accelerator. Not rendered on a CPU, where it would take minutes."""
    sizes: tuple[tuple[int, int], ...] = ((200, 84), (96, 64))
    """Pixels of the static and the wrist picture."""
    seconds: float = 3.0
    """Least time to spend on each number."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""

    def __post_init__(self):
        if not self.tables or min(self.tables) < 1 or self.seconds <= 0:
            raise ValueError(f"tables={self.tables} and seconds={self.seconds} must be positive.")


def main(args: Args) -> None:
    """Print the result as JSON."""
    large = args.large or jax.default_backend() != "cpu"
    counts = dict.fromkeys([*args.tables, *([4096] if large else [])])
    result = {
        "tables": {},
        "calvin_rendered_steps_per_s": CALVIN_RENDERED_STEPS_PER_S,
        "usable_cores": cores.usable(),
        "settings": {name: value for name, value in dataclasses.asdict(args).items() if name != "out"},
    }
    for count in counts:
        result["tables"][str(count)] = measure(count, args)
        if args.out is not None:  # what is measured is kept, whatever becomes of the rest
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    machine.report(result, args.out)


def measure(count: int, args: Args) -> dict[str, Any]:
    """Steps and rendered steps per second of `count` tables together, scenes A to D in turn."""
    scenes = stack_scenes(SCENES)
    which = jnp.arange(count) % len(SCENES)
    robot, table = jax.jit(jax.vmap(lambda i, key: starts.sample(env.pick(scenes, i), key)))(
        which, jax.random.split(jax.random.key(0), count)
    )
    each = env.pick(scenes, which)
    states = env.reset_batch(each, robot, table)
    # real work: every table opens or closes its drawer
    routes, act = _experts(scenes, which, states)
    progress = jax.tree.map(lambda x: jnp.broadcast_to(x, (count,)), waypoints.begin())

    def advance(carry):
        states, progress = carry
        actions, progress = act(routes, progress, states)
        return env.step_batch(each, states, actions), progress

    begin = time.perf_counter()
    jax.block_until_ready(advance((states, progress)))
    compile_seconds = time.perf_counter() - begin
    result: dict[str, Any] = {"first_step_seconds": compile_seconds}
    result["steps"] = _rates(count, advance, (states, progress), args.seconds)
    if jax.default_backend() == "cpu" and count > 1024:
        return result
    for sizes in args.sizes:
        backdrops = env.backdrops(scenes, sizes[0])

        def advance_and_look(carry, sizes=sizes, backdrops=backdrops):
            carry = advance(carry[:2])
            looks = (
                env.render_batch(scenes, which, carry[0], camera, size, backdrops, jax.default_backend())
                for camera, size in zip(("static", "wrist"), sizes)
            )
            return (*carry, *looks)

        rates = _rates(count, advance_and_look, (states, progress), args.seconds)
        times = {f"times_calvin_{unit}": rate / CALVIN_RENDERED_STEPS_PER_S for unit, rate in rates.items()}
        result[f"rendered_steps_{sizes[0]}_{sizes[1]}"] = rates | times
    return result


def _experts(scenes: Any, which: jax.Array, states: bodies.State) -> tuple[walking.Plan, Callable]:
    shut, pull = (plans.TASKS.index(name) for name in ("close_drawer", "open_drawer"))

    def plan(i, state, key):
        scene = env.pick(scenes, i)
        return plans.plan(scene, state, jnp.where(state.mechanisms[DRAWER] > 0, shut, pull), key)

    keys = jax.random.split(jax.random.key(1), len(which))
    return jax.jit(jax.vmap(plan))(which, states, keys), jax.jit(jax.vmap(waypoints.act))


def _rates(count: int, advance: Callable[[Any], Any], carry: Any, least_seconds: float) -> dict[str, float]:
    """Tables per second of the clock and of computing time; each call starts from the result of the last."""
    carry = jax.block_until_ready(advance(carry))
    clock, computing, begin = [], [], time.perf_counter()
    while len(clock) < 3 or time.perf_counter() - begin < least_seconds:
        start, start_computing = time.perf_counter(), time.process_time()
        carry = jax.block_until_ready(advance(carry))
        clock.append(time.perf_counter() - start)
        computing.append(time.process_time() - start_computing)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(carry[0]))
    return {"per_s": count / statistics.median(clock), "per_cpu_s": count / statistics.median(computing)}


if __name__ == "__main__":
    main(cli.read(Args))
