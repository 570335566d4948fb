"""A training step or a control step as a compiler makes it for a described target, and about what it takes at best.

That is the roofline (Williams et al. 2009) with a third roof: matrix products over the chip's peak, traffic of its
main memory over its bandwidth, and collectives over the links they go along. The step takes as long as the largest of
the three if everything else is hidden behind it, and as their sum if nothing is. Traffic is a model
(`parallel.program_costs`): what a cache still holds is read faster. What is hidden the schedule says
(`parallel.schedules`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from robovlms_jax import atomic
from robovlms_jax.backbones.base import VLMConfig
from robovlms_jax.parallel import gpu, program_costs, schedules, targets
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel.config import MeshConfig
from robovlms_jax.policies import serving
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build, edge, served, steps
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import flops, memory, optimizer, state, step
from robovlms_jax.training.state import TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
    """Devices to compile for. mesh: of some of the target's devices. kept: folder of earlier results; None: none."""

    target: targets.Target
    mesh: Mesh
    kept: pathlib.Path | None = None


def training(place: Place, config: ExperimentConfig, model: VLA, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The step that a run would compile; plain JSON values, of one device where not said otherwise.

    Args:
      batch: shapes of the whole batch, by source.
    """
    mesh = place.mesh
    abstract = abstract_state(config, model, mesh)
    estimate = steps.memory_of(config, model, abstract, batch)
    split = meshes.batched(mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), batch)
    tuned = config.train.compiler_options == "auto"
    with gpu.cudnn_of_described():
        lowered = steps.make_step(config, model, abstract, mesh).lower(abstract, shapes)
        found = _compiled(place, lowered, step.compiler_options(abstract, mesh) if tuned else None)
    plain = dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, remat="none", dtype="float32"))
    needed = flops.of_step(steps.make_loss(config, plain), abstract, batch) / mesh.size
    result = _roofs(place, found, needed)
    result["windows_per_s"] = config.train.batch_size / result["floor_s"] if result["floor_s"] else None
    result["bytes"] |= {
        "parameters": memory.bytes_per_device((abstract.trainable, abstract.frozen)),
        "optimizer": memory.bytes_per_device(abstract.opt_state),
        "batch": estimate.batch,
        "estimate": estimate.total,
    }
    if not result["fits"]:
        result["nearest"] = _nearest(place, config, model, batch, result["bytes"]["peak"] / estimate.total)
    return result


def control(place: Place, config: ExperimentConfig, vlm: VLMConfig, text_length: int) -> dict[str, Any]:
    """A control step of one robot on the first device as it is served, bfloat16 computation and weights; plain JSON
    values."""
    one = Mesh(place.mesh.devices[:1, :1, :1], meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    place, whole = dataclasses.replace(place, mesh=one), meshes.replicated(one)
    model = build.make_model(config, dataclasses.replace(vlm, dtype="bfloat16"))
    params, carry, images, ids, mask, *rest = edge.arguments(model, text_length)
    model = served.model(model)
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        [jax.eval_shape(functools.partial(served.parameters, model), params), carry, images, (ids, mask), *rest],
    )
    with gpu.cudnn_of_described():
        step = functools.partial(serving.served_step, model, cudnn=gpu.has_cudnn(one))
        traced = jax.jit(step, donate_argnums=1, out_shardings=whole).trace(*given)
        found = _compiled(place, traced.lower(), gpu.served(place.target.platform))
    needed = sum(count for _, count, _ in flops.products(traced.jaxpr.jaxpr))
    needed += found.get("cudnn", {}).get("flops", 0.0)  # no products that JAX knows of
    result = _roofs(place, found, needed)
    weights = memory.bytes_per_device(given[0])
    result["bytes"] |= {"parameters": weights}
    figures = place.target.figures
    result["needed_s"] = max(needed / figures.flops, weights / figures.bandwidth)
    return result


def abstract_state(config: ExperimentConfig, model: VLA, mesh: Mesh | AbstractMesh) -> TrainState:
    """The state of a run on the mesh, as shapes with shardings."""
    shapes, shardings = build.abstract_params(model, mesh)
    tx = optimizer.make_optimizer(config.optimizer, config.train.steps)
    return state.abstract(shapes, shardings, config.train.trainable, tx, mesh)


# ---------------------------------------------------------------------------------------------------------------------
# Compiling, once per program


def _compiled(place: Place, lowered: jax.stages.Lowered, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """bytes, costs and compiler's words of a program; kept by what it is, for whom and by which compiler. With the
    target's figures, by which collectives are timed. own: compiler options that it has in earnest, too."""
    versions = {name: _version(name) for name in ("jaxlib", "libtpu", "jax-cuda12-pjrt")}
    options = {**targets.OPTIONS[place.target.platform], **(own or {})}
    said = json.dumps([place.target.name, dataclasses.asdict(place.target.figures), options, versions, _VERSION])
    key = hashlib.sha256(f"{said}\n{lowered.as_text()}".encode()).hexdigest()[:24]
    path = place.kept / f"{key}.json" if place.kept else None
    if path and path.exists():
        logger.info("compiled before: %s", path)
        return json.loads(path.read_text())
    begin = time.perf_counter()
    found = _compile(place, lowered, options) | {"seconds_to_compile": round(time.perf_counter() - begin, 1)}
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(path, found)
    return found


_VERSION = 9
"""Raised when what is kept of a program changes."""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _compile(place: Place, lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        # libtpu says it in two ways; the second counts arguments and results among the "temporaries".
        used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or used is None:
            raise
        peak = int(float(used[1]) * 1024 ** " KMGT".index(used[2] or " "))
        return {"bytes": {"peak": peak}, "refused": str(error).splitlines()[0][:300]}
    text, figures = compiled.as_text(), place.target.figures
    costs = program_costs.of_text(text, place.mesh.size)
    analysis = compiled.cost_analysis() if place.target.platform == "tpu" else None
    where = targets.places(place.target, list(place.mesh.devices.flat))
    sizes = dict(place.mesh.shape)

    def seconds(x: program_costs.Collective) -> float:
        return targets.seconds(place.target, x.groups, where, x.sent)

    schedule = schedules.of_text(
        text, place.mesh.size, lambda flops, moved: max(flops / figures.flops, moved / figures.bandwidth), seconds
    )
    exchanged = [
        {
            "kind": x.kind,
            "axes": list(x.axes(sizes)),
            "dtype": x.dtype,
            "times": x.times,
            "bytes": x.sent * x.times,
            "seconds": x.times * seconds(x),
            "where": x.where,
        }
        for x in costs.collectives
    ]
    return {
        "bytes": memory.of_program(compiled),
        "flops": costs.flops,
        "traffic": costs.bytes,
        "cycles": [costs.cycles, costs.cycles_once],
        "cudnn": dataclasses.asdict(costs.cudnn),
        "unknown_loops": costs.unknown_loops,
        "kernels": costs.kernels,
        "schedule_s": dataclasses.asdict(schedule),
        "optimal_seconds": (analysis or {}).get("optimal_seconds"),
        "collectives": sorted(exchanged, key=lambda x: -x["bytes"]),
    }


def _roofs(place: Place, found: Mapping[str, Any], needed: float) -> dict[str, Any]:
    """What a program can do at best. needed: FLOPs of the model without rematerialisation, on one device."""
    figures = place.target.figures
    out = {**found, "bytes": dict(found["bytes"]), "needed_flops": needed}
    out["fits"] = "refused" not in found and found["bytes"]["peak"] <= figures.memory
    if "refused" in found:
        return out | {"floor_s": None}
    roofs = {
        "compute": found["flops"] / figures.flops,
        "memory": found["traffic"] / figures.bandwidth,
        "interconnect": sum(x["seconds"] for x in found["collectives"]),
    }
    floor, cycles = max(roofs.values()), found["cycles"]
    out |= {"roofs_s": roofs, "bound": max(roofs, key=roofs.get), "floor_s": floor, "sum_s": sum(roofs.values())}
    out["mfu"] = needed / figures.flops / floor if floor else None
    # The compiler counts loops once; what its own cycles say of loops is put right by their share.
    if (found["optimal_seconds"] or 0) > 0 and cycles[1]:  # libtpu says numbers below 0 of some programs
        out["compiler_s"] = found["optimal_seconds"] * cycles[0] / cycles[1]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# What fits


def _nearest(place: Place, config: ExperimentConfig, model: VLA, batch: Mapping[str, Any], ratio: float) -> str:
    """The least change with which the step fits, by the estimate times `ratio`, what the compiler took more; words."""
    limit, sizes, platform = place.target.figures.memory, place.mesh.devices.shape, place.target.platform
    for fsdp in [sizes[1] * 2**n for n in range(12) if place.mesh.size % (sizes[1] * 2**n * sizes[2]) == 0]:
        data = place.mesh.size // fsdp // sizes[2]
        mesh = AbstractMesh((data, fsdp, sizes[2]), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
        changed = dataclasses.replace(config, mesh=MeshConfig(data, fsdp, sizes[2]))
        abstract = abstract_state(changed, model, mesh)
        flag = "" if fsdp == sizes[1] else f"--mesh.data {data} --mesh.fsdp {fsdp} "
        whole = [("", steps.memory_of(changed, model, abstract, batch, platform=platform))] if flag else []
        # One by one: each that is asked for is traced.
        smaller = steps.smaller(changed, model, abstract, batch, platform=platform)
        for words, estimate in itertools.chain(whole, smaller):
            if estimate.total * ratio <= limit:
                size = memory.readable(estimate.total * ratio)
                return f"{flag}{words}".strip() + f" (about {size}, by the estimate times {ratio:.2f})"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# As text


def show(target: targets.Target, mesh: Mapping[str, int], plans: Mapping[str, Any]) -> str:
    """The result of `training` and `control` as a table to read."""
    figures = target.figures
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.items())
    lines = [
        f"{target.name}: {target.count} x {figures.kind}, mesh {sizes}; each {figures.flops / 1e12:g} TFLOP/s of "
        f"bfloat16, {memory.readable(figures.memory)}, {figures.bandwidth / 1e9:g} GB/s",
        f"  {figures.source}",
    ]
    for name, found in plans.items():
        lines += _show_one(name, found)
    return "\n".join(lines)


def _show_one(name: str, found: Mapping[str, Any]) -> list[str]:
    lines = [f"{name} step, compiled in {found['seconds_to_compile']} s; on each device:"]
    lines += [f"  {kind:<12}{memory.readable(size):>12}" for kind, size in found["bytes"].items()]
    if not found["fits"]:
        ways = found.get("nearest") or "no accumulation, rematerialisation or larger mesh.fsdp that would"
        lines.append(f"  does not fit. {found.get('refused', '')}\n  Nearest that fits: {ways}")
    if "refused" in found:
        return lines
    lines.append(
        f"  {found['flops'] / 1e12:.4g} TFLOP ({found['needed_flops'] / 1e12:.4g} without what is computed again), "
        f"{found['traffic'] / 1e9:.4g} GB of memory traffic, {found['kernels']} kernels"
    )
    if found.get("cudnn", {}).get("calls"):
        calls, flops, moved = (found["cudnn"][name] for name in ("calls", "flops", "bytes"))
        lines += [
            f"  of these {calls} x attention by cuDNN, by operands and results: {flops / 1e12:.4g} TFLOP, "
            f"{moved / 1e9:.4g} GB",
            "  (what else that library needs is not known; without it: --backbone.attention_kernel xla)",
        ]
    if found["unknown_loops"]:
        lines.append(f"  {found['unknown_loops']} loops of unknown length are counted once")
    lines += [
        f"  {1e3 * value:>10.3f} ms {roof}" + (" by a model that knows no caches" if roof == "memory" else "")
        for roof, value in found["roofs_s"].items()
    ]
    # Only what caches cannot shorten is a bound.
    least, most = ("without caches", "") if found["bound"] == "memory" else ("at least", " at most")
    lines.append(
        f"  {1e3 * found['floor_s']:>10.3f} ms {least}, by {found['bound']}: MFU{most} {100 * found['mfu']:.1f} %"
        + (f", {found['windows_per_s']:.4g} windows/s" if found.get("windows_per_s") else "")
        + f"; {1e3 * found['sum_s']:.3f} ms if nothing overlaps"
    )
    schedule = found["schedule_s"]
    lines.append(
        f"  {1e3 * (schedule['kernels'] + schedule['waited']):>10.3f} ms by its schedule: kernels one after the other, "
        f"{1e3 * schedule['waited']:.3f} of {1e3 * schedule['collectives']:.3f} ms of collectives not behind them"
    )
    if found.get("compiler_s"):
        lines.append(
            f"  {1e3 * found['compiler_s']:>10.3f} ms by the compiler (optimal_seconds {found['optimal_seconds']:.4g} "
            "with loops counted)"
        )
    if found.get("needed_s"):
        lines.append(f"  {1e3 * found['needed_s']:>10.3f} ms if weights are read once and nothing else is")
    return lines + _show_collectives(found["collectives"])


def _show_collectives(collectives: Sequence[Mapping[str, Any]]) -> list[str]:
    together: dict[tuple[str, ...], list[float]] = {}
    for x in collectives:
        row = together.setdefault((x["kind"], " x ".join(x["axes"]), x["dtype"]), [0, 0.0, 0.0])
        for index, value in enumerate((x["times"], x["bytes"], x["seconds"])):
            row[index] += value
    lines = ["  collectives (each device sends):"] if together else []
    for (kind, axes, dtype), (times, sent, took) in sorted(together.items(), key=lambda item: -item[1][1]):
        lines.append(f"    {kind:<19}{axes:<16}{dtype:<6}{times:>6} x {sent / 1e6:>12.4g} MB {1e3 * took:>10.4g} ms")
    return lines
