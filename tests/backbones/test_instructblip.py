"""InstructBLIP's Q-Former reads the instruction, in tokens of its own: from tokenizer files to the image's tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from robovlms_jax.backbones import base, registry, t5
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.inputs import conversations, prompts, tokenizers
from robovlms_jax.inputs import images as images_module
from robovlms_jax.policies import serving
from robovlms_jax.policies.auxiliary_config import AuxiliaryConfig
from robovlms_jax.runs import build
from tests import toy
from tests.backbones.oracle import abstract, as_read, example, question

NAME = "instructblip-vicuna-7b"


@pytest.fixture(scope="module")
def backbone() -> build.Backbone:
    return build.open_backbone(BackboneConfig(name=NAME), ["open the drawer", "push the red block to the left"])


def test_the_instruction_is_told_twice_each_time_in_tokens_of_one_tokenizer(backbone):
    ids, mask = backbone.encode("open the drawer", 24)
    assert ids.shape == mask.shape == (24, 2)
    parts = (backbone.tokenizer, backbone.connector_tokenizer)
    for part, tokenizer in enumerate(parts):
        expected, real = prompts.encode(tokenizer, "{instruction}", "open the drawer", 24)
        np.testing.assert_array_equal(ids[:, part], expected)
        np.testing.assert_array_equal(mask[:, part], real)
    texts = ["open the drawer", "a word that neither of them knows"]
    longest = max(len(tokenizer(text)["input_ids"]) for text in texts for tokenizer in parts)
    assert backbone.longest(texts, multiple=1) == longest


def test_both_tokenizers_travel_inside_a_checkpoint_and_a_missing_one_is_named(backbone):
    files = [name for name in backbone.assets if name.startswith(f"{tokenizers.CONNECTOR_TOKENIZER}/")]
    assert f"{tokenizers.CONNECTOR_TOKENIZER}/tokenizer.json" in files
    again = build.backbone_from_assets(BackboneConfig(name=NAME), backbone.assets)
    np.testing.assert_array_equal(again.encode("close it", 24)[0], backbone.encode("close it", 24)[0])
    left = {name: content for name, content in backbone.assets.items() if name not in files}
    with pytest.raises(ValueError, match=r"assets/qformer_tokenizer is missing: .* Copy the folder qformer_"):
        build.backbone_from_assets(BackboneConfig(name=NAME), left)


def test_the_images_tokens_follow_the_question_and_not_its_padding(exact_matmul):
    config = registry.get(NAME).tiny()
    rng = np.random.default_rng(3)

    def make(path, x):
        return rng.normal(path[-1].key == "scale", 0.2, x.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(make, abstract(config))
    images, *text = example(config)

    @jax.jit
    def features(ids, mask):
        return base.build(config).apply({"params": params}, images, (ids, mask), method="encode_images")

    ids, mask = question(config)
    found = features(ids, mask)
    assert np.abs(features(np.where(np.arange(7) == 1, 9, ids), mask) - found).max() > 1e-3
    np.testing.assert_allclose(features(np.where(mask, ids, 9), mask), found, atol=1e-5)
    np.testing.assert_allclose(features(*question(config, side="left")), found, atol=1e-5)
    both = as_read(config, *text)
    with pytest.raises(AssertionError, match=r"(?i)rank"):
        jax.eval_shape(lambda p: base.build(config).apply({"params": p}, images, *text, method="embed"), params)
    tokens = jax.jit(lambda p: base.build(config).apply({"params": p}, images, *both, method="embed"))(params)
    np.testing.assert_allclose(tokens.embeds[:, tokens.slot("image")], found, atol=1e-5)


def test_an_episodes_instruction_reaches_the_q_former_and_is_encoded_once(backbone):
    model = toy.make_product("one_step", "action_query", "mlp")
    model = dataclasses.replace(model, vlm=registry.get(NAME).tiny())
    batch = toy.as_read(model.vlm, toy.make_batch(np.random.default_rng(0), window=1, windows=1, chunk=2))
    params, asked = toy.random_params(model, batch), []
    params = jax.tree.map(lambda x: x + 0.05, params)

    def encode(instruction: str):
        asked.append(instruction)
        ids, mask = (np.asarray(x[0]).copy() for x in (batch.inputs.text_ids, batch.inputs.text_mask))
        ids[1, 1] = 5 if instruction == "open" else 250  # the prompts themselves are the same
        return ids, mask

    policy = serving.BatchedVLAPolicy(model, params, encode, slots=1, prompt_lengths=(4, 16))
    frame = {camera: x[0, 0] for camera, x in batch.inputs.images.items()}
    acted = {}
    for instruction in ("open", "close"):
        policy.reset([0], [instruction])
        acted[instruction] = [policy.act([serving.Observation(frame)], [0])[0].actions for _ in range(2)]
    assert asked == ["open", "close"]
    assert np.abs(acted["open"][0] - acted["close"][0]).max() > 1e-6


def test_the_first_question_of_a_conversation_is_what_the_q_former_reads(tmp_path):
    for name in ("a", "b"):
        tokenizers.make_twin_tokenizer([f"what colour {name}"], 300, tmp_path / name)
    first, second = (tokenizers.load_tokenizer(tmp_path / name) for name in ("a", "b"))
    turns = (conversations.Turn("<image>\nWhat colour?", "red"), conversations.Turn("And its shape?", "round"))
    found = conversations.encoder(first, "instructblip", 4, second)(turns, 1)
    assert found.question.tolist() == second("What colour?")["input_ids"]
    assert conversations.encoder(first, "instructblip", 4)(turns, 1).question.size == 0


def test_captions_are_refused_because_the_image_would_tell_the_words():
    model = toy.make_product("one_step", "action_query", "mlp")
    config = dataclasses.replace(model.config, auxiliary=AuxiliaryConfig(caption_weight=0.1))
    model = dataclasses.replace(model, config=config, vlm=registry.get(NAME).tiny())
    batch = toy.as_read(model.vlm, toy.make_batch(np.random.default_rng(0), window=1, windows=1, chunk=2))
    with pytest.raises(ValueError, match=r"caption_weight asks for each word.*connector of a instructblip reads all"):
        toy.random_params(model, batch)


def test_a_question_longer_than_the_q_former_reads_is_refused():
    config = registry.get(NAME).tiny()
    config = dataclasses.replace(config, connector=dataclasses.replace(config.connector, max_positions=5))
    images, *text = example(config)
    with pytest.raises(ValueError, match=r"the instruction has 7 slots, and the Q-Former reads 5"):
        jax.eval_shape(lambda: base.build(config).init(jax.random.key(0), images, *as_read(config, *text)))


def test_pictures_are_prepared_as_blips_processor_does(tmp_path):
    spec = registry.get(NAME).image
    edges = {"height": spec.size, "width": spec.size}
    processor = transformers.BlipImageProcessorPil(size=edges, image_mean=list(spec.mean), image_std=list(spec.std))
    processor.save_pretrained(tmp_path)
    assert images_module.read_image_spec(tmp_path) == spec
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8).repeat(9, 0).repeat(7, 1)
    expected = processor(frame, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    levels = (expected * np.asarray(spec.std) + np.asarray(spec.mean)) * 255
    ours = images_module.resize_on_host(frame, spec.size, spec.interpolation).astype(float)
    assert np.abs(ours - levels).max() < 1.01


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({}, (False, "relu", "tied", True)),
        ({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, (True, "gelu_new", "linear", False)),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, (True, "gelu", "tied", True)),
        ({"feed_forward_proj": "gated-silu", "scale_decoder_outputs": False}, (True, "silu", "tied", False)),
    ],
)
def test_t5s_forms_are_read_as_transformers_reads_them(part, expected):
    text, encoder = t5.read({"text_config": part})
    theirs = transformers.T5Config(**part)
    assert (text.is_gated, text.activation, text.head, text.head_scale) == expected
    assert (theirs.is_gated_act, theirs.dense_act_fn) == expected[:2]
    assert theirs.scale_decoder_outputs == text.head_scale
    assert (encoder.relative_both, text.relative_both, text.cross) == (True, False, True)
    assert t5.read({"text_config": t5.write(text, encoder)}) == (text, encoder)
    assert jnp.isscalar(text.query_scalar) and text.query_scalar == 1
