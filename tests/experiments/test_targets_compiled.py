"""KOSMOS-2's twin compiled for accelerators that are not here: `make test-plans`; needs the compilers."""

from __future__ import annotations

import importlib.util

import pytest

from experiments import plan
from robovlms_jax import cli

pytestmark = pytest.mark.slow
COMPILERS = {"v": "libtpu", "h": "jax_plugins.xla_cuda12"}


def planned(target: str, data: int, fsdp: int, programs: tuple[str, ...] = ("training",)) -> dict:
    """The twin with two segments on each device, nothing kept."""
    module = COMPILERS[target[0]]
    if importlib.util.find_spec(module.partition(".")[0]) is None or importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: make test-plans")
    changes = {
        "policy.window": 4, "data.windows_per_segment": 2, "train.batch_size": 4 * data * fsdp, "mesh.data": data,
        "mesh.fsdp": fsdp, "target": target, "programs": programs, "compiled": "",
    }  # fmt: skip
    return plan.plan(cli.override(plan.presets()["sample"], **changes))["plans"]


def held(collectives: list[dict]) -> dict[tuple, float]:
    """(kind, axes, type) -> bytes that a device sends, summed over the program."""
    found: dict[tuple, float] = {}
    for x in collectives:
        key = (x["kind"], tuple(x["axes"]), x["dtype"])
        found[key] = found.get(key, 0.0) + x["bytes"]
    return found


@pytest.mark.parametrize("target", ["v5e:2x2", "h100:4"])
def test_a_training_and_a_control_step_are_compiled_for_what_is_not_here(target):
    plans = planned(target, 2, 2, ("training", "control"))
    training, control = plans["training"], plans["control"]
    # No rematerialisation in the twin: what is computed is what is needed. Holes or loops miscounted would show here.
    assert training["flops"] == pytest.approx(training["needed_flops"], rel=0.01)
    assert training["unknown_loops"] == control["unknown_loops"] == 0
    assert {tuple(x["axes"]) for x in training["collectives"]} <= {("data",), ("fsdp",), ("data", "fsdp")}
    assert control["collectives"] == []
    for found in (training, control):
        assert found["fits"] and 0 < found["mfu"] < 1
        assert found["bytes"]["peak"] < 256 * 2**20 and found["bytes"]["parameters"] < found["bytes"]["arguments"]
    # Parameters, optimizer and batch arrive as planned; TPUs pad them to tiles.
    exact = sum(training["bytes"][name] for name in ("parameters", "optimizer", "batch"))
    assert exact <= training["bytes"]["arguments"] + 1024 < (2.5 if target[0] == "v" else 1.05) * exact
    # libtpu says a time, below 0 for some programs, which is not shown.
    assert (training["optimal_seconds"] is not None) == (target[0] == "v")
    assert training.get("compiler_s", 1) > 0


def test_no_collective_of_a_device_grows_with_the_copies_of_the_model():
    # 16 and 64 chips, groups of four that split the model. A ring of 16 sends 15/16 of an array, one of four 3/4, which
    # is 1.25 times; what is sent to every copy of the model would be four times and more.
    few, many = (
        held(planned(target, data, 4)["training"]["collectives"]) for target, data in (("v5e:4x4", 4), ("v5e:8x8", 16))
    )
    assert sum(many.values()) < 1.3 * sum(few.values())
    for key, sent in many.items():
        if "data" in key[1]:
            assert key[0] in ("all-reduce", "reduce-scatter", "all-gather")
            assert sent <= 1.3 * few.get(key, 0.0) + 4096, key
