"""A released checkpoint becomes a policy that acts as upstream's evaluator does; what can be wrong is named."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments import convert_weights
from experiments.convert_weights import ConvertConfig
from robovlms_jax.control.interface import Observation
from robovlms_jax.load import load_config, load_policy
from robovlms_jax.weights import sources
from tests.backbones import families
from tests.upstream import published
from tests.upstream import release as releases


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> releases.Release:
    return releases.make(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    target = tmp_path_factory.mktemp("converted") / "policy"
    report = convert_weights.main(ConvertConfig(str(release.checkpoint), str(release.json), str(target)))
    return target, report


def frames(number: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    sizes = {"static": (40, 40, 3), "wrist": (21, 21, 3)}
    return [{name: rng.integers(0, 256, size, dtype=np.uint8) for name, size in sizes.items()} for _ in range(number)]


def test_the_policy_acts_as_upstream_for_the_same_frames_text_and_history(release, converted, exact_matmul):
    # From pixels and words to executed numbers, past the window and across a reset. Any of camera order, resize,
    # prompt, place of the action token, gate order, window or scale taken otherwise fails here.
    policy = load_policy(converted[0])
    for instruction in (" push the red block to the left ", "open the drawer"):
        steps = frames(releases.WINDOW + 2)
        expected = release.actions(instruction, steps)
        policy.reset(instruction)
        found = np.stack([policy.act(Observation(step)).actions for step in steps])
        np.testing.assert_allclose(found[..., :6], expected[..., :6], atol=1e-4)
        np.testing.assert_array_equal(found[..., 6], expected[..., 6])
    assert len(np.unique(found[..., 6])) == 2, "the comparison of grippers compares nothing"


def test_the_report_is_complete_and_the_directory_needs_nothing_else(release, converted):
    target, report = converted
    assert {entry["tensor"] for entry in report["tensors"]} == set(release.state_dict())
    assert report["difference_parameters"] == 0 and report["difference_actions"] < 1e-6
    assert json.loads((target / "conversion.json").read_text())["tensors"] == report["tensors"]
    config = load_config(target)
    assert config.policy.window == releases.WINDOW and config.backbone.dtype == "float32"
    release.backbone.rename(release.directory / "away")
    try:
        load_policy(target)
    finally:
        (release.directory / "away").rename(release.backbone)


def test_a_head_for_words_stays_behind_where_actions_are_no_words(tmp_path):
    # Fails if Qwen-VL's checkpoints are refused for their lm_head, which an LSTM policy has no use for.
    weights, _ = families.publish("qwen-vl", tmp_path / "qwen")
    vlm = load_file(pathlib.Path(weights) / sources.SINGLE)
    head = releases.Head(width=vlm["lm_head.weight"].shape[1])
    state = {f"model.backbone.{name}": x for name, x in vlm.items()}
    state |= {f"model.act_head.{name}": x for name, x in head.state_dict().items()}
    torch.save(state | {"model.action_token": torch.zeros(head.rnn.input_size)}, tmp_path / "policy.pt")
    settings = releases.settings(pathlib.Path(weights), next(name for name in published.NAMES if "qwen" in name))
    (tmp_path / "policy.json").write_text(json.dumps(settings))
    files = str(tmp_path / "policy.pt"), str(tmp_path / "policy.json"), str(tmp_path / "converted")
    report = convert_weights.main(ConvertConfig(*files))
    left = {entry["tensor"]: entry["becomes"] for entry in report["tensors"] if "ignored" in entry["becomes"]}
    assert left == {"model.backbone.lm_head.weight": "ignored: this policy has no backbone/text/head/kernel"}


def run(release, target, **changes) -> dict:
    config = {"source": str(release.checkpoint), "config": str(release.json), "out": str(target)} | changes
    return convert_weights.main(ConvertConfig(**config))


def save(release, path, change) -> str:
    state = dict(release.state_dict())
    change(state)
    torch.save(state, path)
    return str(path)


def test_missing_and_left_over_tensors_are_listed_and_only_taken_when_allowed(release, tmp_path):
    def change(state):
        state["model.extra.weight"] = torch.zeros(3)
        del state["model.action_token"]

    source = save(release, tmp_path / "odd.pt", change)
    with pytest.raises(ValueError, match=r"(?s)no rule matches.*model\.extra\.weight.*missing.*action_token"):
        run(release, tmp_path / "a", source=source)
    with pytest.raises(ValueError, match=r"(?s)missing.*action_token"):
        run(release, tmp_path / "b", source=source, allow_unused=("^model.extra",))
    # As wide as can be, and still only the two are excepted. Stored in half precision, as the report then says.
    report = run(release, tmp_path / "c", source=source, allow_unused=(".*",), allow_missing=(".*",), dtype="bfloat16")
    assert (report["missing"], report["unused"]) == (["readout/queries"], ["model.extra.weight"])
    assert report["stored"] == ["bfloat16", "float32"]
    assert 0 < report["difference_parameters"] < 0.01 and report["difference_actions"] < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "nowhere.pt"}, r"nowhere\.pt does not exist"),
        ({"config": "nowhere.json"}, r"no file nowhere\.json"),
        ({"backbone": "nowhere"}, "no directory nowhere"),
        ({"backbone": "experiments"}, r"experiments/config\.json does not exist"),
    ],
)
def test_wrong_paths_are_named(release, tmp_path, change, message):
    with pytest.raises(FileNotFoundError, match=message):
        run(release, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_the_published_path_of_the_backbone_asks_for_ones_own(release, tmp_path):
    (tmp_path / "published.json").write_text(json.dumps(published.read(releases.USE_HAND)))
    with pytest.raises(FileNotFoundError, match=r"names the backbone \.vlms/kosmos-2-patch14-224.*pass --backbone"):
        run(release, tmp_path / "out", config=str(tmp_path / "published.json"))


def test_another_models_config_lists_every_shape_that_differs(release, tmp_path):
    values = releases.settings(release.backbone)
    values["act_head"]["hidden_size"] = 8
    (tmp_path / "other.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"(?s)of another shape.*act_head\.rnn\.weight_ih_l0.*checkpoint of another"):
        run(release, tmp_path / "out", config=str(tmp_path / "other.json"))


def test_a_truncated_file_is_named(release, tmp_path):
    data = release.checkpoint.read_bytes()
    (tmp_path / "half.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"half\.pt .*truncated"):
        run(release, tmp_path / "out", source=str(tmp_path / "half.pt"))


def test_a_conversion_that_ends_early_leaves_nothing_that_looks_like_a_policy(release, tmp_path, monkeypatch):
    def cut_off(folder):
        assert (folder / "checkpoints").is_dir() and not (tmp_path / "out").exists()
        raise OSError("no space left")

    monkeypatch.setattr(convert_weights.load, "open_model", cut_off)
    with pytest.raises(OSError, match="no space left"):
        run(release, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_a_directory_with_something_in_it_is_not_written_to(release, converted):
    with pytest.raises(FileExistsError, match="not an empty folder"):
        run(release, converted[0])


def test_command_line(release, tmp_path, capsys):
    # The flags are spelled as the documentation spells them, and mistakes end with one line and status 1.
    with pytest.raises(SystemExit) as error:
        convert_weights.cli(["--from", "nowhere.pt", "--config", str(release.json), "--to", str(tmp_path / "out")])
    assert "error: nowhere.pt does not exist" in str(error.value)


def test_policies_of_rlds_data_act_in_quantiles_or_with_statistics_in_the_datasets_units(release, tmp_path):
    # Upstream: 0.65 * a by the policy, then 0.5 * (x + 1) * (q99 - q01) + q01 by its SimplerEnv wrapper.
    values = published.read(next(name for name in published.NAMES if "bridge_finetune" in name))
    (tmp_path / "bridge.json").write_text(json.dumps(values))
    numbers = {key: [0.0] * 7 for key in ("mean", "std", "max", "min")}
    numbers |= {"q01": [-0.1, -0.2, 0.0, -1.0, -1.0, -1.0, 0.0], "q99": [0.3, 0.2, 0.5, 1.0, 1.0, 1.0, 1.0]}
    (tmp_path / "bridge_statistics.json").write_text(json.dumps({"action": numbers}))
    config = ConvertConfig("x.pt", str(tmp_path / "bridge.json"), "to", backbone=str(release.backbone))
    plain = convert_weights._experiment(config).policy
    assert (set(plain.action_low), set(plain.action_high)) == ({-0.65}, {0.65})
    assert {dimension.unit for dimension in plain.robot.action} == {"1"}
    given = dataclasses.replace(config, statistics=str(tmp_path / "bridge_statistics.json"))
    assert [dimension.unit for dimension in convert_weights._experiment(given).policy.robot.action] == [
        *["m"] * 3,
        *["rad"] * 3,
        "1",
    ]
    predicted = np.linspace(-1, 1, 7)
    low, high = np.float64(numbers["q01"])[:6], np.float64(numbers["q99"])[:6]
    expected = 0.5 * (plain.normalizer.unnormalize(predicted)[:6] + 1) * (high - low) + low
    found = convert_weights._experiment(given).policy.normalizer.unnormalize(predicted)[:6]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    with pytest.raises(ValueError, match="this one has bounds of its own"):
        convert_weights._experiment(dataclasses.replace(given, config=str(release.json)))
