"""Seconds per training step, by windows that share a segment's frames.   python -m benchmarks.train_step

Times `training.step.make_train_step` itself, on synthetic batches that already lie on the devices, and prints JSON. A
batch has the same number of windows for every K; at K windows per segment it encodes (W + K - 1) / K frames per window,
so K can be at most K W / (W + K - 1) times as fast as 1.

    python -m benchmarks.train_step --size full --batch_size 32     # published KOSMOS-2 on an accelerator
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import time
from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks import machine, workload
from robovlms_jax import cli
from robovlms_jax.nn.linear import AttentionKernel
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel.config import MeshConfig
from robovlms_jax.policies import objective
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import optimizer, state, step
from robovlms_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Args:
    """Time training steps and compare them with what the hardware allows."""

    size: workload.Size = "small"
    """small: minutes on a laptop. full: published KOSMOS-2, bfloat16, rematerialised, all parameters trained; about
    27 GB of parameters, gradients and optimizer state."""
    window: int = 8
    """W."""
    windows_per_segment: tuple[int, ...] = (1, 8)
    """The K to compare."""
    batch_size: int = 8
    """Windows per step over all devices, the same for every K."""
    steps: int = 8
    """Timed steps of each K. They take turns, so that a change of load on the machine meets all; the median counts."""
    attention_kernel: AttentionKernel = "auto"
    """As backbone.attention_kernel."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    peak_tflops: float = 0.0
    """Of one device, for MFU and roofline. 0: from the table of known GPUs, measured on other devices."""
    bandwidth_gbs: float = 0.0
    """Of one device. 0: the same."""
    trace: pathlib.Path | None = None
    """Afterwards trace three steps of the last K into this folder; `benchmarks.kernels` reads it."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""

    def __post_init__(self):
        if not self.windows_per_segment or self.steps < 1:
            raise ValueError(f"nothing to time: windows_per_segment={self.windows_per_segment}, steps={self.steps}.")


@dataclasses.dataclass
class Case:
    """One K: its batch on the devices, its compiled step, and the seconds measured."""

    config: ExperimentConfig
    batch: dict[str, Batch]
    compiled: jax.stages.Compiled
    compile_seconds: float
    seconds: list[float] = dataclasses.field(default_factory=list)


def main(args: Args) -> None:
    """Print the result as JSON."""
    configs = [
        workload.experiment(
            args.size,
            window=args.window,
            windows_per_segment=k,
            batch_size=args.batch_size,
            mesh=args.mesh,
            attention_kernel=args.attention_kernel,
        )
        for k in args.windows_per_segment
    ]
    for config in configs:
        config.validate(jax.device_count())
    mesh = meshes.make_mesh(configs[0].mesh_sizes(jax.device_count()))
    model = workload.make_model(args.size, configs[0])
    ceiling = machine.ceiling(
        model.vlm.dtype, mesh.size, peak_tflops=args.peak_tflops, bandwidth_gbs=args.bandwidth_gbs
    )

    tx = optimizer.make_optimizer(configs[0].optimizer, args.steps)
    train_state = state.create(build.init_params(model, mesh, seed=0), (".*",), tx, 0, mesh)
    cases = [prepare(config, model, train_state, mesh) for config in configs]
    for turn in range(args.steps + 1):
        for case in cases:
            begin = time.perf_counter()
            train_state, metrics = jax.block_until_ready(case.compiled(train_state, case.batch))
            if turn > 0:  # the first step of a program still allocates
                case.seconds.append(time.perf_counter() - begin)
    if args.trace is not None:
        with machine.traced(args.trace, cases[-1].compiled):
            for _ in range(3):
                train_state, metrics = jax.block_until_ready(cases[-1].compiled(train_state, cases[-1].batch))

    results = {str(case.config.data.windows_per_segment): summarize(case, model, mesh, ceiling) for case in cases}
    machine.report(
        {
            "windows_per_segment": results,
            "speedup": speedups(results, args.window),
            "parameters": build.count(train_state.params),
            "last_loss": float(metrics["loss"]),
            "device_peak_bytes": machine.device_peak_bytes(),
            "mesh": dict(mesh.shape),
            "ceiling": dataclasses.asdict(ceiling),
            "settings": {
                name: value for name, value in dataclasses.asdict(args).items() if name not in ("out", "trace")
            },
        },
        args.out,
    )


def prepare(config: ExperimentConfig, model: VLA, train_state: state.TrainState, mesh: Mesh) -> Case:
    """Compile the real training step for one K."""
    tx = optimizer.make_optimizer(config.optimizer, config.train.steps)
    schedule = optimizer.learning_rate(config.optimizer, config.train.steps)
    loss = objective.robot(model, shifts=config.data.shifts)
    train_step = step.make_train_step(loss, tx, schedule, train_state, mesh)
    rows = workload.make_batch(config, config.segments_per_batch // jax.process_count())
    batch = meshes.put_batch({objective.ROBOT: rows}, mesh)
    begin = time.perf_counter()
    compiled = train_step.lower(train_state, batch).compile()
    return Case(config, batch, compiled, time.perf_counter() - begin)


def summarize(case: Case, model: VLA, mesh: Mesh, ceiling: machine.Ceiling) -> dict[str, Any]:
    """Rates, FLOPs by both counts, and the distance from the ceiling."""
    config, program = case.config, machine.Program.of(case.compiled, mesh.size)
    windows, seconds = config.train.batch_size, statistics.median(case.seconds)
    frames = config.segments_per_batch * (config.policy.window + config.data.windows_per_segment - 1)
    flops = workload.train_flops(model, frames=frames, windows=windows)
    once = workload.train_flops(model, frames=frames, windows=windows, loops_once=True)
    floor = ceiling.floor(flops, program.io_bytes)
    return {
        "frames_per_step": frames,
        "seconds_per_step": seconds,
        "fastest_step_seconds": min(case.seconds),
        "windows_per_second": windows / seconds,
        "compile_seconds": case.compile_seconds,
        "flops": flops,
        "flops_loops_once": once,
        "xla_flops_loops_once": program.flops,
        "mfu": flops / seconds / ceiling.flops,
        "io_bytes": program.io_bytes,
        "roofline_floor_seconds": floor,
        "times_roofline_floor": seconds / floor,
        "program_peak_bytes": program.peak_bytes,
    }


def speedups(results: dict[str, dict[str, Any]], window: int) -> dict[str, dict[str, float]]:
    """Windows/s of each K over those of K = 1, and the limit set by the frames; empty where 1 was not measured."""
    if "1" not in results:
        return {}
    base = results["1"]["windows_per_second"]
    return {
        k: {"measured": result["windows_per_second"] / base, "limit": int(k) * window / (window + int(k) - 1)}
        for k, result in results.items()
    }


if __name__ == "__main__":
    main(cli.read(Args))
