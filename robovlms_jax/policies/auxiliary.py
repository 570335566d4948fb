"""Heads that only training needs, and their errors: frames to come, the sentence in CLIP's space, the prompt's words,
how far the robot will have moved, where things are.

`policies.tasks` makes losses of them. None of them is part of acting."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from robovlms_jax.nn.attention import Attention
from robovlms_jax.nn.linear import Dense
from robovlms_jax.nn.mlp import MLP
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.policies import readout
from robovlms_jax.policies.auxiliary_config import AuxiliaryConfig, ForwardConfig
from robovlms_jax.types import Tokens


class Auxiliary(nn.Module):
    """The heads that only training needs. Parameters: `forward/`, `clip/`, `ahead/`, `scene/`.

    moving: how many numbers of the robot's state `ahead` is about.
    """

    config: AuxiliaryConfig
    cameras: tuple[str, ...]
    image_size: int
    moving: int = 0

    def setup(self):
        patch, size = self.config.forward.patch_size, self.image_size
        if self.config.forward.loss_weight:
            if size % patch:
                raise ValueError(
                    f"policy.auxiliary.forward.patch_size={patch} does not divide the backbone's images, {size} pixels."
                )
            self.forward = ForwardPrediction(self.config.forward, len(self.cameras), self.image_size)
        if self.config.clip.weights:
            self.clip = Dense(self.config.clip.dim, ("embed", None))
        if self.config.scene.loss_weight:
            self.scene = Dense(len(self.config.scene.columns), ("embed", None))
        if self.config.ahead.loss_weight:
            self.ahead = Dense(len(self.config.ahead.offsets) * self.moving, ("embed", None))

    def forward_prediction_loss(
        self, features: jax.Array, future: Mapping[str, jax.Array], real: jax.Array
    ) -> jax.Array:
        """Squared error of the frames to come, per window.

        Args:
          features: float[N, Q, D] of each window's newest step.
          future: camera -> float[N, O, size, size, 3], prepared frames at the O configured offsets from that step.
          real: bool[N, O, cameras], True = recorded; other frames cost nothing.
        Returns:
          float32[N].
        """
        frames = jnp.stack([future[camera] for camera in self.cameras], axis=2)  # [N, O, cameras, size, size, 3]
        predicted, target = self.forward(features), patches(frames, self.config.forward.patch_size)
        error = jnp.square(predicted - target).mean(axis=(3, 4))
        return jnp.where(real, error, 0).sum((1, 2)) / jnp.maximum(real.sum((1, 2)), 1)

    def clip_alignment_loss(self, features: jax.Array, sentence: jax.Array) -> jax.Array:
        """Smooth L1 between max-pooled, projected features and the sentence's embedding (upstream's CLIP-norm head).

        Args:
          features: float[N, W, Q, D]. sentence: float32[N, E], of length 1.
        Returns:
          float32[N, W].
        """
        pooled = self.clip(readout.largest(features.astype(jnp.float32)))
        return optax.losses.huber_loss(pooled, sentence[:, None], delta=1.0).mean(-1)

    def scene_errors(self, hidden: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Huber loss of numbers in units of `scale`, and how far off they are.

        Args:
          hidden: float[N, I, D] of the pictures' tokens. numbers: float32[N, M].
        Returns:
          float32[N], and float32[N]: the mean absolute error.
        """
        predicted = self.scene(hidden.astype(jnp.float32).reshape(len(hidden), -1))
        scale = self.config.scene.scale
        loss = optax.losses.huber_loss(predicted, numbers / scale, delta=1.0).mean(1)
        return loss, jnp.abs(predicted * scale - numbers).mean(1)

    def movement_errors(self, features: jax.Array, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Huber loss of movements in units of `scale`, and how far off they are.

        Args:
          features: float[N, Q, D] of each window's newest step; their mean over Q is what is read.
          moved: float32[N, O, M], m and rad.
        Returns:
          float32[N], and float32[N]: the distance to the right place, mean over O.
        """
        predicted = self.ahead(features.astype(jnp.float32).mean(axis=1)).reshape(moved.shape)
        scale = self.config.ahead.scale
        loss = optax.losses.huber_loss(predicted, moved / scale, delta=1.0).mean((1, 2))
        return loss, jnp.sqrt(jnp.square(predicted * scale - moved).sum(-1)).mean(-1)

    def __call__(self, features: jax.Array, hidden: jax.Array) -> None:
        """Touches every parameter, so `init` makes them all. features: float[N, Q, D]; hidden: as `scene_errors`."""
        if self.config.forward.loss_weight:
            self.forward(features)
        if self.config.clip.weights:
            self.clip(features.astype(jnp.float32))
        if self.config.ahead.loss_weight:
            self.ahead(features.astype(jnp.float32))
        if self.config.scene.loss_weight:
            self.scene(hidden.astype(jnp.float32).reshape(len(hidden), -1))


class ForwardPrediction(nn.Module):
    """Future frames from the features that actions are made of: a small transformer over features and empty patches
    (the decoder of a masked autoencoder, He et al. 2021, arXiv:2111.06377, as GR-1 uses it, arXiv:2312.13139)."""

    config: ForwardConfig
    num_cameras: int
    image_size: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """float[N, Q, D] -> float32[N, O, cameras, P, 3 * patch_size^2], patches of zero mean and unit variance."""
        c, heads = self.config, self.config.width // self.config.head_dim
        count = (self.image_size // c.patch_size) ** 2
        x = Dense(c.width, ("embed", None), name="seen")(features.astype(jnp.float32))
        shape = (len(c.offsets), self.num_cameras, count)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None, "position", "embed"))
        empty = self.param("patches", init, (*shape, c.width)).reshape(1, -1, c.width)
        x = jnp.concatenate([x, jnp.broadcast_to(empty, (len(x), *empty.shape[1:]))], axis=1)
        for layer in range(c.depth):
            attention = Attention(heads, c.head_dim, name=f"attn_{layer}")
            x = x + attention(LayerNorm(1e-5, name=f"attn_norm_{layer}")(x))[0]
            x = x + MLP(4 * c.width, "gelu", name=f"mlp_{layer}")(LayerNorm(1e-5, name=f"mlp_norm_{layer}")(x))
        x = LayerNorm(1e-5, name="final_norm")(x[:, features.shape[1] :])
        x = Dense(3 * c.patch_size**2, ("embed", None), name="pixels")(x)
        return x.reshape(len(x), *shape, -1)


def patches(images: jax.Array, size: int) -> jax.Array:
    """float[..., height, width, 3] -> float32[..., P, 3 * size^2], row by row, each of zero mean and unit variance."""
    *lead, height, width, channels = images.shape
    x = images.astype(jnp.float32).reshape(*lead, height // size, size, width // size, size, channels)
    x = jnp.moveaxis(x, -4, -3).reshape(*lead, -1, size * size * channels)
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def caption_errors(
    hidden: jax.Array, tokens: Tokens, text_ids: jax.Array, text_mask: jax.Array, logits: Callable
) -> jax.Array:
    """How surprised the language model is by the prompt, given the images before it: mean cross-entropy per prompt.

    The prompt's last token is left out: action queries stand before it.

    Args:
      hidden: float[N, S, D] final hidden states. tokens: what they came from.
      text_ids, text_mask: int32[N, T], bool[N, T].
      logits: float[N, T', D] -> float32[N, T', V].
    Returns:
      float32[N].
    """
    text, image = tokens.slot("text"), tokens.slot("image")
    length = text.stop - text.start
    first = max(image.stop - 1, 0)
    before = jnp.concatenate([hidden[:, first : first + 1], hidden[:, text.start : text.stop - 1]], axis=1)
    ids, real = text_ids[:, -length:], text_mask[:, -length:]
    number = jnp.cumsum(real, axis=1)
    compared = real & (number < number[:, -1:])
    if image.stop == 0:  # pictures stand beside the prompt, and nothing comes before its first token
        compared &= number > 1
    errors = optax.losses.softmax_cross_entropy_with_integer_labels(logits(before).astype(jnp.float32), ids)
    return jnp.where(compared, errors, 0).sum(1) / jnp.maximum(compared.sum(1), 1)
