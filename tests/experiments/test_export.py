"""`experiments.export`: a Python without this project computes the same actions from the exported control step."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import export
from robovlms_jax.control.interface import Observation
from robovlms_jax.load import load_policy
from robovlms_jax.runs import program
from tests.toy import make_product

FOREIGN = pathlib.Path(__file__).with_name("foreign.py")
RELEASE = pathlib.Path(__file__).parents[1] / "compatibility" / "release_0_1"
STEPS = 4
NEEDS = {"stablehlo": ("flatbuffers",), "onnx": ("jax2onnx", "onnxruntime"), "litert": ("tensorflow", "ai_edge_litert")}


def seen(policy):
    """Observations, as the live policy takes them and as the exported one does."""
    rng = np.random.default_rng(0)
    sizes = {"static": 200, "wrist": 84} if policy == "policy_head_lstm" else {"static": 256}
    images = {name: rng.integers(0, 256, (STEPS, size, size, 3), np.uint8) for name, size in sizes.items()}
    states = rng.normal(size=(STEPS, 7)).astype(np.float32)
    live = [Observation({name: x[step] for name, x in images.items()}, states[step]) for step in range(STEPS)]
    foreign = {f"image_{name}": x for name, x in images.items()}
    if policy == "policy_head_lstm":
        foreign |= {"sensor_proprio": states[:, None], "sensor_action_history": np.full((STEPS, 2, 7), np.nan, "f4")}
    return live, foreign


def exported(tmp_path, name, **settings):
    """float32[STEPS, C, A] of the exported program in a process that cannot import this project."""
    for module in NEEDS[settings.get("to", "stablehlo")]:
        pytest.importorskip(module, reason="an optional package; setup.cfg, extras export, onnx and litert")
    config = export.ExportConfig(
        str(RELEASE / name), str(tmp_path / "out"), instructions=("open the drawer",), platforms=("cpu",), **settings
    )
    folder = export.export(config)
    np.savez(tmp_path / "seen.npz", **seen(name)[1])
    command = [sys.executable, str(FOREIGN), str(folder), str(tmp_path / "seen.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(tmp_path / "out.npz")["actions"]


def live(name, **settings):
    policy = load_policy(RELEASE / name, **settings)
    policy.reset("open the drawer")
    return np.stack([policy.act(observation).actions for observation in seen(name)[0]])


def test_a_python_without_this_project_computes_the_same_actions_from_stablehlo(tmp_path):
    found = exported(tmp_path, "policy_head_lstm")
    np.testing.assert_array_equal(found, live("policy_head_lstm"))
    about = json.loads((tmp_path / "out" / "program.json").read_text())
    assert {entry["what"] for entry in about["inputs"]} == set(about["what"])
    assert about["actions"]["shape"] == [1, 4, 7]
    assert (tmp_path / "out" / "backbone" / "config.json").exists()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export.export(export.ExportConfig(str(RELEASE / "policy_head_lstm"), str(tmp_path / "out")))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "w8a8"])
def test_a_history_of_tokens_in_bytes_goes_through_stablehlo_as_it_is(tmp_path, weights):
    found = exported(tmp_path, "interleaved_discrete", weights=weights)
    np.testing.assert_array_equal(found, live("interleaved_discrete", weights=weights))


@pytest.mark.parametrize(
    ("name", "to", "weights"),
    [
        ("policy_head_lstm", "onnx", None),
        ("policy_head_lstm", "onnx", "int8"),
        ("policy_head_lstm", "litert", None),
        ("policy_head_lstm", "litert", "int8"),
    ],
)
def test_other_run_times_compute_the_same_actions(name, to, weights, tmp_path):
    found = exported(tmp_path, name, to=to, weights=weights)
    np.testing.assert_allclose(found, live(name, weights=weights), atol=1e-4)


@pytest.mark.parametrize(
    ("product", "to", "what"),
    [
        (("interleaved", "action_query", "mlp"), "onnx", "history=interleaved"),
        (("interleaved", "action_query", "mlp"), "litert", "history=interleaved"),
        (("policy_head", "action_query", "flow"), "onnx", "a flow head"),
        (("one_step", "action_query", "flow"), "litert", "a flow head"),
        (("one_step", "token", "discrete"), "litert", "a head other than lstm and gpt"),
    ],
)
def test_a_policy_without_a_form_is_refused_with_the_way_out(product, to, what):
    model = make_product(*product)
    with pytest.raises(ValueError, match=rf"{what}.* has no form in {to}: export it with --to stablehlo"):
        export.require_form(model, to)
    export.require_form(model, "stablehlo")


@pytest.mark.parametrize("to", ["onnx", "litert"])
def test_activations_in_int8_have_a_form_in_stablehlo_alone(to):
    model = make_product("policy_head", "action_query", "lstm")
    model = dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, storage="w8a8"))
    with pytest.raises(ValueError, match=rf"activations in int8 \(weights=w8a8\) has no form in {to}: export it with"):
        export.require_form(model, to)
    export.require_form(model, "stablehlo")


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    config = export.ExportConfig(str(RELEASE / "policy_head_lstm"), str(tmp_path / "out"), to="onnx")
    with pytest.raises(ImportError, match=r"jax2onnx .*pip install -e '\.\[onnx\]'"):
        export.export(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError("no translation"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("begun", [False, True])
def test_an_export_that_fails_leaves_nothing_behind(error, begun, tmp_path, monkeypatch):
    def write(step, folder, config):
        (folder / "program.onnx").write_bytes(b"half")
        raise error

    monkeypatch.setitem(export.WRITERS, "onnx", ("program.onnx", write))
    if begun:
        (tmp_path / "out").mkdir()
    with pytest.raises(type(error)):
        export.export(export.ExportConfig(str(RELEASE / "policy_head_lstm"), str(tmp_path / "out"), to="onnx"))
    assert [path.name for path in tmp_path.rglob("*")] == ["out"] * begun


@pytest.mark.parametrize("platforms", [("gpu",), ("cpu", "CUDA"), ()])
def test_platforms_that_are_none_are_refused_before_anything_is_read(platforms):
    with pytest.raises(ValueError, match=r"platforms=.*one or more of \['cpu', 'cuda', 'rocm', 'tpu'\]"):
        export.ExportConfig("nowhere", "out", platforms=platforms)


@pytest.mark.parametrize("to", ["onnx", "litert"])
def test_a_refused_export_makes_no_folder(to, tmp_path):
    config = export.ExportConfig(str(RELEASE / "interleaved_discrete"), str(tmp_path / "new" / "out"), to=to)
    with pytest.raises(ValueError, match="has no form"):
        export.export(config)
    assert not list(tmp_path.iterdir())


def test_the_carry_that_comes_out_goes_in_again():
    step = program.make(RELEASE / "policy_head_lstm", instructions=["open the drawer"])
    results = jax.eval_shape(step.step, *step.weights.values(), *step.carry.values(), *step.observed.values())
    assert [(x.shape, x.dtype) for x in results[1:]] == [(x.shape, x.dtype) for x in step.carry.values()]
    assert len(results) == len(step.results)
    with pytest.raises(ValueError, match="an instruction is empty"):
        program.make(RELEASE / "policy_head_lstm", instructions=[" "])
