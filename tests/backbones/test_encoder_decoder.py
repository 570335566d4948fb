"""Encoder-decoders against transformers: the encoder reads pictures and prompt, the decoder the action queries."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from robovlms_jax.backbones import base, registry, sequence
from robovlms_jax.inputs import images as images_module
from robovlms_jax.policies import objective
from robovlms_jax.policies.auxiliary_config import AuxiliaryConfig
from robovlms_jax.policies.histories.base import TokenWindow
from robovlms_jax.runs import build
from robovlms_jax.weights import quantize
from tests import toy
from tests.backbones import families
from tests.backbones.oracle import IMAGE, TEXT, Twin, as_read, example, from_torch, randomize, relative_error

pytestmark = pytest.mark.usefixtures("exact_matmul")
NAME = families.ENCODER_DECODER[0]
QUERIES = np.asarray([41, 7])
"""Token ids whose embeddings are the queries, so that a torch model can be given them as text."""
CAMERAS = ("wrist", "static")


def make_pair(config: base.VLMConfig) -> Twin:
    model = randomize(families.torch_model(config))
    return Twin(config, model, from_torch(config, dict(model.state_dict())))


@pytest.fixture(scope="module")
def twin() -> Twin:
    return make_pair(families.tiny(NAME))


ORDINARY = [
    pytest.param(name, marks=pytest.mark.slow if name in families.SAME_ARITHMETIC else ())
    for name in families.ENCODER_DECODER
]


@pytest.fixture(scope="module", params=ORDINARY)
def each(request, twin) -> Twin:
    return twin if request.param == NAME else make_pair(families.tiny(request.param))


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, images, ids, mask):
    """(tokens, hidden, logits); its gradients, below, take longer to compile."""
    model = base.build(config)
    ordered = {camera: images[camera] for camera in CAMERAS}
    queries = [sequence.query(params["text"]["embed"]["table"][QUERIES], len(ids))]
    tokens = model.apply({"params": params}, ordered, ids, mask, queries, method="embed")
    hidden, _ = model.apply({"params": params}, tokens, method="decode")
    return tokens, hidden, model.apply({"params": params}, hidden, method="logits")


@functools.partial(jax.jit, static_argnums=0)
def gradients(config, params, images, ids, mask, weight):
    """Of sum(logits * weight)."""
    return jax.grad(lambda params: (forward(config, params, images, ids, mask)[2] * weight).sum())(params)


def weight_of(config) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(2, 1 + len(QUERIES), config.text.vocab_size)).astype(np.float32)


def theirs(twin: Twin):
    """transformers' output, prompts padded on the right: BART counts places from the left edge, padding or not."""
    config = twin.config
    images, ids, mask = example(config, CAMERAS)
    one = getattr(config.connector, "num_queries", None) or config.vision.side**2 + 1
    patches = len(CAMERAS) * one
    full = np.concatenate([np.full((len(ids), patches), IMAGE), ids], axis=1)
    real = np.concatenate([np.ones((len(ids), patches), int), mask], axis=1)
    pixels = torch.from_numpy(np.stack([images[c] for c in CAMERAS], 1).transpose(0, 1, 4, 2, 3).copy()).flatten(0, 1)
    out = twin.torch_model(
        input_ids=torch.from_numpy(full).long(),
        attention_mask=torch.from_numpy(real).long(),
        pixel_values=pixels,
        decoder_input_ids=torch.from_numpy(np.tile(np.r_[config.start_id, QUERIES], (len(ids), 1))).long(),
        **families.torch_question(config, len(ids), len(CAMERAS)),
        use_cache=False,
        output_hidden_states=True,
    )
    inner = getattr(out, "language_model_outputs", out)
    return out.logits, inner.decoder_hidden_states[-1], inner.encoder_last_hidden_state


def logits_error(twin: Twin, side: str) -> float:
    """Of logits, the decoder's hidden states and the encoder's, prompts padded on one side in ours."""
    images, ids, mask = example(twin.config, CAMERAS)
    lengths = mask.sum(1)
    if side == "left":
        ids, mask = (np.stack([np.roll(row, TEXT - n) for row, n in zip(x, lengths)]) for x in (ids, mask))
    text = as_read(twin.config, ids, mask, side)
    tokens, hidden, logits = forward(twin.config, twin.params, images, *text)
    with torch.no_grad():
        expected, last, encoded = theirs(twin)
    errors = [relative_error(logits, expected), relative_error(hidden, last)]
    for row, length in enumerate(lengths):
        states = np.asarray(tokens.media.embeds[row])[np.asarray(tokens.media.mask[row])]
        errors.append(relative_error(states, encoded[row][: len(states)]))
        assert len(states) == tokens.media.mask.shape[1] - TEXT + length
    return max(errors)


