"""What more devices cost and save, on pretended CPUs.   python -m benchmarks.scaling

Three questions, each answered in processes of its own: seconds and bytes per device of one training step against the
number of devices; how long an asynchronous save holds up training; how much host memory loading takes beyond the shards
themselves. Pretended devices share the processor, so seconds say what splitting costs, not what it gains.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from benchmarks import machine, workload
from robovlms_jax import cli
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel.config import MeshConfig
from robovlms_jax.runs import steps
from robovlms_jax.training import checkpoints, memory, optimizer, state
from robovlms_jax.weights import convert, sources
from robovlms_jax.weights.rules import Rule


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure on pretended CPU devices."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Device counts of the step; each divides `batch_size`."""
    axis: Literal["data", "fsdp"] = "fsdp"
    """Mesh axis that they lie on."""
    backbone: str = "kosmos-2-twin"
    batch_size: int = 8
    """Windows per step over all devices, the same for every count."""
    window: int = 2
    steps: int = 5
    """Timed steps; the median counts."""
    save_mib: int = 512
    """State to save."""
    saves: int = 3
    load_gib: float = 2.0
    """Checkpoint to load."""
    shards: int = 8
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""
    part: Literal["", "step", "save", "load_weights", "load_checkpoint"] = ""
    """One measurement alone, on the devices that there are; what the whole benchmark starts its processes with."""

    def __post_init__(self):
        for count in self.devices:
            if count < 1 or self.batch_size % count:
                raise ValueError(f"batch_size={self.batch_size} does not divide over devices={count}.")
        if min(self.steps, self.saves, self.save_mib, self.shards) < 1 or self.load_gib <= 0:
            raise ValueError("steps, saves, save_mib, shards and load_gib must be positive.")


def main(args: Args) -> None:
    """Print the result as JSON."""
    if args.part:
        parts = {
            "step": measure_step,
            "save": measure_save,
            "load_weights": measure_load_weights,
            "load_checkpoint": measure_load_checkpoint,
        }
        print(json.dumps(parts[args.part](args)))
        return
    result = {
        "load_weights": _apart(args, "load_weights", args.shards),
        "load_checkpoint": _apart(args, "load_checkpoint", args.shards),
        "save": _apart(args, "save", args.shards),
        "step": {str(count): _apart(args, "step", count) for count in args.devices},
        "settings": {name: value for name, value in dataclasses.asdict(args).items() if name not in ("out", "part")},
    }
    machine.report(result, args.out)


def _apart(args: Args, part: str, devices: int) -> dict[str, Any]:
    """One measurement in a new process that has so many devices."""
    flags = [f"--{field}={getattr(args, field)}" for field in ("axis", "backbone", "batch_size", "window", "steps")]
    flags += [f"--{field}={getattr(args, field)}" for field in ("save_mib", "saves", "load_gib", "shards")]
    return machine.apart("benchmarks.scaling", f"--part={part}", *flags, JAX_NUM_CPU_DEVICES=str(devices))


def measure_step(args: Args) -> dict[str, Any]:
    """Seconds, XLA's plan and our estimate of one training step on all devices."""
    sizes = {"data": 1, "fsdp": 1, args.axis: jax.device_count()}
    config = workload.experiment(
        "small", window=args.window, batch_size=args.batch_size, mesh=MeshConfig(**sizes), backbone=args.backbone
    )
    config.validate(jax.device_count())
    train_step, model, train_state, batch = workload.training_step(config)
    begin = time.perf_counter()
    compiled = train_step.lower(train_state, batch).compile()
    compile_seconds, seconds = time.perf_counter() - begin, []
    estimate = steps.memory_of(config, model, train_state, batch)
    for _ in range(args.steps + 1):
        begin = time.perf_counter()
        train_state, metrics = jax.block_until_ready(compiled(train_state, batch))
        seconds.append(time.perf_counter() - begin)
    if not np.isfinite(metrics["loss"]):
        raise RuntimeError(f"the loss is {metrics['loss']}: such steps change nothing and measure nothing.")
    return {
        "seconds_per_step": statistics.median(seconds[1:]),  # the first still allocates
        "fastest_step_seconds": min(seconds[1:]),
        "compile_seconds": compile_seconds,
        "last_loss": float(metrics["loss"]),
        "xla_bytes_per_device": memory.of_program(compiled),
        "estimated_bytes_per_device": estimate.parts(),
    }


