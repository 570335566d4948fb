"""Serving: types change no number, settings of control reach the policy."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.control.interface import Observation
from robovlms_jax.nn import stack
from robovlms_jax.policies import objective
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.runs import build, chaining, load
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import to_dict
from robovlms_jax.training import checkpoints, items, seals
from robovlms_jax.weights import quantize
from tests.toy import HEADS, make_batch, make_model, random_params

RELEASE = pathlib.Path(__file__).parents[1] / "compatibility" / "release_0_1" / "policy_head_lstm"


def test_parameters_stored_in_the_type_of_computation_give_the_same_loss():
    # Bit for bit: fails if a block uses a parameter in float32 before it is cast, or if a norm is stored short.
    batch = make_batch(np.random.default_rng(0))
    model = make_model()
    half = dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, dtype="bfloat16"))
    params = random_params(model, batch)
    types = quantize.stored_types(params, "bfloat16")
    stored = jax.tree.map(lambda x, dtype: x.astype(dtype), params, types)
    assert stored["backbone"]["text"]["layers"]["attn"]["q"]["kernel"].dtype == jnp.bfloat16
    assert (
        stored["backbone"]["text"]["final_norm"]["scale"].dtype
        == stored["head"]["arm"]["layer_0"]["kernel"].dtype
        == jnp.float32
    )
    loss = jax.jit(objective.RobotLoss(half))
    assert loss(stored, batch)[0] == loss(params, batch)[0]
    assert jax.tree.leaves(quantize.stored_types(params, "float32")) == [x.dtype for x in jax.tree.leaves(params)]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    """A run directory with a tiny policy of one frame."""
    run = tmp_path_factory.mktemp("runs") / "run"
    backbone = build.open_backbone(BackboneConfig(name="kosmos-2-twin"), ["open the drawer"])
    policy = PolicyConfig(window=1, history="one_step", chunk=2, head=HEADS["flow"])
    experiment = ExperimentConfig(backbone=BackboneConfig(name="kosmos-2-twin"), policy=policy)
    model = build.make_model(experiment, backbone.vlm)
    params = random_params(model, make_batch(np.random.default_rng(0), window=1, windows=1, chunk=2))
    checkpoints.write_policy(run, params, {"config": to_dict(experiment), "assets": dict(backbone.assets)})
    return run


@pytest.fixture
def step(written, tmp_path) -> pathlib.Path:
    """A copy of its only step, to be damaged."""
    return shutil.copytree(written / "checkpoints" / "0", tmp_path / "run" / "checkpoints" / "0")


def test_control_may_choose_settings_that_change_no_parameter(written):
    # Fails if the fields are not merged into those of training, or do not reach the model that acts.
    frame = {"static": np.zeros((40, 40, 3), np.uint8), "wrist": np.zeros((20, 20, 3), np.uint8)}

    def act(changes):
        opened = load.load_policy(written, policy=changes)
        opened.reset("open the drawer")
        return opened.act(Observation(frame)).actions

    three, one = act(None), act({"head": {"num_steps": 1}})
    said = load.load_policy(written, policy={"head": {"num_steps": 3}})
    assert said._batched.model.config == load.load_policy(written)._batched.model.config
    assert np.abs(three - one).max() > 1e-3
    with pytest.raises(ValueError, match="num_stepps"):
        act({"head": {"num_stepps": 1}})
    with pytest.raises(ValueError, match=r"head/.*checkpoint .*model"):
        act({"head": {"hidden_size": 32}})


def test_a_policy_served_in_int8_acts_nearly_as_it_was_trained_to():
    # Within 0.003 where actions reach 0.65: half a step of 255 over the whole range.
    # With rounded activations twice as far: they and the matrices are rounded about equally.
    plain, stored = load.load_policy(RELEASE), load.load_policy(RELEASE, weights="int8")
    rounded = load.load_policy(RELEASE, weights="w8a8")
    rng, images = np.random.default_rng(0), {"static": (200, 200, 3), "wrist": (84, 84, 3)}
    for policy in (plain, stored, rounded):
        policy.reset("pick up the red block")
    for _ in range(3):
        state = np.append(rng.normal(size=14), 1.0).astype(np.float32)
        seen = Observation({camera: rng.integers(0, 256, size, np.uint8) for camera, size in images.items()}, state)
        expected, found, both = (policy.act(seen).actions for policy in (plain, stored, rounded))
        assert 0 < np.abs(found - expected).max() < 3e-3
        assert 0 < np.abs(both - expected).max() < 6e-3 and np.abs(both - found).max() > 0
        assert np.abs(expected[:, :6]).max() > 0.1

    before, after = (flatten_dict(stack.joined(policy._batched.params), sep="/") for policy in (plain, stored))
    jax.tree.map(np.testing.assert_array_equal, rounded._batched.params, stored._batched.params)
    matrices = {path for path, x in after.items() if x.dtype == jnp.int8}
    assert {"backbone/text/layers/attn/qkv/kernel", "backbone/text/embed/table"} < matrices
    for path, x in before.items():
        if path not in matrices:
            np.testing.assert_array_equal(after[path], x)
    scales = sum(after[path.rpartition("/")[0] + "/scale"].size for path in matrices)
    saved = sum(3 * after[path].size for path in matrices) - 4 * scales
    assert sum(x.nbytes for x in before.values()) - sum(x.nbytes for x in after.values()) == saved


def test_intervals_of_weights_that_are_rounded_after_the_calibration_are_said_to_be_unmeasured(monkeypatch, caplog):
    monkeypatch.setattr(
        load.saved, "read_calibration", lambda directory: load.confidence.Calibration((1.0,), 0.9, 10, False)
    )
    assert load._calibration(RELEASE, None).coverage == 0.9 and not caplog.records
    load._calibration(RELEASE, "w8a8")
    assert "intervals of 90 % were calibrated without weights=w8a8" in caplog.text


def test_weights_are_kept_in_the_type_that_is_asked_for(written):
    def types(weights):
        params = flatten_dict(stack.joined(load.load_policy(written, weights=weights)._batched.params), sep="/")
        kernel, norm = "backbone/text/layers/attn/qkv/kernel", "backbone/text/final_norm/scale"
        return [str(params[path].dtype) for path in (kernel, norm, "head/action_in/kernel")]

    assert types(None) == types("float32") == ["float32"] * 3
    assert types("bfloat16") == ["bfloat16", "float32", "float32"]
    assert types("int8") == ["int8", "float32", "float32"]
    with pytest.raises(ValueError, match=r"weights='int4' is none of \['float32', 'bfloat16', 'int8', 'w8a8'\]"):
        load.load_policy(written, weights="int4")


def test_two_altered_bytes_in_a_weight_file_are_named_by_all_who_read_it(step):
    weights = max((step / "params").rglob("*"), key=lambda path: path.stat().st_size)
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b"\x7f\x7f")
    with pytest.raises(seals.DamagedError, match=rf"{weights} is damaged"):
        load.load_policy(step)
    with pytest.raises(seals.DamagedError, match=rf"{weights} is damaged"):
        chaining.take_over({"head": {"action_out": {"bias": jnp.zeros(7)}}, **shapes_of(step)}, str(step))


def shapes_of(step: pathlib.Path) -> dict[str, jax.Array]:
    return {path: jnp.zeros(shape) for path, shape in items.shapes(step).items()}


def rewrite(step: pathlib.Path, change) -> None:
    """Change what the step holds for serving; sealed again, as whoever edits a checkpoint by hand would not do."""
    path = step / "serving" / "metadata"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    seals.seal(step)


def put(path: str, value):
    def change(values):
        *parts, name = path.split(".")
        for part in parts:
            values = values[part]
        if value is None:
            del values[name]
        else:
            values[name] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("config", None, r"has no 'config' \(the configuration; .*found \['assets'\]\)"),
        ("config", [], "has no 'config'"),
        ("assets", None, "has no 'assets'"),
        ("assets.merges", 3, r"assets \['merges'\] are no text"),
        ("config.policy", None, "its configuration has no policy"),
        ("config.policy", "x", r"config.policy='x' is a str; expected the fields of PolicyConfig"),
        ("config.policy.window", None, r"its configuration has no policy.window\. No default may stand in"),
        ("config.policy.window", "abc", r"config.policy.window='abc' is a str; expected int"),
        ("config.policy.window", True, r"config.policy.window=True is a bool; expected int"),
        ("config.policy.history", "future", r"config.policy.history='future' is not one of 'one_step', "),
        (
            "config.policy.action_low",
            [1, 2, "x", 4, 5, 6],
            r"config.policy.action_low=\(1, 2, 'x', 4, 5, 6\) is a tuple; expected tuple\[float, ...\]",
        ),
        ("config.policy.action_high", 0.5, r"config.policy.action_high=0.5 is a float; expected tuple\[float, ...\]"),
        ("config.policy.head.kind", None, r"config.policy.head has no field 'kind'"),
        ("config.policy.head.kind", "nose", "no head 'nose'"),
        ("config.policy.head.kind", ["lstm"], r"head.kind=\['lstm'\] is a list; expected one of \['attention'"),
        ("config.train.batchsize", 3, "no field 'batchsize'; did you mean 'batch_size'"),
        ("config.rollouts.image_size", [1, 2, 3], r"image_size=\(1, 2, 3\) is a tuple; expected tuple\[int, int\]"),
    ],
)
def test_what_a_checkpoint_says_wrongly_is_named(step, path, value, message):
    rewrite(step, put(path, value))
    with pytest.raises(ValueError, match=rf"(?s){step / 'serving'}.*{message}"):
        load.load_config(step)


def test_a_flow_checkpoint_from_before_a_field_computes_what_it_was_trained_to(step):
    now = load.load_config(step).policy.head
    rewrite(step, put("config.policy.head.time_turns", None))
    rewrite(step, put("config.policy.head.data_std", None))
    then = load.load_config(step).policy.head
    assert (then.time_turns, then.data_std) == ((1.0, 1000.0), 0.0) != (now.time_turns, now.data_std)
    assert dataclasses.replace(then, time_turns=now.time_turns, data_std=now.data_std) == now


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tokenizer.json", "tokenizer_config.json"], r"lack a tokenizer \(found .*'config.json'"),
        (["config.json"], r"lack config.json \(found"),
    ],
)
def test_missing_small_files_are_named_with_the_checkpoint(step, names, message):
    rewrite(step, lambda values: [values["assets"].pop(name) for name in names])
    with pytest.raises(ValueError, match=rf"{step / 'serving'}: .*{message}"):
        load.load_policy(step)


def test_small_files_that_cannot_be_read_are_named_with_the_checkpoint_not_a_temporary_folder(step):
    rewrite(step, lambda values: values["assets"].update({"tokenizer.json": "{"}))
    with pytest.raises(ValueError, match=rf"^{step / 'serving'}, assets has tokenizer files") as caught:
        load.load_policy(step)
    assert "/tmp" not in str(caught.value).replace(str(step), "")


def test_a_file_is_no_checkpoint(step):
    path = step.parents[1] / "README.md"
    path.touch()
    for wrong, what in ((path, "a file"), (path.with_name("none"), "nothing is there")):
        with pytest.raises(FileNotFoundError, match=rf"checkpoint {wrong} is not a directory \({what}\); pass a run"):
            load.load_policy(wrong)
    run = step.parents[1]
    with pytest.raises(FileNotFoundError, match=rf"Runs in {run.parent}: .*\b{run.name}\b"):
        load.load_policy(run.parent / "another")
    (step / seals.SEAL).unlink()
    for item, message in (
        ("serving", "serving/metadata is missing"),
        ("params", "looked for checkpoints/<step>/params"),
    ):
        (step / item).rename(step / "aside")
        with pytest.raises(FileNotFoundError, match=message):
            load.load_policy(step)
        (step / "aside").rename(step / item)
    (step / "serving" / "metadata").write_text('{"config": {')
    with pytest.raises(ValueError, match=r"serving/metadata is no JSON"):
        load.load_policy(step)
