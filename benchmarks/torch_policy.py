"""The policy of `against_torch`, in PyTorch: KOSMOS-2's layers with an LSTM head, written down from their formulas.

Eager float32 modules as PyTorch offers them (`scaled_dot_product_attention`, `LSTM`, fused `AdamW`), one sequence per
frame in the order of positions, so that attention is plainly causal. `load` copies parameters of our model into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from robovlms_jax.policies.vla import VLA


class Attention(nn.Module):
    """Multi-head attention, the heads' outputs normed before they are projected where `inner_norm` is set."""

    def __init__(self, width: int, heads: int, inner_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.inner_norm = nn.LayerNorm(width) if inner_norm else nn.Identity()

    def forward(self, x: torch.Tensor, context: torch.Tensor, causal: bool = False) -> torch.Tensor:
        def split(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(context)), split(self.v(context))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.o(self.inner_norm(y.transpose(1, 2).flatten(2)))


class Layer(nn.Module):
    """Pre-norm: attention, then two matrices with an activation between them. quick: CLIP's activation; otherwise GELU,
    and norms inside attention and MLP as Magneto has them."""

    def __init__(self, width: int, heads: int, mlp: int, quick: bool):
        super().__init__()
        self.quick = quick
        self.attn, self.attn_norm, self.mlp_norm = (
            Attention(width, heads, not quick),
            nn.LayerNorm(width),
            nn.LayerNorm(width),
        )
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.inner_norm = nn.Identity() if quick else nn.LayerNorm(mlp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.attn_norm(x)
        x = x + self.attn(normed, normed, causal=not self.quick)
        y = self.up(self.mlp_norm(x))
        y = y * torch.sigmoid(1.702 * y) if self.quick else functional.gelu(y)
        return x + self.down(self.inner_norm(y))


class Policy(nn.Module):
    """Frames of a window to features (`features`), and these to action chunks (`act`). Sizes are those of `model`, with
    one camera and one action query."""

    def __init__(self, model: VLA):
        super().__init__()
        vision, text, config = model.vlm.vision, model.vlm.text, model.config
        width, head = text.width, config.head
        self.spec, self.chunk, self.window = model.vlm.image, config.chunk, config.window
        self.patch = nn.Conv2d(3, vision.width, vision.patch_size, vision.patch_size, bias=False)
        self.cls = nn.Parameter(torch.empty(vision.width))
        self.positions = nn.Parameter(torch.empty(vision.num_tokens, vision.width))
        self.pre_norm, self.post_norm = nn.LayerNorm(vision.width), nn.LayerNorm(vision.width)
        self.tower = nn.ModuleList(
            Layer(vision.width, vision.num_heads, vision.mlp_dim, quick=True) for _ in range(vision.depth)
        )
        self.dense = nn.Linear(vision.width, width)
        self.latents = nn.Parameter(torch.empty(model.vlm.connector.num_latents, width))
        self.pool = Attention(width, text.num_heads)
        self.table = nn.Embedding(text.vocab_size, width)
        self.decoder = nn.ModuleList(Layer(width, text.num_heads, text.mlp_dim, quick=False) for _ in range(text.depth))
        self.final_norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.empty(1, width))
        self.lstm = nn.LSTM(width, head.hidden_size, head.num_layers, batch_first=True)
        self.arm, self.gripper = (_trunk(head.hidden_size, head.trunk, self.chunk * n) for n in (6, 1))

    def features(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """uint8[G, size, size, 3], int64[T] -> what each frame's action query becomes, float32[G, D]."""
        mean, std = (torch.tensor(x) for x in (self.spec.mean, self.spec.std))
        x = self.patch(((images / 255 - mean) / std).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1) + self.positions
        x = self.pre_norm(x)
        for layer in self.tower:
            x = layer(x)
        x = self.dense(functional.normalize(self.post_norm(x), dim=-1))
        latents = self.latents.expand(len(x), -1, -1)
        x = self.pool(latents, torch.cat([x, latents], dim=1))
        words = self.table(ids).expand(len(x), -1, -1)
        # First word, image, the other words but the last, query, last word.
        x = torch.cat([words[:, :1], x, words[:, 1:-1], self.query.expand(len(x), 1, -1), words[:, -1:]], dim=1)
        x = x * x.shape[-1] ** 0.5 + _sinusoids(x.shape[1], x.shape[2])
        for layer in self.decoder:
            x = layer(x)
        return self.final_norm(x)[:, -2]

    def act(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32[N, W, D] -> arm float32[N, W, C, 6] in [-1, 1] and logits of the gripper float32[N, W, C, 1]."""
        hidden = self.lstm(features)[0]
        arm, gripper = torch.tanh(self.arm(hidden)), self.gripper(hidden)
        return arm.unflatten(-1, (self.chunk, 6)), gripper.unflatten(-1, (self.chunk, 1))

    def loss(self, images: torch.Tensor, ids: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """actions: float32[W + C - 1, 7], normalised; every one counts."""
        arm, gripper = self.act(self.features(images, ids)[None])
        target = actions.unfold(0, self.chunk, 1).transpose(1, 2)[None]
        is_open = (target[..., 6:] > 0).float()
        return functional.huber_loss(arm, target[..., :6]) + 0.01 * functional.binary_cross_entropy_with_logits(
            gripper, is_open
        )


def _trunk(width: int, hidden: tuple[int, ...], out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, out))


def _sinusoids(length: int, width: int) -> torch.Tensor:
    """fairseq's: sines, then cosines; the last frequency is 1 / 10000, and the first token stands at 2."""
    frequency = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(width // 2) / (width // 2 - 1))
    angle = (torch.arange(length)[:, None] + 2) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def load(policy: Policy, params: Mapping[str, Any]) -> None:
    """Copy our parameters (nested) into it; both have the same number of scalars afterwards, or ValueError."""
    params = jax.tree.map(np.asarray, params)
    vision, text, connector, head = (*(params["backbone"][x] for x in ("vision", "text", "connector")), params["head"])
    _copy(policy.patch.weight, vision["patch"]["kernel"].transpose(3, 2, 0, 1))
    _copy(policy.cls, vision["cls"])
    _copy(policy.positions, vision["positions"])
    for name in ("pre_norm", "post_norm"):
        _norm(getattr(policy, name), vision[name])
    _linear(policy.dense, connector["dense"])
    _copy(policy.latents, connector["latents"])
    _attention(policy.pool, connector["attn"])
    _copy(policy.table.weight, text["embed"]["table"])
    _norm(policy.final_norm, text["final_norm"])
    for tower, stacked in ((policy.tower, vision["layers"]), (policy.decoder, text["layers"])):
        for number, layer in enumerate(tower):
            _layer(layer, jax.tree.map(lambda x, number=number: x[number], stacked))
    _copy(policy.query, next(iter(jax.tree.leaves(params["readout"]))))
    for number in range(policy.lstm.num_layers):
        for theirs, ours in (("ih", "input"), ("hh", "hidden")):
            kernel = head[f"lstm_{number}"][f"{ours}_kernel"]
            _copy(getattr(policy.lstm, f"weight_{theirs}_l{number}"), kernel.reshape(len(kernel), -1).T)
            _copy(getattr(policy.lstm, f"bias_{theirs}_l{number}"), head[f"lstm_{number}"][f"{ours}_bias"].reshape(-1))
    for trunk, name in ((policy.arm, "arm"), (policy.gripper, "gripper")):
        for number, linear in enumerate(x for x in trunk if isinstance(x, nn.Linear)):
            _linear(linear, head[name][f"layer_{number}"])
    counts = sum(x.numel() for x in policy.parameters()), sum(x.size for x in jax.tree.leaves(params))
    if counts[0] != counts[1]:
        raise ValueError(f"PyTorch's policy has {counts[0]} parameters, ours {counts[1]}: they are not of one form.")


def _copy(parameter: torch.Tensor, values: np.ndarray) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.array(values)).reshape(parameter.shape))


def _linear(linear: nn.Linear, ours: Mapping[str, np.ndarray], inputs: int = 1) -> None:
    kernel = ours["kernel"]
    _copy(linear.weight, kernel.reshape(int(np.prod(kernel.shape[:inputs])), -1).T)
    _copy(linear.bias, ours["bias"].reshape(-1))


def _norm(norm: nn.LayerNorm, ours: Mapping[str, np.ndarray]) -> None:
    _copy(norm.weight, ours["scale"])
    _copy(norm.bias, ours["bias"])


def _attention(attention: Attention, ours: Mapping[str, Any]) -> None:
    for name in ("q", "k", "v", "o"):
        _linear(getattr(attention, name), ours[name], inputs=2 if name == "o" else 1)
    if "inner_norm" in ours:
        _norm(attention.inner_norm, ours["inner_norm"])


def _layer(layer: Layer, ours: Mapping[str, Any]) -> None:
    _attention(layer.attn, ours["attn"])
    for name in ("attn_norm", "mlp_norm"):
        _norm(getattr(layer, name), ours[name])
    _linear(layer.up, ours["mlp"]["up"])
    _linear(layer.down, ours["mlp"]["down"])
    if "inner_norm" in ours["mlp"]:
        _norm(layer.inner_norm, ours["mlp"]["inner_norm"])
