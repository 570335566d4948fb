"""Flamingo's particulars: which token attends to which picture, and checkpoints in several parts and spellings."""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.torch import save_file

from robovlms_jax.backbones import base, registry, sequence
from robovlms_jax.policies.histories import base as histories
from robovlms_jax.policies.histories.interleaved import Interleaved
from robovlms_jax.policies.histories.video import Video
from robovlms_jax.types import Tokens
from robovlms_jax.weights import convert, sources
from tests.backbones import families
from tests.backbones.oracle import abstract, example, from_torch, randomize

W, LATENTS = 3, 2


def runs(lead: int, text: int) -> list[sequence.Run]:
    def run(name: str, n: int, **more) -> sequence.Run:
        return sequence.Run(jnp.zeros((W, n, 4)), jnp.ones((W, n), bool), name, **more)

    picture = run("image", LATENTS, kind="image", beside=True)
    return [run("bos", lead, kind="text"), picture, run("text", text, kind="text"), run("query", 1, kind="query")]


def open_flamingos(is_picture: np.ndarray, pictures: int) -> np.ndarray:
    """bool[S, pictures * LATENTS]: a token attends to the picture whose mark is the last one up to it (its
    `only_attend_immediate_media`), a mark itself included."""
    text_time, media_time = np.cumsum(is_picture), np.repeat(np.arange(pictures) + 1, LATENTS)
    return text_time[:, None] == media_time


@pytest.mark.parametrize("lead", [0, 1])
def test_a_step_attends_to_its_own_pictures_as_in_open_flamingo(lead):
    tokens = sequence.layout(runs(lead, 3), sequence.Order(tail=1))
    marks = np.arange(lead + 4) == lead  # the mark of the picture is the first token after the lead
    assert dict(tokens.layout)["image"] == 0
    alone = np.asarray(tokens.media.may_attend(tokens.sees))
    np.testing.assert_array_equal(alone, np.stack([open_flamingos(marks, 1)] * W))
    joined = Interleaved(W).to_sequences(tokens, jnp.ones((1, W), bool))
    found = np.asarray(joined.media.may_attend(joined.sees))[0]
    slots = (np.arange(len(found)) % (lead + 4)) >= lead  # a step's first token sees nothing, not the step before
    np.testing.assert_array_equal(found, open_flamingos(np.tile(marks, W), W) & slots[:, None])


def test_a_token_before_the_picture_is_before_it_whichever_side_is_padded():
    prompt = [run.replace(mask=run.mask[:1], embeds=run.embeds[:1]) for run in runs(1, 3)]
    mask = jnp.asarray([[False, False, True, True]])  # the first real token is the one before the picture
    prompt[0], prompt[2] = prompt[0].replace(mask=mask[:, :1]), prompt[2].replace(mask=mask[:, 1:])
    tokens = sequence.layout(prompt)
    assert tokens.sees[0, 2:].tolist() == [0, 1, 1]


def test_a_video_sees_all_its_real_frames_and_steps_before_the_episode_are_nobodys():
    tokens, real = sequence.layout(runs(0, 3)), jnp.asarray([[False, True, True]])
    video = Video(W, cameras=1).to_sequences(tokens, real)
    assert np.asarray(video.media.may_attend(video.sees)).tolist() == [[[False] * 2 + [True] * 4] * 4]
    joined = histories.concatenate(histories.window_frames(tokens, 1, W), real)
    assert not joined.media.mask[0, 0].any() and joined.media.mask[0, 1:].all()


def test_tokens_without_pictures_are_told_so():
    config = registry.get("flamingo-mpt-1b").tiny()
    tokens = Tokens(jnp.zeros((1, 2, config.width)), jnp.ones((1, 2), bool), jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"attends to media, and has got none"):
        jax.eval_shape(lambda p: base.build(config).apply({"params": p}, tokens, method="decode"), abstract(config))


@pytest.mark.slow
def test_a_masked_picture_adds_nothing(exact_matmul):
    config = registry.get("flamingo-mpt-1b").tiny()
    images, ids, mask = example(config)
    model = base.build(config)
    params = nn.unbox(jax.jit(lambda key: model.init(key, images, ids, mask))(jax.random.key(0)))

    @jax.jit
    def hidden(images, there):
        tokens = model.apply(params, images, ids, mask, image_mask=there, method="embed")
        return model.apply(params, tokens, method="decode")[0]

    gates = params["params"]["text"]["cross_layers"]
    gates |= {name: gates[name] + 1 for name in ("attn_gate", "mlp_gate")}
    nobody = jnp.zeros((2, 2), bool)
    other = jax.tree.map(lambda x: x[::-1] + 1, images)
    np.testing.assert_array_equal(hidden(images, nobody), hidden(other, nobody))
    assert np.abs(hidden(images, ~nobody) - hidden(other, ~nobody)).max() > 1e-3


