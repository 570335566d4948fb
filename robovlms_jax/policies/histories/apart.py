"""Every frame is decoded alone, so windows share it: histories `one_step` and `policy_head`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from robovlms_jax.backbones import base as backbones
from robovlms_jax.nn.attention import Cache
from robovlms_jax.policies.histories import base
from robovlms_jax.policies.readout import Read
from robovlms_jax.types import Tokens


@dataclasses.dataclass(frozen=True)
class FramesApart:
    """The policy head remembers (upstream's `post`) or, with a window of one, nobody does (`one_step`). Between control
    steps nothing is kept but the head's own carry.

    num_tokens: action tokens that are decoded after each frame; 0 where actions are no tokens.
    """

    window: int
    num_tokens: int = 0

    def to_sequences(self, tokens: Tokens, step_mask: jax.Array) -> Tokens:
        return tokens

    def to_steps(self, x: Any, batch: int) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(batch, -1, *leaf.shape[1:]), x)

    def windows(self, x: jax.Array) -> jax.Array:
        return self.steps(x)

    def steps(self, x: jax.Array) -> jax.Array:
        return base.merge(base.windows(x, self.window), 0)

    def init_state(self, vlm: backbones.VLM, frame: Tokens) -> tuple:
        return ()

    def append(self, vlm: backbones.VLM, read: Read, tokens: Tokens, state: tuple, active: jax.Array) -> base.Context:
        return base.decode_alone(vlm, tokens, state, self.num_tokens)

    def reset(self, state: tuple, slot: jax.Array) -> tuple:
        return state

    def fit(self, state: tuple, fresh: tuple) -> tuple:
        return state

    def reclaim(self, state: tuple, cache: Cache) -> tuple:
        return state
