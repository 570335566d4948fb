"""Where tokens stand: positions, offsets, groups and masks of every backbone and structure, equal to release 0.1's.

`layouts.npz` was written by this file's `recorded` at revision 608ecf4, before sequences were laid out from named runs:

    python -m tests.policies.test_layouts tests/policies/layouts.npz
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.backbones import base as backbones
from robovlms_jax.backbones import registry
from robovlms_jax.policies import vla
from robovlms_jax.policies.config import ActionHistoryConfig, PolicyConfig, ProprioConfig
from robovlms_jax.policies.heads import discrete, lstm, mlp
from robovlms_jax.policies.sensors import base as sensors
from robovlms_jax.types import Inputs

W, G, T, B = 2, 3, 6, 3
LENGTHS = (6, 4, 3)
LSTM = lstm.LSTMHeadConfig(hidden_size=8, num_layers=1, trunk=(8,))
MLP = mlp.MLPHeadConfig(hidden_size=8, trunk=(8,))
TOKENS = discrete.DiscreteHeadConfig(num_bins=16)
EXTRAS = {"proprio": ProprioConfig(enabled=True), "action_history": ActionHistoryConfig(length=2)}

STRUCTURES: dict[str, dict[str, Any]] = {
    "policy_head": {"history": "policy_head", "head": LSTM, "window": W, "num_queries": 2},
    "one_camera_pool": {"history": "policy_head", "head": LSTM, "window": W, "readout": "pool", "cameras": ("static",)},
    "one_step_extras": {"history": "one_step", "head": MLP, "window": 1, **EXTRAS},
    "interleaved_tokens": {"history": "interleaved", "head": TOKENS, "window": W, "readout": "token", "chunk": 1},
    "interleaved_extras": {"history": "interleaved", "head": MLP, "window": W, **EXTRAS},
    "video_extras": {"history": "video", "head": MLP, "window": W, **EXTRAS},
    "counts_padding": {"history": "policy_head", "head": LSTM, "window": W, "compat_count_padding": True},
    "queries_last": {"history": "policy_head", "head": LSTM, "window": W, "compat_queries_last": True, **EXTRAS},
}

FAMILIES = (
    *("deepseek_vl", "kosmos-2", "llava", "llava_mpt", "moondream1", "paligemma"),
    *("qwen", "qwen2_5_vl", "smolvlm", "vlm"),
)
RELEASED = [name for name in registry.names() if registry.get(name).model_type in FAMILIES]
"""Backbones whose layouts release 0.1 wrote down."""

COPIES = ("counts_padding", "queries_last")
"""Structures that copy how upstream's training batches are padded."""


def variants() -> Iterator[tuple[str, backbones.VLMConfig, tuple[str, ...]]]:
    """Backbones of every family of release 0.1, shrunken, and the structures they are laid out in: all for the first of
    its form."""
    families, forms = set(), set()
    paligemma, qwen = registry.get("paligemma-3b-224"), registry.get("qwen2.5-vl-3b")
    prefix = {
        "paligemma prefix": dataclasses.replace(paligemma, attention="prefix"),
        "qwen2.5-vl prefix": dataclasses.replace(qwen, attention="prefix"),
    }
    for name, config in ({name: registry.get(name) for name in RELEASED} | prefix).items():
        form = (config.lead, config.tail, bool(config.image_start), config.image_grid is None, config.attention)
        if form in forms or name in ("deepseek-vl-1.3b", "uform-gen2-qwen-500m", "qwen-vl"):
            # Their lead, tail and image marks are seen by two structures as well as by all.
            if form not in forms or config.model_type not in families:
                yield name, config.tiny(), ("queries_last", "video_extras")
        elif config.attention == "prefix":
            # Release 0.1 lost the prefix where it copied upstream's padding; with a video ExperimentConfig refuses it.
            meant = tuple(name for name in STRUCTURES if name not in COPIES and not name.startswith("video"))
            yield name, config.tiny(), meant
        else:
            yield name, config.tiny(), tuple(STRUCTURES)
        families.add(config.model_type)
        forms.add(form)


