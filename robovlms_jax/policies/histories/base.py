"""What every history is: reshapes around the language model in training, and an explicit state in control.

A segment's frames become tokens frame by frame, whatever the history: vision tower and connector, by far the most
of the work, run once per frame even where windows overlap. `to_sequences` makes of them the sequences to decode,
`to_steps` finds a step's tokens in them again. In control one frame is encoded per step; what is kept of the earlier
ones is the history's own (`init_state`, `append`).

Letters beside the legend's: G frames of a segment, K = G - W + 1 its windows, S tokens of one frame.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.backbones import base as backbones
from robovlms_jax.nn.attention import Cache
from robovlms_jax.policies.readout import Read
from robovlms_jax.types import Inputs, Tokens


class Context(NamedTuple):
    """The newest frame, decoded in its context.

    hidden: float[B, S, D] and tokens of the sequence it is read from, without action tokens.
    state: what the history keeps for the next step.
    action_position: int32[B], where the step's first action token goes, and cache: keys and values of everything it
      may attend to, with room behind; None where no action tokens will be decoded.
    renewed: features float[B, W, Q, D] of a window that was decoded again, newest last, and bool[B] where it was; None
      where that never happens.
    """

    hidden: jax.Array
    tokens: Tokens
    state: Any
    action_position: jax.Array | None = None
    cache: Cache | None = None
    renewed: tuple[jax.Array, jax.Array] | None = None


class History(Protocol):
    """Where the W steps of a window meet.

    In training: reshapes between a segment's frames, the sequences that are decoded, and the steps of its windows. In
    control: a state, a pytree that begins as `init_state` makes it. `vlm` is bound wherever it is an argument.
    """

    window: int

    def to_sequences(self, tokens: Tokens, step_mask: jax.Array) -> Tokens:
        """Tokens of B * G frames, bool[B, G] real frames -> the sequences to decode."""

    def to_steps(self, x: Any, batch: int) -> Any:
        """Leaves [sequences, slots, ...] -> the steps in them: [B, G, S, ...], or [B * K, steps, S, ...]."""

    def windows(self, x: jax.Array) -> jax.Array:
        """What was read from every step `to_steps` found -> float[B * K, steps, ...]."""

    def steps(self, x: jax.Array) -> jax.Array:
        """Anything [B, G, ...] that frames have, of the steps that predict: [B * K, steps, ...]."""

    def init_state(self, vlm: backbones.VLM, frame: Tokens) -> Any:
        """The state before an episode's first step. frame: shapes of one frame's tokens, leaves [B, S, ...]."""

    def append(self, vlm: backbones.VLM, read: Read, tokens: Tokens, state: Any, active: jax.Array) -> Context:
        """Let a new frame in: leaves [B, S, ...]. Where bool[B] `active` is False the state stays as it is."""

    def reset(self, state: Any, slot: jax.Array) -> Any:
        """Forget everything about episode int32[] `slot`, or several: as `VLA.reset_slot`."""

    def fit(self, state: Any, fresh: Any) -> Any:
        """The same state for longer or shorter prompts; `fresh`: one made for them, which says how many slots a frame
        has. What does not fit is lost: only episodes whose own prompts fit may go on."""

    def reclaim(self, state: Any, cache: Cache) -> Any:
        """The state with the buffers of `Context.cache` after action tokens were appended: same content, no copy."""


@flax.struct.dataclass
class TokenWindow:
    """The last W frames' tokens, newest last. tokens: leaves [B, W, S, ...]; count: int32[B], how many are real."""

    tokens: Tokens
    count: jax.Array

    @classmethod
    def create(cls, frame: Tokens, window: int) -> TokenWindow:
        """Nothing seen yet. frame: shapes of one frame's tokens, leaves [B, S, ...]."""
        zeros = jax.tree.map(lambda x: jnp.zeros((x.shape[0], window, *x.shape[1:]), x.dtype), frame)
        return cls(zeros, jnp.zeros((frame.mask.shape[0],), jnp.int32))

    def push(self, tokens: Tokens) -> TokenWindow:
        """With one more frame's tokens, leaves [B, S, ...]."""
        shifted = jax.tree.map(lambda old, new: jnp.concatenate([old[:, 1:], new[:, None]], 1), self.tokens, tokens)
        return TokenWindow(shifted, jnp.minimum(self.count + 1, self.window))

    def reset(self, slot: jax.Array) -> TokenWindow:
        """Without the frames of episode int32[] `slot`, or several."""
        return self.replace(count=self.count.at[slot].set(0))

    def fit(self, fresh: TokenWindow) -> TokenWindow:
        """Frames get masked slots where their text ends, or lose masked ones; so do media, in which a prompt comes last
        where an encoder has read it."""
        old, new = self.tokens, fresh.tokens
        text, extra = old.slot("text"), new.mask.shape[2] - old.mask.shape[2]

        def resize(x: jax.Array) -> jax.Array:  # [B, W, S, ...]
            gap = jnp.zeros((*x.shape[:2], max(extra, 0), *x.shape[3:]), x.dtype)
            return jnp.concatenate([x[:, :, : text.stop + min(extra, 0)], gap, x[:, :, text.stop :]], axis=2)

        media = None
        if old.media is not None:
            more = new.media.mask.shape[2] - old.media.mask.shape[2]

            def resize_media(x: jax.Array) -> jax.Array:  # [B, W, M, ...]
                gap = [(0, 0), (0, 0), (0, max(more, 0))] + [(0, 0)] * (x.ndim - 3)
                return jnp.pad(x[:, :, : new.media.mask.shape[2]], gap)

            media = jax.tree.map(resize_media, old.media)
        return self.replace(tokens=old.map_slots(resize).replace(layout=new.layout, media=media))

    @property
    def window(self) -> int:
        """W."""
        return self.tokens.mask.shape[1]

    @property
    def step_mask(self) -> jax.Array:
        """bool[B, W], True = real."""
        return jnp.arange(self.window) >= self.window - self.count[:, None]


