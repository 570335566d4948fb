"""Every preset of full size planned for every machine.   python -m benchmarks.plans

Each device gets one segment of windows, as many as leave room by the estimate (`experiments.plan`), in the first of
`WINDOWS` that does; so accumulation is 1, and a batch is as large as the machine. Every plan is an estimate, which
needs no compiler; those of `--compile` are compiled, too, each in a process of its own (extras plan-tpu and plan-gpu).
The result, `matrix.json` and `matrix.md` in `--out`, is written after each plan. What it has is not planned again
(`--again`: all is), so the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType

from experiments import plan
from robovlms_jax import atomic, cli
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel import targets
from robovlms_jax.runs import compiled, logs, steps
from robovlms_jax.training import flops, memory

MACHINES: Mapping[str, tuple[int, int]] = {
    "h100:8": (1, 8),
    "a100:8x4": (4, 8),
    "v5p:4x4x4": (8, 8),
    "v5e:4x4": (1, 16),
    "v6e:4x4": (1, 16),
}
"""Target -> mesh: copies of the model, devices that split one."""
WINDOWS = (8, 4, 2, 1)
"""Windows of a segment, which share frames; tried in this order."""
IMPORTANT = ("kosmos_lstm", "paligemma_lstm", "qwen_vl_lstm", "llava_lstm", "flamingo_lstm")
ROOM = 1.1
"""An estimate may be so much below the compiler's peak; it was up to 8 % (`matrix.json`)."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Plan presets for machines that need not be here."""

    presets: tuple[str, ...] = ()
    """Empty: all whose backbone is of a published size."""
    targets: tuple[str, ...] = tuple(MACHINES)
    """As `experiments.plan --target` has them; those of MACHINES."""
    compile: tuple[str, ...] = IMPORTANT
    """Presets that are compiled, too; a minute (GPU) to a quarter of an hour (TPU) of a core each."""
    limit_s: int = 1800
    """Seconds that one compiler may take; what takes longer stays an estimate."""
    again: bool = False
    """Also plan what has been planned."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/plans")
    """Folder of matrix.json and matrix.md."""

    def __post_init__(self):
        known = plan.presets()
        for field, given, names in (
            ("presets", self.presets, known), ("compile", self.compile, known), ("targets", self.targets, MACHINES)
        ):  # fmt: skip
            unknown = [name for name in given if name not in names]
            if unknown:
                raise ValueError(f"{field}: no {', '.join(unknown)}; known are {', '.join(names)}.")


def main(args: Args) -> None:
    path = args.out / "matrix.json"
    rows = {(row["preset"], row["target"]): row for row in json.loads(path.read_text())} if path.exists() else {}
    for preset in args.presets or full_size():
        for target in args.targets:
            row = rows.get((preset, target))
            if row is None or args.again:
                row = rows[preset, target] = estimated(preset, target)
                print(words(row), flush=True)
            if preset in args.compile and row["windows_per_segment"] and "compiled" not in row:
                rows[preset, target] = row | {"compiled": compile_one(row, args.limit_s)}
                print(words(rows[preset, target]), flush=True)
            names = list(plan.presets())
            ordered = [rows[key] for key in sorted(rows, key=lambda key: (names.index(key[0]), *key))]
            args.out.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, "[\n" + ",\n".join(json.dumps(row) for row in ordered) + "\n]\n")
            atomic.write_text(args.out / "matrix.md", markdown(ordered))


def full_size() -> list[str]:
    """Presets whose backbone is a published one; twins and minis are made for CPUs."""
    return [name for name, x in plan.presets().items() if not x.backbone.name.endswith(("-twin", "-mini"))]


# ---------------------------------------------------------------------------------------------------------------------
# One plan


def settings(target: str, windows: int) -> dict[str, int]:
    """Fields of the preset that its plan changes: one segment of `windows` windows on each device."""
    data, fsdp = MACHINES[target]
    return {
        "data.windows_per_segment": windows, "train.batch_size": windows * data * fsdp, "train.accumulation": 1,
        "mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": 1,
    }  # fmt: skip


def estimated(preset: str, target: str) -> dict[str, Any]:
    """The plan without a compiler: estimated bytes on each device, and what its matrix products alone take."""
    place = targets.parse(target)
    data, fsdp = MACHINES[target]
    mesh = AbstractMesh((data, fsdp, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    row: dict[str, Any] = {"preset": preset, "target": target, "windows_per_segment": 0}
    config = plan.presets()[preset]
    # Goals of single windows, upstream's way, leave no frames to share.
    for windows in (1,) if config.data.compat_goal_relabelling else WINDOWS:
        subject = plan.describe(cli.override(config, **settings(target, windows)))
        abstract = compiled.abstract_state(subject.config, subject.model, mesh)
        traced, flops = _traced(preset, windows)
        loss = steps.make_loss(subject.config, subject.model)
        how = {"batch_ways": mesh.size, "platform": place.platform, "traced": traced}
        found = memory.estimate(loss, abstract, subject.batch, **how)
        row["estimate"] = found.parts()
        if found.total * ROOM > place.figures.memory:
            continue
        return row | {
            "backbone": subject.config.backbone.name,
            "mesh": {"data": data, "fsdp": fsdp},
            "windows_per_step": subject.config.train.batch_size,
            "windows_per_segment": windows,
            "accumulation": subject.config.train.accumulation,
            "remat": subject.config.backbone.remat,
            "needed_flops": flops,
            "compute_s": flops / place.figures.flops,
        }
    return row


@functools.lru_cache(maxsize=len(WINDOWS))
def _traced(preset: str, windows: int) -> tuple[core.ClosedJaxpr, float]:
    """The gradient by one segment as it is traced, and its FLOPs without rematerialisation: the same on every target,
    which has a segment on each device."""
    subject = plan.describe(cli.override(plan.presets()[preset], **settings("h100:8", windows)))
    mesh = AbstractMesh((1, 8, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    abstract = compiled.abstract_state(subject.config, subject.model, mesh)
    traced = memory.trace(steps.make_loss(subject.config, subject.model), abstract, subject.batch, ways=mesh.size)
    plain = dataclasses.replace(
        subject.model, vlm=dataclasses.replace(subject.model.vlm, remat="none", dtype="float32")
    )
    return traced, flops.of_step(steps.make_loss(subject.config, plain), abstract, subject.batch) / mesh.size


def compile_one(row: Mapping[str, Any], limit_s: int) -> dict[str, Any]:
    """What the target's compiler says of a row's training step; {"failed": why} where it does not say it."""
    out = pathlib.Path("runs/plans/cells") / f"{row['preset'].replace('/', '_')}_{row['target'].replace(':', '_')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    flags = settings(row["target"], row["windows_per_segment"])
    command = [sys.executable, "-m", "experiments.plan", "--preset", row["preset"], "--target", row["target"]]
    command += ["--programs", "training", "--out", str(out)]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    out.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"failed": f"not compiled in {limit_s} s"}
    if not out.exists():
        return {"failed": (done.stdout.strip().splitlines() or ["no word"])[-1]}
    return summary(json.loads(out.read_text()))


def summary(planned: Mapping[str, Any]) -> dict[str, Any]:
    """Of `experiments.plan`'s result what the table needs, collectives added up by kind, axes and type."""
    found = planned["plans"]["training"]
    together: dict[str, list[float]] = {}
    for x in found.get("collectives", ()):
        sums = together.setdefault(f"{x['kind']} {' x '.join(x['axes'])} {x['dtype']}", [0, 0.0, 0.0])
        for index, value in enumerate((x["times"], x["bytes"], x["seconds"])):
            sums[index] += value
    kept = ("bytes", "fits", "refused", "nearest", "flops", "traffic", "roofs_s", "bound", "floor_s", "sum_s", "mfu")
    kept += ("schedule_s", "windows_per_s", "compiler_s", "seconds_to_compile")
    return {name: found[name] for name in kept if name in found} | {"collectives": together}


