"""What a policy keeps between control steps, and how a new frame enters it.

One frame is encoded per control step, whatever the history. What else happens:

- `one_step`, `policy_head`: nothing is kept but the head's own carry.
- `video`: the image tokens of the last W frames are kept, and the prompt that holds them all is decoded again.
- `interleaved`: keys and values of the last W frames are kept (a ring of W frames per episode), so a new frame is
  decoded alone. Until W frames have been seen this equals decoding the window again. From then on the oldest frame
  leaves, and `PolicyConfig.reencode_every` says what happens:
    1  the window is decoded again at every step from its kept embeddings: exact, at the decoder's cost for W frames
       (the vision tower still sees the new frame only).
    0  never: a step keeps costing one frame. Approximate in two ways: the kept keys and values were computed when
       frames that have left could still be attended to, and positions go on counting instead of starting from 0.
    n  every n-th step, which bounds how far both can drift.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attention import Cache
from robovlms_jax.policies import encoders
from robovlms_jax.policies import history as histories
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.types import Inputs, Tokens

if TYPE_CHECKING:
    from robovlms_jax.policies.vla import VLA


@flax.struct.dataclass
class Recent:
    """The last W frames' tokens, newest last. tokens: leaves [B, W, S, ...]; count: int32[B], how many are real."""

    tokens: Tokens
    count: jax.Array

    def push(self, tokens: Tokens) -> Recent:
        """With one more frame's tokens, leaves [B, S, ...]."""
        shifted = jax.tree.map(lambda old, new: jnp.concatenate([old[:, 1:], new[:, None]], 1), self.tokens, tokens)
        return Recent(shifted, jnp.minimum(self.count + 1, self.window))

    @property
    def window(self) -> int:
        """W."""
        return self.tokens.mask.shape[1]

    @property
    def step_mask(self) -> jax.Array:
        """bool[B, W], True = real."""
        return jnp.arange(self.window) >= self.window - self.count[:, None]


@flax.struct.dataclass
class Ring:
    """Keys and values of the last W frames of each episode.

    cache: slots [0, W * S) are W frames in a ring, those behind are scratch for action tokens.
    oldest: int32[B], place in the ring that the next frame takes.
    count: int32[B], frames seen in this episode. position: int32[B], of the next frame's first token.
    window, slots: W and S.
    """

    cache: Cache
    oldest: jax.Array
    count: jax.Array
    position: jax.Array
    window: int = flax.struct.field(pytree_node=False)
    slots: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Kept:
    """What a history keeps; None is what it has no use for."""

    recent: Recent | None = None
    ring: Ring | None = None

    def reclaim(self, cache: Cache) -> Kept:
        """With the buffers of a cache that grew behind the ring: same content, and nothing has to be copied."""
        if self.ring is None:
            return self
        kept = self.ring.cache.replace(key=cache.key, value=cache.value)
        return self.replace(ring=self.ring.replace(cache=kept))


@flax.struct.dataclass
class Carry:
    """Everything between two control steps of B episodes. head: the head's own; history: see `Kept`."""

    head: Any
    history: Kept


class Seen(NamedTuple):
    """The newest frame in its context.

    hidden: float[B, S, D] and tokens of the sequence it is read from, without action tokens.
    head: the head's carry, with older features as this context has them.
    kept: what goes into the next step's carry.
    action_position: int32[B], where the step's first action token goes, and cache: keys and values of everything it
      may attend to, with room behind; None where no action tokens will be decoded.
    """

    hidden: jax.Array
    tokens: Tokens
    head: Any
    kept: Kept
    action_position: jax.Array | None = None
    cache: Cache | None = None


def create(model: VLA, batch: int, params: Any, text_length: int) -> Kept:
    """Nothing seen yet."""
    config = model.config
    if config.history not in ("interleaved", "video"):
        return Kept()
    if params is None or text_length < 1:
        raise ValueError(f"a {config.history} policy keeps tokens: pass init_carry its params and text_length.")
    shapes = jax.eval_shape(lambda params: _blank(model, params, batch, text_length), params)
    tokens = shapes if config.history == "video" else jax.eval_shape(lambda x: _without_actions(model, x), shapes)
    zeros = jax.tree.map(lambda x: jnp.zeros((batch, config.window, *x.shape[1:]), x.dtype), tokens)

    def counter() -> jax.Array:  # a buffer of its own each time: carries are donated
        return jnp.zeros((batch,), jnp.int32)

    recent = Recent(zeros, counter())
    if config.history == "video":
        return Kept(recent)
    slots = tokens.mask.shape[1]
    scratch = model.num_tokens if config.is_autoregressive else 0
    cache = model.bind({"params": params}).backbone.init_cache(batch, config.window * slots + scratch)
    # Never moves: frames are put into the ring, only action tokens are appended to it.
    cache = cache.replace(length=jnp.int32(config.window * slots))
    return Kept(
        recent if config.reencode_every else None, Ring(cache, counter(), counter(), counter(), config.window, slots)
    )


