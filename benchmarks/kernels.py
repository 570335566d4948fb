"""Where the time of a traced program went, kernel by kernel.   python -m benchmarks.kernels --trace DIR

DIR is the folder that `--trace` of a benchmark wrote, or any folder of `jax.profiler.trace`. Prints the time in which
the device worked, of all between the first kernel and the last, what kinds of kernels it went to, and the kernels that
took longest, with the operation of the model that each computes (from `program.txt` beside the trace).
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
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
    """One execution: when it began and ended, in nanoseconds, and what it is called."""

    begin: float
    end: float
    name: str


KINDS = (
    ("attention", r"cudnn|flash"),
    ("products", r"nvjet|gemm|cutlass|cublas|convolution|dot"),
    ("copies", r"memcpy|memset|copy"),
)
"""Kind -> what is found in its kernels' names, whatever the case; the first counts, and the others are "other": sums,
norms, activations, whatever XLA fuses."""


def main(args: Args) -> None:
    """Print the result as JSON. A folder without a trace of an accelerator ends the process with a message."""
    text = next((file.read_text() for file in args.trace.rglob("program.txt")), "")
    try:
        found = summary(list(kernels(args.trace)), args.top, sources(text))
    except ValueError as error:
        sys.exit(f"error: {error}")
    machine.report(found, args.out)


def kernels(folder: pathlib.Path) -> Iterator[Kernel]:
    """What the first accelerator did in the newest trace below `folder`. Raises ValueError where there is none, or
    where it holds no accelerator: on CPUs, instructions are no kernels."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ValueError(f"{folder} holds no trace (*.xplane.pb); make one with --trace of a benchmark.")
    planes = jax.profiler.ProfileData.from_file(str(files[-1])).planes
    found = [plane for plane in planes if re.match(r"/device:(GPU|TPU):0", plane.name)]
    if not found:
        raise ValueError(f"{files[-1]} has nothing of a GPU or TPU in it; it was a program on CPUs.")
    for line in found[0].lines:
        # Streams are what a GPU executes, "XLA Ops" what a TPU does; other lines say the same by other names.
        if line.name.startswith("Stream") or line.name == "XLA Ops":
            for event in line.events:
                yield Kernel(event.start_ns, event.end_ns, event.name)


def sources(program: str) -> dict[str, str]:
    """Kernel -> the operation of the model that it computes, from the text of a compiled program, for kernels that are
    called like its instructions."""
    found = re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = [^\n]*op_name=\"([^\"]*)\"", program, re.MULTILINE)
    return {re.sub(r"[.-]", "_", name): operation for name, operation in found}


def summary(done: Iterable[Kernel], top: int, sources: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Seconds from the first kernel's begin to the last one's end; seconds in which at least one worked; seconds by
    `KINDS`; and of the `top` names that took longest: seconds, share of all kernels', executions, source. Raises
    ValueError where there are none."""
    done = sorted(done)
    if not done:
        raise ValueError("the trace has no kernels in it.")
    busy, until = 0.0, done[0].begin
    times: dict[str, list[float]] = collections.defaultdict(list)
    for kernel in done:
        busy += max(0.0, kernel.end - max(kernel.begin, until))
        until = max(until, kernel.end)
        times[kernel.name].append(kernel.end - kernel.begin)
    total = {name: sum(each) for name, each in times.items()}
    kinds = dict.fromkeys([*(kind for kind, _ in KINDS), "other"], 0.0)
    for name, nanoseconds in total.items():
        kinds[next((kind for kind, found in KINDS if re.search(found, name, re.IGNORECASE)), "other")] += nanoseconds
    return {
        "seconds": (until - done[0].begin) * 1e-9,
        "busy_seconds": busy * 1e-9,
        "executions": len(done),
        "kinds_seconds": {kind: nanoseconds * 1e-9 for kind, nanoseconds in kinds.items()},
        "longest": [
            {
                "kernel": name[:120],
                "seconds": total[name] * 1e-9,
                "share": total[name] / sum(total.values()),
                "executions": len(times[name]),
                "source": (sources or {}).get(name, "")[-120:],
            }
            for name in sorted(total, key=lambda name: -total[name])[:top]
        ],
    }


if __name__ == "__main__":
    main(cli.read(Args))
