"""XLA's text of a compiled program, taken apart: computations, instructions, shapes, how often each runs.

The text is what `jax.stages.Compiled.as_text()` gives: one device's part of the program, after partitioning, fusion and
scheduling, so that shapes are one device's. Nothing here needs a device, a compiler or JAX. `program_costs` counts
with it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_BITS = re.compile(r"\d+")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")
_REFERENCE = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of one device. space: XLA's number of a memory; 0: the device's main memory, others lie on the chip."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        if self.dtype == "token":
            return 0
        bits = 8 if self.dtype == "pred" else int(_BITS.search(self.dtype)[0])
        return math.ceil(self.size * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. result: the arrays that it makes, a tuple's one after the other. operands: names. attributes: the text
    behind the operands; `inner` finds the computations that it names."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool = False

    def attribute(self, name: str) -> str:
        """The value of `name=`, up to the next one; "" where there is none."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]*)", self.attributes)
        return found[1] if found else ""

    def inner(self, *names: str) -> list[str]:
        """Computations that the attributes `names` refer to."""
        return [match for name in names for match in _REFERENCE.findall(self.attribute(name))]

    @property
    def where(self) -> str:
        """What in the model this computes, as JAX named it; "" where nothing is noted."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run, by name."""

    name: str
    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next((x for x in self.instructions.values() if x.root), list(self.instructions.values())[-1])

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """Name -> the instructions that read it."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction, how often it runs in one call of the program, and whether as part of another one (a fusion)."""

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """entry: the name of the computation that is called."""

    computations: Mapping[str, Computation]
    entry: str

    def runs(self) -> Iterator[Run]:
        """Every instruction that is reached, loops counted. Of branches, all count."""
        yield from self._runs(self.entry, 1, False)

    def _runs(self, name: str, times: int, fused: bool) -> Iterator[Run]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield Run(instruction, computation, times, fused)
            if instruction.opcode == "fusion":
                for inner in instruction.inner("calls"):
                    yield from self._runs(inner, times, True)
            elif instruction.opcode == "while":
                for inner in instruction.inner("body"):
                    yield from self._runs(inner, times * (self.trips(instruction, computation) or 1), fused)
            elif instruction.opcode in ("call", "async-start", "conditional"):
                names = ("calls", "to_apply", "branch_computations", "true_computation", "false_computation")
                for inner in dict.fromkeys(instruction.inner(*names)):
                    yield from self._runs(inner, times, fused)

    def trips(self, loop: Instruction, computation: Computation) -> int | None:
        """How often a `while` runs its body: as XLA notes it, or by what its condition compares; None: not known."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.computations[loop.inner("condition")[0]]
        start = computation.instructions.get(loop.operands[0]) if loop.operands else None
        for inner, names in self._inlined(condition):
            compares = [x for x in inner.instructions.values() if x.opcode == "compare"]
            for compare in compares:
                values = [self._constant(inner, name, names, start, computation) for name in compare.operands]
                if compare.attribute("direction") == "LT" and len(values) == 2 and values[1] is not None:
                    by = self._stride(loop, self._counter(inner, compare.operands[0], names))
                    return max(math.ceil((values[1] - (values[0] or 0)) / by), 0)
        return None

    def _counter(self, computation: Computation, name: str, outside: Sequence[tuple[Computation, str]]) -> int | None:
        """Which part of what a loop carries stands behind a name in its condition; None: none."""
        for _ in range(8):  # copies of copies
            found = computation.instructions.get(name)
            if found is not None and found.opcode == "get-tuple-element":
                return int(found.attribute("index"))
            if found is not None and found.opcode == "parameter" and outside:
                computation, name = outside[int(found.arguments)]
                outside = ()
            elif found is not None and found.opcode in ("copy", "bitcast", "convert") and found.operands:
                name = found.operands[0]
            else:
                return None
        return None

    def _stride(self, loop: Instruction, counter: int | None) -> int:
        """By how much a turn raises the counter; libtpu's loops over matrix products and shifts do two turns in one."""
        body = self.computations[loop.inner("body")[0]]
        if counter is None or body.root.opcode != "tuple" or counter >= len(body.root.operands):
            return 1
        raised = body.instructions.get(body.root.operands[counter])
        if raised is None or raised.opcode != "add":
            return 1
        found = (self._constant(body, name, (), None, body) for name in raised.operands)
        return next((value for value in found if value and value > 0), 1)

    def _inlined(self, condition: Computation) -> Iterator[tuple[Computation, Sequence[tuple[Computation, str]]]]:
        """The condition, and what its fusions call: each with what stands for its parameters outside."""
        yield condition, ()
        for instruction in condition.instructions.values():
            for name in instruction.inner("calls") if instruction.opcode == "fusion" else ():
                yield self.computations[name], [(condition, operand) for operand in instruction.operands]

    def _constant(
        self,
        computation: Computation,
        name: str,
        outside: Sequence[tuple[Computation, str]],
        start: Instruction | None,
        around: Computation,
    ) -> int | None:
        """A whole number behind a name in a loop's condition: a constant, or what the loop begins with (`start`)."""
        for _ in range(8):  # copies of copies
            found = computation.instructions.get(name)
            if found is None:
                return None
            if found.opcode == "constant":
                return int(found.arguments) if re.fullmatch(r"-?\d+", found.arguments) else None
            if found.opcode == "parameter" and outside:
                computation, name = outside[int(found.arguments)]
                outside = ()
            elif found.opcode == "get-tuple-element" and computation is not around and start is not None:
                index = int(found.attribute("index"))
                if start.opcode != "tuple" or index >= len(start.operands):
                    return None
                computation, name = around, start.operands[index]
            elif found.opcode in ("copy", "bitcast", "convert") and found.operands:
                name = found.operands[0]
            else:
                return None
        return None


def parse(text: str) -> Program:
    """Raises ValueError: the text has no entry computation."""
    computations: dict[str, Computation] = {}
    name, entry, lines = "", "", {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and " = " not in line.split("(", 1)[0]:
            name, lines = header[2], {}
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            computations[name], name = Computation(name, lines), ""
        elif name and (found := _instruction(line)) is not None:
            lines[found.name] = found
    if not entry:
        raise ValueError("no text of a compiled program: expected XLA's HLO with a computation called ENTRY.")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    line = _COMMENT.sub("", line)
    begin = _NAME.match(line)
    if begin is None:
        return None
    rest = line[begin.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 2
    arguments, attributes = rest[:end], rest[end + 1 :]
    return Instruction(
        begin[2], opcode, arrays(result), tuple(_REFERENCE.findall(arguments)), arguments, attributes, bool(begin[1])
    )


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed: the index behind it."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def arrays(text: str) -> tuple[Array, ...]:
    """All array types in a text, such as "(bf16[8,4]{1,0:T(8,128)S(1)}, s32[])"."""
    found = []
    for dtype, shape, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.removeprefix("<=")) for size in shape.split(",") if size)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)
