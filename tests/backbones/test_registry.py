"""Every registered backbone, at full size as shapes and as its tiny twin."""

from __future__ import annotations

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from robovlms_jax.backbones import base, registry, sequence
from robovlms_jax.inputs import images as images_module
from robovlms_jax.nn.attention import Cache
from robovlms_jax.parallel.rules import RULES
from robovlms_jax.weights import convert
from tests.backbones import families
from tests.backbones.oracle import BATCH, DISTINCT, abstract, as_read, boxed, example

Q = 3
PUBLISHED = {
    "kosmos-2": (886, 1_664_485_376),
    "paligemma-3b-224": (604, 2_923_466_480),
    "paligemma-3b-448": (604, 2_924_351_216),
    "paligemma2-3b-224": (728, 3_032_242_416),
    "paligemma2-10b-224": (904, 9_662_638_832),
    "paligemma2-3b-mix-224": (728, 3_032_242_416),
    "paligemma2-3b-mix-448": (728, 3_033_127_152),
    "paligemma2-10b-mix-448": (904, 9_663_523_568),
    "paligemma2-28b-mix-448": (948, 27_651_371_760),
    "llava-1.5-7b": (686, 7_063_427_072),
    "llava-1.5-13b": (758, 13_351_494_656),
    "llava-mpt-7b": (588, 6_956_664_832),
    "moondream2": (578, 1_866_919_792),
    "moondream2-2024-03": (578, 1_857_482_608),
    "qwen-vl": (853, 9_656_935_168),
    "uform-gen2-qwen-500m": (894, 1_117_794_176),
    "qwen2.5-vl-3b": (825, 3_754_622_976),
    "qwen2.5-vl-7b": (729, 8_292_166_656),
    "qwen3-vl-2b": (626, 2_127_532_032),
    "qwen3-vl-4b": (714, 4_437_815_808),
    "qwen3-vl-8b": (750, 8_767_123_696),
    "gemma-3-4b": (884, 4_300_079_472),
    "gemma-3-12b": (1066, 12_187_325_040),
    "gemma-3-27b": (1248, 27_432_406_640),
    "internvl3-1b": (733, 938_193_024),
    "internvl3-2b": (781, 2_088_957_440),
    "internvl3-8b": (781, 7_944_373_760),
    "blip2-opt-2.7b": (1248, 3_744_761_856),
    "blip2-opt-6.7b": (1248, 7_752_869_376),
    "blip2-flan-t5-xl": (1291, 3_942_446_592),
    "instructblip-vicuna-7b": (1096, 7_913_210_624),
    "instructblip-vicuna-13b": (1168, 14_191_448_832),
    "instructblip-flan-t5-xl": (1365, 4_022_969_088),
    "smolvlm2-256m": (471, 256_484_928),
    "smolvlm2-500m": (489, 507_482_304),
    "smolvlm2-2.2b": (657, 2_246_784_880),
    "idefics3-8b-llama3": (729, 8_462_086_384),
    "janus-pro-1b": (964, 1_962_640_384),
    "deepseek-vl-1.3b": (612, 1_962_640_384),
    "florence-2-base": (668, 231_414_016),
    "florence-2-large": (920, 776_465_408),
    "flamingo-mpt-1b": (919, 2_558_640_176),
    "flamingo-neox-3b": (1024, 4_039_805_984),
    "flamingo-mpt-7b": (743, 8_131_299_344),
    "otter-mpt-7b": (743, 8_131_299_344),
    "otter-llama-7b": (839, 8_220_428_304),
}
"""Tensors of the torch model (tied matrices stored once more, what other parts of a joint checkpoint add left out), and
parameters. Qwen-VL's are those of its published index: 853 names, total_size / 2."""

every = pytest.mark.parametrize("name", registry.names())
FIRST = {dataclasses.replace(registry.get(name).tiny(), rules=()): name for name in reversed(registry.names())}


def by_form(names) -> pytest.MarkDecorator:
    """Every day the first of those whose twins are equal; the others, which differ in sizes alone, are slow tests."""
    first = set(FIRST.values())
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in first else pytest.mark.slow) for name in names]
    )


def test_every_family_has_a_published_model_to_compare_with():
    assert {registry.get(name).model_type for name in registry.names()} == {
        registry.get(name).model_type for name in PUBLISHED
    }
    assert set(registry.names()) - set(PUBLISHED) == {"kosmos-2-twin", "kosmos-2-mini"}


