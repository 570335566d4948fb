"""Checkpoints of every family as found on disk: spellings, shards, types, the way back, and what is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.torch import save_file

from robovlms_jax.backbones import base, registry, sections
from robovlms_jax.runs import build
from robovlms_jax.weights import convert, export, sources
from tests.backbones import families, test_registry
from tests.backbones.oracle import abstract, from_torch, randomize
from tests.weights.array_source import ArraySource

NATIVE = {*families.COMPARED, *families.ENCODER_DECODER} - test_registry.REMOTE_CODE - {"kosmos-2"}
"""Families that transformers saves and opens; KOSMOS-2 has a file of its own."""


def load(config, *directories):
    shapes = abstract(config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, shapes)
    return convert.load_params(config.rules, sources.open_sources(directories), shapes, shardings)


def assert_equal(found, expected):
    found, expected = flatten_dict(found, sep="/"), flatten_dict(expected, sep="/")
    assert set(found) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


ORDINARY = {
    *("kosmos-2", "paligemma2-3b-224", "qwen3-vl-4b", "smolvlm2-500m", "llava-mpt-7b", "moondream2", "janus-pro-1b"),
    *("blip2-opt-2.7b", "flamingo-mpt-1b", "florence-2-base"),
}
"""Between them every kind of rule: fused and parted matrices, tied heads, towers of stages, names within names. The
numbers that every other family's rules give are compared in test_parity.py every day."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in ORDINARY else pytest.mark.slow)
        for name in (*families.COMPARED, *families.ENCODER_DECODER)
    ],
)
def model(request):
    config = families.tiny(request.param)
    return request.param, config, randomize(families.torch_model(config))


def test_every_spelling_and_type_and_the_way_back(model, tmp_path):
    name, config, torch_model = model
    state = families.published(torch_model, dict(torch_model.state_dict()))
    params = from_torch(config, state)
    assert_equal(from_torch(config, {f"module.model.backbone.{key}": value for key, value in state.items()}), params)
    directory = tmp_path / "bfloat16"
    directory.mkdir()
    half = {key: value.to(torch.bfloat16).contiguous().clone() for key, value in state.items()}
    save_file(half, directory / sources.SINGLE)
    assert_equal(load(config, directory), from_torch(config, {key: value.float() for key, value in half.items()}))
    export.export(params, config.rules, tmp_path / "export", registry.to_hf_config(config), max_shard_bytes=40_000)
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 1
    again = registry.from_directory(tmp_path / "export")
    assert again == config
    assert_equal(load(again, tmp_path / "export"), params)
    if name not in NATIVE:
        return
    opened, info = type(torch_model).from_pretrained(tmp_path / "export", output_loading_info=True)
    drawing = {key for key in info["missing_keys"] if key.startswith(("model.vqmodel.", "model.generation_"))}  # Janus'
    constants = {key for key in info["missing_keys"] if key.endswith(".pos_idx_to_embed")}  # compared below
    assert not (info["missing_keys"] - constants - drawing or info["unexpected_keys"] or info["mismatched_keys"]), info
    expected = torch_model.state_dict()
    kept = opened.state_dict().keys() - drawing
    assert all(torch.equal(opened.state_dict()[key], expected[key]) for key in kept)
    torch_model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    saved = registry.from_directory(tmp_path / "saved")
    if (
        config.text.positions == "relative"
    ):  # transformers 5 notes of every T5 that it is tied; `build.fit_weights` looks
        saved = registry.untied(saved)
    assert_equal(load(saved, tmp_path / "saved"), params)


def opened(config, source) -> base.VLMConfig:
    """The configuration that a run goes on with, after it has seen the weights."""
    return build.fit_weights(build.Backbone(config, None, {}), source).vlm


