"""Tiny torch models to compare every decoder-only backbone with, and how each of them is called."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from safetensors.torch import save_file

from robovlms_jax.backbones import base, registry
from robovlms_jax.runs import build
from robovlms_jax.weights import sources
from tests.backbones import composed, composed_flamingo
from tests.backbones.oracle import IMAGE, from_torch, hugging_face, question, randomize


def janus(config: base.VLMConfig) -> torch.nn.Module:
    """transformers' Janus; a twin's unused part that draws pictures is small."""
    small = {"base_channels": 32, "channel_multiplier": [1], "latent_channels": 32, "num_embeddings": 16}
    small |= dict.fromkeys(("embed_dim", "projection_dim", "image_token_embed_dim"), 8)
    return hugging_face(config, image_token_id=IMAGE, vq_config=small if config.width < 100 else {})


def with_language(config: base.VLMConfig) -> torch.nn.Module:
    """transformers' BLIP-2 or InstructBLIP. Its T5 begins with a tied head, and takes another one from a file."""
    model = hugging_face(config, image_token_index=IMAGE)
    if config.encoder is not None and config.text.head == "linear":
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.clone())
    return model


TORCH: dict[str, Callable[[base.VLMConfig], torch.nn.Module]] = {
    "kosmos-2": hugging_face,
    "paligemma": lambda config: hugging_face(config, image_token_index=IMAGE),
    "llava": lambda config: hugging_face(config, image_token_index=IMAGE),
    "smolvlm": lambda config: hugging_face(config, image_token_id=IMAGE),
    "deepseek_vl": lambda config: hugging_face(config, image_token_id=IMAGE),
    "blip-2": with_language,
    "instructblip": with_language,
    "gemma3": lambda config: hugging_face(config, image_token_index=IMAGE),
    "idefics3": lambda config: hugging_face(config, image_token_id=IMAGE),
    "internvl": lambda config: hugging_face(config, image_token_id=IMAGE),
    "janus": janus,
    "qwen2_5_vl": lambda config: hugging_face(config, image_token_id=IMAGE, video_token_id=101),
    "qwen3_vl": lambda config: hugging_face(config, image_token_id=IMAGE, video_token_id=101),
    "florence2": lambda config: hugging_face(config, image_token_id=IMAGE),
    "llava_mpt": composed.LlavaMpt,
    "moondream1": composed.Moondream,
    "qwen": composed.QwenVL,
    "vlm": composed.UForm,
    "flamingo": composed_flamingo.Flamingo,
    "otter": composed_flamingo.Flamingo,
}
"""model_type -> the torch model of a configuration."""

COMPARED = (
    "kosmos-2",
    "paligemma-3b-224",
    "paligemma2-3b-224",
    "llava-1.5-7b",
    "smolvlm2-500m",
    "deepseek-vl-1.3b",
    "qwen2.5-vl-3b",
    "qwen3-vl-4b",
    "gemma-3-4b",
    "internvl3-1b",
    "blip2-opt-2.7b",
    "instructblip-vicuna-7b",
    "idefics3-8b-llama3",
    "janus-pro-1b",
    "llava-mpt-7b",
    "moondream2",
    "moondream2-2024-03",
    "qwen-vl",
    "uform-gen2-qwen-500m",
    "flamingo-mpt-1b",
    "flamingo-neox-3b",
    "otter-mpt-7b",
    "otter-llama-7b",
)
"""Registered names, one of each form, whose tiny twins are compared."""

FORMS = {
    f"{config.model_type}{'-encoder' if config.encoder is not None else ''}": name
    for name, config in ((name, registry.get(name)) for name in reversed(registry.names()))
}
"""Family, those of an encoder and those without one apart -> a registered name."""

ENCODER_DECODER = ("florence-2-base", "blip2-flan-t5-xl", "instructblip-flan-t5-xl")
"""The same of those with an encoder, whose sequences are two: compared in test_encoder_decoder.py."""

SAME_ARITHMETIC = ("otter-mpt-7b", "otter-llama-7b", "instructblip-flan-t5-xl")
"""Those of them whose parts are compared in others, too; in the slow tests alone."""


def torch_model(config: base.VLMConfig) -> torch.nn.Module:
    """The torch model of a configuration, as its family makes it."""
    return TORCH[config.model_type](config)


