"""Latency of one control step of a served policy.   python -m benchmarks.policy_step

Drives `policies.serving.BatchedVLAPolicy` (`VLAPolicy` is its one-slot form) as a robot would, NumPy observations in
and actions out, and prints JSON. Fails when anything is compiled after the first step.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks import machine, workload
from robovlms_jax import cli
from robovlms_jax.control.interface import Observation
from robovlms_jax.nn import stack
from robovlms_jax.parallel import gpu
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel.config import MeshConfig
from robovlms_jax.policies import objective, serving
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build, served
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.types import Inputs
from robovlms_jax.weights import quantize

WARM_UP = 10
"""Steps left out of the comparison of early and late ones."""
SPAN = 50
"""Steps on each side of it."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Time the control steps of one long episode."""

    size: workload.Size = "small"
    """small: seconds on a laptop. full: published KOSMOS-2, 3.5 GB of parameters, bfloat16."""
    window: int = 8
    """W: the history the head looks back over. Latency should not depend on how much of it is filled."""
    slots: tuple[int, ...] = (1,)
    """Episodes advanced together; each number is measured by itself."""
    steps: int = 220
    """Control steps after the first."""
    lstm_layers: tuple[int, ...] = ()
    """Also compare LSTM heads of that many layers, such as 2 3 4 (the head's usual width; one slot)."""
    interleaved_window: int = 0
    """> 0: also stream `interleaved` history over a window of that many frames, beside one frame's encode alone."""
    int8: bool = False
    """Also serve the backbone's matrices in int8, in turn with the same policy in its own type (one slot)."""
    peak_tflops: float = 0.0
    """Of one device, for the roofline. 0: from the table of known GPUs, measured on other devices."""
    bandwidth_gbs: float = 0.0
    """Of one device. 0: the same."""
    trace: pathlib.Path | None = None
    """Afterwards trace five steps of one slot into this folder; `benchmarks.kernels` reads it."""
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
    config = workload.experiment(args.size, window=args.window, batch_size=1, mesh=MeshConfig(data=1))
    model = workload.make_model(args.size, config)
    mesh = meshes.make_mesh((1, 1, 1), jax.local_devices()[:1])
    model, params = as_served(model, mesh)
    ceiling = machine.ceiling(model.vlm.dtype, 1, peak_tflops=args.peak_tflops, bandwidth_gbs=args.bandwidth_gbs)
    compiles = CompileCount()
    results = {str(slots): measure(model, params, slots, args.steps, compiles, ceiling) for slots in args.slots}
    layers = {str(n): measure_layers(args.size, config, n, args.steps, compiles, ceiling) for n in args.lstm_layers}
    streams = {}
    if args.interleaved_window:
        for name, every in (("cached", 0), ("exact", 1)):
            stream = workload.interleaved(config, args.interleaved_window, reencode_every=every)
            other = workload.make_model(args.size, stream)
            other, weights = as_served(other, mesh)
            streams[name] = measure(other, weights, 1, args.steps, compiles, ceiling, beside=frame_encoder(other))
    if args.trace is not None:
        trace(model, params, args.trace)
    machine.report(
        {
            "slots": results,
            "lstm_layers": layers,
            "interleaved": streams,
            "int8": compare_int8(model, params, mesh, args.steps) if args.int8 else {},
            "parameters": build.count(params),
            "device_peak_bytes": machine.device_peak_bytes(),
            "ceiling": dataclasses.asdict(ceiling),
            "settings": {
                name: value for name, value in dataclasses.asdict(args).items() if name not in ("out", "trace")
            },
        },
        args.out,
    )
    everything = [*results.values(), *layers.values(), *streams.values()]
    if any(result["compiles_after_first_step"] for result in everything):
        sys.exit("error: a control step after the first compiled again; see compiles_after_first_step.")


def as_served(model: VLA, mesh: Mesh) -> tuple[VLA, dict[str, Any]]:
    """Model and random parameters as `runs.load.load_policy` serves them: those that are cast are kept in the type that
    the model computes in, and lie as `runs.served` puts them."""
    params = build.init_params(model, mesh, seed=0)
    types = quantize.stored_types(params, model.vlm.dtype)
    cast = jax.jit(lambda tree: jax.tree.map(lambda x, kind: x.astype(kind), tree, types))
    model = served.model(model)
    return model, served.parameters(model, cast(params), take=True)


def measure_layers(
    size: workload.Size,
    config: ExperimentConfig,
    num_layers: int,
    steps: int,
    compiles: CompileCount,
    ceiling: machine.Ceiling,
) -> dict[str, Any]:
    """`measure` with another depth of the LSTM head."""
    head = dataclasses.replace(config.policy.head, num_layers=num_layers)
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, head=head))
    model = workload.make_model(size, config)
    model, params = as_served(model, meshes.make_mesh((1, 1, 1), jax.local_devices()[:1]))
    return measure(model, params, 1, steps, compiles, ceiling) | {"head_parameters": build.count(params["head"])}


