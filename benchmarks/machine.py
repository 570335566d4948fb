"""The machine under a benchmark: what it is, what it could do at best, and how results leave the process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from robovlms_jax.parallel import targets
from robovlms_jax.training import provenance


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What the devices in use can do at best, all together.

    flops: FLOP/s of matrix products. bandwidth: bytes/s of memory. source: where the two numbers come from.
    """

    flops: float
    bandwidth: float
    source: str

    def floor(self, flops: float, num_bytes: float) -> float:
        """Seconds below which no program with this much to do can run (roofline, Williams et al. 2009)."""
        return max(flops / self.flops, num_bytes / self.bandwidth)


def ceiling(dtype: str, num_devices: int, *, peak_tflops: float = 0.0, bandwidth_gbs: float = 0.0) -> Ceiling:
    """The ceiling of `num_devices` devices of this machine's kind for matrix products in `dtype`.

    Args:
      peak_tflops, bandwidth_gbs: of one device, where known better; 0: the table's for a known accelerator, measured
        for any other device.
    """
    device = jax.devices()[0]
    # Fake CPU devices (--xla_force_host_platform_device_count) share one processor.
    count = 1 if device.platform == "cpu" else num_devices
    published = targets.peaks(device.device_kind, dtype)
    if published is None:
        flops, bandwidth, source = measure_matmul(dtype), measure_bandwidth(), "measured in this run"
    else:
        flops, bandwidth = published
        source = f"data sheet of {device.device_kind}"
    given = [name for name, value in (("peak", peak_tflops), ("bandwidth", bandwidth_gbs)) if value]
    source += f"; {' and '.join(given)} as given" if given else ""
    return Ceiling((peak_tflops * 1e12 or flops) * count, (bandwidth_gbs * 1e9 or bandwidth) * count, source)


def measure_matmul(dtype: str, size: int = 2048) -> float:
    """FLOP/s of the fastest of several products of two [size, size] matrices on one device."""
    x = jnp.full((size, size), 1 / size, dtype)  # its square is itself
    return 2 * size**3 / _fastest(jax.jit(lambda x: x @ x), x)


def measure_bandwidth(num_bytes: int = 2**28) -> float:
    """Bytes/s, read and written, of the fastest of several passes over an array far larger than any cache."""
    x = jnp.zeros(num_bytes // 4, jnp.float32)
    # In place: a fresh result would measure how fast the system hands out memory.
    return 2 * num_bytes / _fastest(jax.jit(lambda x: x + 1, donate_argnums=0), x)


def _fastest(function: Callable[[jax.Array], jax.Array], x: jax.Array, seconds: float = 1.0) -> float:
    x = function(x).block_until_ready()  # compiles
    best, begin = math.inf, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        x = function(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


@dataclasses.dataclass(frozen=True)
class Program:
    """What XLA says about a compiled program, summed over devices.

    flops: arithmetic operations; XLA's cost analysis counts the body of a loop once, however often it runs.
    io_bytes: arguments read once and results written once; whatever else it does, the program must move these.
    peak_bytes: arguments, results and temporaries alive at a time, per device.
    """

    flops: float
    io_bytes: int
    peak_bytes: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled, num_devices: int) -> Program:
        """Facts of a program that runs on `num_devices`; XLA's analyses are those of one device's part."""
        memory = compiled.memory_analysis()
        moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return cls(
            flops=float(compiled.cost_analysis()["flops"]) * num_devices,
            io_bytes=moved * num_devices,
            peak_bytes=moved + memory.temp_size_in_bytes - memory.alias_size_in_bytes,  # aliased: donated to a result
        )


def describe() -> dict[str, Any]:
    """Processor, devices and package versions."""
    return {
        "cores": os.cpu_count(),  # noqa: TID251 (the machine is described)
        "processor": platform.processor() or platform.machine(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        **provenance.environment(),
    }


@contextlib.contextmanager
def traced(folder: pathlib.Path, program: jax.stages.Compiled) -> Iterator[None]:
    """Trace what is run inside into `folder`, with the text of `program` beside it. `benchmarks.kernels` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.txt").write_text(program.as_text())
    with jax.profiler.trace(str(folder)):
        yield


def device_peak_bytes() -> int | None:
    """Most memory the first device ever held in this process; None where the backend does not count (CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def apart(module: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """What `python -m module arguments` prints last, JSON, in a process of its own that has CPUs only."""
    command = [sys.executable, "-m", module, *arguments]
    known = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=known, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(result: Mapping[str, Any], out: pathlib.Path | None) -> None:
    """Print the result, with the machine it is from, as one JSON object; also write it to `out`. First process only."""
    if jax.process_index() != 0:
        return
    text = json.dumps(_rounded({**result, "machine": describe()}), indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


def _rounded(value: Any) -> Any:
    """Floats to four significant digits; no timing deserves more."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