@pytest.mark.parametrize("name", DISTINCT)
def test_full_size_shapes(name):
    config = registry.get(name)
    cameras = ("static",) if config.encoder is not None else ("wrist", "static")  # base has no places for two
    images, *text = example(config, cameras)
    ids, mask = as_read(config, *text)
    model = base.build(config)
    params = {"params": abstract(config)}
    queries = [sequence.query(jnp.zeros((Q, config.width)), BATCH)]
    tokens = jax.eval_shape(lambda p: model.apply(p, images, ids, mask, queries, method="embed"), params)
    slots = sum(length for _, length in tokens.layout)
    assert dict(tokens.layout)["query"] == Q
    cache = jax.eval_shape(lambda p: model.apply(p, BATCH, slots + 1, method="init_cache"), params)
    hidden, cache = jax.eval_shape(lambda p, t, c: model.apply(p, t, c, method="decode"), params, tokens, cache)
    logits = jax.eval_shape(lambda p, h: model.apply(p, h, method="logits"), params, hidden)
    dims = chex.Dimensions(B=BATCH, S=slots, D=config.width, V=config.text.vocab_size)
    chex.assert_shape([tokens.embeds, hidden], dims["BSD"])
    chex.assert_shape([tokens.mask, tokens.positions], dims["BS"])
    chex.assert_shape(logits, dims["BSV"])
    chex.assert_type([tokens.mask, tokens.positions], [bool, jnp.int32])
    assert isinstance(cache, Cache)
    assert cache.mask.shape == (BATCH, slots)


ADAPTED = [name for name in DISTINCT if registry.get(name).model_type in ("kosmos-2", "qwen3_vl")]


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        *((name, 0) for name in DISTINCT),
        # Adapters are made by `nn.linear.Kernel` alike everywhere: every day of two families that have all its forms.
        *(pytest.param(name, 4, marks=() if name in ADAPTED else pytest.mark.slow) for name in DISTINCT),
    ],
)
def test_every_parameter_names_its_axes_and_the_mesh_rules_know_them(name, rank):
    known = {axis for axis, _ in RULES}
    for path, leaf in flatten_dict(boxed(dataclasses.replace(registry.get(name), lora_rank=rank)), sep="/").items():
        assert len(leaf.names) == leaf.value.ndim, path
        assert set(leaf.names) - {None} <= known, path
        assert leaf.value.dtype == jnp.float32, path
        assert ("layers" in leaf.names) == ("layers/" in path), path


@by_form(PUBLISHED)
def test_rules_cover_the_full_size_checkpoint_and_its_parameters(name):
    num_tensors, num_parameters = PUBLISHED[name]
    config = registry.get(name)
    with torch.device("meta"):
        model = families.torch_model(config)
        tensors = families.published(model, dict(model.state_dict()))
    tensors = {key: tuple(value.shape) for key, value in tensors.items()}
    assert len(tensors) == num_tensors
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract(config), sep="/").items()}
    recipes = convert.plan(config.rules, tensors, shapes)
    assert set(recipes) == set(shapes)
    assert sum(np.prod(shape) for shape in shapes.values()) == num_parameters


REMOTE_CODE = {"llava-mpt-7b", "moondream2", "moondream2-2024-03", "qwen-vl", "uform-gen2-qwen-500m"}
REMOTE_CODE |= {name for name in PUBLISHED if name.startswith(("flamingo-", "otter-"))}
"""Published models whose classes are not in transformers."""


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - REMOTE_CODE))
def test_transformers_reads_our_config_json_as_we_do(name):
    # With all its own defaults filled in, and its own names for them.
    config = registry.get(name)
    values = registry.to_hf_config(config)
    model_class = getattr(transformers, values.pop("architectures")[0])
    model_type = values.pop("model_type")
    found = registry.from_hf_config(model_class.config_class(**values).to_dict() | {"model_type": model_type})
    if config.text.positions == "relative":  # it calls every T5's head tied, until a file holds another one
        assert found.text.head == "tied"
        found = registry.untied(found)
    assert found == config


def test_published_numbers_of_kosmos_are_those_of_the_config_class():
    assert registry.from_hf_config(transformers.Kosmos2Config().to_dict()) == registry.get("kosmos-2")


@every
def test_configuration_survives_its_config_json(name):
    for config in (registry.get(name), registry.get(name).tiny()):
        assert registry.from_hf_config(json.loads(json.dumps(registry.to_hf_config(config)))) == config


