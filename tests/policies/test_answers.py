"""Answers to questions about pictures as a loss, and a backbone kept from the actions' loss."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import unbox
from flax.traverse_util import flatten_dict

from robovlms_jax.backbones import base as backbones
from robovlms_jax.backbones import registry
from robovlms_jax.policies import answers, objective
from robovlms_jax.policies.auxiliary_config import AuxiliaryConfig
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.runs import questions
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.types import Pairs
from tests import toy

SPEAKING = toy.make_model(auxiliary=AuxiliaryConfig(vl_weight=0.1))
ROBOT = toy.make_batch(np.random.default_rng(0))


def make_pairs(vlm, *, slots: int = 14, pictures: int = 2, batch: int = 2) -> Pairs:
    """Samples with a picture each (the second has two), and answers of two and three tokens at the end."""
    rng, tokens = np.random.default_rng(1), questions.image_tokens(vlm)
    slots += pictures * tokens
    image = np.full((batch, slots), -1, np.int32)
    image[0, 1 : 1 + tokens] = np.arange(tokens)
    image[1, 2 : 2 + 2 * tokens] = np.arange(2 * tokens)
    lengths = np.array([tokens + 9, slots])
    said = lengths[:, None] - np.array([[2, 1, 1], [3, 2, 1]])
    question = {"question_ids": np.arange(5, 5 + 3 * batch, dtype=np.int32).reshape(batch, 3)}
    question["question_mask"] = np.arange(3) < np.resize([2, 3], batch)[:, None]
    return Pairs(
        images=rng.integers(0, 256, (batch, pictures, 20, 20, 3), dtype=np.uint8),
        text_ids=np.where(image < 0, rng.integers(4, 100, (batch, slots)), 0).astype(np.int32),
        image_slots=image,
        text_mask=np.arange(slots) < lengths[:, None],
        answer_slots=said.astype(np.int32),
        answer_mask=np.array([[True, True, False], [True, True, True]]),
        episode=np.arange(batch, dtype=np.int32),
        corrupt=np.full(batch, -1, np.int32),
        **(question if vlm.connector_tokenizer else {}),
    )


@pytest.fixture(scope="module")
def params():
    return toy.random_params(SPEAKING, ROBOT)


@pytest.fixture(scope="module")
def predicted(params):
    """Jitted: batch -> sums."""
    return jax.jit(lambda batch: answers.AnswerLoss(SPEAKING).predict(params, batch))


def changed(batch: Pairs, row: int, slot: int) -> Pairs:
    ids = batch.text_ids.copy()
    ids[row, slot] = ids[row, slot] + 1
    return batch.replace(text_ids=ids)


def test_answers_are_the_cross_entropy_of_their_tokens_given_all_before(params, predicted):
    batch = make_pairs(SPEAKING.vlm)
    vlm = backbones.build(SPEAKING.vlm)
    own = {"params": params["backbone"]}
    spec, images = SPEAKING.vlm.image, objective.images
    pictures = images.normalize(images.resize(jnp.asarray(batch.images), spec.size), spec.mean, spec.std)

    def logits(row: int, length: int) -> np.ndarray:
        """Of one sample without its padding, its tokens put together by hand."""
        seen = vlm.apply(own, {i: pictures[row : row + 1, i] for i in range(2)}, method="encode_images")[0]
        words = vlm.apply(own, batch.text_ids[row, :length], method="embed_ids")
        image = batch.image_slots[row, :length]
        embeds = jnp.where((image >= 0)[:, None], seen[jnp.maximum(image, 0)], words)[None]
        places = jnp.arange(length)[None]
        decode = backbones.Tokens(embeds, jnp.ones((1, length), bool), places, (("text", length),))
        return vlm.apply(own, vlm.apply(own, decode, method="decode")[0], method="logits")[0]

    total = 0.0
    for row in range(2):
        length = int(batch.text_mask[row].sum())
        log_p = jax.nn.log_softmax(jax.jit(logits, static_argnums=(0, 1))(row, length))
        slots = batch.answer_slots[row][batch.answer_mask[row]]
        total -= sum(float(log_p[slot - 1, batch.text_ids[row, slot]]) for slot in slots)
    found = predicted(batch)
    np.testing.assert_allclose(found["loss"], total, rtol=1e-4)
    assert found["tokens"] == 5 and found["answers"] == 2


def test_a_question_counts_only_as_what_an_answer_is_said_after(predicted):
    batch = make_pairs(SPEAKING.vlm)
    loss, last = predicted(batch)["loss"], int(batch.answer_slots[1, 2])
    assert predicted(changed(batch, 0, 8 + questions.image_tokens(SPEAKING.vlm) - 3))["loss"] != loss  # a question
    padded = changed(batch, 0, last)  # padding of the shorter one
    assert predicted(padded)["loss"] == loss
    black = batch.replace(images=np.where(np.arange(2)[None, :, None, None, None] == 1, 0, batch.images))
    alone = batch.replace(answer_mask=batch.answer_mask & np.array([[True], [False]]))
    without = black.replace(answer_mask=alone.answer_mask)
    assert predicted(alone)["loss"] == predicted(without)["loss"]  # the first sample refers to one picture


def test_answers_are_right_when_their_last_token_is(predicted):
    batch = make_pairs(SPEAKING.vlm)
    for _ in range(6):  # say what the model would say, token after token
        found = predicted(batch)
        if found["right"] == 2:
            break
        batch = _greedy(batch, predicted)
    assert found["right"] == 2 and found["answers"] == 2
    assert predicted(changed(batch, 1, int(batch.answer_slots[1, 2])))["right"] == 1


def _greedy(batch: Pairs, predicted) -> Pairs:
    """With every answer's first wrong token replaced by the likeliest one, found by trying all."""
    for row in range(2):
        for number in range(int(batch.answer_mask[row].sum())):
            only = np.zeros_like(batch.answer_mask)
            only[row, number] = True
            asked = batch.replace(answer_mask=only)
            if predicted(asked)["right"] == 1:
                continue
            for token in range(128):
                ids = batch.text_ids.copy()
                ids[row, batch.answer_slots[row, number]] = token
                if predicted(asked.replace(text_ids=ids))["right"] == 1:
                    batch = batch.replace(text_ids=ids)
                    break
    return batch


