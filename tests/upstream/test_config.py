"""Upstream's JSON files: all published ones load, every key is accounted for, nothing is dropped in silence."""

from __future__ import annotations

import copy
import json
import pathlib
import re
from typing import Any

import jax
import pytest
from flax.traverse_util import flatten_dict

from experiments import calvin_abcd
from robovlms_jax import upstream
from robovlms_jax.backbones import registry
from robovlms_jax.data.registry import mixtures
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.runs import build
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import from_dict, to_dict
from robovlms_jax.upstream import files, ignored
from robovlms_jax.upstream import table as tables
from tests.upstream import published

KOSMOS = next(name for name in published.NAMES if name.endswith("use-hand_ws-16_act-10.json"))
BRIDGE = next(name for name in published.NAMES if "bridge_finetune" in name)


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    return dict(files.flatten(values))


def change(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with one dotted key replaced or added."""
    values = copy.deepcopy(values)
    *parents, leaf = key.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
    place[leaf] = value
    return values


@pytest.mark.parametrize("name", published.NAMES)
def test_published_configurations_load(name):
    values = published.read(name)
    config = upstream.to_experiment(values)
    assert (config.policy.window, config.policy.chunk) == (values["window_size"], 10)
    assert config.policy.head.gripper_loss_weight == 0.01
    assert set(config.policy.action_low) == {-0.65} and set(config.policy.action_high) == {0.65}
    is_rlds = values["train_dataset"]["type"] == "OpenVLADataset"
    assert (config.policy.action_scaling, config.data.compat_second_norm) == (
        ("quantile", True) if is_rlds else ("bounds", False)
    )
    assert config.optimizer.learning_rate == values["learning_rate"]
    assert config.train.batch_size == values["batch_size"] * values["trainer"].get("accumulate_grad_batches", 1)
    assert config.train.seed == 123
    assert from_dict(ExperimentConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_what_the_released_kosmos_configuration_says():
    # Section by section against the published file, read by eye.
    config = upstream.to_experiment(published.read(KOSMOS))
    assert (config.backbone.name, config.backbone.weights) == ("kosmos-2", ".vlms/kosmos-2-patch14-224")
    assert (config.backbone.dtype, config.backbone.lora_rank) == ("bfloat16", 0)
    assert (config.policy.history, config.policy.readout, config.policy.num_queries) == (
        "policy_head",
        "action_query",
        1,
    )
    assert (config.policy.cameras, config.policy.window) == (("wrist", "static"), 16)
    assert (config.policy.head.hidden_size, config.policy.head.num_layers) == (1024, 4)
    assert config.policy.head.trunk == (1024, 512, 256)
    assert (config.data.root, config.data.static_shift, config.data.wrist_shift) == (
        "datasets/calvin_data/task_ABCD_D",
        10,
        4,
    )
    assert (config.optimizer.warmup_epochs, config.optimizer.clip_norm) == (0.25, 1.0)
    assert (config.optimizer.schedule, config.optimizer.weight_decay) == ("constant", 0.0)
    assert (config.train.epochs, config.train.trainable) == (5.0, (".*",))
    assert (config.mesh.data, config.mesh.fsdp) == (1, -1)
    assert config.train.output == "runs/checkpoints/kosmos/calvin_finetune"


@pytest.mark.parametrize(("bias", "trained"), [("none", 0), ("all", 1)])
def test_upstreams_lora_has_its_rank_scale_dropout_and_biases(bias, trained):
    values = change(published.read(KOSMOS), "train_setup.lora_enable", True)
    config = upstream.to_experiment(change(values, "train_setup.lora_bias", bias))
    backbone = config.backbone
    assert (backbone.lora_rank, backbone.lora_alpha, backbone.lora_dropout) == (64, 16.0, 0.05)
    paths = ("backbone/text/layers/q/lora_a", "backbone/text/layers/q/kernel", "head/kernel")
    assert [any(re.search(x, path) for x in config.train.trainable) for path in paths] == [True, False, True]
    biases = ["backbone/text/layers/q/bias", "backbone/text/final_norm/bias"]
    assert sum(any(re.search(x, path) for x in config.train.trainable) for path in biases) == 2 * trained


def test_the_preset_of_upstreams_adapters_is_its_configuration_with_adapters_on_and_fits_kosmos_2_at_full_size():
    config = upstream.to_experiment(change(published.read(KOSMOS), "train_setup.lora_enable", True))
    preset, full = (calvin_abcd.PRESETS[name] for name in ("kosmos_lstm_upstream_lora", "kosmos_lstm"))
    adapters = [f"lora_{field}" for field in ("rank", "alpha", "kind", "dropout")]
    assert [getattr(preset.backbone, x) for x in adapters] == [getattr(config.backbone, x) for x in adapters]
    assert preset.train.trainable == config.train.trainable and preset.optimizer == full.optimizer
    preset.validate(1)
    model = build.make_model(preset, build.with_settings(preset.backbone, registry.get("kosmos-2")))
    shapes, _ = build.abstract_params(model, meshes.make_mesh((1, 1, 1), jax.devices()[:1]))
    found = {path: leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}
    beside = [path.removesuffix("lora_a") for path in found if path.endswith("lora_a")]
    assert all(found[f"{path}lora_a"][-1] == 64 and f"{path}lora_b" in found for path in beside)
    kernels = [path for path in found if re.fullmatch(r"backbone/.*kernel", path)]
    assert sorted(f"{path}kernel" for path in beside) == sorted(kernels)
    assert found["backbone/text/layers/attn/q/lora_a"] == found["backbone/text/layers/mlp/up/lora_a"] == (24, 2048, 64)


def test_what_the_bridge_configuration_says():
    config = upstream.to_experiment(published.read(BRIDGE))
    assert (config.data.dataset, config.data.root, config.data.image_size) == (
        "bridge",
        "datasets/open-x-embodiment",
        224,
    )
    assert config.policy.cameras == ("static",), "its batches never hold a wrist image, whatever use_hand_rgb says"
    assert (config.data.augment.crop_area, config.data.augment.hue, config.data.static_shift) == (0.9, 0.05, 0)
    assert (config.train.steps, config.train.epochs, config.optimizer.warmup_steps) == (50_000, 0.0, 2500)
    config.validate(num_devices=1)
    mixes = {upstream.to_experiment(published.read(name)).data.dataset for name in published.NAMES}
    assert mixes == {"calvin", "bridge", "rt_1", "oxe_magic_soup"}
    assert mixes - {"calvin"} <= set(mixtures.published_mixtures())


def test_every_key_is_in_exactly_one_table():
    for key in {key for name in published.NAMES for key in flatten(published.read(name))}:
        is_mapped, is_ignored = key in tables.MAPPED, ignored.reason(key) is not None
        assert is_mapped != is_ignored, key
    assert all(len(reason) > 8 for reason in ignored.IGNORED.values())


OTHER = {
    "robovlm_name": "RoboQwen",
    "model": "qwen",
    "vlm.name": "other",
    "vlm.pretrained_model_name_or_path": "elsewhere",
    "tokenizer.pretrained_model_name_or_path": "elsewhere",
    "image_size": 336,
    "act_head.type": "GPTDecoder",
    "act_head.action_space": "discrete",
    "act_head.history_type": "pre",
    "act_head.down_sample": "pooling",
    "act_head.token_source": "text",
    "scheduler": "half-cosine",
    "train_dataset.type": "OpenVLADataset",
    "train_dataset.data_mix": "rt_1",
    "train_dataset.data_root_dir": "elsewhere",
    "train_dataset.window_sample": "range",
    "train_dataset.organize_type": "segment",
    "model_load_path": "runs/other",
    "val_dataset.type": "OpenVLADataset",
    "train_dataset.data_dir": "a/training",
    "val_dataset.data_dir": "a/validation",
    "train_dataset.exclude_tasks": ["open_drawer"],
    "train_dataset.lang_folder": "lang_clip",
    "train_setup.lora_bias": "all",
    "trainer.precision": "32",
    "trainer.strategy": "ddp",
    "output_root": "elsewhere",
    "task_name": "other",
    "resume": "last.ckpt",
    "fwd_head": {"type": "x"},
    "act_encoder": {"type": "x"},
}
"""Another value for keys that do not simply take another number or the other truth value."""

ABSENT = {
    "clip_norm_ratio": 0.1,
    "act_head.n_bin": 128,
    "act_head.min_action": -2,
    "act_head.max_action": 2,
    "mu_val": 100,
    "x_mean": 0.5,
    "x_std": 0.5,
    "act_head.num_layers": 2,
    "train_dataset.skip_frames": 2,
    "trainer.limit_val_batches": 2,
    "gpus": 2,
    "num_nodes": 2,
    "gradient_clip_val": 2.0,
}
"""Values for numbers that the file at hand does not have."""

DISCRETE = {"act_head.type": "DiscreteDecoder", "act_head.action_space": "discrete"}
NEEDS = {
    "act_head.n_bin": DISCRETE,
    "act_head.min_action": DISCRETE,
    "act_head.max_action": DISCRETE,
    "act_head.token_source": {"act_head.action_space": "down_sample", "act_head.down_sample": "pooling"},
    "train_setup.freeze_resampler": {"use_vision_resampler": True},
    "clip_norm_ratio": {"use_clip_norm": True},
    "cap_loss_ratio": {"train_setup.predict_caption": True},
    "mu_val": {"use_mu_law": True},
    "x_mean": {"regular_action": True},
    "x_std": {"regular_action": True},
    "min_lr_scale": {"scheduler": "half-cosine"},
    "train_setup.lora_r": {"train_setup.lora_enable": True, "train_setup.lora_dropout": 0},
    "train_setup.lora_alpha": {"train_setup.lora_enable": True, "train_setup.lora_dropout": 0},
    "train_setup.lora_dropout": {"train_setup.lora_enable": True, "train_setup.lora_dropout": 0},
    "train_setup.lora_bias": {"train_setup.lora_enable": True, "train_setup.lora_dropout": 0},
}
"""What must be set for a key to matter at all."""

OF_RLDS = ("data_mix", "data_root_dir", "image_aug", "window_sample", "organize_type", "left_pad", "filter_langs")


def outcome(values: dict[str, Any]) -> Any:
    try:
        return upstream.to_experiment(values)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("key", [key for key in tables.MAPPED if key != "parent"])
def test_every_mapped_key_decides_something(key):
    # The point of the tables: a mapped key whose value may be anything without consequence has been dropped.
    values = published.read(BRIDGE if key.removeprefix("train_dataset.") in OF_RLDS else KOSMOS)
    for other, value in NEEDS.get(key, {}).items():
        values = change(values, other, value)
    old = flatten(values).get(key)
    if key in OTHER:
        new = OTHER[key]
    elif key in ABSENT:
        new = ABSENT[key]
    elif isinstance(old, bool) or old is None:
        new = not old
    else:
        new = old + 3
    before = outcome(values)
    assert isinstance(before, ExperimentConfig), before
    assert outcome(change(values, key, new)) != before


@pytest.mark.parametrize("key", ["windw_size", "act_head.num_layer", "train_setup.lora_rank"])
def test_an_unknown_key_is_named_with_the_nearest_known_one(key):
    near = {"windw_size": "window_size", "act_head.num_layer": "act_head.num_layers"}.get(key, "train_setup.lora_r")
    with pytest.raises(ValueError, match=rf"unknown key '{key}'; did you mean '{near}"):
        upstream.to_experiment(change(published.read(KOSMOS), key, 1))


def test_all_unknown_keys_are_named_at_once(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(change(change(published.read(KOSMOS), "zzz", 1), "yyy.x", 1)))
    with pytest.raises(ValueError, match=r"(?s)a\.json: unknown key 'zzz'.*unknown key 'yyy\.x'.*docs/upstream\.md"):
        upstream.load_experiment(tmp_path / "a.json")


def write(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def test_parents_are_merged_below_their_children(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "configs" / "base.json", a=1, sub={"x": 1, "y": {"p": 1, "q": 2}}, gone={"old": 1}, many=[1, 2])
    write(tmp_path / "configs" / "middle.json", parent="base.json", sub={"x": 2})  # beside its child
    child = write(
        tmp_path / "runs" / "child.json",
        parent="configs/middle.json",  # from the working directory, as upstream looks for it
        sub={"y": {"p": 3}},
        gone={"__override__": True, "new": 2},
        many=[3],
    )
    assert upstream.read_json(child) == {
        "a": 1,
        "parent": "configs/middle.json",
        "sub": {"x": 2, "y": {"p": 3, "q": 2}},
        "gone": {"new": 2},
        "many": [3],
    }


def test_a_child_of_a_published_file_differs_by_what_it_says(tmp_path):
    write(tmp_path / "base.json", **published.read(KOSMOS))
    child = write(tmp_path / "child.json", parent="base.json", window_size=4, trainer={"max_epochs": 1})
    base, config = upstream.load_experiment(tmp_path / "base.json"), upstream.load_experiment(child)
    assert (config.policy.window, config.train.epochs) == (4, 1.0)
    assert config.policy.head == base.policy.head and config.mesh == base.mesh


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "no file .*x.json; expected an upstream JSON"),
        ("{", ValueError, "x.json is not JSON"),
        ("[]", ValueError, "holds a list; expected an object"),
        ('{"parent": "y.json"}', FileNotFoundError, "no file .*y.json, the parent of .*x.json"),
        ('{"parent": "x.json"}', ValueError, "x.json is its own parent"),
        ("{}", ValueError, "x.json: model=None is unknown; known: .*kosmos"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, text, error, message):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=message):
        upstream.load_experiment(path)


def test_a_byte_order_mark_changes_nothing(tmp_path):
    path = tmp_path / "x.json"
    values = published.read(KOSMOS)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(values, indent=1).replace("\n", "\r\n").encode())
    assert upstream.load_experiment(path) == upstream.to_experiment(values)


def test_steps_instead_of_epochs_take_their_share_of_the_warm_up():
    # Lightning estimates the steps; a quarter of one of five epochs of 50,000 steps is 2500.
    config = upstream.to_experiment(change(published.read(KOSMOS), "trainer.max_steps", 50_000))
    assert (config.train.steps, config.train.epochs) == (50_000, 0.0)
    assert (config.optimizer.warmup_steps, config.optimizer.warmup_epochs) == (2500, 0.0)


@pytest.mark.parametrize(
    ("vision", "embedding", "frozen", "expected"),
    [
        (True, True, False, {"vision", "embed", "layers", "connector", "head"}),
        (False, True, False, {"embed", "layers", "connector", "head"}),
        (False, False, False, {"layers", "connector", "head"}),
        (True, False, True, {"vision", "head"}),
        (False, False, True, {"head"}),
    ],
)
def test_what_trains_follows_upstreams_order(vision, embedding, frozen, expected):
    from robovlms_jax.training import trainable

    paths = {
        "vision": "backbone/vision/layers/attn/q/kernel",
        "embed": "backbone/text/embed/table",
        "layers": "backbone/text/layers/attn/q/kernel",
        "connector": "backbone/connector/dense/kernel",
        "head": "head/arm/layer_0/kernel",
    }
    values = published.read(KOSMOS)
    for key, value in (("train_vision", vision), ("train_text_embedding", embedding), ("freeze_backbone", frozen)):
        values = change(values, f"train_setup.{key}", value)
    patterns = upstream.to_experiment(values).train.trainable
    trains, _ = trainable.split({path: part for part, path in paths.items()} | {"readout/queries": "query"}, patterns)
    assert set(trains.values()) == expected | {"query"}


def rows(table: dict[str, str]) -> str:
    return "\n".join(f"| `{key}` | {text} |" for key, text in table.items())


def test_the_page_shows_both_tables():
    page = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "upstream.md").read_text()
    for table in (tables.MAPPED, ignored.IGNORED):
        assert rows(table) in page, f"docs/upstream.md must hold these rows:\n{rows(table)}"


@pytest.mark.parametrize(
    ("changes", "product"),
    [
        ({}, ("policy_head", "action_query", "lstm", 16)),
        ({"type": "GPTDecoder"}, ("policy_head", "action_query", "gpt", 16)),
        ({"type": "FCDecoder"}, ("one_step", "action_query", "mlp", 1)),
        ({"type": "FCDecoder", "history_type": "pre"}, ("interleaved", "action_query", "mlp", 16)),
        ({"type": "FCDecoder", "history_type": "video"}, ("video", "action_query", "mlp", 16)),
        ({"action_space": "down_sample", "down_sample": "pooling"}, ("policy_head", "pool", "lstm", 16)),
        ({"type": "DiscreteDecoder", "action_space": "discrete"}, ("interleaved", "token", "discrete", 16)),
    ],
)
def test_every_structure_of_upstreams_has_its_product(changes, product):
    values = published.read(KOSMOS)
    values["act_head"] |= changes
    policy = upstream.to_experiment(values).policy
    assert (policy.history, policy.readout, heads.kind_of(type(policy.head)), policy.window) == product


def test_heads_and_spaces_that_do_not_go_together_are_refused():
    for key, value in (("type", "DiscreteDecoder"), ("action_space", "discrete")):
        values = published.read(KOSMOS)
        values["act_head"][key] = value
        with pytest.raises(ValueError, match="go together"):
            upstream.to_experiment(values)


def test_backbones_have_the_names_they_are_registered_by():
    assert {name for _, _, name in tables.BACKBONES.values()} <= set(registry.names())