def reset(carry: Carry, slot: jax.Array, head: Any) -> Carry:
    """Forget everything about episode int32[] `slot`; `head`: a head's carry before its first step, for one episode."""
    new_head = jax.tree.map(lambda x, fresh: x.at[slot].set(fresh[0]), carry.head, head)
    recent, ring = carry.history.recent, carry.history.ring
    if recent is not None:
        recent = recent.replace(count=recent.count.at[slot].set(0))
    if ring is not None:
        # What is masked is never attended to, so keys and values may stay as they are.
        mask = ring.cache.mask.at[slot].set(False)
        zeros = {name: getattr(ring, name).at[slot].set(0) for name in ("oldest", "count", "position")}
        ring = ring.replace(cache=ring.cache.replace(mask=mask), **zeros)
    return Carry(new_head, Kept(recent, ring))


def fit(carry: Carry, fresh: Carry) -> Carry:
    """The same carry for longer or shorter prompts; `fresh`: one made for them, which says how many slots a frame has.

    Frames that were seen get masked slots where their text ends, or lose masked ones. What does not fit is lost: only
    episodes whose own prompts fit may go on.
    """
    recent, ring = carry.history.recent, carry.history.ring
    if recent is not None:
        old, new = recent.tokens, fresh.history.recent.tokens
        text, extra = old.slot("text"), new.mask.shape[2] - old.mask.shape[2]

        def resize(x: jax.Array) -> jax.Array:  # [B, W, S, ...]
            gap = jnp.zeros((*x.shape[:2], max(extra, 0), *x.shape[3:]), x.dtype)
            return jnp.concatenate([x[:, :, : text.stop + min(extra, 0)], gap, x[:, :, text.stop :]], axis=2)

        recent = recent.replace(tokens=jax.tree.map(resize, old).replace(layout=new.layout))
    if ring is not None:
        ring = _fit_ring(ring, fresh.history.ring)
    return Carry(carry.head, Kept(recent, ring))


