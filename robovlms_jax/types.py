"""Structs that jitted code sees, and the one legend of axis letters.

    B batch     W window (observed steps)   C chunk (predicted steps)   A action dims    G frames of a segment, W + K
    - 1
    S tokens (queries)   T tokens (keys)    D model width   F mlp width   V vocabulary   L layers   R LoRA rank
    N query heads        H head dim         P image tokens  Q action-query tokens
    K key/value heads in `nn`; windows of a segment in `data` and `policies`
    H also past actions, E also extra tokens and sentence embeddings, in `data` and `policies`

Masks are boolean and say what True means. Attention masks are True = may attend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Inputs:
    """What a policy may see of a segment.

    images: camera -> uint8[B, G, height, width, 3] as stored, or float[B, G, size, size, 3] once preprocessed.
    text_ids: int32[B, T], the prompt with its special tokens, right-padded; int32[B, T, 2] where the connector reads
      the instruction, too (InstructBLIP): [..., 1] are the tokens of its own tokenizer.
    text_mask: bool of the same shape, True = real token.
    step_mask: bool[B, G], True = real step (False = padding before an episode begins).
    image_mask: camera -> bool[B, G], True = there is an image (False: it is black); None where every frame has all.
    sensors: name -> float32[B, P + G, ...], readings of the sensors that the policy has, raw; P are as many readings
      before frame 0 as a frame's tokens are made of beside its own (`inputs.sensors.Reading.past`). "proprio": the
      robot's state as `inputs.proprio` defines it, P = 0. "action_history": dataset units, one row late, so that the H
      = P + 1 actions before frame g are rows g ... g + H - 1; all NaN before the episode began.
    sensor_mask: name -> bool[B, P + G], True = there is a reading (False: it is zero); sensors that are not in it have
      all.
    """

    images: Mapping[str, Array]
    text_ids: Array
    text_mask: Array
    step_mask: Array
    image_mask: Mapping[str, Array] | None = None
    sensors: Mapping[str, Array] = flax.struct.field(default_factory=dict)
    sensor_mask: Mapping[str, Array] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Batch:
    """Segments to learn from. A segment is G = W + K - 1 consecutive frames carrying K windows of W frames.

    actions: float32[B, G + C - 1, A], raw dataset units; the chunk of frame g is actions[:, g : g + C].
    action_mask: bool[B, G + C - 1], True = a recorded action to learn from.
    window_mask: bool[B, K], True = the window counts (a segment at the end of an episode may carry fewer than K).
    episode: int32[B], index of the episode in the dataset, for error messages.
    corrupt: int32[B], index of an episode that could not be read and was replaced by `episode`; -1 = none.
    future: camera -> uint8[B, F, height, width, 3], the F frames after frame G - 1, for policies that learn to predict
      them; beyond the episode's end its last frame repeats.
    future_mask: bool[B, F], True = a frame of its own.
    sentence: float32[B, E], the instruction's CLIP embedding, for policies that learn to stay near it.
    ahead: float32[B, K, O, D], how far the robot moves from each window's newest step to O later ones, m and rad, for
      policies that learn to predict it.
    scene: float32[B, K, M], numbers about each window's newest frame, for policies that learn to see them.
    """

    inputs: Inputs
    actions: Array
    action_mask: Array
    window_mask: Array
    episode: Array
    corrupt: Array
    future: Mapping[str, Array] | None = None
    future_mask: Array | None = None
    sentence: Array | None = None
    ahead: Array | None = None
    scene: Array | None = None


@flax.struct.dataclass
class Pairs:
    """Pictures with text about them, to learn answers from.

    images: uint8[B, N, size, size, 3]; a sample with fewer than N pictures has black ones that no slot refers to.
    text_ids: int32[B, S], right-padded; 0 where a picture's token stands.
    image_slots: int32[B, S], which of the pictures' tokens stands there, counted over all of the sample's pictures; -1:
      text.
    text_mask: bool[B, S], True = real token.
    answer_slots: int32[B, A], slots of the tokens that are to be said, each from all that comes before it.
    answer_mask: bool[B, A], True = there is one.
    question_ids: int32[B, U], the first question in tokens of the connector's own tokenizer, right-padded; None where
      the connector reads none. question_mask: bool[B, U], True = real token.
    episode: int32[B], number of the sample, called as `Batch` calls it, for error messages.
    corrupt: int32[B], number of a sample that could not be read and was replaced by `episode`; -1 = none.
    """

    images: Array
    text_ids: Array
    image_slots: Array
    text_mask: Array
    answer_slots: Array
    answer_mask: Array
    episode: Array
    corrupt: Array
    question_ids: Array | None = None
    question_mask: Array | None = None


@flax.struct.dataclass
class Media:
    """What stands beside a sequence, for its layers to attend to: pictures (Flamingo), an encoder's states.

    embeds: float[B, M, E], E of their own width; None where `keys` says it all.
    mask: bool[B, M], True = real.
    number: int32[B, M], from 1 on: a token attends to the media of the number it has in `Tokens.sees`.
    keys: keys and values float[layers, B, K, M, H] each, as an earlier call made them of `embeds`; None before.
    """

    embeds: Array | None
    mask: Array
    number: Array
    keys: tuple[Array, Array] | None = None

    def may_attend(self, sees: Array) -> Array:
        """int32[B, S] -> bool[B, S, M], True = may attend."""
        return (sees[:, :, None] == self.number[:, None, :]) & self.mask[:, None, :]


@flax.struct.dataclass
class Tokens:
    """A sequence on its way into a decoder.

    embeds: float[B, S, D].
    mask: bool[B, S], True = real token.
    positions: int32[B, S], 0-based place of each token among the real ones. Attention is causal in `positions`, not in
      slot order, so a token may sit in any slot (padding then changes nothing) and still come before another.
    layout: named runs of slots in order, (("image", 64), ("text", 32), ("query", 1)); static.
    group: int32[B, S], or None. Keys of a group > 0 may be attended only from inside it: the action tokens of one step,
      which later steps must not copy from.
    private: names of runs whose tokens only their own frame's private runs may attend to; static.
    offsets: int32[B, S, 1 or 3]; position encodings read `positions + offsets`. Tokens that all see each other share a
      position, and patches may have places in time, height and width. None: zero.
    deep: float[B, S, n, D], added behind each of the decoder's first n layers (DeepStack); zero where a token has
      nothing to add. None: no token has.
    media: what stands beside the sequence, or None.
    sees: int32[B, S], the number of the media that a token attends to, 0: none. None: there are no media.
    """

    embeds: Array
    mask: Array
    positions: Array
    layout: tuple[tuple[str, int], ...] = flax.struct.field(pytree_node=False, default=())
    group: Array | None = None
    offsets: Array | None = None
    deep: Array | None = None
    private: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    media: Media | None = None
    sees: Array | None = None

    def slot(self, name: str) -> slice:
        """The slots of one named run; static, so a readout is a slice."""
        start = 0
        for run, length in self.layout:
            if run == name:
                return slice(start, start + length)
            start += length
        raise KeyError(f"no run {name!r} in token layout {self.layout}")

    def without(self, name: str) -> Tokens:
        """The same tokens in fewer slots: the named run, which must be the last one, is left out."""
        run, length = self.layout[-1]
        assert run == name, f"{name!r} is not the last run of {self.layout}"
        rest = self.map_slots(lambda x: x[:, :-length])
        return dataclasses.replace(rest, layout=self.layout[:-1], private=tuple(x for x in self.private if x != name))

    def map_slots(self, function: Callable[..., Array], *others: Tokens) -> Tokens:
        """function(array, the others' arrays...) on everything that has slots: all but the media."""
        tokens = [dataclasses.replace(x, media=None) for x in (self, *others)]
        return jax.tree.map(function, *tokens).replace(media=self.media)
