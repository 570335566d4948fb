"""KOSMOS-2 checkpoints as they are found on disk: spellings, shards, types, and the way back."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.torch import save_file

from robovlms_jax.backbones import registry
from robovlms_jax.weights import convert, export, rules, sources
from tests.backbones.oracle import abstract, example, from_torch, relative_error


def load(config, directory):
    shapes = abstract(config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, shapes)
    return convert.load_params(config.rules, sources.open_source(directory), shapes, shardings)


def assert_equal(found, expected):
    found, expected = flatten_dict(found, sep="/"), flatten_dict(expected, sep="/")
    assert set(found) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_directory_saved_by_transformers_whole_or_in_shards(kosmos, tmp_path):
    kosmos.torch_model.save_pretrained(tmp_path / "whole")
    kosmos.torch_model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for name in ("whole", "shards"):
        config = registry.from_directory(tmp_path / name)
        assert config == kosmos.config
        assert_equal(load(config, tmp_path / name), kosmos.params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32_parameters(kosmos, tmp_path, dtype):
    state = {name: value.to(dtype) for name, value in kosmos.torch_model.state_dict().items()}
    del state["text_model.lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    assert_equal(
        load(kosmos.config, tmp_path),
        from_torch(kosmos.config, {name: value.float() for name, value in state.items()}),
    )


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.", "model.backbone.", "backbone.", "_orig_mod.", "module.model.backbone."]
)
@pytest.mark.parametrize("tied_head", [True, False])
def test_every_spelling_of_a_trained_checkpoint(kosmos, prefix, tied_head):
    state = {f"{prefix}{name}": value for name, value in kosmos.torch_model.state_dict().items()}
    if not tied_head:
        del state[f"{prefix}text_model.lm_head.weight"]
    assert_equal(from_torch(kosmos.config, state), kosmos.params)


def test_compiled_submodules_and_old_buffers_are_admitted(kosmos):
    state = kosmos.torch_model.state_dict()
    state = {name.replace("text_model.model.", "text_model._orig_mod.model."): value for name, value in state.items()}
    state["vision_model.model.embeddings.position_ids"] = torch.arange(5)[None]
    state["text_model.model.embed_positions.weights"] = torch.zeros(8, 32)
    assert_equal(from_torch(kosmos.config, state), kosmos.params)


def test_checkpoint_of_another_size_or_family_is_refused_at_once(kosmos):
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract(kosmos.config), sep="/").items()}
    with torch.device("meta"):
        full = transformers.Kosmos2ForConditionalGeneration(transformers.Kosmos2Config()).state_dict()
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        convert.plan(kosmos.config.rules, {name: tuple(x.shape) for name, x in full.items()}, shapes, name="full")
    message = str(caught.value)
    assert message.startswith("full does not fit")
    assert (
        "text_model.model.embed_tokens.weight  found [65037, 2048], expected [128, 32] for text/embed/table" in message
    )
    assert "(* = 3-23)" in message  # layers the twin does not have
    assert message.count("\n") < 150


def test_export_is_opened_by_transformers_and_computes_the_same(kosmos, tmp_path):
    images, ids, mask = example(kosmos.config, cameras=("static",), lengths=(7, 7))
    for name, size in (("whole", 10**9), ("shards", 60_000)):
        export.export(
            kosmos.params,
            kosmos.config.rules,
            tmp_path / name,
            registry.to_hf_config(kosmos.config),
            max_shard_bytes=size,
        )
        model, info = transformers.Kosmos2ForConditionalGeneration.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        expected = kosmos.torch_model.state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), key
        assert_equal(load(registry.from_directory(tmp_path / name), tmp_path / name), kosmos.params)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 3

    num_image = kosmos.config.connector.num_latents
    slots = np.zeros((2, 7 + num_image), bool)
    slots[:, 1 : 1 + num_image] = True
    with torch.no_grad():
        logits = model(
            pixel_values=torch.from_numpy(images["static"].transpose(0, 3, 1, 2).copy()),
            input_ids=torch.from_numpy(np.insert(ids, [1] * num_image, 50, axis=1)).long(),
            image_embeds_position_mask=torch.from_numpy(slots),
        ).logits
    with jax.default_matmul_precision("highest"):
        assert relative_error(kosmos.apply(images, ids, mask), logits) < 1e-5


def test_backbone_rules_serve_a_policys_tree_beside_rules_of_its_own(kosmos):
    # As an upstream checkpoint has it: the backbone under `model.backbone.`, the policy's tensors beside it.
    state = {f"model.backbone.{name}": tuple(x.shape) for name, x in kosmos.torch_model.state_dict().items()}
    shapes = {f"backbone/{path}": leaf.shape for path, leaf in flatten_dict(abstract(kosmos.config), sep="/").items()}
    policy = (rules.Rule("action_token", "readout/queries"), *rules.linear("act_head.mlp", "head/mlp"))
    state |= {"model.action_token": (1, 32), "model.act_head.mlp.weight": (5, 32), "model.act_head.mlp.bias": (5,)}
    shapes |= {"readout/queries": (1, 32), "head/mlp/kernel": (32, 5), "head/mlp/bias": (5,)}
    recipes = convert.plan(rules.prefixed(kosmos.config.rules, target="backbone/") + policy, state, shapes)
    assert set(recipes) == set(shapes)
    assert recipes["readout/queries"].tensors == ("model.action_token",)