def inputs(config: PolicyConfig, size: int) -> Inputs:
    """Segments with prompts of three lengths, a frame before an episode's beginning and missing pictures."""
    images = {camera: jnp.zeros((B, G, size, size, 3)) for camera in ("static", "wrist")}
    steps = np.ones((B, G), bool)
    steps[1, 0] = False
    there = {"static": np.ones((B, G), bool), "wrist": np.arange(B * G).reshape(B, G) % 2 == 0}
    return Inputs(
        images=images,
        text_ids=np.full((B, T), 5, np.int32),
        text_mask=np.arange(T) < np.array(LENGTHS)[:, None],
        step_mask=steps,
        image_mask=there,
        **sensors.blank(config.all_sensors, B, G),
    )


class Decoded(Exception):
    """Carries the tokens that reached the decoder."""


@contextlib.contextmanager
def caught(tokens_per_image: int) -> Iterator[None]:
    """Decoding ends with its tokens; pictures are not looked at."""
    decode, encode = backbones.VLM.decode, backbones.VLM.encode_images

    def stop(self, tokens, *_, **__):
        raise Decoded(tokens)

    def blank(self, images, *_, **__):
        batch = len(next(iter(images.values())))
        return jnp.zeros((batch, tokens_per_image * len(images), self.config.width))

    backbones.VLM.decode, backbones.VLM.encode_images = stop, blank
    try:
        yield
    finally:
        backbones.VLM.decode, backbones.VLM.encode_images = decode, encode


@functools.lru_cache
def tokens_per_image(vlm: backbones.VLMConfig) -> int:
    """Number of tokens that one picture becomes."""
    image = {"static": jnp.zeros((1, vlm.image.size, vlm.image.size, 3))}
    run = functools.partial(backbones.build(vlm).init_with_output, method="encode_images")
    return jax.eval_shape(lambda: run(jax.random.key(0), image))[0].shape[1]


def layout_of(vlm: backbones.VLMConfig, changes: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the decoder is told about places: int32 arrays by name."""
    config = PolicyConfig(**{"chunk": 2, **changes})
    model = vla.VLA(config, vlm)
    given = inputs(config, vlm.image.size)
    actions = jnp.zeros((B, G, config.chunk, 7)) if config.is_autoregressive else None
    with caught(tokens_per_image(vlm)):
        # Only what stands before the decoder has parameters here: neither towers nor the head are traced.
        embed = functools.partial(model.init, jax.random.key(0), given, actions=actions, method="embed")
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(embed))
        runs = []

        @jax.jit
        def places() -> dict[str, jax.Array | None]:
            with pytest.raises(Decoded) as stopped:
                model.apply(params, given, actions=actions)
            (tokens,) = stopped.value.args
            runs.extend(tokens.layout)
            found = {"positions": tokens.positions, "mask": tokens.mask, "offsets": tokens.offsets}
            return found | {"group": tokens.group}

        found = places()
    names = [name if name in ("bos", "image", "text", "query") else "extra" for name, _ in runs]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}  # all extra tokens were one run
    slots = np.concatenate([np.full(n, number[name]) for name, (_, n) in zip(names, runs, strict=True)])
    return {"runs": slots, **{name: np.asarray(value) for name, value in found.items() if value is not None}}


def recorded(name: str, vlm: backbones.VLMConfig, structures: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Every array of a backbone's structures, by "backbone|structure|array"."""
    found = {}
    for structure in structures:
        arrays = layout_of(vlm, STRUCTURES[structure])
        found |= {f"{name}|{structure}|{key}": value for key, value in arrays.items()}
    return found


@pytest.mark.parametrize(("name", "vlm", "structures"), [pytest.param(*v, id=v[0]) for v in variants()])
def test_tokens_stand_where_they_stood(name, vlm, structures):
    with np.load(pathlib.Path(__file__).with_name("layouts.npz")) as stored:
        expected = {
            key: stored[key] for key in stored.files if key.split("|")[0] == name and key.split("|")[1] in structures
        }
    found = recorded(name, vlm, structures)
    assert set(found) == set(expected)
    for key, value in expected.items():
        real = found[key.rpartition("|")[0] + "|mask"]  # where padding stands means nothing
        if not key.endswith(("|runs", "|mask")):
            value, found[key] = value[real], found[key][real]
        np.testing.assert_array_equal(found[key], value, err_msg=key)


if __name__ == "__main__":
    everything = {key: value for variant in variants() for key, value in recorded(*variant).items()}
    np.savez_compressed(sys.argv[1], **{key: value.astype(np.int16) for key, value in everything.items()})
