"""Plans of compiled programs: roofs, what fits, and that nothing is compiled twice."""

from __future__ import annotations

import types

import jax
import pytest

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel import targets
from robovlms_jax.runs import compiled

FOUND = {
    "bytes": {"peak": 2**30}, "flops": 989e9, "traffic": 3350e6, "cycles": [0, 0], "unknown_loops": 0,
    "optimal_seconds": None, "seconds_to_compile": 1.0,
    "collectives": [
        {"kind": "all-reduce", "axes": ["data"], "dtype": "f32", "times": 2, "bytes": 1e9, "seconds": 3e-3, "where": ""}
    ],
}  # fmt: skip


@pytest.fixture
def place(tmp_path) -> compiled.Place:
    return compiled.Place(targets.parse("h100:1"), meshes.make_mesh((1, 1, 1), jax.devices()[:1]), tmp_path)


def test_a_step_cannot_be_faster_than_its_lowest_roof(place):
    # An H100 computes 989 GFLOP in a millisecond and moves 3.35 GB in one; the collectives take three.
    found = compiled._roofs(place, FOUND, needed=494.5e9)
    assert found["roofs_s"] == pytest.approx({"compute": 1e-3, "memory": 1e-3, "interconnect": 3e-3})
    assert (found["bound"], found["floor_s"], found["sum_s"]) == ("interconnect", 3e-3, pytest.approx(5e-3))
    assert found["mfu"] == pytest.approx(0.5e-3 / 3e-3)
    text = compiled.show(place.target, {"data": 1}, {"training": found})
    assert "3.000 ms at least, by interconnect: MFU at most 16.7 %" in text
    assert "all-reduce" in text and "1000 MB" in text


def test_what_the_compiler_says_of_loops_is_put_right_by_their_cycles(place):
    found = compiled._roofs(place, FOUND | {"cycles": [600, 200], "optimal_seconds": 0.01}, needed=1.0)
    assert found["compiler_s"] == pytest.approx(0.03)


def lowered(text: str, error: str, tried: list[str]) -> types.SimpleNamespace:
    def compile(compiler_options):
        tried.append(text)
        raise jax.errors.JaxRuntimeError(error)

    return types.SimpleNamespace(as_text=lambda: text, compile=compile)


def test_a_program_that_the_compiler_refuses_for_its_memory_does_not_fit_and_is_not_compiled_again(place):
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 31.20G of 15.75G hbm."
    tried: list[str] = []
    first = compiled._compiled(place, lowered("a", said, tried))
    assert first["bytes"]["peak"] == int(31.2 * 2**30)
    assert compiled._compiled(place, lowered("a", said, tried)) == first and tried == ["a"]
    compiled._compiled(place, lowered("b", said, tried))
    assert tried == ["a", "b"]  # another program
    plan = compiled._roofs(place, first, needed=1.0) | {"nearest": "--train.accumulation 2 (about 15 GiB)"}
    assert not plan["fits"]
    text = compiled.show(place.target, {"data": 1}, {"training": plan})
    assert "does not fit" in text and "Nearest that fits: --train.accumulation 2 (about 15 GiB)" in text


def test_other_errors_of_the_compiler_are_not_hidden(place):
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such flag"):
        compiled._compiled(place, lowered("a", "INVALID_ARGUMENT: no such flag", []))
