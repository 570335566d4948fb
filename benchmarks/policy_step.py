"""Latency of one control step of a served policy.   python -m benchmarks.policy_step

Drives `policies.rollout.BatchedVLAPolicy` (`VLAPolicy` is its one-slot form) as a robot would, NumPy observations in
and actions out, and prints JSON. Fails when anything is compiled after the first step.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks import machine, workload
from robovlms_jax import build
from robovlms_jax.config import MeshConfig
from robovlms_jax.interface import Observation
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies import rollout
from robovlms_jax.policies.vla import VLA

WARM_UP = 10
"""Steps left out of the comparison of early and late ones."""
SPAN = 50
"""Steps on each side of it."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Time the control steps of one long episode."""

    size: workload.Size = "small"
    """small: seconds on a laptop. full: published KOSMOS-2, bfloat16; 6.8 GB of parameters."""
    window: int = 8
    """W: the history the head looks back over. Latency should not depend on how much of it is filled."""
    slots: tuple[int, ...] = (1,)
    """Episodes advanced together; each number is measured by itself."""
    steps: int = 220
    """Control steps after the first."""
    peak_tflops: float = 0.0
    """Of one device, for the roofline. 0: from the table of known GPUs, measured on other devices."""
    bandwidth_gbs: float = 0.0
    """Of one device. 0: the same."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""

    def __post_init__(self):
        if self.steps < WARM_UP + 2 * SPAN:
            raise ValueError(
                f"steps={self.steps} must be at least {WARM_UP + 2 * SPAN} to compare early with late ones."
            )


class CompileCount:
    """Programs that XLA has compiled in this process since the count was made, by anyone."""

    def __init__(self):
        self.value = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration: float, **_: Any) -> None:
        self.value += event == "/jax/core/compile/backend_compile_duration"


def main(args: Args) -> None:
    """Print the result as JSON; status 1 when a step compiled."""
    config = workload.experiment(
        args.size, window=args.window, windows_per_segment=1, batch_size=1, mesh=MeshConfig(data=1)
    )
    model = workload.make_model(args.size, config)
    mesh = meshes.make_mesh((1, 1, 1), jax.local_devices()[:1])
    params = build.init_params(model, mesh, seed=0)
    ceiling = machine.ceiling(model.vlm.dtype, 1, peak_tflops=args.peak_tflops, bandwidth_gbs=args.bandwidth_gbs)
    compiles = CompileCount()
    results = {str(slots): measure(model, params, slots, args.steps, compiles, ceiling) for slots in args.slots}
    machine.report(
        {
            "slots": results,
            "parameters": build.count(params),
            "device_peak_bytes": machine.device_peak_bytes(),
            "ceiling": dataclasses.asdict(ceiling),
            "settings": {name: value for name, value in dataclasses.asdict(args).items() if name != "out"},
        },
        args.out,
    )
    if any(result["compiles_after_first_step"] for result in results.values()):
        sys.exit("error: a control step after the first compiled again; see compiles_after_first_step.")


def measure(
    model: VLA, params: Any, slots: int, steps: int, compiles: CompileCount, ceiling: machine.Ceiling
) -> dict[str, Any]:
    """Latencies of `steps` control steps of `slots` episodes, all slots asked every time."""
    policy = rollout.BatchedVLAPolicy(model, params, encode_text, slots)
    everyone, observations = range(slots), make_observations(model)
    policy.reset(everyone, ["push the block"] * slots)

    def act(index: int) -> float:
        begin = time.perf_counter()
        policy.act([observations[(index + slot) % len(observations)] for slot in everyone], everyone)
        return time.perf_counter() - begin

    first = act(0)
    before = compiles.value
    seconds = [act(index) for index in range(1, steps + 1)]
    compiled = compiles.value - before

    program = machine.Program.of(compile_step(model, params, slots, observations[0]), 1)
    flops = workload.control_flops(model, slots=slots)
    floor = ceiling.floor(flops, program.io_bytes)
    median = statistics.median(seconds)
    early, late = seconds[WARM_UP : WARM_UP + SPAN], seconds[-SPAN:]
    return {
        "median_seconds": median,
        "p95_seconds": float(np.percentile(seconds, 95)),
        "p99_seconds": float(np.percentile(seconds, 99)),
        "first_step_seconds": first,
        "compiles_after_first_step": compiled,
        "late_over_early_mean": statistics.mean(late) / statistics.mean(early),
        "late_over_early_fastest": min(late) / min(early),
        "flops": flops,
        "flops_loops_once": workload.control_flops(model, slots=slots, loops_once=True),
        "xla_flops_loops_once": program.flops,
        "io_bytes": program.io_bytes,
        "roofline_floor_seconds": floor,
        "times_roofline_floor": median / floor,
        "program_peak_bytes": program.peak_bytes,
    }


def encode_text(instruction: str) -> tuple[np.ndarray, np.ndarray]:
    """Made-up token ids, of one length for every instruction."""
    return np.arange(4, 4 + workload.TEXT_LENGTH, dtype=np.int32), np.ones(workload.TEXT_LENGTH, bool)


def make_observations(model: VLA) -> list[Observation]:
    """A few frames of noise, to be shown in turn."""
    rng = np.random.default_rng(0)
    sizes = {camera: workload.IMAGE_SIZES[camera] for camera in model.config.cameras}
    return [
        Observation({camera: rng.integers(0, 256, (*size, 3), np.uint8) for camera, size in sizes.items()})
        for _ in range(8)
    ]


def compile_step(model: VLA, params: Any, slots: int, observation: Observation) -> jax.stages.Compiled:
    """The program that the policy runs, for its cost analysis."""
    images = {camera: np.stack([image] * slots) for camera, image in observation.images.items()}
    ids, mask = (np.stack([x] * slots) for x in encode_text(""))
    program = jax.jit(functools.partial(rollout.control_step, model), donate_argnums=1)
    return program.lower(params, model.init_carry(slots), images, ids, mask, np.ones(slots, bool)).compile()


if __name__ == "__main__":
    main(tyro.cli(Args))
