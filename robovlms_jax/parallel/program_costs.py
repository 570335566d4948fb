"""What a compiled program costs on one device: matrix products, memory traffic and collectives, loops counted.

Read from XLA's text (`hlo`), because XLA's own analysis counts the body of a loop once, and gives no account of GPUs at
all. Two things are models: a kernel reads each of its operands in main memory once and writes each result once (of what
it slices or updates, the part alone), and collectives go round a ring (Patarasu and Yuan 2009), which sends least.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from robovlms_jax.parallel import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    kind: of `KINDS`. groups: device positions in the mesh that exchange with each other (pairs, for a permutation).
    operand: bytes that each device brings along. times: in one call. where: in the model. dtype: of the largest part.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    operand: int
    times: int
    where: str
    dtype: str

    @property
    def ways(self) -> int:
        """Devices that exchange with each other."""
        return max((len(group) for group in self.groups), default=1)

    @property
    def sent(self) -> float:
        """Bytes that one device sends each time."""
        others = self.ways - 1
        factors = {"all-gather": others, "all-reduce": 2 * others / self.ways, "collective-permute": float(others > 0)}
        return self.operand * factors.get(self.kind, others / self.ways)

    def axes(self, mesh: dict[str, int]) -> tuple[str, ...]:
        """Names of the mesh axes along which it goes. mesh: axis -> size, in the order of the devices."""
        along: set[str] = set()
        for group in self.groups:
            places = np.array(np.unravel_index(group, tuple(mesh.values())))
            along |= {name for name, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1}
        return tuple(name for name in mesh if name in along)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Of one device, in one call of the program: how often some of its kernels run, their FLOPs and bytes."""

    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one device, in one call of the program.

    flops: of matrix products and convolutions. bytes: read from and written to main memory. cycles: XLA's own estimate
    for TPUs; 0 elsewhere. cycles_once: the same with every loop counted once. unknown_loops: loops whose number of
    turns the text does not tell; they count once. kernels: launched one after the other, which takes microseconds each
    however little they do. cudnn: attention's kernels of NVIDIA's library, part of flops and bytes; what they need
    beside operands and results is chosen by the library on the card, and not counted.
    """

    flops: float
    bytes: float
    cycles: float
    cycles_once: float
    collectives: tuple[Collective, ...]
    unknown_loops: int
    kernels: int
    cudnn: Kernels = Kernels()


def of_text(text: str, devices: int) -> Costs:
    """devices: that the program runs on. Raises ValueError: no text of a compiled program."""
    program = hlo.parse(text)
    flops = moved = cycles = once = 0.0
    collectives: dict[str, Collective] = {}
    unknown, kernels, cudnn = 0, 0, Kernels()
    for run in program.runs():
        x = run.instruction
        flops += run.times * flops_of(x, run.computation)
        kind = x.opcode.removesuffix("-start")
        if kind in KINDS:
            # A TPU's programs spread one collective over several kernels, which share its channel.
            channel = x.attribute("channel_id") if run.fused else ""
            key = channel or f"{run.computation.name}/{x.name}"
            if key not in collectives or collectives[key].times < run.times:
                collectives[key] = collective_of(run, devices)
        if not run.fused:
            bytes_of = traffic_of(x, run.computation, program)
            moved += run.times * bytes_of
            kernels += run.times * (bytes_of > 0)
            if _ATTENTION in x.attribute("custom_call_target"):
                more = run.times * flops_of(x, run.computation)
                cudnn = Kernels(cudnn.calls + run.times, cudnn.flops + more, cudnn.bytes + run.times * bytes_of)
            cycle = re.search(r'"estimated_cycles":"(\d+)"', x.attributes)
            cycles += run.times * int(cycle[1]) if cycle else 0
            once += int(cycle[1]) if cycle else 0
            unknown += x.opcode == "while" and program.trips(x, run.computation) is None
    exchanging = tuple(found for found in collectives.values() if found.ways > 1)
    return Costs(flops, moved, cycles, once, exchanging, unknown, kernels, cudnn)


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products


def flops_of(x: hlo.Instruction, computation: hlo.Computation) -> float:
    """Of one instruction that is a product or a convolution; those inside of a fusion are instructions of their own."""
    operands = [array for operand in computation.operands(x) for array in operand.result[:1]]
    if x.opcode == "dot":
        contracted = _numbers(x.attribute("lhs_contracting_dims"))
        return 2.0 * x.result[0].size * math.prod(operands[0].shape[axis] for axis in contracted)
    if x.opcode == "convolution":
        return _convolution(x, operands[0].shape, operands[1].shape, x.result[0].shape)
    if x.opcode != "custom-call":
        return 0.0
    target = x.attribute("custom_call_target")
    if _ATTENTION in target:
        return _attention(x, operands)
    if "matmul" in target or "gemm" in target:
        numbers = re.search(r'"dot_dimension_numbers":(\{[^}]*\})', x.attributes)
        contracted = json.loads(numbers[1])["lhs_contracting_dimensions"] if numbers else []
        return 2.0 * x.result[0].size * math.prod(operands[0].shape[int(axis)] for axis in contracted)
    if "conv" in target and x.attribute("dim_labels"):
        # Operands and result change places in the two backward passes; the arithmetic is the forward pass's.
        image, kernel, out = operands[0].shape, operands[1].shape, x.result[0].shape
        if "BackwardFilter" in target:
            kernel, out = out, kernel
        elif "BackwardInput" in target:
            image, out = out, image
        return _convolution(x, image, kernel, out)
    return 0.0


_ATTENTION = "__cudnn$fmha"


def _attention(x: hlo.Instruction, operands: Sequence[hlo.Array]) -> float:
    """Of queries with keys and of weights with values; backwards of scores once more, and four gradients. Masked scores
    count, as XLA's own kernels compute them."""
    scores = re.search(r'"intermediate_tensor_shape":\{[^}]*?"dimensions":\[([^\]]*)\]', x.attributes.replace(" ", ""))
    products = 5 if "Backward" in x.attribute("custom_call_target") else 2
    return 2.0 * products * math.prod(_numbers(scores[1])) * operands[0].shape[-1] if scores else 0.0


