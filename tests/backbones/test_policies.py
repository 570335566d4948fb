"""Every policy structure on every backbone at the tiny size: traced, and (slow) trained and asked for actions."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import calvin_abcd
from robovlms_jax.backbones import registry
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies import objective
from robovlms_jax.policies.auxiliary_config import AuxiliaryConfig
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.runs import build
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import trainable
from tests import toy
from tests.backbones import families

STRUCTURES = (
    ("one_step", "action_query", "mlp"),
    ("one_step", "token", "discrete"),
    ("interleaved", "action_query", "mlp"),
    ("interleaved", "token", "discrete"),
    ("policy_head", "action_query", "lstm"),
    ("policy_head", "pool", "gpt"),
    ("video", "action_query", "mlp"),
)
"""The paper's, one of each; heads differ in nothing that a backbone sees."""

TRACED = tuple(
    structure
    for structure in STRUCTURES
    if structure[:2] not in {("one_step", "action_query"), ("interleaved", "token"), ("policy_head", "action_query")}
)
"""Every history and every readout. Their other pairs are in tests/policies/test_products.py,
with KOSMOS-2, and with every backbone in the slow tests."""


def make(name: str, structure: tuple[str, str, str]):
    return dataclasses.replace(toy.make_product(*structure), vlm=registry.get(name).tiny())


APART = {"kosmos-2", "flamingo", "florence2", "qwen2_5_vl"}
"""Families that differ in what a history meets: of places in two dimensions, of pictures beside the sequence, of two
sequences; all four are traced on them."""


def in_turns() -> list:
    """Each other family with one of the four: they differ in numbers and in what is in their towers. A structure meets
    every fourth of them, and all seven learn on every family in the slow tests."""
    return [
        pytest.param(name, structure, id=f"{form}-{'-'.join(structure)}")
        for i, (form, name) in enumerate(families.FORMS.items())
        for structure in (TRACED if registry.get(name).model_type in APART else [TRACED[i % 4]])
    ]


@pytest.mark.parametrize(("name", "structure"), in_turns())
def test_every_history_and_readout_traces_on_every_backbone(name, structure):
    assert structure in heads.products()
    model = make(name, structure)
    batch = toy.make_batch(np.random.default_rng(0), window=model.config.window, windows=2, chunk=2)
    batch = toy.as_read(model.vlm, batch)
    loss, _ = jax.eval_shape(lambda p: objective.RobotLoss(model)(p, batch), toy.param_shapes(model, batch))
    assert loss.shape == ()


def test_the_traced_structures_have_every_history_and_readout():
    traced = [x.values for x in in_turns()]
    assert {name for name, _ in traced} == set(families.FORMS.values())
    assert {registry.get(name).model_type for name, _ in traced} >= APART
    for choices, traced in zip(zip(*STRUCTURES), zip(*TRACED)):
        assert set(choices) - set(traced) <= {"lstm"}


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES, ids="-".join)
@pytest.mark.parametrize("name", families.FORMS.values(), ids=families.FORMS.keys())
def test_every_structure_learns_and_acts_on_every_backbone(name, structure):
    toy.assert_learns_and_acts(make(name, structure), steps=20, learning_rate=3e-3, left=0.9)


@pytest.mark.parametrize("structure", [STRUCTURES[2], STRUCTURES[3]], ids="-".join)
def test_rows_and_columns_of_patches_reach_the_loss(structure):
    # Qwen2.5-VL's places in two dimensions pass through joined frames and action tokens, and give finite gradients.
    model = make("qwen2.5-vl-3b", structure)
    batch = toy.make_batch(np.random.default_rng(0), window=model.config.window, windows=2, chunk=2)
    params = toy.random_params(model, batch)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: objective.RobotLoss(model)(p, batch)[0]))(params)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_patches_of_an_image_see_each_other_in_a_video_and_keep_their_places():
    model = make("gemma-3-4b", ("video", "action_query", "mlp"))
    batch = toy.make_batch(np.random.default_rng(0), window=model.config.window, windows=2, chunk=2)
    params, size = toy.random_params(model, batch), model.vlm.image.size
    images = {camera: np.zeros((*x.shape[:2], size, size, 3), np.float32) for camera, x in batch.inputs.images.items()}
    inputs = batch.inputs.replace(images=images)
    tokens = jax.jit(lambda p: model.apply({"params": p}, inputs, method="embed"))(params)
    video = model.history.to_sequences(tokens, np.ones_like(inputs.step_mask))
    positions, image = np.asarray(video.positions)[0], video.slot("image")
    length = len(positions[image]) // (len(model.config.cameras) * model.config.window)
    for first in range(image.start, image.stop, length):  # start of image, patches, end of image
        assert len(set(positions[first + 1 : first + length - 1])) == 1
        assert positions[first] < positions[first + 1] < positions[first + length - 1]
    places = (positions + np.asarray(video.offsets)[0, :, 0])[np.asarray(video.mask)[0]]
    assert sorted(places) == list(range(len(places)))


@pytest.mark.parametrize("preset", calvin_abcd.OTHERS)
def test_presets_build_their_backbone_and_train_what_they_say(preset):
    config = calvin_abcd.PRESETS[preset]
    assert isinstance(config, ExperimentConfig)
    config.validate(1)
    vlm = registry.get(config.backbone.name)
    model = build.make_model(config, vlm)
    shapes, _ = build.abstract_params(model, meshes.make_mesh((1, 1, 1), jax.devices()[:1]))
    assert build.count(shapes["backbone"]) > 4e8
    trained, frozen = trainable.split(flatten_dict(shapes, sep="/"), config.train.trainable)
    between = ("backbone/vision", "backbone/text/layers", "backbone/text/final_norm")
    expected = {
        "qwen_vl_lstm": ("backbone/vision", "backbone/connector"),
        "llava_mpt_lstm": ("backbone/text/embed",),
        "flamingo_lstm": between,
        "otter_lstm": between,
    }
    assert bool(frozen) == (preset in expected)
    assert all(path.startswith(expected[preset]) for path in frozen)
    assert any(path.startswith("head/") for path in trained)


def test_prefix_attention_is_refused_where_it_means_nothing():
    config = calvin_abcd.PRESETS["paligemma_lstm"]
    prefix = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, attention="prefix"))
    prefix.validate(1)
    caption = AuxiliaryConfig(caption_weight=0.1)
    captioned = dataclasses.replace(prefix, policy=dataclasses.replace(prefix.policy, auxiliary=caption))
    with pytest.raises(ValueError, match=r"caption_weight asks for each word from those before it"):
        captioned.validate(1)
    pooled = dataclasses.replace(prefix, policy=dataclasses.replace(prefix.policy, readout="pool"))
    with pytest.raises(ValueError, match=r"backbone.attention='prefix' needs policy.readout='action_query'"):
        pooled.validate(1)
