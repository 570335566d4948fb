"""From a weight directory in the hub's layout to sharded policy parameters."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from robovlms_jax import cli
from robovlms_jax.actions import discretize
from robovlms_jax.backbones import registry
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.inputs import images, tokenizers
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.discrete import DiscreteHeadConfig
from robovlms_jax.runs import build
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.weights import export
from tests.toy import make_batch, make_model, random_params

SENTENCES = ["open the drawer", "push the red block to the left"]


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh((1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def published(tmp_path_factory, mesh):
    """A directory as the hub publishes it, and the policy parameters its weights were taken from."""
    directory = tmp_path_factory.mktemp("weights")
    vlm = registry.get("kosmos-2").tiny()
    vlm = dataclasses.replace(vlm, text=dataclasses.replace(vlm.text, vocab_size=300))
    model = dataclasses.replace(make_model(), vlm=vlm)
    params = random_params(model, make_batch(np.random.default_rng(3)))
    export.export(params["backbone"], vlm.rules, directory, registry.to_hf_config(vlm))
    images.write_image_spec(vlm.image, directory)
    tokenizers.make_twin_tokenizer(SENTENCES, 300, directory)
    return directory, model, params


def test_a_published_directory_becomes_the_backbone(published, mesh):
    # Loaded parameters replace random ones exactly; head and readout come from the seed.
    directory, model, params = published
    backbone = build.open_backbone(BackboneConfig(weights=str(directory)), [])
    assert (backbone.vlm.text, backbone.vlm.vision) == (model.vlm.text, model.vlm.vision)
    loaded = flatten_dict(build.init_params(model, mesh, seed=4, backbone=backbone), sep="/")
    expected = flatten_dict(params, sep="/")

    def drawn(key):  # without the backbone, so that drawing it is not compiled
        flat = flatten_dict(meshes.unbox(build._init(model, key)), sep="/")
        return {path: x for path, x in flat.items() if not path.startswith("backbone/")}

    other = jax.jit(drawn)(jax.random.key(4))
    assert loaded.keys() == expected.keys()
    for path, x in loaded.items():
        source = expected if path.startswith("backbone/") else other
        np.testing.assert_array_equal(x, source[path], err_msg=path)


def test_adapters_are_added_to_loaded_weights(published, mesh):
    directory, model, params = published
    backbone = build.open_backbone(BackboneConfig(weights=str(directory), lora_rank=2), [])
    adapted = dataclasses.replace(model, vlm=backbone.vlm)
    flat = flatten_dict(build.init_params(adapted, mesh, seed=4, backbone=backbone), sep="/")
    extra = set(flat) - set(flatten_dict(params, sep="/"))
    assert extra and all(path.rpartition("/")[2] in ("lora_a", "lora_b") for path in extra)
    assert not any(np.any(flat[path]) for path in extra if path.endswith("lora_b"))


def test_the_backbone_comes_back_from_a_checkpoints_files(published):
    directory, *_ = published
    config = BackboneConfig(weights=str(directory), dtype="bfloat16")
    opened = build.open_backbone(config, [])
    again = build.backbone_from_assets(config, json.loads(json.dumps(dict(opened.assets))))
    assert again.vlm == opened.vlm and again.vlm.dtype == "bfloat16"
    for first, second in zip(opened.encoder(8)(SENTENCES[0]), again.encoder(8)(SENTENCES[0])):
        np.testing.assert_array_equal(first, second)


def test_what_a_checkpoints_files_lack_is_said_without_a_temporary_path(published):
    config = BackboneConfig(weights=str(published[0]))
    assets = dict(build.open_backbone(config, []).assets)
    for changes, message in (
        ({"tokenizer.json": None}, "^the checkpoint's assets has no tokenizer"),
        ({"config.json": "{"}, "^the checkpoint's assets/config.json is not JSON"),
        ({"tokenizer.json": "{"}, "^the checkpoint's assets has tokenizer files .*assets/tokenizer.json is not JSON"),
    ):
        left = {name: content for name, content in (assets | changes).items() if content is not None}
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            build.backbone_from_assets(config, left)


def test_byte_order_marks_in_a_published_directory_change_nothing(published, tmp_path):
    directory, *_ = published
    for path in directory.iterdir():
        mark = b"\xef\xbb\xbf" if path.suffix == ".json" else b""
        (tmp_path / path.name).write_bytes(mark + path.read_bytes())
    opened, marked = (build.open_backbone(BackboneConfig(weights=str(x)), []) for x in (directory, tmp_path))
    assert marked.vlm == opened.vlm
    np.testing.assert_array_equal(marked.encode("open it", 32)[0], opened.encode("open it", 32)[0])
    again = build.backbone_from_assets(BackboneConfig(), json.loads(json.dumps(dict(marked.assets))))
    np.testing.assert_array_equal(again.encode("open it", 32)[0], opened.encode("open it", 32)[0])


def test_a_head_that_fine_tuning_untied_is_kept_in_training_and_in_checkpoints(published, mesh, tmp_path, caplog):
    directory, model, params = published
    for path in directory.iterdir():
        shutil.copy(path, tmp_path / path.name)
    tensors = load_file(tmp_path / "model.safetensors")
    head = np.asarray(params["backbone"]["text"]["embed"]["table"]) + 1
    save_file(tensors | {"text_model.lm_head.weight": head}, tmp_path / "model.safetensors")
    backbone = build.open_backbone(BackboneConfig(weights=str(tmp_path)), [])
    assert "are both stored and differ, by up to 1" in caplog.text and str(tmp_path) in caplog.text
    assert backbone.vlm.text.head == "linear"
    again = build.backbone_from_assets(BackboneConfig(), dict(backbone.assets))
    assert again.vlm == backbone.vlm, "a checkpoint's own config.json says so"
    policy = dataclasses.replace(model.config, window=1, history="one_step", readout="token", head=DiscreteHeadConfig())
    untied = dataclasses.replace(model, vlm=backbone.vlm, config=policy)
    loaded = build.init_params(untied, mesh, seed=4, backbone=backbone)
    np.testing.assert_array_equal(loaded["backbone"]["text"]["head"]["kernel"], head.T)


def test_prompts_longer_than_training_still_fit(published):
    encode = build.open_backbone(BackboneConfig(weights=str(published[0])), []).encoder(8)
    ids, mask = encode(" ".join(SENTENCES * 3))
    assert len(ids) % 8 == 0 and len(ids) > 8 and mask.sum() > 8


def test_action_words_are_the_vocabularys_last_ones(published):
    # Upstream's original size: the tokenizer's 297 words less 4 special tokens with a name, 7 without and 10. A number
    # that was given is kept, and policies whose actions are no words stay as they are.
    tokenizer = build.open_backbone(BackboneConfig(weights=str(published[0])), []).tokenizer
    policy = PolicyConfig(window=1, history="one_step", readout="token", head=DiscreteHeadConfig(num_bins=64))
    words = ExperimentConfig(policy=policy)
    end = build.with_action_ids(words, tokenizer).policy.head.vocab_end
    assert end == discretize.vocabulary_end(tokenizer) == 297 - 4 - 7 - 10
    given = cli.override(words, **{"policy.head.vocab_end": 200})
    assert build.with_action_ids(given, tokenizer) == given
    assert build.with_action_ids(ExperimentConfig(), tokenizer) == ExperimentConfig()
    many = cli.override(words, **{"policy.head.num_bins": 299})
    with pytest.raises(ValueError, match="299"):
        build.with_action_ids(many, tokenizer)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "config.json does not exist"),
        ("tokenizer.json", "has no tokenizer"),
        ("model.safetensors", "safetensors"),
    ],
)
def test_an_incomplete_directory_names_what_is_missing(published, mesh, tmp_path, missing, message):
    directory, model, _ = published
    copy = tmp_path / "weights"
    shutil.copytree(directory, copy)
    (copy / missing).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        build.init_params(model, mesh, 0, build.open_backbone(BackboneConfig(weights=str(copy)), []))


def test_truncated_weights_are_named(published, mesh, tmp_path):
    directory, model, _ = published
    copy = tmp_path / "weights"
    shutil.copytree(directory, copy)
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises((OSError, ValueError), match=r"model\.safetensors"):
        build.init_params(model, mesh, 0, build.open_backbone(BackboneConfig(weights=str(copy)), []))


def test_a_tokenizer_of_another_model_is_refused(published, tmp_path):
    copy = tmp_path / "weights"
    shutil.copytree(published[0], copy)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["vocab_size"] = 100
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vocabulary is 100"):
        build.open_backbone(BackboneConfig(weights=str(copy)), [])


def test_full_size_without_weights_costs_no_memory():
    # Shapes of the whole published policy, milliseconds, nothing allocated.
    model = dataclasses.replace(make_model(), vlm=registry.get("kosmos-2"))
    shapes, _ = build.abstract_params(model, meshes.make_mesh((1, 1, 1), jax.devices()[:1]))
    assert build.count(shapes["backbone"]) == 1_664_485_376
