"""KOSMOS-2 against Hugging Face's model and against numbers of upstream's own code."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from robovlms_jax.backbones import base, registry, sequence
from robovlms_jax.types import Tokens
from robovlms_jax.weights import rules
from tests.backbones.oracle import Twin, example, from_torch, relative_error

pytestmark = pytest.mark.usefixtures("exact_matmul")
TOLERANCE = 1e-5  # relative to the largest value; 1e-4 is promised


def torch_forward(twin: Twin, images, text_ids, text_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and final hidden states of the full model: images as placeholders behind the first token."""
    num_image = twin.config.connector.num_latents
    before, after = text_ids[:, :1], text_ids[:, 1:]
    batch = len(text_ids)
    slots = np.zeros((batch, text_ids.shape[1] + num_image), bool)
    slots[:, 1 : 1 + num_image] = True
    (pixels,) = images.values()
    out = twin.torch_model(
        pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        input_ids=torch.from_numpy(np.concatenate([before, np.full((batch, num_image), 50), after], 1)).long(),
        image_embeds_position_mask=torch.from_numpy(slots),
        attention_mask=torch.from_numpy(
            np.concatenate([text_mask[:, :1], np.ones((batch, num_image)), text_mask[:, 1:]], 1)
        ),
        output_hidden_states=True,
    )
    return out.logits, out.hidden_states[-1]


def real_slots(twin: Twin, text_mask) -> np.ndarray:
    num_image = twin.config.connector.num_latents
    return np.concatenate([text_mask[:, :1], np.ones((len(text_mask), num_image), bool), text_mask[:, 1:]], 1)


def test_logits_and_hidden_states_of_right_padded_prompts(kosmos):
    images, ids, mask = example(kosmos.config, cameras=("static",))
    real = real_slots(kosmos, mask)
    with torch.no_grad():
        logits, hidden = torch_forward(kosmos, images, ids, mask)
    tokens = kosmos.apply(images, ids, mask, method="embed")
    ours, _ = kosmos.apply(tokens, method="decode")
    np.testing.assert_array_equal(tokens.mask, real)
    assert relative_error(ours[real], hidden[real]) < TOLERANCE
    assert relative_error(kosmos.apply(ours, method="logits")[real], logits[real]) < TOLERANCE
    assert relative_error(kosmos.apply(images, ids, mask)[real], logits[real]) < TOLERANCE


def test_queries_of_a_padded_prompt_equal_upstreams_sequence_without_padding(kosmos):
    # Upstream feeds `inputs_embeds` = [bos][wrist][static][text][queries][eos] and reads the queries' hidden states.
    images, ids, mask = example(kosmos.config)
    queries = np.random.default_rng(1).normal(size=(2, kosmos.config.width)).astype(np.float32) * 0.1
    tokens = kosmos.apply(images, ids, mask, [sequence.query(jnp.asarray(queries), len(ids))], method="embed")
    hidden, _ = kosmos.apply(tokens, method="decode")
    model = kosmos.torch_model
    with torch.no_grad():
        for row, length in enumerate(mask.sum(1)):
            text = model.text_model.model.embed_tokens(torch.from_numpy(ids[row : row + 1, :length]).long())
            features = [torch_image_features(model, pixels[row : row + 1]) for pixels in images.values()]
            parts = [text[:, :1], *features, text[:, 1:-1], torch.from_numpy(queries)[None], text[:, -1:]]
            embeds = torch.cat(parts, 1)
            out = model.text_model(
                inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), output_hidden_states=True
            )
            assert relative_error(hidden[row, tokens.slot("query")], out.hidden_states[-1][0, -3:-1]) < TOLERANCE
            eos = tokens.slot("text").start + length - 2
            assert relative_error(hidden[row, eos], out.hidden_states[-1][0, -1]) < TOLERANCE


def torch_image_features(model, pixels: np.ndarray) -> torch.Tensor:
    vision = model.vision_model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state
    vision = torch.nn.functional.normalize(model.vision_model.model.post_layernorm(vision), dim=-1)
    return model.image_to_text_projection(vision)[0]


def test_gradients_of_every_parameter(kosmos):
    images, ids, mask = example(kosmos.config, cameras=("static",))
    real = real_slots(kosmos, mask)
    weight = np.random.default_rng(2).normal(size=(*real.shape, kosmos.config.text.vocab_size)).astype(np.float32)
    weight[~real] = 0
    model = kosmos.torch_model
    model.zero_grad()
    (torch_forward(kosmos, images, ids, mask)[0] * torch.from_numpy(weight)).sum().backward()
    expected = from_torch(kosmos.config, {name: value.grad for name, value in model.named_parameters()})

    def loss(params):
        return (base.build(kosmos.config).apply({"params": params}, images, ids, mask) * weight).sum()

    found = jax.jit(jax.grad(loss))(kosmos.params)
    expected, found = (flatten_dict(jax.device_get(x), sep="/") for x in (expected, found))
    scale = max(float(np.abs(x).max()) for x in expected.values())
    for path, value in expected.items():
        # Key biases shift all scores of a row alike: their true gradient is zero, so only noise could be compared.
        # The smallest gradients, a hundred thousand times smaller than others, are sums that lose a digit more.
        largest = max(float(np.abs(value).max()), 1e-5 * scale)
        bound = 1e-6 * scale if path.endswith("attn/k/bias") else 1e-5 * largest
        assert float(np.abs(found[path] - value).max()) < bound, path