QWEN3 = next(name for name in registry.names() if name.startswith("qwen3"))
FAMILIES = sorted(
    {c.model_type: name for name in reversed(registry.names()) if not (c := registry.get(name)).beside}.values()
)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_answers_from_pictures(name, attention):
    vlm = dataclasses.replace(registry.get(name).tiny(), attention=attention)
    model = dataclasses.replace(toy.make_model(auxiliary=AuxiliaryConfig(vl_weight=0.1)), vlm=vlm)
    batch = make_pairs(vlm)
    params = toy.random_params(model, toy.as_read(vlm, ROBOT))
    loss = answers.AnswerLoss(model)
    grads = flatten_dict(jax.jit(jax.grad(lambda p: loss(p, batch)[0]))(params), sep="/")
    for part in ("backbone/vision/", "backbone/connector/", "backbone/text/"):
        assert any(np.abs(x).max() > 0 for path, x in grads.items() if path.startswith(part)), part
    assert all(np.abs(x).max() == 0 for path, x in grads.items() if not path.startswith("backbone/"))


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", QWEN3])
def test_patches_have_their_rows_and_columns_where_a_family_counts_them(name):
    # One picture right at the front: places as `VLM.embed` gives them for the same tokens.
    vlm = registry.get(name).tiny()
    model, tokens = backbones.build(vlm), questions.image_tokens(vlm)
    pixels = np.random.default_rng(0).normal(size=(1, vlm.image.size, vlm.image.size, 3)).astype(np.float32)
    ids = np.arange(5, 10)[None].astype(np.int32)
    slots = np.concatenate([np.arange(tokens), np.full(5, -1)])[None].astype(np.int32)
    held = np.concatenate([np.zeros((1, tokens), np.int32), ids], axis=1)

    def both(params):
        first = model.apply(params, {"a": pixels}, ids, ids > 0, method="embed")
        every = np.ones(held.shape, bool)
        second = model.apply(params, pixels[:, None], held, slots, every, every, method="embed_conversation")
        return [(x.positions[..., None] + x.offsets, x.embeds, x.deep) for x in (first, second)]

    (places, *first), (others, *second) = jax.jit(both)(toy.random_init(model, {"a": pixels}, ids, ids > 0))
    np.testing.assert_array_equal(places, others)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, second)
    assert (first[1] is not None) == (name == QWEN3)  # DeepStack's features come along


