"""What the compiler options for CPUs are worth.   python -m benchmarks.cpu_options

The training step of KOSMOS-2's twin and PlayTable's step, each compiled as XLA would by itself and with the options of
`parallel.cpu` that it has in earnest; both programs lie in one process and take turns.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, workload
from robovlms_jax import cli
from robovlms_jax.envs.calvin import initial_states, task_chains
from robovlms_jax.parallel import cpu
from robovlms_jax.playtable import env
from robovlms_jax.playtable.mechanics import bodies, physics
from robovlms_jax.playtable.scene import stack_scenes


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure on this processor."""

    backbone: str = "kosmos-2-twin"
    batch_size: int = 64
    """Windows of one frame per training step."""
    tables: tuple[int, ...] = (1, 40, 256)
    """Tables that step together, one after the other."""
    steps: int = 20
    """Steps of a turn."""
    rounds: int = 8
    """Turns of each program; their medians are compared."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""

    def __post_init__(self):
        if min(self.batch_size, self.steps, self.rounds, *self.tables) < 1:
            raise ValueError("batch_size, steps, rounds and tables must be positive.")


def main(args: Args) -> None:
    """Print the result as JSON. Raises RuntimeError where there are no such options."""
    cpu.keep_freed_memory()
    if cpu.options("small_kernels", cpu.default_platform()) is None:
        raise RuntimeError("nothing to compare: this needs a CPU and an XLA that knows the options of parallel.cpu.")
    result: dict[str, Any] = {"training_step": _training(args)}
    result["tables_step"] = {str(count): _tables(args, count) for count in args.tables}
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name != "out"}
    machine.report({**result, "settings": settings}, args.out)


def _training(args: Args) -> dict[str, Any]:
    config = workload.experiment("small", batch_size=args.batch_size, backbone=args.backbone)
    train_step, _, train_state, batch = workload.training_step(config)
    program = jax.jit(train_step.__wrapped__, donate_argnums=0)  # without its own options
    return _compared(args, program, train_state, (batch,), "small_kernels")


def _tables(args: Args, count: int) -> dict[str, Any]:
    scenes = stack_scenes([*"ABCD"] * (count // 4) + [*"ABCD"][: count % 4])
    robot, table = initial_states.initial_state(task_chains.official_chains()[0].condition, "D")
    states = env.reset_batch(scenes, np.tile(robot, (count, 1)), np.tile(table, (count, 1)))
    actions = np.random.default_rng(0).uniform(-1, 1, (count, 7)).astype(np.float32)

    def step(states: bodies.State, scenes: Any, actions: Any) -> tuple[bodies.State, None]:
        return physics.step_tables(scenes, states, actions), None

    return _compared(args, jax.jit(step), states, (scenes, actions), env.STEP_KIND)


def _compared(
    args: Args, program: Callable[..., Any], start: Any, rest: tuple[Any, ...], kind: cpu.Kind
) -> dict[str, Any]:
    """Seconds per call of program(state, *rest) -> (state, anything), and to compile it, of both ways."""
    compiled, states, found = {}, {}, {}
    lowered = program.lower(start, *rest)
    for way, chosen in (("by itself", None), ("with options", cpu.options(kind, "cpu"))):
        begin = time.perf_counter()
        compiled[way] = lowered.compile(compiler_options=chosen)
        found[way] = {"compile_seconds": time.perf_counter() - begin, "seconds": []}
        states[way] = jax.tree.map(jnp.copy, start)  # a training step donates its state
    for turn in range(args.rounds + 1):
        for way, call in compiled.items():
            begin = time.perf_counter()
            for _ in range(args.steps):
                states[way], _ = call(states[way], *rest)
            jax.block_until_ready(states[way])
            if turn:  # the first ones still allocate
                found[way]["seconds"].append((time.perf_counter() - begin) / args.steps)
    medians = {way: statistics.median(row["seconds"]) for way, row in found.items()}
    return {"times_faster": medians["by itself"] / medians["with options"], "median_seconds": medians, **found}


if __name__ == "__main__":
    main(cli.read(Args, description=__doc__))