def _convolution(x: hlo.Instruction, image: Sequence[int], kernel: Sequence[int], out: Sequence[int]) -> float:
    """2 per product of a number of the image with one of the kernel. Holes and borders are no products: on TPUs,
    batched matrix products are written as convolutions that are mostly those."""
    images, kernels, outs = re.split("_|->", x.attribute("dim_labels"))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", x.attribute("window")))
    products = 1
    spatial = sorted(letter for letter in outs if letter.isdigit())
    for letter in spatial:
        axis = int(letter)
        step, spread, holes = (_entry(window, name, axis) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(window["pad"].split("x")[axis].split("_")[0]) if "pad" in window else 0
        length, taps = image[images.index(letter)], kernel[kernels.index(letter)]
        places = np.arange(out[outs.index(letter)])[:, None] * step + np.arange(taps)[None] * holes - low
        inside = (places >= 0) & (places <= (length - 1) * spread) & (places % spread == 0)
        products *= int(inside.sum())
    rows, features = out[outs.index("b")], out[outs.index("f")]
    return 2.0 * rows * features * kernel[kernels.index("i")] * products


def _entry(window: dict[str, str], name: str, axis: int) -> int:
    return int(window[name].split("x")[axis]) if name in window else 1


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# ---------------------------------------------------------------------------------------------------------------------
# Memory traffic

_NO_TRAFFIC = """
    parameter constant iota tuple get-tuple-element bitcast while conditional call after-all opt-barrier domain
    partition-id replica-id copy-done async-start async-update async-done all-gather-done all-reduce-done
    slice-done collective-permute-done reduce-scatter-done all-to-all-done send send-done recv recv-done"""
_NOTHING = frozenset(_NO_TRAFFIC.split())
_PARTS = ("dynamic-slice", "gather", "slice")


def traffic_of(x: hlo.Instruction, computation: hlo.Computation, program: hlo.Program) -> float:
    """Bytes that an instruction outside of fusions reads and writes."""
    if x.opcode in _NOTHING:
        return 0.0
    operands = computation.operands(x)
    if x.opcode == "fusion":
        return _fusion(x, operands, program.computations[x.inner("calls")[0]], program)
    if x.opcode in _PARTS:
        return 2.0 * _main(x.result)
    if x.opcode == "slice-start":  # its result holds the whole operand, and the part, mostly fetched onto the chip
        part = x.result[1]
        return float(_main([dataclasses.replace(part, space=operands[0].result[0].space)]) + _main([part]))
    if x.opcode == "dynamic-update-slice":
        return 2.0 * _main(operands[1].result)
    if x.opcode == "scatter":
        return 3.0 * _main(operands[-1].result)
    read = sum(_main(operand.result) for operand in operands)
    if x.opcode == "custom-call" and len(x.result) > 1 and x.result[-1].dtype == "s8":  # a library's scratch space
        return read + _main(x.result[:-1])
    if x.opcode.endswith("-start"):  # its result holds the operands, too
        ways = 1 if x.opcode == "copy-start" else 0
        return read + ways * _main(x.result[:1])
    return read + _main(x.result)


def _main(arrays: Sequence[hlo.Array]) -> int:
    return sum(array.bytes for array in arrays if array.space == 0)


def _fusion(
    x: hlo.Instruction, operands: Sequence[hlo.Instruction], inside: hlo.Computation, program: hlo.Program
) -> float:
    parameters = _parameters(inside)
    total = 0.0
    for index, operand in enumerate(operands):
        if index not in parameters:
            continue
        users = _users(inside, parameters[index], program)
        if users and all(_is_part(user, name) for user, name in users):
            total += sum(_main(_in_space(user.result, operand)) for user, _ in users if user.opcode in _PARTS)
        else:
            total += _main(operand.result)
    root = inside.root
    made = inside.operands(root) if root.opcode == "tuple" else [root]
    for array, source in zip(x.result, made, strict=False):
        source, place = _behind(inside, source, program)
        if source.opcode == "dynamic-update-slice":
            total += _main(_in_space(place.operands(source)[1].result, x))
        elif source.opcode != "parameter" and source.opcode.removesuffix("-start") not in KINDS:
            total += _main([array])
    return total


def _parameters(inside: hlo.Computation) -> dict[int, str]:
    return {int(x.arguments): x.name for x in inside.instructions.values() if x.opcode == "parameter"}


def _users(inside: hlo.Computation, name: str, program: hlo.Program) -> list[tuple[hlo.Instruction, str]]:
    """Who reads a parameter, and by which name; seen through views, and into fusions that are part of this one: on TPUs
    a product's kernel has another in it that cuts its operand out of a stack."""
    found = []
    for user in inside.users.get(name, ()):
        if user.opcode in ("bitcast", "reshape") and not user.root:
            found += _users(inside, user.name, program)
        elif user.opcode == "fusion":
            within = program.computations[user.inner("calls")[0]]
            parameters = _parameters(within)
            for index, operand in enumerate(user.operands):
                if operand == name and index in parameters:
                    found += _users(within, parameters[index], program)
        else:
            found.append((user, name))
    return found


def _is_part(user: hlo.Instruction, name: str) -> bool:
    """Does it read a part of `name` only, or pass it on as it is?"""
    if user.opcode in (*_PARTS, "dynamic-update-slice"):
        return user.operands[0] == name and name not in user.operands[1:]
    return user.opcode == "tuple" or user.opcode.removesuffix("-start") in KINDS


def _behind(
    inside: hlo.Computation, source: hlo.Instruction, program: hlo.Program
) -> tuple[hlo.Instruction, hlo.Computation]:
    """What makes an array, seen through views, casts and fusions that are part of this one; and what it is part of."""
    while True:
        if source.opcode == "fusion":
            within = program.computations[source.inner("calls")[0]]
            if within.root.opcode == "tuple":
                return source, inside
            inside, source = within, within.root
        elif source.opcode in ("bitcast", "convert", "copy", "reshape") and inside.operands(source):
            source = inside.operands(source)[0]
        else:
            return source, inside


def _in_space(arrays: Sequence[hlo.Array], place: hlo.Instruction) -> list[hlo.Array]:
    """Arrays inside a fusion, in the memory in which what they are part of lies."""
    space = min((array.space for array in place.result), default=0)
    return [dataclasses.replace(array, space=space) for array in arrays]


# ---------------------------------------------------------------------------------------------------------------------
# Collectives


def collective_of(run: hlo.Run, devices: int) -> Collective:
    """devices: that the program runs on."""
    x = run.instruction
    brought = [array for operand in run.computation.operands(x) for array in operand.result]
    largest = max(brought, key=lambda array: array.bytes, default=hlo.Array("f32", (0,)))
    return Collective(
        kind=x.opcode.removesuffix("-start"),
        groups=tuple(groups(x.attributes, devices)),
        operand=sum(array.bytes for array in brought),
        times=run.times,
        where=x.where,
        dtype=largest.dtype,
    )


def groups(attributes: str, devices: int) -> Iterator[tuple[int, ...]]:
    """Which devices exchange with each other, from the attributes of a collective: `source_target_pairs={{0,1},..}`,
    or `replica_groups=` in one of XLA's three forms: lists `{{0,1},{2,3}}`, a range `[2,4]<=[4,2]T(1,0)`, or axes of
    a mesh `mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}`. Groups of one, where ids are those of replicas: all.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        yield from (tuple(_numbers(pair)) for pair in re.findall(r"\{[^}]*\}", pairs[1]))
        return
    found: list[tuple[int, ...]] = []
    if mesh := re.search(
        r"replica_groups=@?\w*\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", attributes
    ):
        found = _along(mesh)
    elif span := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape = _numbers(span[1])
        found = [tuple(row) for row in _range(span[2], span[3]).reshape(-1, shape[-1]).tolist()]
    elif lists := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        found = [tuple(_numbers(group)) for group in re.findall(r"\{[^}]*\}", lists[1])]
    whole = "use_global_device_ids=true" not in attributes and all(len(group) <= 1 for group in found)
    yield from [tuple(range(devices))] if whole else found


def _range(sizes: str, order: str | None) -> np.ndarray:
    sizes = _numbers(sizes)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(order)) if order else ids


def _along(mesh: re.Match) -> list[tuple[int, ...]]:
    names = re.findall(r"'([^']+)'=(\d+)", mesh[1])
    sizes = [int(size) for _, size in names]
    ids = _range(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(sizes))
    # An axis that is used in part, 'name':(before)size, is three axes.
    shape, chosen = [], []
    used = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[4])}
    for name, size in zip((name for name, _ in names), sizes, strict=True):
        before, part = used.get(name, ("", ""))
        pieces = [int(before), int(part), size // int(before) // int(part)] if part else [size]
        if name in used:
            chosen.append(len(shape) + (1 if part else 0))
        shape += pieces
    ids = ids.reshape(shape)
    rest = [axis for axis in range(len(shape)) if axis not in chosen]
    ways = math.prod(shape[axis] for axis in chosen)
    return [tuple(row) for row in ids.transpose(*rest, *chosen).reshape(-1, ways).tolist()]