@pytest.mark.parametrize("side", [pytest.param("right", marks=pytest.mark.slow), "left"])
def test_padded_prompts(each, side):
    assert logits_error(each, side) < 1e-5


def gradient_error(twin: Twin) -> float:
    """Largest error of any parameter's gradient, as a share of its largest entry."""
    config, model = twin.config, twin.torch_model
    images, ids, mask = example(config, CAMERAS)
    weight = weight_of(config)
    model.zero_grad()
    (theirs(twin)[0] * torch.from_numpy(weight)).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    found = gradients(config, twin.params, images, *as_read(config, ids, mask), weight)
    expected, found = (flatten_dict(jax.device_get(x), sep="/") for x in (from_torch(config, grads), found))
    scale = max(float(np.abs(x).max()) for x in expected.values())
    assert set(found) == set(expected)
    errors = {}
    for path, value in expected.items():
        # Key biases shift all scores of a row alike: their true gradient is zero, and only noise could be compared.
        floor = 0.1 * scale if path.endswith("k/bias") else 1e-3 * scale
        errors[path] = float(np.abs(found[path] - value).max()) / max(float(np.abs(value).max()), floor)
    return max(errors.values())


@pytest.mark.slow
def test_gradients_of_every_parameter(each):
    assert gradient_error(each) < 3e-5


@pytest.mark.slow
def test_bfloat16_stays_close(each):
    images, *text = example(each.config, CAMERAS)
    text, weight = as_read(each.config, *text), weight_of(each.config)
    config = dataclasses.replace(each.config, dtype="bfloat16")
    found, expected = (forward(x, each.params, images, *text)[1] for x in (config, each.config))
    grads = gradients(config, each.params, images, *text, weight)
    assert found.dtype == jnp.bfloat16 and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    assert relative_error(found, expected) < 0.05


def test_pictures_are_prepared_as_the_published_processor_does(tmp_path):
    edges = {"height": 768, "width": 768}
    mean, std = (registry.get(NAME).image.mean, registry.get(NAME).image.std)
    make = transformers.CLIPImageProcessorPil
    processor = make(size=edges, do_center_crop=False, image_mean=list(mean), image_std=list(std), resample=3)
    processor.save_pretrained(tmp_path)
    spec = images_module.read_image_spec(tmp_path)
    assert spec == registry.get(NAME).image
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8).repeat(5, 0).repeat(5, 1)
    expected = processor(frame, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    levels = (expected * np.asarray(std) + np.asarray(mean)) * 255
    assert (
        np.abs(images_module.resize_on_host(frame, spec.size, spec.interpolation).astype(float) - levels).max() < 1.01
    )


def test_a_longer_prompt_gives_earlier_frames_masked_states(twin):
    images, ids, mask = example(twin.config, lengths=(5, 4))
    vlm, params = base.build(twin.config), {"params": twin.params}

    @jax.jit
    def embed(params, ids, mask):
        tokens = vlm.apply(params, images, ids, mask, method="embed")
        # Masks, positions and shapes are what is compared: without the states hardly anything is left to compile.
        return jax.tree.map(lambda x: jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tokens)

    def window(length: int) -> TokenWindow:
        tokens = embed(params, ids[:, :length], mask[:, :length])
        return TokenWindow(jax.tree.map(lambda x: x[:, None], tokens), jnp.int32([1, 1]))

    short, long = window(5), window(7)
    for old, new in ((short, long), (long, short)):
        fitted = old.fit(new)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.shape, y.shape), fitted, new)
        np.testing.assert_array_equal(fitted.tokens.media.mask, new.tokens.media.mask)


def test_the_encoders_own_states_are_the_published_ones_and_queries_behind_them_change_none(each):
    config = dataclasses.replace(each.config, states="encoder")
    images, ids, mask = example(config, CAMERAS)

    @jax.jit
    def ours(params):
        model, ordered = base.build(config), {camera: images[camera] for camera in CAMERAS}
        queries = [sequence.query(params["text"]["embed"]["table"][QUERIES], len(ids))]
        tokens = model.apply({"params": params}, ordered, *as_read(config, ids, mask), queries, method="embed")
        return tokens, model.apply({"params": params}, tokens, method="decode")[0]

    tokens, hidden = ours(each.params)
    with torch.no_grad():
        *_, expected = theirs(each)
    prompt = slice(0, tokens.slot("text").stop)
    assert tokens.media is None and tokens.slot("query").start == prompt.stop
    for row in range(len(ids)):
        states = np.asarray(hidden[row, prompt])[np.asarray(tokens.mask[row, prompt])]
        assert relative_error(states, expected[row][: len(states)]) < 1e-5