def test_decoder_training_and_clip_are_opened_from_their_own_directories(tmp_path):
    # As published: the decoder with its config.json and fewer tokens, what was trained, CLIP with its text side.
    config = families.tiny("flamingo-mpt-1b")
    model = randomize(families.torch_model(config))
    state = families.published(model, dict(model.state_dict()))
    state = {name: value.contiguous().clone() for name, value in state.items() if not name.endswith("lm_head.weight")}
    language = {
        n.removeprefix("lang_encoder."): x for n, x in state.items() if n.startswith("lang_encoder.transformer")
    }
    trained = {n: x for n, x in state.items() if n.startswith(("perceiver", "lang_encoder.gated"))}
    trained["lang_encoder.transformer.wte.weight"] = language.pop("transformer.wte.weight")
    language["transformer.wte.weight"] = torch.zeros(config.text.vocab_size - 5, config.width)
    vision = {n.removeprefix("vision_encoder."): x for n, x in state.items() if n.startswith("vision_encoder")}
    vision |= {"logit_scale": torch.zeros(()), "text_model.final_layer_norm.weight": torch.zeros(3)}
    parts = {"language": language, "trained": trained, "vision": vision}
    for part, tensors in parts.items():
        (tmp_path / part).mkdir()
        save_file(tensors, tmp_path / part / sources.SINGLE)
    values = registry.to_hf_config(config)
    text = values["text_config"] | {"vocab_size": config.text.vocab_size - 5}
    (tmp_path / "language" / "config.json").write_text(json.dumps(text))
    opened = registry.from_directory(tmp_path / "language")
    assert opened.model_type == "flamingo" and opened.text.gated.every == 1
    source = sources.open_sources([tmp_path / part for part in parts])
    found = registry.refine_from_tensors(opened, source.shapes)
    assert found.text.vocab_size == config.text.vocab_size
    convert.plan(found.rules, source.shapes, shapes_of(config))


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(abstract(config), sep="/").items()}


@pytest.mark.parametrize("name", ["flamingo-neox-3b", "otter-mpt-7b"])
def test_layers_that_a_file_holds_three_times_are_read_once(name):
    # A whole model's state has them by themselves and inside of the wrappers that join decoder and cross-attention.
    config = families.tiny(name)
    model = randomize(families.torch_model(config))
    state = families.published(model, dict(model.state_dict()))
    expected = from_torch(config, state)
    blocks = "lang_encoder.gpt_neox.layers." if "neox" in name else "lang_encoder.transformer.blocks."
    gated = "lang_encoder.gated_cross_attn_layers."
    whole = {}
    for key, value in state.items():
        if key.startswith(blocks):
            number, _, rest = key.removeprefix(blocks).partition(".")
            whole |= {f"lang_encoder.old_decoder_blocks.{number}.{rest}": value}
            whole |= {f"{blocks}{number}.decoder_layer.{rest}": value}
        elif key.startswith(gated):
            number, _, rest = key.removeprefix(gated).partition(".")
            whole |= {key: value, f"{blocks}{number}.gated_cross_attn_layer.{rest}": value}
        else:
            whole[key.replace("embed_out", "lm_head")] = value  # transformers 5 calls GPT-NeoX's head so
    for path, value in flatten_dict(from_torch(config, whole), sep="/").items():
        np.testing.assert_array_equal(value, flatten_dict(expected, sep="/")[path], err_msg=path)


def test_a_tower_in_open_clips_names_is_the_same_tower(exact_matmul):
    # As in OpenFlamingo's own files: queries, keys and values in one tensor, what CLIP makes of its class token beside.
    config = families.tiny("flamingo-mpt-1b")
    model = randomize(families.torch_model(config))
    state = families.published(model, dict(model.state_dict()))
    there, here = "vision_encoder.vision_model.", "vision_encoder."
    names = {"embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight"}
    names |= {"embeddings.position_embedding.weight": "positional_embedding"}
    parts = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "encoder.layers": "transformer.resblocks"}
    parts |= {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}
    spelled = {f"{here}proj": torch.zeros(config.vision.width, 3)}
    for name, value in state.items():
        if not name.startswith(there):
            spelled[name] = value
            continue
        inner = names.get(name.removeprefix(there), name.removeprefix(there))
        for old, new in parts.items():
            inner = inner.replace(old, new)
        layer, fused, kind = inner.partition(".self_attn.q_proj.")
        if fused:
            group = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            spelled[f"{here}{layer}.attn.in_proj_{kind}"] = torch.cat(group)
        elif ".self_attn.k_proj." not in inner and ".self_attn.v_proj." not in inner:
            spelled[here + inner] = value
    assert not any("self_attn" in name or "layers" in name for name in spelled if name.startswith(here))
    expected = flatten_dict(from_torch(config, state), sep="/")
    for path, value in flatten_dict(from_torch(config, spelled), sep="/").items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
