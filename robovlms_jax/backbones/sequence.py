"""A decoder's sequence from named runs of tokens: where each stands, who may see whom. See `layout`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.types import Media, Tokens


@flax.struct.dataclass
class Run:
    """Neighbouring tokens of one origin, before they are given places.

    embeds: float[B, n, D].
    mask: bool[B, n], True = real token; padding of text takes no place. A masked token of another kind keeps its place,
      so that nothing moves when a picture is missing.
    name: how readouts find its slots again (`Tokens.slot`).
    kind: what it is made of. Text is what images, sensors and queries are put between.
    attend: causal: sees what comes before it. prefix: all prefix runs see each other in both directions. private:
      causal, and only tokens of the same frame's private runs may attend to it (a step's action tokens, which later
      steps must not copy).
    grid: int[n, coordinates], the place of each token counted from the run's first, where position encodings read
      several coordinates (time, height, width of patches). None: token i is at (i, i, ...).
    advance: by how much what follows a run with a grid is moved on.
    order: int[n], beginning with 0: the order in which tokens see each other, counted from the run's first; those of
      equal numbers do in both directions (the patches of one image). Encodings go on to tell them apart. None: one
      after the other. Prefix runs have none.
    deep: float[B, n, layers, D], what the tokens add behind the decoder's first layers; None: nothing.
    beside: it takes neither slots nor places; the tokens of the runs that follow, up to the next one beside, attend to
      it through layers of their own. Its width is its own.
    """

    embeds: jax.Array
    mask: jax.Array
    name: str = flax.struct.field(pytree_node=False)
    kind: Literal["text", "image", "sensor", "query"] = flax.struct.field(pytree_node=False)
    attend: Literal["causal", "prefix", "private"] = flax.struct.field(pytree_node=False, default="causal")
    grid: tuple[tuple[int, ...], ...] | None = flax.struct.field(pytree_node=False, default=None)
    advance: int = flax.struct.field(pytree_node=False, default=0)
    order: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    deep: jax.Array | None = None
    beside: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def length(self) -> int:
        """n, its slots."""
        return 0 if self.beside else self.embeds.shape[1]


def query(embeds: jax.Array, batch: int, *, attend: Literal["causal", "private"] = "causal") -> Run:
    """The run "query": float[Q, D], the same for all, or float[B, Q, D]."""
    embeds = jnp.broadcast_to(embeds, (batch, *embeds.shape[-2:]))
    return Run(embeds, jnp.ones(embeds.shape[:2], bool), "query", "query", attend)


@dataclasses.dataclass(frozen=True)
class Order:
    """How a prompt's own tokens stand to what is put between them.

    tail: real text tokens that come after everything else.
    count_padding, queries_last: as upstream's training batches have it. Positions count the padding of prompts, too;
      the tail is the last slots of the padded prompt, not its last real tokens. A prompt alone has no padding, so
      neither changes anything in control.
    """

    tail: int = 0
    count_padding: bool = False
    queries_last: bool = False


def layout(runs: Sequence[Run], order: Order = Order()) -> Tokens:
    """Put runs behind each other and give every token its place.

    Slots follow the order of `runs`. Positions do, too, but for the text's tail: sensors and queries are read right
    before it. Seen through positions that is upstream's `[bos][images][text][queries][eos]` for a single prompt, and it
    stays so for a padded one.

    Returns:
      Tokens whose `layout` has the runs' names; `private` names those that attend privately. Runs beside the sequence
      become its media, numbered from 1 on, and have no slots.
    """
    beside = [run for run in runs if run.beside]
    nothing = next(run.embeds[:, :0] for run in runs if not run.beside)
    # Of what is beside only the place in the order remains.
    runs = [run.replace(embeds=nothing, mask=run.mask[:, :0]) if run.beside else run for run in runs]
    frame = _Frame.of(runs, order)
    lengths = [run.length for run in runs]
    steps = [np.arange(length) for length in lengths]
    orders = [step if run.order is None else np.array(run.order) for run, step in zip(runs, steps, strict=True)]
    positions = frame.places(lengths, orders)
    offsets = None
    if any(run.order is not None for run in runs):
        offsets = (frame.places(lengths, steps) - positions)[..., None]
    if any(run.grid for run in runs):
        # Every patch has its row and column; what follows goes on after the larger of them.
        sizes = [run.advance if run.grid else run.length for run in runs]
        width = max(len(run.grid[0]) for run in runs if run.grid)
        grids = [np.array(run.grid) if run.grid else np.tile(np.arange(run.length)[:, None], width) for run in runs]
        axes = [frame.places(sizes, [grid[:, axis] for grid in grids]) for axis in range(width)]
        offsets = jnp.stack(axes, axis=-1) - positions[..., None]
    is_prefix = np.concatenate([np.full(run.length, run.attend == "prefix") for run in runs])
    if is_prefix.any():
        # One position for all that see each other; encodings read the offset.
        last = jnp.max(jnp.where(frame.mask & is_prefix, positions, 0), axis=1, keepdims=True)
        shared = jnp.where(is_prefix, last, positions)
        offsets = (positions - shared)[..., None] + (0 if offsets is None else offsets)
        positions = shared
    embeds = jnp.concatenate([run.embeds for run in runs], axis=1)
    deep = None
    if any(run.deep is not None for run in runs):
        shape, dtype = next((run.deep.shape[2:], run.deep.dtype) for run in runs if run.deep is not None)
        parts = [jnp.zeros((*run.mask.shape, *shape), dtype) if run.deep is None else run.deep for run in runs]
        deep = jnp.concatenate(parts, axis=1)
    named = tuple((run.name, run.length) for run in runs)
    private = tuple(run.name for run in runs if run.attend == "private")
    return Tokens(
        embeds,
        frame.mask,
        positions,
        named,
        offsets=offsets,
        deep=deep,
        private=private,
        media=_media(beside),
        sees=frame.sees() if beside else None,
    )


def _media(beside: Sequence[Run]) -> Media | None:
    """The runs beside the sequence, numbered from 1 on; None where there are none."""
    if not beside:
        return None
    numbers = [jnp.full(run.mask.shape, number, jnp.int32) for number, run in enumerate(beside, 1)]
    parts = [run.embeds for run in beside], [run.mask for run in beside], numbers
    return Media(*(jnp.concatenate(x, axis=1) for x in parts))


class _Frame(NamedTuple):
    """What places are counted from.

    mask: bool[B, S]. counted: bool[B, T], text tokens that take a place.
    after: of each run that is no text, bool[B, T]: text tokens that come after it. Of text runs it means nothing.
    """

    runs: Sequence[Run]
    mask: jax.Array
    counted: jax.Array
    after: Sequence[jax.Array]

    @classmethod
    def of(cls, runs: Sequence[Run], order: Order) -> _Frame:
        text = jnp.concatenate([run.mask for run in runs if run.kind == "text"], axis=1)
        number = jnp.cumsum(text, axis=1) - text  # among the real ones, whichever side is padded
        before = np.cumsum([run.length if run.kind == "text" else 0 for run in runs])
        if order.queries_last:
            tail = jnp.broadcast_to(jnp.arange(text.shape[1]) >= text.shape[1] - order.tail, text.shape)
        else:
            tail = number >= text.sum(axis=1, keepdims=True) - order.tail
        # Whatever the prompt, the tail begins after the text that images follow.
        lead = max((int(n) for run, n in zip(runs, before, strict=True) if run.kind == "image"), default=0)
        tail &= number >= lead
        after = [number >= int(n) if run.kind == "image" else tail for run, n in zip(runs, before, strict=True)]
        mask = jnp.concatenate([run.mask for run in runs], axis=1)
        return cls(runs, mask, jnp.ones_like(text) if order.count_padding else text, after)

    def sees(self) -> jax.Array:
        """int32[B, S]: how many of the runs beside the sequence come before a token; some are."""
        text = sum(after.astype(jnp.int32) for run, after in zip(self.runs, self.after, strict=True) if run.beside)
        parts, start = [], 0
        for run, count in zip(self.runs, np.cumsum([run.beside for run in self.runs]), strict=True):
            if run.kind == "text":
                parts.append(text[:, start : start + run.length])
                start += run.length
            else:
                parts.append(jnp.full(run.mask.shape, count, jnp.int32))
        return jnp.concatenate(parts, axis=1)

    def places(self, sizes: Sequence[int], steps: Sequence[np.ndarray]) -> jax.Array:
        """int32[B, S].

        Args:
          sizes: places that each run takes; of text runs it is not looked at.
          steps: places of a run's tokens, counted from its first, int[n]; of text runs they are not looked at.
        """
        text = jnp.cumsum(self.counted, axis=1) - self.counted
        for run, size, after in zip(self.runs, sizes, self.after, strict=True):
            text += 0 if run.kind == "text" else jnp.where(after, size, 0)
        parts, start, earlier = [], 0, 0
        for run, size, step, after in zip(self.runs, sizes, steps, self.after, strict=True):
            if run.kind == "text":
                parts.append(text[:, start : start + run.length])
                start += run.length
            else:
                first = jnp.sum(self.counted & ~after, axis=1, keepdims=True) + earlier
                parts.append(first + step)
                earlier += size
        return jnp.concatenate(parts, axis=1).astype(jnp.int32)