def test_bfloat16_stays_close(kosmos):
    images, ids, mask = example(kosmos.config)
    queries = [sequence.query(jnp.full((1, kosmos.config.width), 0.1), len(ids))]
    config = dataclasses.replace(kosmos.config, dtype="bfloat16")

    def hidden(config):
        tokens = kosmos.apply(images, ids, mask, queries, method="embed", config=config)
        return kosmos.apply(tokens, method="decode", config=config)[0][:, tokens.slot("query")]

    found = hidden(config)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found, hidden(kosmos.config)) < 0.03


@pytest.fixture
def upstream(golden, shared_data):
    """Upstream's tiny model and what it computed, from the checkpoint keys its trainer writes."""
    meta = json.loads((shared_data / "golden/kosmos/meta.json").read_text())
    config = registry.from_hf_config(meta["kosmos_config"])
    weights = {name.removeprefix("w/"): value for name, value in golden("kosmos/weights_lstm.npz").items()}
    state = {f"model.{name}": torch.from_numpy(x) for name, x in weights.items() if name.startswith("backbone.")}
    twin = Twin(config, None, from_torch(config, state))
    return twin, golden("kosmos/post_lstm.npz"), weights["action_token"]


def test_golden_image_features(upstream):
    twin, numbers, _ = upstream
    expected = numbers["image_features"]
    frames = numbers["vision_x"][0].transpose(0, 2, 3, 1)
    found = twin.apply({"static": frames}, method="encode_images")
    assert relative_error(found[None], expected) < TOLERANCE


def test_golden_action_features_of_the_longest_prompt(upstream):
    # In a batch upstream pads the text first and puts the action token after the padding, so only the longest prompt of
    # a batch (and every prompt on its own, as at inference) has the layout we give to all.
    twin, numbers, action_token = upstream
    lengths = numbers["attention_mask"].sum(1)
    assert lengths[0] == numbers["lang_x"].shape[1] > lengths[1]
    frames = numbers["vision_x"][0].transpose(0, 2, 3, 1)
    ids = np.repeat(numbers["lang_x"][:1], len(frames), 0).astype(np.int32)
    tokens = twin.apply(
        {"static": frames},
        ids,
        np.ones_like(ids, bool),
        [sequence.query(jnp.asarray(action_token)[None], len(ids))],
        method="embed",
    )
    hidden, _ = twin.apply(tokens, method="decode")
    assert relative_error(hidden[:, tokens.slot("query")], numbers["action_hs"][0]) < TOLERANCE


def test_golden_action_features_of_a_padded_prompt_in_upstreams_order(upstream):
    # The sequence upstream builds for the shorter prompt, numbered straight through: [bos][image][text, eos, padding
    # but its last slot][action][that slot]. The decoder follows positions and mask, so it reproduces even that.
    twin, numbers, action_token = upstream
    frames = numbers["vision_x"][1].transpose(0, 2, 3, 1)
    ids = np.repeat(numbers["lang_x"][1:], len(frames), 0).astype(np.int32)
    mask = np.repeat(numbers["attention_mask"][1:], len(frames), 0).astype(bool)
    ours = twin.apply(
        {"static": frames}, ids, mask, [sequence.query(jnp.asarray(action_token)[None], len(ids))], method="embed"
    )
    order = np.r_[: ours.mask.shape[1] - 2, ours.mask.shape[1] - 1, ours.mask.shape[1] - 2]
    positions = jnp.broadcast_to(jnp.arange(len(order)), ours.mask.shape)
    theirs = Tokens(ours.embeds[:, order], ours.mask[:, order], positions)
    hidden, _ = twin.apply(theirs, method="decode")
    assert relative_error(hidden[:, -2:-1], numbers["action_hs"][1]) < TOLERANCE


def test_golden_checkpoint_keys_are_those_the_rules_know(shared_data):
    keys = json.loads((shared_data / "golden/kosmos/meta.json").read_text())["checkpoint_keys"]
    names = [rules.normalize(key) for key in keys]
    assert len(set(names)) == len(names)
    assert {"action_token", "act_head.rnn.weight_ih_l0", "text_model.model.embed_tokens.weight"} <= set(names)
