"""What it saves on a CPU to keep freed memory.   python -m benchmarks.host_memory

The training step of KOSMOS-2's twin, with glibc's own settings and with `parallel.cpu.keep_freed_memory`, in
processes of their own that take turns.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import resource
import statistics
import time
from typing import Any, Literal

import jax

from benchmarks import machine, workload
from robovlms_jax import cli
from robovlms_jax.parallel import cpu

WAYS = ("given back", "kept")


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure on this processor."""

    backbone: str = "kosmos-2-twin"
    batch_size: int = 64
    """Windows of one frame per step."""
    steps: int = 60
    """Timed steps of each process."""
    rounds: int = 3
    """Processes of each kind; the medians of their steps are compared."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""
    part: Literal["", "given back", "kept"] = ""
    """One process's measurement alone; what the whole benchmark starts its processes with."""

    def __post_init__(self):
        if min(self.batch_size, self.steps, self.rounds) < 1:
            raise ValueError("batch_size, steps and rounds must be positive.")


def main(args: Args) -> None:
    """Print the result as JSON."""
    if args.part:
        print(json.dumps(measure(args)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            found[way].append(_apart(args, way))
    medians = {
        way: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for way, rows in found.items()
    }
    given_back, kept = (medians[way]["seconds_per_step"] for way in WAYS)
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in ("out", "part")}
    machine.report({"times_faster": given_back / kept, **medians, "rounds": found, "settings": settings}, args.out)


def _apart(args: Args, way: str) -> dict[str, float]:
    flags = [f"--{field}={getattr(args, field)}" for field in ("backbone", "batch_size", "steps")]
    return machine.apart("benchmarks.host_memory", f"--part={way}", *flags)


def measure(args: Args) -> dict[str, Any]:
    """Per step: seconds, seconds of the operating system over all threads, pages faulted in; and the process's peak.

    Raises RuntimeError where memory cannot be kept (no glibc).
    """
    if args.part == "kept" and not cpu.keep_freed_memory():
        raise RuntimeError("freed memory cannot be kept here: this needs glibc and a JAX without accelerators.")
    config = workload.experiment("small", batch_size=args.batch_size, backbone=args.backbone)
    train_step, _, train_state, batch = workload.training_step(config)
    for _ in range(2):  # the first one compiles, and both still allocate
        train_state, _ = jax.block_until_ready(train_step(train_state, batch))
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(args.steps):  # not waited for one by one, as in training
        train_state, _ = train_step(train_state, batch)
    jax.block_until_ready(train_state)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds_per_step": seconds / args.steps,
        "system_seconds_per_step": (after.ru_stime - before.ru_stime) / args.steps,
        "page_faults_per_step": (after.ru_minflt - before.ru_minflt) / args.steps,
        "peak_bytes": after.ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main(cli.read(Args, description=__doc__))