def tiny(name: str) -> base.VLMConfig:
    """The tiny twin that is compared; images of an even number of patches and a rest where that is allowed."""
    config = registry.get(name).tiny()
    if getattr(config.vision, "is_ragged", False):
        config = config.resized(dataclasses.replace(config.vision, image_size=59))  # 4 x 4 patches and 3 pixels more
    if config.model_type in ("gemma3", "internvl"):  # 4 x 4 patches, 2 x 2 tokens
        config = config.resized(dataclasses.replace(config.vision, image_size=56))
    if config.text.positions == "alibi":  # transformers' MPT has this ratio only
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, mlp_dim=4 * config.width))
    return config


def published(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters (or their gradients) of a torch model by the names its checkpoint has."""
    return model.published(state) if isinstance(model, composed.Composed) else state


def forward(
    config: base.VLMConfig, model: torch.nn.Module, ids: np.ndarray, images: np.ndarray, mask: np.ndarray, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, S, V] and final hidden states [B, S, D]; ids int[B, S], images float[B, cameras, size, size, 3]."""
    pixels = torch.from_numpy(images.transpose(0, 1, 4, 2, 3).copy())
    ids = torch.from_numpy(ids).long()
    arguments = {"attention_mask": torch.from_numpy(mask).long(), "pixel_values": pixels.flatten(0, 1)}
    if config.model_type == "kosmos-2":
        arguments["image_embeds_position_mask"] = ids == IMAGE
    if config.model_type == "gemma3":
        arguments["token_type_ids"] = (ids == IMAGE).int()
    if config.model_type in ("smolvlm", "idefics3"):
        arguments["pixel_values"] = pixels
    if config.model_type in ("qwen2_5_vl", "qwen3_vl"):
        patches = flat_patches(pixels.flatten(0, 1), config.vision.patch_size)
        arguments |= patches | {"mm_token_type_ids": (ids == IMAGE).int()}
    arguments |= torch_question(config, len(ids), images.shape[1])
    out = model(input_ids=ids, **arguments, **more, output_hidden_states=True, use_cache=False)
    out_of_decoder = out.language_model_outputs if config.model_type in ("blip-2", "instructblip") else out
    return out.logits, out_of_decoder.hidden_states[-1]


def torch_question(config: base.VLMConfig, batch: int, cameras: int) -> dict[str, torch.Tensor]:
    """What transformers' InstructBLIP is told beside the prompt, for every picture."""
    if not config.connector_tokenizer:
        return {}
    ids, mask = (torch.from_numpy(np.repeat(x, cameras, axis=0)).long() for x in question(config, batch))
    return {"qformer_input_ids": ids, "qformer_attention_mask": mask}


def flat_patches(images: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """Qwen-VL 2.5's and 3's patches: two by two beside each other, each of them channels, two frames, rows, columns."""
    side = images.shape[-1] // size
    x = images.reshape(len(images), 3, side // 2, 2, size, side // 2, 2, size).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x[..., None, :, :].expand(*x.shape[:6], 2, size, size).reshape(-1, 3 * 2 * size * size)
    return {"pixel_values": x, "image_grid_thw": torch.tensor([[1, side, side]] * len(images))}


def publish(name: str, directory: pathlib.Path) -> tuple[str, dict[str, np.ndarray]]:
    """Write the tiny twin of `name` as the hub has it, in two directories where it is published in two.

    Returns:
      backbone.weights for it (the first part holds config.json and tokenizer), and its parameters, "/"-joined.
    """
    config = tiny(name)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=300))
    model = randomize(torch_model(config))
    state = published(model, dict(model.state_dict()))
    state = {key: value.contiguous().clone() for key, value in state.items()}
    apart = [key for key in state if name == "llava-mpt-7b" and key.startswith("vision_model.")]
    parts = {"language": [key for key in state if key not in apart], "vision": apart}
    for part, keys in parts.items():
        (directory / part).mkdir(parents=True)
        if keys:
            save_file({key: state[key] for key in keys}, directory / part / sources.SINGLE)
    first = directory / "language"
    build.write_files(config, ["open the drawer"], first)
    weights = ",".join(str(directory / part) for part, keys in parts.items() if keys)
    return weights, flatten_dict(from_torch(config, state), sep="/")