def measure_save(args: Args) -> dict[str, Any]:
    """How long `Checkpointer.save` holds up the caller, and how long the files then take."""
    mesh = meshes.make_mesh((1, jax.device_count(), 1))
    rows = args.save_mib * 2**20 // 3 // (4 * 1024) // jax.device_count() * jax.device_count()
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    params = {"head": {"kernel": jax.jit(lambda: jnp.ones((rows, 1024)), out_shardings=split)()}}
    train_state = state.create(params, (".*",), optimizer.make_optimizer(workload.OptimizerConfig(), 10), 0, mesh)
    stalls, totals = [], []
    with tempfile.TemporaryDirectory() as directory:
        saver = checkpoints.Checkpointer(directory, keep=1, serving={})
        for number in range(args.saves):
            current = train_state.replace(step=train_state.step + number)
            begin = time.perf_counter()
            saver.save(current, {})
            stalls.append(time.perf_counter() - begin)
            saver.wait()
            totals.append(time.perf_counter() - begin)
        saver.close()
    size = sum(x.nbytes for x in jax.tree.leaves((train_state.params, train_state.opt_state)))
    return {
        "state_bytes": size,
        "stall_seconds": stalls,
        "seconds_until_on_disk": totals,
        "stall_share": statistics.median(stalls) / statistics.median(totals),
    }


_MATRICES, _LAYERS, _WIDTH = 8, 8, 2048


def measure_load_weights(args: Args) -> dict[str, Any]:
    """Peak host memory of `weights.convert.load_params` from safetensors, beyond the arrays it makes."""
    names, shapes, shardings = _synthetic(args)
    rules = [Rule(f"{name}.{{layer}}.weight", name) for name in names]
    with tempfile.TemporaryDirectory() as directory:
        rng = np.random.default_rng(0)
        for name in names:  # a file each, as published checkpoints are parted
            tensors = {f"{name}.{i}.weight": rng.random(shapes[name].shape[1:], np.float32) for i in range(_LAYERS)}
            save_file(tensors, f"{directory}/{name}.safetensors")
        del tensors
        _write_index(pathlib.Path(directory), names)
        source = sources.open_source(directory)
        return _loading(lambda: convert.load_params(tuple(rules), source, shapes, shardings))


def measure_load_checkpoint(args: Args) -> dict[str, Any]:
    """The same of `training.checkpoints.read_params` from one of our own checkpoints."""
    _, shapes, shardings = _synthetic(args)
    make = jax.jit(lambda: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes), out_shardings=shardings)
    abstract = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)
    with tempfile.TemporaryDirectory() as directory:
        made = make()
        written = checkpoints.write_policy(directory, made, {})
        jax.tree.map(lambda x: x.delete(), made)
        return _loading(lambda: checkpoints.read_params(written, abstract))


def _synthetic(args: Args) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Names, shapes and shardings of stacked float32 matrices of `load_gib` in all, rows split over devices."""
    mesh: Mesh = meshes.make_mesh((1, jax.device_count(), 1))
    rows = int(args.load_gib * 2**30) // (4 * _MATRICES * _LAYERS * _WIDTH)
    rows -= rows % jax.device_count()
    names = [f"matrix_{index}" for index in range(_MATRICES)]
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    shape = jax.ShapeDtypeStruct((_LAYERS, rows, _WIDTH), np.float32)
    return names, dict.fromkeys(names, shape), dict.fromkeys(names, split)


def _write_index(directory: pathlib.Path, names: list[str]) -> None:
    weights = {f"{name}.{layer}.weight": f"{name}.safetensors" for name in names for layer in range(_LAYERS)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def _loading(load: Any) -> dict[str, Any]:
    peak = Peak()
    begin = time.perf_counter()
    with peak:
        arrays = jax.block_until_ready(load())
    seconds = time.perf_counter() - begin
    size = sum(x.nbytes for x in flatten_dict(arrays).values())
    shard = size // jax.device_count()
    beyond = peak.bytes - size
    return {
        "checkpoint_bytes": size,
        "shard_bytes": shard,
        "seconds": seconds,
        # All pretended devices' shards lie in this process; a process with one device would hold one of them.
        "peak_bytes_beyond_arrays": beyond,
        "peak_of_one_shard": (shard + max(beyond, 0)) / shard,
    }


class Peak:
    """Most anonymous memory of this process inside the context, beyond what it had before (Linux).

    Sampled every 2 ms. Pages of mapped files are left out: the system takes them back when it needs them.
    """

    def __enter__(self) -> Peak:
        self._before, self._most, self._stop = _anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self._most, _anonymous()) - self._before

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._most = max(self._most, _anonymous())


def _anonymous() -> int:
    lines: Iterator[str] = iter(pathlib.Path("/proc/self/status").read_text().splitlines())
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main(cli.read(Args))