def compare_int8(model: VLA, params: Any, mesh: Mesh, steps: int) -> dict[str, Any]:
    """The policy with its backbone's matrices in int8 beside the same one as it is, one slot each, asked in turn so
    that a change of load meets both. Errors are of actions in dataset units, gripper left out."""
    whole = dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, joint=False))
    small = dataclasses.replace(whole, vlm=dataclasses.replace(whole.vlm, storage="int8"))
    rounded = quantize.quantize(build.init_params(whole, mesh, seed=0), build.abstract_params(small, mesh)[0])
    models = {"float": model, "int8": served.model(small)}
    stored = {"float": params, "int8": served.parameters(models["int8"], rounded, take=True)}
    policies = {name: serving.BatchedVLAPolicy(models[name], stored[name], encode_text, 1) for name in models}
    seconds, errors, size = {name: [] for name in models}, [], 0.0
    for policy in policies.values():
        policy.reset([0], ["push the block"])
    observations = make_observations(model)
    for index in range(steps + 1):
        actions = {}
        for name, policy in policies.items():
            begin = time.perf_counter()
            actions[name] = policy.act([observations[index % len(observations)]], [0])[0].actions[:, :-1]
            seconds[name].append(time.perf_counter() - begin)
        errors.append(np.abs(actions["int8"] - actions["float"]).max())
        size = max(size, np.abs(actions["float"]).max())
    median, fastest = ({name: choose(x[1:]) for name, x in seconds.items()} for choose in (statistics.median, min))
    return {
        "median_seconds": median,
        "times_float": median["int8"] / median["float"],
        "times_float_fastest": fastest["int8"] / fastest["float"],
        "parameter_bytes": {name: sum(x.nbytes for x in jax.tree.leaves(tree)) for name, tree in stored.items()},
        "max_action_error": float(max(errors)),
        "max_action": float(size),
    }


def frame_encoder(model: VLA) -> Callable:
    """One frame by itself through preprocessing, vision tower and language model; compiled."""

    def encode(params, images, ids, mask):
        inputs = Inputs({camera: x[:, None] for camera, x in images.items()}, ids, mask, np.ones((len(ids), 1), bool))
        inputs = objective.prepare(inputs, model.vlm.image, model.config.cameras)
        bound = model.bind({"params": params})
        return bound.backbone.decode(bound.embed(inputs))[0]

    return jax.jit(encode)


def measure(
    model: VLA,
    params: Any,
    slots: int,
    steps: int,
    compiles: CompileCount,
    ceiling: machine.Ceiling,
    beside: Callable | None = None,
) -> dict[str, Any]:
    """Latencies of `steps` control steps of `slots` episodes, all slots asked every time.

    beside: a `frame_encoder` to be timed in turn with the steps, so that a change of load meets both.
    """
    policy = serving.BatchedVLAPolicy(model, params, encode_text, slots)
    everyone, observations = range(slots), make_observations(model)
    policy.reset(everyone, ["push the block"] * slots)

    def act(index: int) -> float:
        begin = time.perf_counter()
        policy.act([observations[(index + slot) % len(observations)] for slot in everyone], everyone)
        return time.perf_counter() - begin

    ids, mask = (np.stack([x] * slots) for x in encode_text(""))
    images = {camera: np.stack([image] * slots) for camera, image in observations[0].images.items()}

    def encode() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(beside(params, images, ids, mask))
        return time.perf_counter() - begin

    first = act(0)
    if beside is not None:
        encode()
    before = compiles.value
    seconds, alone = [], []
    for index in range(1, steps + 1):
        seconds.append(act(index))
        if beside is not None:
            alone.append(encode())
    compiled = compiles.value - before

    program = machine.Program.of(compile_step(model, params, slots, observations[0]), 1)
    flops = workload.control_flops(model, slots=slots)
    floor = ceiling.floor(flops, program.io_bytes)
    return (
        latencies(seconds)
        | {
            "first_step_seconds": first,
            "compiles_after_first_step": compiled,
            "flops": flops,
            "flops_loops_once": workload.control_flops(model, slots=slots, loops_once=True),
            "xla_flops_loops_once": program.flops,
            "io_bytes": program.io_bytes,
            "roofline_floor_seconds": floor,
            "times_roofline_floor": statistics.median(seconds) / floor,
            "program_peak_bytes": program.peak_bytes,
        }
        | ({} if beside is None else compare(seconds[WARM_UP:], alone[WARM_UP:]))
    )


def trace(model: VLA, params: Any, folder: pathlib.Path) -> None:
    """Trace five control steps of one slot into `folder`."""
    policy, observations = serving.BatchedVLAPolicy(model, params, encode_text, 1), make_observations(model)
    policy.reset([0], ["push the block"])
    policy.act(observations[:1], [0])
    with machine.traced(folder, compile_step(model, params, 1, observations[0])):
        for observation in observations[:5]:
            policy.act([observation], [0])


def latencies(seconds: list[float]) -> dict[str, float]:
    """How long steps took, and whether later ones took longer than early ones."""
    early, late = seconds[WARM_UP : WARM_UP + SPAN], seconds[-SPAN:]
    return {
        "median_seconds": statistics.median(seconds),
        "p95_seconds": float(np.percentile(seconds, 95)),
        "p99_seconds": float(np.percentile(seconds, 99)),
        "late_over_early_mean": statistics.mean(late) / statistics.mean(early),
        "late_over_early_fastest": min(late) / min(early),
    }


def compare(seconds: list[float], alone: list[float]) -> dict[str, float]:
    """Control steps against encoding a frame alone: medians, and the fastest of each, which load does not reach."""
    return {
        "frame_encode_seconds": statistics.median(alone),
        "times_frame_encode": statistics.median(seconds) / statistics.median(alone),
        "times_frame_encode_fastest": min(seconds) / min(alone),
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
    cudnn = gpu.has_cudnn(meshes.make_mesh((1, 1, 1), jax.local_devices()[:1]))
    program = jax.jit(
        functools.partial(serving.served_step, model, cudnn=cudnn),
        donate_argnums=1,
        compiler_options=gpu.served(jax.default_backend()),
    )
    carry = model.init_carry(slots, stack.joined(params), ids.shape[1])
    return program.lower(params, carry, images, (ids, mask), np.ones(slots, bool)).compile()


if __name__ == "__main__":
    main(cli.read(Args))
