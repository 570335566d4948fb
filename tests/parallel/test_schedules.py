"""How long programs take by the order of their kernels and collectives."""

from __future__ import annotations

import pathlib

import pytest

from robovlms_jax.parallel import program_costs, schedules

PROGRAMS = pathlib.Path(__file__).parent / "programs"


def program(*between: str, turns: int = 1) -> str:
    """A loop whose body gathers f32[4] from four devices and multiplies 8 x 8 matrices, in 1024 FLOPs a product."""
    product = "f32[8,8] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    body = [f"  %{x} = {product}" if len(x) == 1 else f"  {x}" for x in between]
    return "\n".join(
        [
            "%body (p: (f32[8,8], f32[4])) -> (f32[8,8], f32[4]) {",
            "  %p = (f32[8,8], f32[4]) parameter(0)",
            "  %a = f32[8,8] get-tuple-element(%p), index=0",
            "  %s = f32[4] get-tuple-element(%p), index=1",
            *body,
            "  ROOT %t = (f32[8,8], f32[4]) tuple(%a, %s)",
            "}",
            "%condition (q: (f32[8,8], f32[4])) -> pred[] {",
            "  %q = (f32[8,8], f32[4]) parameter(0)",
            "  ROOT %c = pred[] constant(true)",
            "}",
            "ENTRY %main (i: (f32[8,8], f32[4])) -> (f32[8,8], f32[4]) {",
            "  %i = (f32[8,8], f32[4]) parameter(0)",
            f"  ROOT %w = (f32[8,8], f32[4]) while(%i), condition=%condition, body=%body, "
            f'backend_config={{"known_trip_count":{{"n":"{turns}"}}}}',
            "}",
        ]
    )


START = "%g = (f32[4], f32[16]) all-gather-start(%s), replica_groups={{0,1,2,3}}, dimensions={0}"
DONE = "%d = f32[16] all-gather-done(%g)"
WHOLE = "%d = f32[16] all-gather(%s), replica_groups={{0,1,2,3}}, dimensions={0}"


def schedule(text: str, collective: float) -> tuple[float, float, float]:
    found = schedules.of_text(text, 4, lambda flops, moved: flops / 1024, lambda x: collective)
    return found.kernels, found.waited, found.collectives


def test_a_collective_is_waited_for_where_kernels_between_its_start_and_its_end_take_less():
    # A second a product. Behind two of them a collective of 1.5 s is hidden, behind one it is not, behind none not at
    # all, be it started and waited for or one instruction; and a product in front of it hides nothing.
    assert schedule(program(START, "x", "y", DONE, "z"), 1.5) == (3, 0, 1.5)
    assert schedule(program(START, "x", DONE, "y", "z"), 1.5) == (3, 0.5, 1.5)
    assert schedule(program("x", "y", START, DONE, "z"), 1.5) == (3, 1.5, 1.5)
    assert schedule(program("x", WHOLE, "y", "z"), 1.5) == (3, 1.5, 1.5)


def test_loops_count_as_often_as_they_turn():
    assert schedule(program(START, "x", DONE, turns=7), 1.5) == (7, 3.5, 10.5)


def test_links_serve_one_collective_at_a_time():
    # Two of 1.5 s, started together, take three; one product hides one second of them.
    more = [line.replace("%g", "%h").replace("%d", "%e") for line in (START, DONE)]
    assert schedule(program(START, more[0], "x", DONE, more[1]), 1.5) == (1, 2, 3)


@pytest.mark.parametrize("name", ["v5e", "h100"])
def test_compiled_programs_are_read(name):
    # What is on the links is what the program's costs have, on TPUs, which spread one over several kernels, too; what
    # is waited for is no more than that.
    text = (PROGRAMS / f"{name}.txt").read_text()
    costs = program_costs.of_text(text, 8)
    found = schedules.of_text(text, 8, lambda flops, moved: flops, lambda x: x.sent)
    assert found.kernels == costs.flops
    assert found.collectives == pytest.approx(sum(x.sent * x.times for x in costs.collectives))
    assert 0 < found.waited <= found.collectives and found.total == found.kernels + found.waited
