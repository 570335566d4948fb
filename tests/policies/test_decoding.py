"""Action tokens: the cached loop against decoding again from the start, and what happens to foreign words."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.actions import discretize
from robovlms_jax.control.interface import Observation
from robovlms_jax.policies import decoding, objective, serving
from tests import toy

pytestmark = pytest.mark.usefixtures("exact_matmul")
CHUNK = 2


@pytest.fixture(scope="module")
def one_step():
    """Model, parameters, and two prompts of different lengths."""
    model = toy.make_product("one_step", "token", "discrete", chunk=CHUNK)
    batch = toy.make_batch(np.random.default_rng(0), window=1, windows=1, chunk=CHUNK)
    assert len(set(batch.inputs.text_mask.sum(1))) == 2
    return model, toy.random_params(model, batch), batch


def with_head(model, **changes):
    head = dataclasses.replace(model.config.head, **changes)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, head=head))


@pytest.mark.parametrize("constrained", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_loop_equals_decoding_from_the_start_every_time(one_step, constrained):
    # Batch of two, two actions per chunk. Fails on a misplaced token, a cache slot written twice, or a prompt whose
    # padding or eos is seen.
    model, params, batch = one_step
    model = with_head(model, constrained=constrained)
    inputs = jax.jit(lambda x: objective.prepare(x, model.vlm.image, model.config.cameras))(batch.inputs)

    def loop(model, inputs):
        carry = model.init_carry(len(inputs.step_mask))
        active = jnp.ones(len(inputs.step_mask), bool)
        tokens = model.embed(inputs)
        context = model.history.append(model.backbone, model.read, tokens, carry.history, active)
        return decoding.generate(model.backbone, model.head.choose, context, model.num_tokens)[0]

    logits = jax.jit(lambda params, x: model.apply({"params": params}, x, method=loop))(params, inputs)
    chosen = np.asarray(model.bind({}).head.choose(logits))
    assert logits.shape == (2, CHUNK * 7, model.vlm.text.vocab_size)

    def forward(model, inputs, words):
        tokens = model.embed(inputs)
        embeds = tokens.embeds.at[:, tokens.slot("query")].set(model.backbone.embed_ids(words))
        tokens = tokens.replace(embeds=embeds)
        return model._read(model.backbone.decode(tokens)[0], tokens)

    full = jax.jit(lambda params, x, words: model.apply({"params": params}, x, words, method=forward))
    words = np.zeros((2, CHUNK * 7), np.int32)
    for index in range(CHUNK * 7):
        again = full(params, inputs, words)[:, index]
        np.testing.assert_allclose(logits[:, index], again, rtol=1e-4, atol=1e-4)
        words[:, index] = model.bind({}).head.choose(again)
    np.testing.assert_array_equal(chosen, words)
    inside = discretize.is_action_id(words, model.bind({}).head.vocab_end, 32)
    assert inside.all() == constrained  # random parameters name foreign words sooner or later


def act(model, params, batch):
    text = batch.inputs.text_ids[0], batch.inputs.text_mask[0]
    policy = serving.VLAPolicy(model, params, lambda _: text)
    policy.reset("open the drawer")
    return policy.act(Observation({camera: x[0, 0] for camera, x in batch.inputs.images.items()})).actions


def test_a_foreign_word_is_an_error_and_never_an_action(one_step):
    model, params, batch = one_step
    with pytest.raises(ValueError, match="a word that is no action"):
        act(with_head(model, constrained=False, num_bins=2), params, batch)  # 126 of 128 words are foreign


def test_only_the_foreign_word_is_flagged():
    head = toy.make_product("one_step", "token", "discrete", chunk=1).bind({}).head
    free = dataclasses.replace(head.config, constrained=False)
    head = head.clone(config=free)
    logits = np.zeros((7, 128), np.float32)
    ids = np.array([127, 96, 100, 95, 110, 0, 120])  # 96 ... 127 are actions
    logits[np.arange(7), ids] = 1
    actions = head.bind({}).actions(head.bind({})(logits[None], None))[0, 0]
    np.testing.assert_array_equal(np.isnan(actions), [False, False, False, True, False, True, False])
    assert actions[0] < -0.9 and actions[1] > 0.9 and actions[6] == -1


def test_parallel_decoding_is_one_pass_of_the_window_form():
    model = with_head(toy.make_product("interleaved", "token", "discrete", chunk=1), decoding="parallel")
    batch = toy.make_batch(np.random.default_rng(1), batch=1, windows=1, chunk=1)
    params = toy.random_params(model, batch)
    assert params["readout"]["queries"].shape == (7, model.vlm.width)

    def run(params, inputs):
        bound = model.bind({"params": params})
        inputs = objective.prepare(inputs, model.vlm.image, model.config.cameras)
        return bound.head.actions(bound(inputs))

    expected = jax.jit(run)(params, batch.inputs)[0]
    text = batch.inputs.text_ids[0], batch.inputs.text_mask[0]
    policy = serving.VLAPolicy(model, params, lambda _: text)
    policy.reset("open the drawer")
    for t in range(model.config.window):
        found = policy.act(Observation({camera: x[0, t] for camera, x in batch.inputs.images.items()})).actions
        np.testing.assert_allclose(found[:, :6], 0.65 * expected[t, :, :6], atol=1e-6)
        np.testing.assert_array_equal(found[:, 6], expected[t, :, 6])