def test_a_head_of_its_own_is_kept_and_a_tied_one_found_under_either_name(model, caplog):
    _, config, torch_model = model
    if config.text.head == "linear_bias":
        with pytest.raises(ValueError, match="tie_word_embeddings=True is not supported"):
            registry.from_hf_config(registry.to_hf_config(config) | {"tie_word_embeddings": True})
        return
    values = registry.to_hf_config(config)
    tied, untied = (registry.from_hf_config(values | {"tie_word_embeddings": flag}) for flag in (True, False))
    assert [x.text.head for x in (tied, untied)] == ["tied", "linear"]
    assert config in (tied, untied) and registry.from_hf_config(registry.to_hf_config(tied)) == tied
    state = families.published(torch_model, dict(torch_model.state_dict()))
    table = next(key for key in state if key.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")))
    head = next(key for key in state if key.endswith(("lm_head.weight", "embed_out.weight")))
    own = {key: value.detach().numpy() for key, value in state.items()} | {head: state[table].numpy() + 0.25}
    source = ArraySource(own, "here")

    found = opened(tied, source)
    assert found == untied and "Both are kept, as transformers does" in caplog.text
    params = from_torch(found, {key: torch.from_numpy(value) for key, value in own.items()})["text"]
    np.testing.assert_array_equal(params["head"]["kernel"], own[head].T)
    np.testing.assert_array_equal(params["embed"]["table"], own[table])
    with pytest.raises(ValueError, match=r"are both stored and differ, by up to 0.25"):
        from_torch(tied, {key: torch.from_numpy(value) for key, value in own.items()})

    for left_out in (head, table):
        same = {key: state[table] if key in (head, table) else value for key, value in state.items() if key != left_out}
        arrays = ArraySource({key: value.detach().numpy() for key, value in same.items()})
        assert opened(tied, arrays) == tied
        np.testing.assert_array_equal(from_torch(tied, same)["text"]["embed"]["table"], own[table])


@pytest.mark.parametrize("name", ["paligemma-3b-224", "smolvlm2-500m", "qwen2.5-vl-3b"])
def test_transformers_keeps_the_same_head(tmp_path, name):
    config = families.tiny(name)
    config = registry.from_hf_config(registry.to_hf_config(config) | {"tie_word_embeddings": True})
    torch_model = randomize(families.torch_model(config))
    state = {key: value.contiguous().clone() for key, value in torch_model.state_dict().items()}
    state["lm_head.weight"] += 0.25
    save_file(state, tmp_path / sources.SINGLE, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(registry.to_hf_config(config)))
    source = sources.open_source(tmp_path)
    found = opened(config, source)
    ours = load(found, tmp_path)["text"]["head"]["kernel"]
    theirs = type(torch_model).from_pretrained(tmp_path).lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(ours, theirs.T)


@pytest.mark.parametrize(
    ("flags", "head"),
    [
        ({"tie_word_embeddings": True}, "tied"),
        ({"tie_word_embeddings": False}, "linear"),
        ({"text_config": {"tie_word_embeddings": True}}, "tied"),
        ({"text_config": {"tie_word_embeddings": False}}, "linear"),
        ({"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}}, "tied"),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, "tied"),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, "tied"),
    ],
)
@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "deepseek_vl"])
def test_the_flag_is_read_wherever_it_stands_and_a_disagreement_is_told(caplog, model_type, flags, head):
    sections._say_once.cache_clear()
    config = registry.from_hf_config({"model_type": model_type} | flags)
    assert config.text.head == head
    disagree = {True, False} == {
        flags.get("tie_word_embeddings"),
        flags.get("text_config", {}).get("tie_word_embeddings"),
    }
    assert ("at the top and" in caplog.text) == disagree


def test_weights_of_another_family_or_size_are_refused():
    config = families.tiny("llava-1.5-7b")
    other = families.torch_model(families.tiny("smolvlm2-500m")).state_dict()
    with pytest.raises(ValueError, match="tensors that no rule matches") as caught:
        from_torch(config, dict(other))
    assert "model.connector.modality_projection.proj.weight" in str(caught.value)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract(config), sep="/").items()}
    with torch.device("meta"):
        full = {
            key: tuple(x.shape) for key, x in families.torch_model(registry.get("llava-1.5-7b")).state_dict().items()
        }
    with pytest.raises(ValueError, match=r"found \[32064, 4096\], expected \[128, 32\] for text/embed/table"):
        convert.plan(config.rules, full, shapes)


