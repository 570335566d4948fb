"""A small policy in upstream's own format, and upstream's evaluation recipe in PyTorch as the oracle for it.

The recipe is written from what upstream's evaluator does (model_wrapper.py, base_backbone.py, base_policy.py): one
frame per step, gripper camera's tokens before the static camera's, both behind the first text token, the action token
before the last one, LSTM from zero over the newest frames, tanh for the arm, everything scaled by 0.65.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from robovlms_jax.backbones import base as backbones
from robovlms_jax.backbones import registry
from robovlms_jax.inputs import tokenizers
from robovlms_jax.runs import build
from tests.upstream import published

SENTENCES = ["open the drawer", "push the red block to the left"]
USE_HAND = next(name for name in published.NAMES if "use-hand_ws-16_act-10.json" in name)
WINDOW, CHUNK, HIDDEN = 3, 4, 16


class Head(torch.nn.Module):
    """Parameters named as upstream's LSTMDecoder names them."""

    def __init__(self, width: int):
        super().__init__()
        self.rnn = torch.nn.LSTM(width, HIDDEN, 4, batch_first=True)
        self.actions, self.gripper = (torch.nn.Module() for _ in range(2))
        for module, size in ((self.actions, 6 * CHUNK), (self.gripper, CHUNK)):
            sizes = (HIDDEN, 1024, 512, 256, size)
            layers = [torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
            module.mlp = torch.nn.Sequential(*[x for layer in layers for x in (layer, torch.nn.ReLU())][:-1])


@dataclasses.dataclass
class Release:
    """What a user downloads: checkpoint, its JSON, the backbone's directory."""

    directory: pathlib.Path
    vlm: Any
    head: Head
    action_token: torch.Tensor
    config: backbones.VLMConfig

    @property
    def checkpoint(self) -> pathlib.Path:
        return self.directory / "policy.pt"

    @property
    def json(self) -> pathlib.Path:
        return self.directory / "policy.json"

    @property
    def backbone(self) -> pathlib.Path:
        return self.directory / "kosmos"

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {f"model.backbone.{name}": x for name, x in self.vlm.state_dict().items()}
        state |= {f"model.act_head.{name}": x for name, x in self.head.state_dict().items()}
        return state | {"model.action_token": self.action_token}

    @torch.no_grad()
    def actions(self, instruction: str, steps: list[dict[str, np.ndarray]]) -> np.ndarray:
        """float32[steps, C, 7] as upstream would execute them, had it executed whole chunks."""
        tokenizer = tokenizers.load_tokenizer(self.backbone)
        prompt = f"<grounding>An image of a robot {instruction.strip()}"
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        text = self.vlm.text_model.model.embed_tokens(ids)
        features, out = [], []
        for frames in steps:
            pictures = [self._picture(frames[camera]) for camera in ("wrist", "static")]
            parts = [text[:, :1], *pictures, text[:, 1:-1], self.action_token[None, None], text[:, -1:]]
            hidden = self.vlm.text_model(inputs_embeds=torch.cat(parts, 1), output_hidden_states=True).hidden_states[-1]
            features.append(hidden[:, -2])
            remembered, _ = self.head.rnn(torch.stack(features[-WINDOW:], 1))
            arm = torch.tanh(self.head.actions.mlp(remembered[0, -1])).reshape(CHUNK, 6)
            is_open = torch.sigmoid(self.head.gripper.mlp(remembered[0, -1])) > 0.5
            out.append(torch.cat([0.65 * arm, is_open[:, None] * 2.0 - 1.0], 1).numpy())
        return np.stack(out)

    def _picture(self, image: np.ndarray) -> torch.Tensor:
        size = self.config.image.size
        scaled = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
        pixels = (scaled - np.float32(self.config.image.mean)) / np.float32(self.config.image.std)
        vision = self.vlm.vision_model.model
        features = vision.post_layernorm(
            vision(torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32))).last_hidden_state
        )
        return self.vlm.image_to_text_projection(torch.nn.functional.normalize(features, dim=-1))[0]


def make(directory: pathlib.Path) -> Release:
    """Write a release with random parameters, none of them zero."""
    config = registry.get("kosmos-2").tiny()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=300))
    folder = directory / "kosmos"
    folder.mkdir(parents=True)
    build.write_files(config, SENTENCES, folder)

    torch.manual_seed(0)
    vlm = transformers.Kosmos2ForConditionalGeneration(transformers.Kosmos2Config(**registry.to_hf_config(config)))
    head = Head(config.width)
    with torch.no_grad():
        for name, value in [*vlm.named_parameters(), *head.named_parameters()]:
            is_norm = any(word in name for word in ("norm", "_ln")) and name.endswith("weight")
            value.copy_(torch.randn(value.shape) * 0.1 + is_norm)
    release = Release(directory, vlm.float().eval(), head.eval(), torch.randn(config.width) * 0.1, config)

    # As the ZeRO converter leaves it: Lightning's client state with the weights under state_dict.
    torch.save({"epoch": 4, "global_step": 100, "state_dict": release.state_dict()}, release.checkpoint)
    release.json.write_text(json.dumps(settings(folder)))
    return release


def settings(backbone: pathlib.Path, name: str = USE_HAND) -> dict[str, Any]:
    """A published configuration, made small, as upstream's trainer dumps it."""
    values = copy.deepcopy(published.read(name))
    values |= {"window_size": WINDOW, "fwd_pred_next_n": CHUNK, "exp_name": "12-30", "gpus": 8, "llm": {"type": None}}
    values["act_head"] |= {"hidden_size": HIDDEN}
    for part in ("vlm", "tokenizer"):
        values[part]["pretrained_model_name_or_path"] = str(backbone)
    return values
