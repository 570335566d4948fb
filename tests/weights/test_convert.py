"""Strict conversion, and parameters read shard by shard."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from robovlms_jax.weights import convert
from robovlms_jax.weights.rules import Ignore, Initialised, Rule, linear
from tests.processes import run_python
from tests.weights.array_source import ArraySource

RULES = (
    Rule("embed.weight", "embed/table"),
    Rule("blocks.{layer}.q.weight", "layers/q/kernel", "(n h) d -> d n h"),
    *linear("out", "out"),
    Ignore(r"head\.weight", "tied"),
    Initialised(r"/lora_[ab]$", "initialised by the run"),
)
LAYERS, N, H, D = 12, 3, 2, 4  # more than ten layers, so that order is by number and not by letter


def make_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (7, D), "out.weight": (5, D), "out.bias": (5,), "head.weight": (7, D)}
    shapes |= {f"blocks.{layer}.q.weight": (N * H, D) for layer in range(LAYERS)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_shapes():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32)

    return {
        "embed": {"table": leaf(7, D)},
        "layers": {"q": {"kernel": leaf(LAYERS, D, N, H), "lora_a": leaf(LAYERS, D, 2)}},
        "out": {"kernel": leaf(D, 5), "bias": leaf(5)},
    }


def load(tensors, rules=RULES, shapes=None):
    shapes = shapes or make_shapes()
    device = SingleDeviceSharding(jax.devices()[0])
    return convert.load_params(rules, ArraySource(tensors, "toy"), shapes, jax.tree.map(lambda _: device, shapes))


def test_parameters_hold_every_layer_in_its_place_and_leave_out_what_is_fresh():
    tensors = make_tensors()
    params = load(tensors)
    np.testing.assert_array_equal(params["embed"]["table"], tensors["embed.weight"])
    np.testing.assert_array_equal(params["out"]["kernel"], tensors["out.weight"].T)
    assert set(params["layers"]["q"]) == {"kernel"}
    for layer in range(LAYERS):
        expected = tensors[f"blocks.{layer}.q.weight"].reshape(N, H, D).transpose(2, 0, 1)
        np.testing.assert_array_equal(params["layers"]["q"]["kernel"][layer], expected)


def test_all_that_is_wrong_is_said_in_one_error():
    tensors = make_tensors()
    tensors["surprise.3.weight"] = tensors["surprise.4.weight"] = np.zeros((2, 2), np.float32)
    tensors["blocks.12.q.weight"] = tensors["blocks.0.q.weight"]
    tensors["module.embed.weight"] = tensors["embed.weight"]
    tensors["out.weight"] = np.zeros((5, D + 1), np.float32)
    tensors["gone.weight"] = np.zeros((3,), np.float32)
    del tensors["out.bias"], tensors["blocks.5.q.weight"], tensors["blocks.6.q.weight"]
    shapes = make_shapes() | {"orphan": {"scale": jax.ShapeDtypeStruct((9,), np.float32)}}
    with pytest.raises(ValueError, match="toy does not fit the model") as caught:
        load(tensors, (*RULES, Rule("gone.weight", "gone/scale")), shapes)
    assert str(caught.value).splitlines()[1:-1] == [
        "  tensors of another shape:",
        "    out.weight  found [5, 5], expected [5, 4] for out/kernel",
        "  tensors that no rule matches:",
        "    surprise.*.weight  [2, 2]  (* = 3-4)",
        "  tensors of layers the model does not have:",
        "    blocks.*.q.weight  layers/q/kernel has 12 layers  (* = 12)",
        "  tensors that fill a parameter twice:",
        "    module.embed.weight  embed/table is filled by embed.weight already",
        "  tensors of parameters the model does not have:",
        "    gone.weight  [3], for gone/scale",
        "  tensors that are missing:",
        "    blocks.*.q.weight  [6, 4], for layers/q/kernel  (* = 5-6)",
        "    out.bias  [5], for out/bias",
        "  parameters that no rule fills:",
        "    orphan/scale  [9]",
    ]


def test_tensors_of_spare_parameters_may_be_there_and_have_to_fit():
    parameters = {"embed/table": (7, D), "layers/q/kernel": (LAYERS, D, N, H)}
    tensors = {name: x.shape for name, x in make_tensors().items()}
    spare = {"out/kernel": (D, 5), "out/bias": (5,)}
    assert set(convert.plan(RULES, tensors, parameters, spare=spare)) == set(parameters)
    del tensors["out.bias"]
    assert set(convert.plan(RULES, tensors, parameters, spare=spare)) == set(parameters)
    with pytest.raises(ValueError, match=r"out.weight  found \[5, 4\], expected \[6, 4\] for out/kernel"):
        convert.plan(RULES, tensors, parameters, spare=spare | {"out/kernel": (D, 6)})


def test_a_tensor_two_rules_match_is_refused():
    with pytest.raises(ValueError, match=r"tensors that several rules match:\n    head\.weight"):
        load(make_tensors(), (*RULES, Rule("head.weight", "out/kernel", "o i -> i o")))


def test_ignored_tensors_may_be_absent():
    tensors = make_tensors()
    del tensors["head.weight"]
    assert set(load(tensors)) == {"embed", "layers", "out"}


def test_each_device_reads_only_its_part():
    # In a process of its own, because the number of devices is fixed when jax starts.
    script = pathlib.Path(__file__).with_name("load_sharded.py")
    report = json.loads(run_python(script, JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu"))
    assert report["devices"] == 8
    assert report["equal"]
    # fsdp halves D and tensor halves the heads: a quarter of each layer per read, each part read once although
    # two devices hold it, and never more than one layer's part in one read.
    assert report["largest_read"] == report["layer"] // 4
    assert report["total_read"] == report["layer"] * report["layers"]
    assert report["shard"] == [report["layers"], 8, 2, 6]
    assert report["replicated_read"] == report["replicated"]


def test_every_part_of_a_fused_tensor_needs_its_rule():
    fused = {"qkv": np.arange(36, dtype=np.float32).reshape(18, 2)}
    leaf = jax.ShapeDtypeStruct((2, 3, 2), np.float32)
    shapes = dict.fromkeys("qkv", leaf)
    rows = tuple(Rule("qkv", name, f"({part}/3 n h) d -> d n h") for part, name in enumerate("qkv"))
    params = load(fused, rows, shapes)
    np.testing.assert_array_equal(params["k"], fused["qkv"][6:12].reshape(3, 2, 2).transpose(2, 0, 1))
    with pytest.raises(ValueError, match="tensors that several rules match"):
        load(fused, rows[:2], dict.fromkeys("qk", leaf))
    with pytest.raises(ValueError, match=r"found \[18, 2\], expected \[18, 4\] for q"):
        load(fused, rows, dict.fromkeys("qkv", jax.ShapeDtypeStruct((4, 3, 2), np.float32)))