@by_form(registry.names())
def test_tiny_twin_has_the_full_models_parameters(name):
    config = registry.get(name)
    full, tiny = (flatten_dict(abstract(c), sep="/") for c in (config, config.tiny()))
    assert {path: leaf.ndim for path, leaf in full.items()} == {path: leaf.ndim for path, leaf in tiny.items()}
    assert sum(leaf.size for leaf in tiny.values()) < 200_000


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"no backbone 'kosmos-3'; did you mean 'kosmos-2'\? Registered: .*kosmos-2"):
        registry.get("kosmos-3")
    with pytest.raises(ValueError, match=r"model_type 'bert' is unknown; known: \[.*'kosmos-2'"):
        registry.from_hf_config({"model_type": "bert"})


def test_names_are_registered_once():
    with pytest.raises(ValueError, match=r"'kosmos-2' is registered already, by robovlms_jax.backbones.kosmos2"):
        registry.register("kosmos-2")(lambda: None)
    with pytest.raises(ValueError, match="'kosmos-2' is registered already"):
        registry.register_family("kosmos-2", None, None)


def test_config_json_may_use_new_names_lists_for_squares_and_leave_out_defaults():
    values = {
        "model_type": "kosmos-2",
        "latent_query_num": 9,
        "text_config": {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "eos_token_id": None},
        "vision_config": {"image_size": [112, 112], "patch_size": 14},
    }
    config = registry.from_hf_config(values)
    published = registry.get("kosmos-2")
    assert (config.text.width, config.text.depth, config.text.num_heads) == (64, 5, 4)
    assert (config.vision.image_size, config.image.size, config.connector.num_latents) == (112, 112, 9)
    assert (config.text.mlp_dim, config.vision.width, config.eos_id) == (
        published.text.mlp_dim,
        published.vision.width,
        2,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config": {"activation_dropout": 0.1}}, "text_config.activation_dropout=0.1 is not supported"),
        ({"text_config": [1]}, r"text_config=\[1\]; expected an object of settings"),
        ({"vision_config": {"hidden_size": "1024"}}, "vision_config.hidden_size='1024'; expected such as 1024"),
        (
            {"model_type": "moondream1", "tie_word_embeddings": True},
            "tie_word_embeddings=True is not supported; this model's head",
        ),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantised by AWQ \(4 bits\).*float32"),
        ({"vision_config": {"image_size": [224, 112]}}, r"vision_config.image_size=\[224, 112\] is not supported"),
        ({"vision_config": {"hidden_act": "relu6"}}, "vision activation 'relu6' is unknown"),
    ],
)
def test_variants_the_model_does_not_have_are_refused_with_the_file_named(tmp_path, values, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kosmos-2"} | values))
    with pytest.raises(ValueError, match=message) as caught:
        registry.from_directory(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_directories_without_a_readable_config_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; a backbone directory holds"):
        registry.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON: Expecting"):
        registry.from_directory(tmp_path)


def test_directory_brings_its_own_image_statistics_which_must_fit(tmp_path):
    tiny = registry.get("kosmos-2").tiny()
    (tmp_path / "config.json").write_text(json.dumps(registry.to_hf_config(tiny)))
    assert registry.from_directory(tmp_path) == tiny
    own = images_module.ImageSpec(
        size=tiny.image.size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), interpolation="bilinear"
    )
    images_module.write_image_spec(own, tmp_path)
    assert registry.from_directory(tmp_path) == dataclasses.replace(tiny, image=own)
    images_module.write_image_spec(dataclasses.replace(own, size=30), tmp_path)
    with pytest.raises(ValueError, match=r"makes 30 pixels but config\.json says the vision tower reads 28"):
        registry.from_directory(tmp_path)


def test_a_partial_table_keeps_the_rows_of_other_backbones_and_says_of_which_revision(tmp_path):
    from benchmarks import backbones  # imports this module

    path = tmp_path / "results.json"
    held = {
        "machine": {"git_revision": "old"},
        "backbones": {"qwen-vl": {"parameters": 1}, "kosmos-2": {"parameters": 2}},
    }
    path.write_text(json.dumps(held))
    rows = backbones.with_earlier({"qwen-vl": {"parameters": 3}}, path)
    assert list(rows) == ["kosmos-2", "qwen-vl"]  # in the order of PUBLISHED
    assert rows["kosmos-2"] == {"parameters": 2, "git_revision": "old"}
    assert rows["qwen-vl"]["parameters"] == 3 and rows["qwen-vl"]["git_revision"] != "old"
    assert list(backbones.with_earlier({"qwen-vl": {}}, None)) == ["qwen-vl"]