def test_pictures_beside_the_text_are_no_part_of_a_conversation():
    backbone = types.SimpleNamespace(vlm=registry.get("flamingo-mpt-1b").tiny())
    config = ExperimentConfig()
    vl = dataclasses.replace(config.data.vl, paths={"vqa": "/data/vqa"})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, vl=vl))
    with pytest.raises(ValueError, match=r"data.vl.paths has \['vqa'\].*those of a flamingo stand beside them"):
        questions.sources_of(config, questions.Collections({"vqa": None}, {}), backbone)


@pytest.mark.parametrize("weights", [{"vl_weight": 0.1}, {"caption_weight": 0.1}])
def test_whoever_says_words_has_a_head_for_them_where_it_is_not_the_token_table(weights):
    vlm = registry.get("llava-1.5-7b").tiny()
    model = dataclasses.replace(toy.make_model(auxiliary=AuxiliaryConfig(**weights)), vlm=vlm)
    prepare = jax.eval_shape(lambda x: objective.prepare(x, vlm.image, model.config.cameras), ROBOT.inputs)
    params = unbox(jax.eval_shape(lambda x: model.init(jax.random.key(0), x)["params"], prepare))
    assert "head" in params["backbone"]["text"]
    jax.eval_shape(lambda p: objective.RobotLoss(model)(p, ROBOT), params)


# ---------------------------------------------------------------------------------------------------------------------
# Knowledge insulation


def test_insulation_leaves_the_forward_pass_and_the_backbone_as_they_are(params):
    plain = objective.RobotLoss(toy.make_model())
    insulated = objective.RobotLoss(toy.make_model(insulate=True))

    def of(loss_fn, params):
        (_, metrics), grads = jax.value_and_grad(lambda p: loss_fn(p, ROBOT), has_aux=True)(params)
        return metrics, flatten_dict(grads, sep="/")

    # One program, in which they share their forward pass.
    (metrics, grads), (expected, free) = jax.device_get(jax.jit(lambda p: (of(insulated, p), of(plain, p)))(params))
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    for path, x in grads.items():
        if path.startswith("backbone/"):
            assert not x.any(), path
        else:  # queries and head learn as they did
            np.testing.assert_allclose(x, free[path], rtol=1e-4, atol=1e-6, err_msg=path)
    assert any(free[path].any() for path in free if path.startswith("backbone/"))
    assert grads["readout/queries"].any()


@pytest.mark.slow
def test_captions_and_answers_go_on_teaching_an_insulated_backbone(params):
    model = toy.make_model(insulate=True, auxiliary=AuxiliaryConfig(caption_weight=0.2, vl_weight=0.1))
    loss_fn = objective.LossBySource({"robot": objective.RobotLoss(model), "questions": answers.AnswerLoss(model, 0.1)})
    batches = {"robot": ROBOT, "questions": make_pairs(model.vlm)}
    grads, metrics = jax.jit(jax.grad(lambda p: loss_fn(p, batches), has_aux=True))(params)
    assert np.abs(grads["backbone"]["text"]["embed"]["table"]).max() > 0
    expected = metrics["loss_robot"] + 0.1 * metrics["loss_questions"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert {"loss_caption", "token_accuracy_questions"} <= set(metrics)


def test_insulation_of_a_policy_whose_actions_are_words_is_refused():
    with pytest.raises(ValueError, match=r"policy\.insulate .*readout='token'"):
        toy.make_product("one_step", "token", "discrete", insulate=True)
    assert PolicyConfig(insulate=True).insulate