def test_parts_published_apart_make_one_model(tmp_path):
    config = families.tiny("llava-mpt-7b")
    torch_model = randomize(families.torch_model(config))
    state = families.published(torch_model, dict(torch_model.state_dict()))
    vision = {key: value.clone() for key, value in state.items() if key.startswith("vision_model.")}
    vision |= {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}  # CLIP has more
    language = {key: value.clone() for key, value in state.items() if key.startswith("transformer.")}
    for name, part in (("language", language), ("vision", vision)):
        (tmp_path / name).mkdir()
        save_file(part, tmp_path / name / sources.SINGLE)
    assert_equal(load(config, tmp_path / "language", tmp_path / "vision"), from_torch(config, state))
    with pytest.raises(ValueError, match="tensors that are missing"):
        load(config, tmp_path / "language")


def test_weights_tell_moondreams_projector_and_revision():
    two, one = registry.get("moondream2"), registry.get("moondream2-2024-03")
    for config in (one, two):
        shapes = {"vision_encoder.projection.mlp.fc1.weight": (8192, 1152 * config.connector.views)}
        assert registry.refine_from_tensors(two, shapes) == registry.refine_from_tensors(one, shapes) == config
    with pytest.raises(ValueError, match=r"MoonDream2 weights of 2025 .* take a revision of 2024"):
        registry.refine_from_tensors(two, {"model.text.blocks.0.ln.weight": (2048,)})
    assert registry.refine_from_tensors(registry.get("qwen-vl"), {}) == registry.get("qwen-vl")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llava", "vision_feature_layer": -1}, "vision_feature_layer=-1 is not supported; .* -2"),
        ({"model_type": "llava", "text_config": {"model_type": "mistral"}}, "text_config.model_type='mistral'"),
        ({"model_type": "llava", "text_config": {"rope_scaling": {"type": "linear"}}}, "rope_scaling of type 'linear'"),
        ({"model_type": "paligemma", "vision_config": {"vision_use_head": True}}, "vision_use_head=True"),
        ({"model_type": "llava_mpt", "attn_config": {"alibi": False}}, "attn_config.alibi=False is not supported"),
        ({"model_type": "vlm", "text_decoder_name_or_path": "a/llama"}, "'a/llama' is not supported"),
        ({"model_type": "qwen2_5_vl", "vision_config": {"image_size": 225}}, "no multiple of 28"),
        (
            {"model_type": "gemma3", "text_config": {"rope_scaling": {"rope_type": "yarn"}}},
            "type 'yarn' is not supported",
        ),
        ({"model_type": "gemma3", "text_config": {"layer_types": ["full_attention"]}}, "every 6th layer alone"),
        ({"model_type": "qwen3_vl", "vision_config": {"image_size": 240}}, "no multiple of 32"),
        ({"model_type": "qwen3_vl", "vision_config": {"deepstack_visual_indexes": [8, 27]}}, "some of the 27 layers"),
        ({"model_type": "paligemma", "vision_config": {"image_size": 225, "patch_size": 14}}, "no multiple of"),
    ],
)
def test_variants_a_family_does_not_have_are_named(tmp_path, values, message):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as caught:
        registry.from_directory(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_hub_files_with_the_decoder_at_the_top_are_read():
    # Qwen/Qwen2.5-VL-7B-Instruct's own file has no text_config and older names.
    values = {
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "vision_config": {"depth": 32, "hidden_size": 1280, "fullatt_block_indexes": [7, 15, 23, 31]},
        "vocab_size": 152_064,
    }
    assert registry.from_hf_config(values) == registry.get("qwen2.5-vl-7b")
    assert transformers.Qwen2_5_VLConfig(**values).text_config.hidden_size == 3584