def decode_alone(vlm: backbones.VLM, tokens: Tokens, state: Any, num_tokens: int) -> Context:
    """Sequences that hold the newest frame's whole context, decoded from nothing. num_tokens: action tokens to follow,
    0: none."""
    if num_tokens == 0:
        hidden, _ = vlm.decode(tokens)
        return Context(hidden, tokens, state)
    start = tokens.positions[:, tokens.slot("query").start]
    tokens = tokens.without("query")
    batch, slots = tokens.mask.shape
    hidden, new = vlm.decode(tokens, vlm.init_cache(batch, 0))
    cache = vlm.init_cache(batch, slots + num_tokens).append(new)
    return Context(hidden, tokens, state, start, cache)


def where(active: jax.Array, new: Any, old: Any) -> Any:
    """Leaves [B, ...]: `new` where bool[B], else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(active.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def frames(inputs: Inputs) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """All frames of all segments, side by side.

    Returns:
      images camera -> float[B * G, size, size, 3], text_ids int32[B * G, T], text_mask bool[B * G, T] or as
      `types.Inputs` has them.
    """
    steps = inputs.step_mask.shape[1]
    images = {camera: merge(x, 0) for camera, x in inputs.images.items()}
    return images, jnp.repeat(inputs.text_ids, steps, axis=0), jnp.repeat(inputs.text_mask, steps, axis=0)


def concatenate(tokens: Tokens, step_mask: jax.Array) -> Tokens:
    """Positions that count over the whole sequence: each frame's are shifted by those of the real frames before it.

    Args:
      tokens: leaves [N, W, S, ...], positions counted within each frame.
      step_mask: bool[N, W]; tokens of other frames are masked, and take no place.
    Returns:
      The same leaves. A frame's tokens attend to its own media alone, which get numbers that no other frame has.
    """
    counts = jnp.where(step_mask, num_positions(tokens), 0)
    offsets = jnp.cumsum(counts, axis=1) - counts
    tokens = tokens.replace(positions=tokens.positions + offsets[..., None], mask=tokens.mask & step_mask[..., None])
    if tokens.media is None:
        return tokens
    media, count = tokens.media, tokens.media.number.max(-1)
    before = (jnp.cumsum(count, axis=1) - count)[..., None]
    media = media.replace(number=media.number + before, mask=media.mask & step_mask[..., None])
    return tokens.replace(media=media, sees=jnp.where(tokens.sees > 0, tokens.sees + before, 0))


def num_positions(tokens: Tokens) -> jax.Array:
    """int32[...]: positions that a sequence takes, leaves [..., S]."""
    return jnp.where(tokens.mask, tokens.positions + 1, 0).max(-1)


def windows(x: jax.Array, window: int) -> jax.Array:
    """All windows of a segment: [B, G, ...] -> [B, K, W, ...], K = G - W + 1; window k holds frames k ... k + W - 1."""
    count = x.shape[1] - window + 1
    return x[:, np.arange(count)[:, None] + np.arange(window)]


def merge(x: jax.Array, axis: int) -> jax.Array:
    """Axes `axis` and `axis` + 1 as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def window_frames(tokens: Tokens, batch: int, window: int) -> Tokens:
    """Tokens of B * G frames -> of the frames of every window, leaves [B * K, W, S, ...]."""
    return jax.tree.map(lambda x: merge(windows(x.reshape(batch, -1, *x.shape[1:]), window), 0), tokens)
