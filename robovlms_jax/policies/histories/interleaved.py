"""All tokens of a window's frames follow each other in one sequence: history `interleaved`.

In control keys and values of the last W frames are kept (a ring of W frames per episode), so a new frame is decoded
alone. Until W frames have been seen this equals decoding the window again. From then on the oldest frame leaves, and
`reencode_every` says what happens:
  1  the window is decoded again at every step from its kept embeddings: exact, at the decoder's cost for W frames (the
     vision tower still sees the new frame only).
  0  never: a step keeps costing one frame. Approximate in two ways: the kept keys and values were computed when frames
     that have left could still be attended to, and positions go on counting instead of starting from 0.
  n  every n-th step, which bounds how far both can drift.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from robovlms_jax.backbones import base as backbones
from robovlms_jax.nn.attention import Cache
from robovlms_jax.policies.histories import base
from robovlms_jax.policies.readout import Read
from robovlms_jax.types import Media, Tokens


@flax.struct.dataclass
class RingCache:
    """Keys and values of the last W frames of each episode.

    cache: slots [0, W * S) are W frames in a ring, those behind are scratch for action tokens.
    oldest: int32[B], place in the ring that the next frame takes.
    count: int32[B], frames seen in this episode. position: int32[B], of the next frame's first token.
    slots: S.
    """

    cache: Cache
    oldest: jax.Array
    count: jax.Array
    position: jax.Array
    slots: int = flax.struct.field(pytree_node=False)

    def fit(self, fresh: RingCache, window: int) -> RingCache:
        """The frames in as many slots each as `fresh` has; real tokens come first, in the order they had."""
        frames = (len(self.count), window, self.slots)
        real = self.cache.mask[:, : window * self.slots].reshape(frames)
        order = jnp.argsort(~real, axis=-1, stable=True)[..., : fresh.slots]  # [B, W, S']

        def move(x: jax.Array, target: jax.Array, batch: int, slots: int) -> jax.Array:
            # Attention does not care which slot a token is in.
            x = jnp.moveaxis(x, (batch, slots), (0, 1))
            x = x[:, : window * self.slots].reshape(*frames, *x.shape[2:])
            x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 3)), axis=2)
            x = jnp.pad(x, [(0, 0), (0, 0), (0, fresh.slots - x.shape[2])] + [(0, 0)] * (x.ndim - 3))
            x = base.merge(x, 1)
            x = jnp.pad(x, [(0, 0), (0, target.shape[slots] - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
            return jnp.moveaxis(x, (0, 1), (batch, slots))

        cache = self.cache.map(move, fresh.cache).replace(length=fresh.cache.length)
        return self.replace(cache=cache, slots=fresh.slots)


@flax.struct.dataclass
class State:
    """recent: the tokens that the window is decoded again from; None where that never happens."""

    ring: RingCache
    recent: base.TokenWindow | None


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """Image, text and queries of step 0, then of step 1, ... (upstream's `pre`). Each window is decoded apart, because
    a frame is seen through those before it.

    Private runs, which hold a step's action tokens, may be attended by their own step only: a later step, told the
    earlier one's chunk, would copy what it is asked for (upstream's CALVIN batches let it, its OXE batches do not).

    num_tokens: action tokens that are decoded after each frame; 0 where actions are no tokens.
    """

    window: int
    num_tokens: int = 0
    reencode_every: int = 1

    def to_sequences(self, tokens: Tokens, step_mask: jax.Array) -> Tokens:
        frames = base.concatenate(base.window_frames(tokens, len(step_mask), self.window), self.steps(step_mask))
        if tokens.private:
            is_private = jnp.concatenate([jnp.full(n, run in tokens.private) for run, n in tokens.layout])
            number = 1 + jnp.arange(self.window)[:, None]
            group = jnp.where(is_private, number, 0).astype(jnp.int32)
            frames = frames.replace(group=jnp.broadcast_to(group, frames.mask.shape))
        return jax.tree.map(lambda x: base.merge(x, 1), frames)

    def to_steps(self, x: Any, batch: int) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(len(leaf), self.window, -1, *leaf.shape[2:]), x)

    def windows(self, x: jax.Array) -> jax.Array:
        return x

    def steps(self, x: jax.Array) -> jax.Array:
        return base.merge(base.windows(x, self.window), 0)

    def init_state(self, vlm: backbones.VLM, frame: Tokens) -> State:
        tokens = jax.eval_shape(self._prompt, frame)
        batch, slots = tokens.mask.shape
        cache = vlm.init_cache(batch, self.window * slots + self.num_tokens)
        # Never moves: frames are put into the ring, only action tokens are appended to it.
        cache = cache.replace(length=jnp.int32(self.window * slots))
        zeros = [jnp.zeros((batch,), jnp.int32) for _ in range(3)]  # a buffer each: carries are donated
        recent = base.TokenWindow.create(tokens, self.window) if self.reencode_every else None
        return State(RingCache(cache, *zeros, slots), recent)

    def append(self, vlm: backbones.VLM, read: Read, tokens: Tokens, state: State, active: jax.Array) -> base.Context:
        start = tokens.positions[:, tokens.slot("query").start] if self.num_tokens else None
        tokens = self._prompt(tokens)
        hidden, placed, ring, media = self._append_to_ring(vlm, tokens, state.ring, active)
        context = base.Context(hidden, placed, State(ring, None), start)
        if state.recent is not None:
            recent = state.recent.push(tokens)
            past = ring.count - self.window
            due = active & (past > 0) & (past % self.reencode_every == 0)
            if not self.num_tokens:  # heads that choose tokens remember nothing
                hidden = jax.ShapeDtypeStruct((*recent.tokens.mask.shape, hidden.shape[-1]), hidden.dtype)
                features = jax.eval_shape(read, hidden, recent.tokens)
                context = context._replace(renewed=(jnp.zeros(features.shape, features.dtype), due))

            def reencode(vlm: backbones.VLM, context: base.Context) -> base.Context:
                return self._reencode(vlm, read, context, recent, due)

            context = nn.cond(due.any(), reencode, lambda vlm, context: context, vlm, context)
            kept = base.where(active, recent, state.recent)
            context = context._replace(state=context.state.replace(recent=kept))
        if start is None:
            return context
        first = context.tokens.positions[:, 0] - tokens.positions[:, 0]  # of the frame in its context
        # Keys of a frame's media are the same in any context; earlier frames' are not attended to any more.
        cache = context.state.ring.cache.replace(media=media)
        return context._replace(action_position=start + first, cache=cache)

    def _append_to_ring(
        self, vlm: backbones.VLM, tokens: Tokens, ring: RingCache, active: jax.Array
    ) -> tuple[jax.Array, Tokens, RingCache, Media | None]:
        """The frame's hidden states, its tokens in their places, the ring in which it takes the oldest's, its media."""
        slots, old = ring.slots, ring.cache
        leaving = ring.oldest * slots  # first slot of the oldest frame
        is_leaving = jnp.arange(old.mask.shape[1]) // slots == ring.oldest[:, None]
        placed = tokens.replace(positions=tokens.positions + ring.position[:, None])
        hidden, new = vlm.decode(placed, old.replace(mask=old.mask & ~is_leaving))
        # Inactive episodes write back their old slots, i.e. stay unchanged.
        cache = old.put(new.select(active, old.take(leaving, slots)), leaving)
        advanced = {
            "oldest": (ring.oldest + 1) % self.window,
            "count": ring.count + 1,
            "position": ring.position + base.num_positions(tokens),
        }
        small = {name: base.where(active, value, getattr(ring, name)) for name, value in advanced.items()}
        return hidden, placed, ring.replace(cache=cache, **small), new.media

    def _reencode(
        self, vlm: backbones.VLM, read: Read, context: base.Context, recent: base.TokenWindow, due: jax.Array
    ) -> base.Context:
        """`context` as if the window had just been decoded from its first frame on, in episodes that are `due`."""
        ring, old = context.state.ring, context.state.ring.cache
        frames = base.concatenate(recent.tokens, recent.step_mask)
        nothing = vlm.init_cache(len(due), 0)
        hidden, new = vlm.decode(jax.tree.map(lambda x: base.merge(x, 1), frames), nothing)
        hidden = hidden.reshape(*frames.mask.shape, -1)
        own = frames.replace(media=recent.tokens.media, sees=recent.tokens.sees)  # numbered as in a frame alone
        newest = jax.tree.map(lambda x: x[:, -1], own)
        first = jnp.int32(0)
        cache = old.put(new.select(due, old.take(first, new.mask.shape[1])), first)
        ring = ring.replace(
            cache=cache,
            oldest=base.where(due, jnp.zeros_like(ring.oldest), ring.oldest),
            position=base.where(due, base.num_positions(newest), ring.position),
        )
        renewed = None if context.renewed is None else (read(hidden, frames), due)
        return context._replace(
            hidden=base.where(due, hidden[:, -1], context.hidden),
            tokens=base.where(due, newest, context.tokens),
            state=State(ring, None),
            renewed=renewed,
        )

    def _prompt(self, tokens: Tokens) -> Tokens:
        """Without the run that a step's action tokens would fill."""
        return tokens.without("query") if self.num_tokens else tokens

    def reset(self, state: State, slot: jax.Array) -> State:
        # What is masked is never attended to, so keys and values may stay as they are.
        ring = state.ring
        mask = ring.cache.mask.at[slot].set(False)
        zeros = {name: getattr(ring, name).at[slot].set(0) for name in ("oldest", "count", "position")}
        ring = ring.replace(cache=ring.cache.replace(mask=mask), **zeros)
        return State(ring, None if state.recent is None else state.recent.reset(slot))

    def fit(self, state: State, fresh: State) -> State:
        recent = None if state.recent is None else state.recent.fit(fresh.recent)
        return State(state.ring.fit(fresh.ring, self.window), recent)

    def reclaim(self, state: State, cache: Cache) -> State:
        kept = state.ring.cache.replace(key=cache.key, value=cache.value)
        return state.replace(ring=state.ring.replace(cache=kept))