@pytest.mark.parametrize(
    ("name", "structure"),  # their other pairs learn in the slow tests below
    [
        ("florence-2-base", ("policy_head", "pool", "gpt")),
        ("blip2-flan-t5-xl", ("interleaved", "action_query", "mlp")),
    ],
)
def test_policies_read_the_encoders_states_and_have_no_decoder_layers(name, structure):
    model = dataclasses.replace(
        toy.make_product(*structure), vlm=dataclasses.replace(registry.get(name).tiny(), states="encoder")
    )
    batch = toy.make_batch(np.random.default_rng(0), window=model.config.window, windows=2, chunk=2)
    params = toy.random_params(model, batch)
    assert "layers" in params["backbone"]["encoder"] and "layers" not in params["backbone"]["text"]
    assert jax.eval_shape(lambda p: objective.RobotLoss(model)(p, batch)[0], params).shape == ()
    layers = [path for path in build.spare_params(model, params) if path.startswith("text/layers/")]
    assert layers  # a published file's decoder is known, and left out


@pytest.mark.slow
@pytest.mark.parametrize("name", families.ENCODER_DECODER[:2])
@pytest.mark.parametrize(
    "structure",
    [("one_step", "action_query", "mlp"), ("interleaved", "action_query", "mlp"), ("policy_head", "pool", "gpt")],
)
def test_policies_learn_from_the_encoders_states_and_act(structure, name):
    model = dataclasses.replace(
        toy.make_product(*structure), vlm=dataclasses.replace(registry.get(name).tiny(), states="encoder")
    )
    toy.assert_learns_and_acts(model, steps=20, learning_rate=3e-3, left=0.9)


@pytest.mark.parametrize(
    ("history", "readout", "head"), [("video", "action_query", "mlp"), ("one_step", "token", "discrete")]
)
def test_what_needs_the_decoder_is_refused_where_the_encoders_states_are_read(history, readout, head):
    model = toy.make_product(history, readout, head)
    model = dataclasses.replace(model, vlm=dataclasses.replace(registry.get(NAME).tiny(), states="encoder"))
    batch = toy.make_batch(np.random.default_rng(0), window=model.config.window, windows=1, chunk=2)
    with pytest.raises(
        ValueError, match=r"backbone.states='encoder' with policy.readout=.*Set backbone.states=decoder"
    ):
        toy.random_params(model, batch)
    with pytest.raises(ValueError, match=r"backbone.states='encoder': a kosmos-2 has a decoder alone"):
        dataclasses.replace(registry.get("kosmos-2"), states="encoder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"readout": "pool", "pool": "text"}, r"policy.pool='text' reads the prompt's own hidden states"),
        ({"readout": "pool", "pool": "vision"}, r"policy.pool='vision' reads the pictures' own hidden states"),
        ({"auxiliary": AuxiliaryConfig(caption_weight=0.1)}, r"caption_weight asks for each word"),
    ],
)
def test_what_means_nothing_beside_an_encoder_is_refused(changes, message):
    model = toy.make_product("one_step", "action_query", "mlp")
    model = dataclasses.replace(
        model, config=dataclasses.replace(model.config, **changes), vlm=registry.get(NAME).tiny()
    )
    with pytest.raises(ValueError, match=message):
        toy.random_params(model, toy.make_batch(np.random.default_rng(0), window=1, windows=1, chunk=2))


def test_more_pictures_than_the_encoder_has_places_for_are_refused(twin):
    config = dataclasses.replace(twin.config, encoder=dataclasses.replace(twin.config.encoder, max_positions=16))
    images, ids, mask = example(config, CAMERAS)  # 2 x 5 tokens and a prompt of 7
    with pytest.raises(ValueError, match=r"take 17 places, and the encoder of this florence2 has learned 16"):
        jax.eval_shape(
            lambda p: base.build(config).apply({"params": p}, images, ids, mask, method="embed"), twin.params
        )


def test_prefix_attention_and_places_the_model_lacks_are_refused():
    config = registry.get(NAME).tiny()
    with pytest.raises(ValueError, match=r"attention='prefix' means nothing in a florence2"):
        dataclasses.replace(config, attention="prefix")
    values = registry.to_hf_config(registry.get(NAME))
    with pytest.raises(ValueError, match=r"vision_config.projection_dim=7 is not supported"):
        registry.from_hf_config(values | {"vision_config": values["vision_config"] | {"projection_dim": 7}})


def test_every_parameter_of_the_tower_and_both_halves_has_a_place_when_serving(twin):
    kinds = {path: quantize.stored_as(f"backbone/{path}") for path in flatten_dict(twin.params, sep="/")}
    assert kinds["vision/stage0/layers/windows/nearby/taps"] == kinds["connector/rows"] == "cast"
    assert kinds["encoder/layers/mlp/up/kernel"] == kinds["text/layers/cross/q/kernel"] == "matrix"