# ---------------------------------------------------------------------------------------------------------------------
# As a table


def words(row: Mapping[str, Any]) -> str:
    """One plan in one line."""
    begin = f"{row['preset']}, {row['target']}: "
    if not row["windows_per_segment"]:
        return begin + f"no room, estimated {memory.readable(row['estimate']['total'])} with one window on each device"
    found = row.get("compiled", {})
    text = begin + f"{row['windows_per_segment']} windows on each device, {memory.readable(row['estimate']['total'])}"
    if "failed" in found:
        return f"{text} estimated; {found['failed']}"
    if not found:
        return f"{text} estimated, {windows_per_s(row):.0f} windows/s at most by matrix products"
    peak = memory.readable(found["bytes"]["peak"])
    if not found.get("windows_per_s"):
        return f"{text} estimated, {peak} compiled: no room"
    return f"{text} estimated, {peak} compiled, {found['windows_per_s']:.0f} windows/s by {found['bound']}"


def windows_per_s(row: Mapping[str, Any]) -> float:
    """By the slowest of a compiled program's three; else those of the matrix products alone, which is more."""
    return row.get("compiled", {}).get("windows_per_s") or row["windows_per_step"] / row["compute_s"]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each preset, those with equal plans in one; a column for each target."""
    names = [target for target in MACHINES if any(row["target"] == target for row in rows)]
    lines: dict[tuple[str, ...], list[str]] = {}
    for preset in dict.fromkeys(row["preset"] for row in rows):
        mine = {row["target"]: row for row in rows if row["preset"] == preset}
        lines.setdefault(tuple(_cell(mine[name]) if name in mine else "" for name in names), []).append(preset)
    head = ["preset", *(f"{name}, data {MACHINES[name][0]} x fsdp {MACHINES[name][1]}" for name in names)]
    table = [head, ["---"] * len(head)]
    table += [[", ".join(f"`{preset}`" for preset in presets), *cells] for cells, presets in lines.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in table) + "\n"


def kept_table(found: Mapping[str, Any]) -> str:
    """`remat.json` as a table: a line for each backbone.remat, four columns for each target."""
    names = [name for name in MACHINES if name in found]
    columns = ("memory (estimate)", "in the host's", "products, traffic", "by its schedule")
    table = [["`backbone.remat`", *(f"{name}: {column}" for name in names for column in columns)]]
    table.append(["---"] * len(table[0]))
    for remat in found[names[0]]:
        table.append([f"`{remat}`", *(cell for name in names for cell in _kept(found[name][remat]))])
    return "\n".join(f"| {' | '.join(line)} |" for line in table) + "\n"


def _kept(found: Mapping[str, Any]) -> list[str]:
    memory = f"{found['peak_bytes'] / 2**30:.2f} ({found['estimate_bytes'] / 2**30:.2f}) GiB"
    host = f"{found.get('host_bytes', 0) / 2**30:.3g} GiB"
    if "refused" in found:
        return [memory, host, "no room", ""]
    took = found["schedule_ms"]["kernels"] + found["schedule_ms"]["waited"]
    return [memory, host, f"{found['flops'] / 1e12:.1f} TFLOP, {found['traffic'] / 1e9:.0f} GB", f"{took:.0f} ms"]


def _cell(row: Mapping[str, Any]) -> str:
    estimate, windows = row["estimate"]["total"] / 2**30, row["windows_per_segment"]
    if not windows:
        return f"no room ({estimate:.0f} GiB)"
    found, speed = row.get("compiled", {}), windows_per_s(row)
    if "bytes" in found:
        room = f"**{found['bytes']['peak'] / 2**30:.1f}** ({estimate:.1f}) GiB"
        return f"{windows}; {room}; " + (f"**{speed:.0f}**/s, {found['bound']}" if found["fits"] else "no room")
    return f"{windows}; ({estimate:.1f}) GiB; < {speed:.0f}/s"


if __name__ == "__main__":
    logs.to_stderr()
    # No accelerator is asked for, or needed; processes that compile need none, either.
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    main(cli.read(Args))
