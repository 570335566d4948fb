"""The images of all a window's frames stand in one prompt, or beside it: history `video`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from robovlms_jax.backbones import base as backbones
from robovlms_jax.nn.attention import Cache
from robovlms_jax.policies.histories import base
from robovlms_jax.policies.readout import Read
from robovlms_jax.types import Tokens


@dataclasses.dataclass(frozen=True)
class Video:
    """Camera by camera, each in time's order (upstream's `video`). One prediction per window, for its newest step.

    In control the tokens of the last W frames are kept, and the prompt that holds them all is decoded again.

    num_tokens: action tokens that are decoded after each frame; 0 where actions are no tokens.
    """

    window: int
    cameras: int
    num_tokens: int = 0

    def to_sequences(self, tokens: Tokens, step_mask: jax.Array) -> Tokens:
        frames = base.window_frames(tokens, len(step_mask), self.window)
        mask = base.merge(base.windows(step_mask, self.window), 0)
        newest = jax.tree.map(lambda x: x[:, -1], frames)
        if tokens.media is not None:  # all frames' stand beside the newest frame's prompt
            media = frames.media.replace(mask=frames.media.mask & mask[..., None])
            return newest.replace(media=jax.tree.map(lambda x: base.merge(x, 1), media))
        image = tokens.slot("image")
        length = (image.stop - image.start) // self.cameras  # of one camera's tokens in one frame
        earlier = mask.sum(1, keepdims=True) - mask[:, -1:]  # real frames before the newest
        first = newest.positions[:, image][:, :1]

        def all_images(x):  # [N, W, slots, ...] -> [N, cameras * W * length, ...]
            x = x[:, :, image]
            x = jnp.swapaxes(x.reshape(*x.shape[:2], self.cameras, length, *x.shape[3:]), 1, 2)
            return x.reshape(len(x), -1, *x.shape[4:])

        real = all_images(frames.mask & mask[..., None])
        # The patches of an image may share a position, that of its last one.
        shared = frames.positions - frames.positions[:, :, image.start, None]
        shared -= jnp.arange(tokens.mask.shape[1]) - image.start
        places = first + jnp.cumsum(real, axis=1) - 1 + all_images(shared)
        after = newest.positions > first
        positions = newest.positions + jnp.where(after, earlier * self.cameras * length, 0)

        def around(x, images):
            return jnp.concatenate([x[:, : image.start], images, x[:, image.stop :]], axis=1)

        joined = jax.tree.map(lambda x, all_x: around(x, all_images(all_x)), newest, frames)
        layout = tuple((run, n * self.window if run == "image" else n) for run, n in tokens.layout)
        return joined.replace(
            mask=around(newest.mask, real), positions=around(positions, jnp.maximum(places, 0)), layout=layout
        )

    def to_steps(self, x: Any, batch: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[:, None], x)

    def windows(self, x: jax.Array) -> jax.Array:
        return x

    def steps(self, x: jax.Array) -> jax.Array:
        return base.merge(base.windows(x, self.window), 0)[:, -1:]

    def init_state(self, vlm: backbones.VLM, frame: Tokens) -> base.TokenWindow:
        return base.TokenWindow.create(frame, self.window)

    def append(
        self, vlm: backbones.VLM, read: Read, tokens: Tokens, state: base.TokenWindow, active: jax.Array
    ) -> base.Context:
        recent = state.push(tokens)
        sequences = self.to_sequences(jax.tree.map(lambda x: base.merge(x, 0), recent.tokens), recent.step_mask)
        return base.decode_alone(vlm, sequences, base.where(active, recent, state), self.num_tokens)

    def reset(self, state: base.TokenWindow, slot: jax.Array) -> base.TokenWindow:
        return state.reset(slot)

    def fit(self, state: base.TokenWindow, fresh: base.TokenWindow) -> base.TokenWindow:
        return state.fit(fresh)

    def reclaim(self, state: base.TokenWindow, cache: Cache) -> base.TokenWindow:
        return state
