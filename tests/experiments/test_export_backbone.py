"""A policy's model goes back to where it came from: transformers opens it, PEFT its adapters, a new run those."""

import dataclasses

import jax
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments import export_backbone
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.nn.linear import merge_lora
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.runs import build
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import to_dict
from robovlms_jax.training import checkpoints
from tests import toy
from tests.backbones import families
from tests.backbones.oracle import from_torch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with adapters that are not zero, of a policy without LLaVA's head for words; the base's weights."""
    root = tmp_path_factory.mktemp("export_backbone")
    weights, published = families.publish("llava-1.5-7b", root / "base")
    settings = BackboneConfig("llava-1.5-7b", weights=weights, lora_rank=2, lora_kind="dora")
    policy = PolicyConfig(window=2, chunk=2, cameras=("static",), head=toy.HEAD)
    experiment = ExperimentConfig(backbone=settings, policy=policy)
    backbone = build.open_backbone(settings, [])
    model, mesh = build.make_model(experiment, backbone.vlm), meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    flat = flatten_dict(build.init_params(model, mesh, 0, backbone), sep="/")
    rng = np.random.default_rng(0)
    for path in flat:
        if path.endswith(("lora_b", "lora_m")) and path.startswith("backbone/"):
            flat[path] = flat[path] + 0.1 * rng.normal(size=flat[path].shape).astype(np.float32)
    params = unflatten_dict(flat, sep="/")
    checkpoints.write_policy(root / "run", params, {"config": to_dict(experiment), "assets": dict(backbone.assets)})
    return root, experiment, published, params


def test_transformers_opens_the_whole_model_with_the_words_of_its_base(trained, tmp_path):
    # Fails if adapters are not merged, if the head that the policy has not is left out, or if files are missing.
    root, experiment, published, params = trained
    out = export_backbone.main(export_backbone.ExportBackboneConfig(str(root / "run"), str(tmp_path / "whole")))
    model = transformers.LlavaForConditionalGeneration.from_pretrained(out)
    vlm = dataclasses.replace(build.open_backbone(experiment.backbone, []).vlm, lora_rank=0)
    state = families.published(model, model.state_dict())
    found = flatten_dict(from_torch(vlm, state), sep="/")
    expected = flatten_dict(merge_lora(params["backbone"], experiment_lora(experiment)), sep="/")
    assert {path for path in found if path not in expected} == {"text/head/kernel"}
    np.testing.assert_array_equal(found.pop("text/head/kernel"), published["text/head/kernel"])
    for path, x in expected.items():
        np.testing.assert_allclose(found[path], x, rtol=1e-5, atol=1e-6, err_msg=path)
    assert build.open_backbone(BackboneConfig(weights=str(out)), []).tokenizer is not None


def experiment_lora(experiment):
    return build.open_backbone(experiment.backbone, []).vlm.lora


def test_exported_adapters_are_what_another_run_begins_with(trained, tmp_path, caplog):
    root, experiment, _, params = trained
    out = export_backbone.main(
        export_backbone.ExportBackboneConfig(str(root / "run"), str(tmp_path / "adapters"), adapters=True)
    )
    assert "of the backbone's own parameters beside the adapters" in caplog.text  # train.trainable is .* there
    settings = dataclasses.replace(experiment.backbone, adapter=str(out))
    backbone = build.open_backbone(settings, [])
    model, mesh = build.make_model(experiment, backbone.vlm), meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    again = flatten_dict(build.init_params(model, mesh, 1, backbone), sep="/")
    for path, x in flatten_dict(params, sep="/").items():
        if path.startswith("backbone/"):
            np.testing.assert_allclose(again[path], x, rtol=1e-5, atol=1e-6, err_msg=path)


def test_what_cannot_be_exported_is_said_and_what_fails_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    root, experiment, _, params = trained
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_backbone.main(export_backbone.ExportBackboneConfig(str(root / "run"), str(tmp_path / "full")))
    alone = dataclasses.replace(experiment, backbone=dataclasses.replace(experiment.backbone, weights=""))
    assets = dict(build.open_backbone(experiment.backbone, []).assets)
    checkpoints.write_policy(tmp_path / "run", params, {"config": to_dict(alone), "assets": assets})
    with pytest.raises(ValueError, match=r"has no \['text/head/kernel'\].*--base"):
        export_backbone.main(export_backbone.ExportBackboneConfig(str(tmp_path / "run"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(export_backbone.tokenizers, "write_assets", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_backbone.main(export_backbone.ExportBackboneConfig(str(root / "run"), str(tmp_path / "out")))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]  # whole or not at all
    with pytest.raises(ValueError, match=r"backbone.adapter='x' needs backbone.lora_rank"):
        BackboneConfig(adapter="x")
