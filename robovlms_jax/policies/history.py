"""Where observed steps meet. A history is a few reshapes around the language model; see docs/style.md section 7.

A segment's frames become tokens frame by frame, whatever the history: vision tower and connector, by far the most
of the work, run once per frame even where windows overlap. `join` makes of them the sequences to decode, `part` finds
a step's tokens in them again.

Letters beside the legend's: G frames of a segment, K = G - W + 1 its windows, S tokens of one frame.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.types import Inputs, Tokens


class History(Protocol):
    """Reshapes between a segment's frames, the sequences that are decoded, and the steps of its windows."""

    def join(self, tokens: Tokens, step_mask: jax.Array) -> Tokens:
        """Tokens of B * G frames, bool[B, G] real frames -> the sequences to decode."""

    def part(self, x: Any, batch: int) -> Any:
        """Leaves [sequences, slots, ...] -> the steps in them: [B, G, S, ...], or [B * K, steps, S, ...]."""

    def windows(self, x: jax.Array) -> jax.Array:
        """What was read from every step `part` found -> float[B * K, steps, ...]."""

    def steps(self, x: jax.Array) -> jax.Array:
        """Anything [B, G, ...] that frames have, of the steps that predict: [B * K, steps, ...]."""


@dataclasses.dataclass(frozen=True)
class FramesApart:
    """Every frame is decoded alone, so windows share it; the policy head remembers (upstream's `post`) or, with a
    window of one, nobody does (`one_step`)."""

    window: int

    def join(self, tokens: Tokens, step_mask: jax.Array) -> Tokens:
        return tokens

    def part(self, x: Any, batch: int) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(batch, -1, *leaf.shape[1:]), x)

    def windows(self, x: jax.Array) -> jax.Array:
        return self.steps(x)

    def steps(self, x: jax.Array) -> jax.Array:
        return merge(windows(x, self.window), 0)


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """All tokens of a window's frames follow each other in one sequence (upstream's `pre`): image, text and queries of
    step 0, then of step 1, ... Each window is decoded apart, because a frame is seen through those before it.

    Private runs, which hold a step's action tokens, may be attended by their own step only: a later step, told the
    earlier one's chunk, would copy what it is asked for (upstream's CALVIN batches let it, its OXE batches do not).
    """

    window: int

    def join(self, tokens: Tokens, step_mask: jax.Array) -> Tokens:
        batch = len(step_mask)
        frames = jax.tree.map(lambda x: merge(windows(x.reshape(batch, -1, *x.shape[1:]), self.window), 0), tokens)
        frames = place(frames, self.steps(step_mask))
        if tokens.private:
            query = jnp.concatenate([jnp.full(n, run in tokens.private) for run, n in tokens.layout])
            number = 1 + jnp.arange(self.window)[:, None]
            group = jnp.where(query, number, 0).astype(jnp.int32)
            frames = frames.replace(group=jnp.broadcast_to(group, frames.mask.shape))
        return jax.tree.map(lambda x: merge(x, 1), frames)

    def part(self, x: Any, batch: int) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(len(leaf), self.window, -1, *leaf.shape[2:]), x)

    def windows(self, x: jax.Array) -> jax.Array:
        return x

    def steps(self, x: jax.Array) -> jax.Array:
        return merge(windows(x, self.window), 0)


@dataclasses.dataclass(frozen=True)
class Video:
    """The images of all a window's frames stand in one prompt, camera by camera, each in time's order (upstream's
    `video`). One prediction per window, for its newest step."""

    window: int
    cameras: int

    def join(self, tokens: Tokens, step_mask: jax.Array) -> Tokens:
        batch = len(step_mask)
        frames = jax.tree.map(lambda x: merge(windows(x.reshape(batch, -1, *x.shape[1:]), self.window), 0), tokens)
        mask = merge(windows(step_mask, self.window), 0)
        image = tokens.slot("image")
        length = (image.stop - image.start) // self.cameras  # of one camera's tokens in one frame
        newest = jax.tree.map(lambda x: x[:, -1], frames)
        earlier = mask.sum(1, keepdims=True) - mask[:, -1:]  # real frames before the newest
        first = newest.positions[:, image][:, :1]

        def all_images(x):  # [N, W, slots, ...] -> [N, cameras * W * length, ...]
            x = x[:, :, image]
            x = jnp.swapaxes(x.reshape(*x.shape[:2], self.cameras, length, *x.shape[3:]), 1, 2)
            return x.reshape(len(x), -1, *x.shape[4:])

        real = all_images(frames.mask & mask[..., None])
        places = first + jnp.cumsum(real, axis=1) - 1
        after = newest.positions > first
        positions = newest.positions + jnp.where(after, earlier * self.cameras * length, 0)

        def around(x, images):
            return jnp.concatenate([x[:, : image.start], images, x[:, image.stop :]], axis=1)

        joined = jax.tree.map(lambda x, all_x: around(x, all_images(all_x)), newest, frames)
        layout = tuple((run, n * self.window if run == "image" else n) for run, n in tokens.layout)
        return joined.replace(
            mask=around(newest.mask, real), positions=around(positions, jnp.maximum(places, 0)), layout=layout
        )

    def part(self, x: Any, batch: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[:, None], x)

    def windows(self, x: jax.Array) -> jax.Array:
        return x

    def steps(self, x: jax.Array) -> jax.Array:
        return merge(windows(x, self.window), 0)[:, -1:]


def make(kind: str, *, window: int, cameras: int) -> History:
    """The history of that kind."""
    if kind == "interleaved":
        return Interleaved(window)
    if kind == "video":
        return Video(window, cameras)
    return FramesApart(window)


def frames(inputs: Inputs) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """All frames of all segments, side by side.

    Returns:
      images camera -> float[B * G, size, size, 3], text_ids int32[B * G, T], text_mask bool[B * G, T].
    """
    steps = inputs.step_mask.shape[1]
    images = {camera: merge(x, 0) for camera, x in inputs.images.items()}
    return images, jnp.repeat(inputs.text_ids, steps, axis=0), jnp.repeat(inputs.text_mask, steps, axis=0)


def place(tokens: Tokens, step_mask: jax.Array) -> Tokens:
    """Frames one behind the other: leaves [N, W, S, ...] with positions of their own become positions in the whole.

    Args:
      step_mask: bool[N, W]; tokens of other frames are masked, and take no place.
    """
    counts = jnp.where(step_mask, num_positions(tokens), 0)
    offsets = jnp.cumsum(counts, axis=1) - counts
    return tokens.replace(positions=tokens.positions + offsets[..., None], mask=tokens.mask & step_mask[..., None])


def num_positions(tokens: Tokens) -> jax.Array:
    """int32[...]: positions that a sequence takes, leaves [..., S]."""
    return jnp.where(tokens.mask, tokens.positions + 1, 0).max(-1)


def windows(x: jax.Array, window: int) -> jax.Array:
    """All windows of a segment: [B, G, ...] -> [B, K, W, ...] with K = G - W + 1; window k holds frames k .. k + W -
    1."""
    count = x.shape[1] - window + 1
    return x[:, np.arange(count)[:, None] + np.arange(window)]


def merge(x: jax.Array, axis: int) -> jax.Array:
    """Axes `axis` and `axis` + 1 as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
