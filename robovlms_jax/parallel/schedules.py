"""How long a compiled program takes by the order in which its compiler lets kernels run and collectives go on beside
them.

XLA's text is the schedule: kernels run one after the other, and a collective that is started goes on until the kernel
that needs it, on links that serve one collective at a time. What is not behind kernels by then is waited for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from robovlms_jax.parallel import hlo, program_costs


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Seconds of one call on one device. kernels: all of them, one after the other. waited: the device does nothing,
    for a collective is not through. collectives: on the links, waited for or not."""

    kernels: float
    waited: float
    collectives: float

    @property
    def total(self) -> float:
        return self.kernels + self.waited


def of_text(
    text: str,
    devices: int,
    kernel: Callable[[float, float], float],
    collective: Callable[[program_costs.Collective], float],
) -> Schedule:
    """Args:
      devices: that the program runs on.
      kernel: (FLOPs of products, bytes of main memory) of a kernel -> its seconds.
      collective: -> its seconds, once.
    Raises ValueError: no text of a compiled program.
    """
    program = hlo.parse(text)
    return _Walk(program, devices, kernel, collective).computation(program.entry)


@dataclasses.dataclass
class _Walk:
    program: hlo.Program
    devices: int
    kernel: Callable[[float, float], float]
    collective: Callable[[program_costs.Collective], float]

    def computation(self, name: str) -> Schedule:
        """Of one call of a computation that is no fusion's. Nothing is on the links when it begins, and all is
        through when it ends."""
        computation = self.program.computations[name]
        now = links = kernels = waited = exchanged = 0.0
        ends: dict[str, float] = {}  # collective -> when it is through
        last = self._last_parts(computation)

        def wait(until: float) -> None:
            nonlocal now, waited
            waited += max(until - now, 0.0)
            now = max(until, now)

        def start(key: str, seconds: float) -> None:
            nonlocal links, exchanged
            links = ends[key] = max(links, now) + seconds
            exchanged += seconds

        for x in computation.instructions.values():
            inside = self._inside(x, computation)
            if inside is not None:
                if inside.collectives:  # it has the links for itself
                    wait(max(ends.values(), default=0.0))
                kernels, waited = kernels + inside.kernels, waited + inside.waited
                exchanged, now = exchanged + inside.collectives, now + inside.total
                continue
            if x.opcode.removesuffix("-start") in program_costs.KINDS:
                start(x.name, self._seconds(x, computation))
                if not x.opcode.endswith("-start"):
                    wait(ends[x.name])
                continue
            if x.opcode.endswith("-done"):
                wait(max((ends[operand] for operand in x.operands if operand in ends), default=now))
                continue
            parts = self._parts(x)
            for channel, (part, where) in parts.items():
                if channel not in ends:
                    start(channel, self._seconds(part, where))
            took = self.kernel(self._flops(x, computation), program_costs.traffic_of(x, computation, self.program))
            kernels, now = kernels + took, now + took
            for channel in parts:
                if last[channel] == x.name:
                    wait(ends[channel])
        wait(max(ends.values(), default=0.0))
        return Schedule(kernels, waited, exchanged)

    def _inside(self, x: hlo.Instruction, computation: hlo.Computation) -> Schedule | None:
        """Of a loop with all its turns, of a call and of all branches; None: `x` is none of these."""
        if x.opcode == "while":
            turns, names = self.program.trips(x, computation) or 1, x.inner("body")
        elif x.opcode in ("call", "conditional"):
            named = ("calls", "to_apply", "branch_computations", "true_computation", "false_computation")
            turns, names = 1, list(dict.fromkeys(x.inner(*named)))
        else:
            return None
        found = [self.computation(name) for name in names]
        return Schedule(*(turns * sum(getattr(y, field.name) for y in found) for field in dataclasses.fields(Schedule)))

    def _seconds(self, x: hlo.Instruction, computation: hlo.Computation) -> float:
        found = program_costs.collective_of(hlo.Run(x, computation, 1, False), self.devices)
        return self.collective(found) if found.ways > 1 else 0.0

    def _parts(self, x: hlo.Instruction) -> dict[str, tuple[hlo.Instruction, hlo.Computation]]:
        """Channel -> a collective that goes on inside a fusion; a TPU's programs spread one over several kernels."""
        found = {}
        for name in x.inner("calls") if x.opcode == "fusion" else ():
            inside = self.program.computations[name]
            for y in inside.instructions.values():
                if y.opcode.removesuffix("-start") in program_costs.KINDS:
                    found[y.attribute("channel_id") or y.name] = (y, inside)
        return found

    def _last_parts(self, computation: hlo.Computation) -> dict[str, str]:
        """Channel -> the last kernel that has a part of the collective in it."""
        return {channel: x.name for x in computation.instructions.values() for channel in self._parts(x)}

    def _flops(self, x: hlo.Instruction, computation: hlo.Computation) -> float:
        total = program_costs.flops_of(x, computation)
        for name in x.inner("calls") if x.opcode == "fusion" else ():
            inside = self.program.computations[name]
            total += sum(self._flops(y, inside) for y in inside.instructions.values())
        return total
