"""Where the time of a traced program went, kernel by kernel.   python -m benchmarks.kernels --trace DIR

DIR is the folder that `--trace` of a benchmark wrote, or any folder of `jax.profiler.trace`. Prints the time in which
the device worked and in which it had nothing to do, between the first kernel and the last, then the kernels that took
longest, with the instruction of the compiled program (`program.txt` beside the trace) that each belongs to.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from benchmarks import machine
from robovlms_jax import cli


@dataclasses.dataclass(frozen=True)
class Args:
    """Read a trace."""

    trace: pathlib.Path
    """Folder of the trace."""
    top: int = 30
    """So many kernels are listed."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""


class Kernel(NamedTuple):
    """One execution: when it began and ended, in nanoseconds; what it is called; the instruction that it belongs to."""

    begin: float
    end: float
    name: str
    instruction: str


def main(args: Args) -> None:
    """Print the result as JSON."""
    machine.report(summary(list(kernels(args.trace)), args.top), args.out)


def kernels(folder: pathlib.Path) -> Iterator[Kernel]:
    """What the first accelerator did in the newest trace below `folder`. Raises ValueError where there is none, or
    where it holds no accelerator: on CPUs, instructions are no kernels."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ValueError(f"{folder} holds no trace (*.xplane.pb); make one with --trace of a benchmark.")
    planes = jax.profiler.ProfileData.from_file(str(files[-1])).planes
    found = [plane for plane in planes if re.match(r"/device:(GPU|TPU):0", plane.name)]
    if not found:
        raise ValueError(f"{files[-1]} has nothing of a GPU or TPU in it: a trace of a program on CPUs?")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jaxlib's own, about the type of `stats`
        for line in found[0].lines:
            # Streams are what a GPU executes, "XLA Ops" what a TPU does; other lines say the same by other names.
            if line.name.startswith("Stream") or line.name == "XLA Ops":
                for event in line.events:
                    stats = dict(event.stats)
                    yield Kernel(event.start_ns, event.end_ns, event.name, str(stats.get("hlo_op", "")))


def summary(done: Iterable[Kernel], top: int) -> dict[str, Any]:
    """Seconds from the first kernel's begin to the last one's end, seconds in which at least one worked, and of the
    `top` names and instructions that took longest: seconds, share of the working seconds, executions."""
    done = sorted(done)
    if not done:
        raise ValueError("the trace has no kernels in it.")
    busy, until = 0.0, done[0].begin
    for kernel in done:
        busy += max(0.0, kernel.end - max(kernel.begin, until))
        until = max(until, kernel.end)
    times: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for kernel in done:
        times[kernel.name, kernel.instruction].append(kernel.end - kernel.begin)
    longest = sorted(times, key=lambda key: -sum(times[key]))[:top]
    return {
        "seconds": (until - done[0].begin) * 1e-9,
        "busy_seconds": busy * 1e-9,
        "kernels": len(done),
        "longest": [
            {
                "kernel": name[:160],
                "instruction": instruction,
                "seconds": sum(times[name, instruction]) * 1e-9,
                "share": sum(times[name, instruction]) / busy,
                "executions": len(times[name, instruction]),
            }
            for name, instruction in longest
        ],
    }


if __name__ == "__main__":
    main(cli.read(Args))