def _fit_ring(ring: Ring, fresh: Ring) -> Ring:
    """The frames of `ring` in as many slots each as `fresh` has; real tokens come first, in the order they had."""
    frames = (len(ring.count), ring.window, ring.slots)
    real = ring.cache.mask[:, : ring.window * ring.slots].reshape(frames)
    order = jnp.argsort(~real, axis=-1, stable=True)[..., : fresh.slots]  # [B, W, S']

    def move(x: jax.Array, target: jax.Array, batch: int, slots: int) -> jax.Array:
        # Attention does not care which slot a token is in.
        x = jnp.moveaxis(x, (batch, slots), (0, 1))
        x = x[:, : ring.window * ring.slots].reshape(*frames, *x.shape[2:])
        x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 3)), axis=2)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, fresh.slots - x.shape[2])] + [(0, 0)] * (x.ndim - 3))
        x = histories.merge(x, 1)
        x = jnp.pad(x, [(0, 0), (0, target.shape[slots] - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x, (0, 1), (batch, slots))

    cache = ring.cache.map(move, fresh.cache).replace(length=fresh.cache.length)
    return ring.replace(cache=cache, slots=fresh.slots)


def where(active: jax.Array, new: Any, old: Any) -> Any:
    """Leaves [B, ...]: `new` where bool[B], else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(active.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def advance(model: VLA, tokens: Tokens, carry: Carry, active: jax.Array) -> Seen:
    """Let a new frame in.

    Args:
      model: bound.
      tokens: of the frame, leaves [B, S, ...], as `VLA.embed` makes them.
      active: bool[B]; where False nothing of the carry changes.
    """
    kept = carry.history
    if kept.ring is not None:
        return _interleaved(model, tokens, carry, active)
    sequences = tokens
    if kept.recent is not None:
        recent = kept.recent.push(tokens)
        sequences = model.history.join(jax.tree.map(lambda x: histories.merge(x, 0), recent.tokens), recent.step_mask)
        kept = Kept(where(active, recent, kept.recent))
    if not model.config.is_autoregressive:
        hidden, _ = model.backbone.decode(sequences)
        return Seen(hidden, sequences, carry.head, kept)
    start = sequences.positions[:, sequences.slot("query").start]
    sequences = sequences.without("query")
    batch, slots = sequences.mask.shape
    hidden, new = model.backbone.decode(sequences, model.backbone.init_cache(batch, 0))
    cache = model.backbone.init_cache(batch, slots + model.num_tokens).append(new)
    return Seen(hidden, sequences, carry.head, kept, start, cache)


def _interleaved(model: VLA, tokens: Tokens, carry: Carry, active: jax.Array) -> Seen:
    ring, recent = carry.history.ring, carry.history.recent
    start = tokens.positions[:, tokens.slot("query").start] if model.config.is_autoregressive else None
    tokens = _without_actions(model, tokens)
    slots = tokens.mask.shape[1]
    leaving = ring.oldest * slots  # first slot of the oldest frame
    is_leaving = jnp.arange(ring.cache.mask.shape[1]) // slots == ring.oldest[:, None]

    placed = tokens.replace(positions=tokens.positions + ring.position[:, None])
    old = ring.cache
    hidden, new = model.backbone.decode(placed, old.replace(mask=old.mask & ~is_leaving))
    # An episode that stands still writes what it reads: nothing.
    cache = old.put(new.select(active, old.take(leaving, slots)), leaving)
    advanced = ring.replace(
        cache=cache,
        oldest=(ring.oldest + 1) % ring.window,
        count=ring.count + 1,
        position=ring.position + histories.num_positions(tokens),
    )
    small = ("oldest", "count", "position")
    ring = advanced.replace(**{name: where(active, getattr(advanced, name), getattr(ring, name)) for name in small})
    seen = Seen(hidden, placed, carry.head, Kept(None, ring), start)
    if recent is not None:
        recent = recent.push(tokens)
        every, past = model.config.reencode_every, ring.count - model.config.window
        due = active & (past > 0) & (past % every == 0)
        seen = nn.cond(due.any(), _reencode, lambda model, seen, recent, due: seen, model, seen, recent, due)
        recent = where(active, recent, carry.history.recent)
        seen = seen._replace(kept=seen.kept.replace(recent=recent))
    if start is None:
        return seen
    first = seen.tokens.positions[:, 0] - tokens.positions[:, 0]  # of the frame in its context
    return seen._replace(action_position=start + first, cache=seen.kept.ring.cache)


def _reencode(model: VLA, seen: Seen, recent: Recent, due: jax.Array) -> Seen:
    """`seen` as if the window had just been decoded from its first frame on, in episodes that are `due`."""
    ring = seen.kept.ring
    frames = histories.place(recent.tokens, recent.step_mask)
    old = ring.cache
    nothing = model.backbone.init_cache(len(due), 0)
    hidden, new = model.backbone.decode(jax.tree.map(lambda x: histories.merge(x, 1), frames), nothing)
    hidden = hidden.reshape(*frames.mask.shape, -1)
    newest = jax.tree.map(lambda x: x[:, -1], frames)
    first = jnp.int32(0)
    cache = old.put(new.select(due, old.take(first, new.mask.shape[1])), first)
    ring = ring.replace(
        cache=cache,
        oldest=where(due, jnp.zeros_like(ring.oldest), ring.oldest),
        position=where(due, histories.num_positions(newest), ring.position),
    )
    head = seen.head
    if isinstance(head, heads.WindowCarry):
        # The step that follows pushes the newest features; these are the ones before it.
        features = model.readout(hidden, frames).astype(head.buffer.dtype)
        before = jnp.concatenate([features[:, :1], features[:, :-1]], axis=1)
        head = head.replace(buffer=where(due, before, head.buffer))
    return Seen(
        where(due, hidden[:, -1], seen.hidden),
        where(due, newest, seen.tokens),
        head,
        Kept(None, ring),
        seen.action_position,
    )


def _without_actions(model: VLA, tokens: Tokens) -> Tokens:
    """Without the run that action tokens of an autoregressive policy would fill."""
    return tokens.without("query") if model.config.is_autoregressive else tokens


def _blank(model: VLA, params: Any, batch: int, text_length: int) -> Tokens:
    """Tokens of one frame of nothing."""
    size = model.vlm.image.size
    inputs = Inputs(
        images={camera: jnp.zeros((batch, 1, size, size, 3)) for camera in model.config.cameras},
        text_ids=jnp.zeros((batch, text_length), jnp.int32),
        text_mask=jnp.ones((batch, text_length), bool),
        step_mask=jnp.ones((batch, 1), bool),
        **encoders.blank(model.config, batch, 1),
    )
    return model.apply({"params": params}, inputs, method="embed")
