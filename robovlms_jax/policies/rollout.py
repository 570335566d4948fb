"""A trained VLA as a policy: what is kept between control steps, and the one jitted function that advances it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from robovlms_jax.inputs import proprio as states
from robovlms_jax.interface import ACTION_DIM, ActionChunk, Observation
from robovlms_jax.policies import encoders, objective, stream
from robovlms_jax.policies.vla import VLA
from robovlms_jax.types import Inputs

EncodeText = Callable[[str], tuple[np.ndarray, np.ndarray]]
"""Instruction -> (int32[T], bool[T]); T as short as the prompt allows, see `inputs.prompts`."""


def control_step(
    model: VLA,
    params: Any,
    carry: Any,
    images: Mapping[str, jax.Array],
    text_ids: jax.Array,
    text_mask: jax.Array,
    active: jax.Array,
    extras: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, Any]:
    """One control step of B independent episodes; pure.

    Args:
      carry: `model.init_carry(B, ...)` or the previous step's result.
      images: camera -> uint8[B, height, width, 3].
      text_ids, text_mask: int32[B, T], bool[B, T].
      extras: what a policy takes beside images and text, fields of `Inputs` for one frame (see `encoders.blank`).
      active: bool[B]; where False the carry stays as it is (the actions there mean nothing).
    Returns:
      float32[B, C, A] in dataset units (gripper exactly -1 or 1), and the new carry.
    """
    steps = jnp.ones((text_ids.shape[0], 1), bool)
    images = {camera: x[:, None] for camera, x in images.items()}
    inputs = Inputs(images, text_ids, text_mask, steps, **(extras or {}))
    inputs = objective.prepare(inputs, model.vlm.image, model.config.cameras)
    actions, carry = model.apply({"params": params}, inputs, carry, active, method="step")
    return model.config.normalizer.unnormalize(actions), carry


class BatchedVLAPolicy:
    """`slots` episodes served by one compiled step. Slots are independent; any subset may be asked at a time.

    The compiled step is reused as long as image sizes and the padded prompt length stay the same.
    """

    def __init__(self, model: VLA, params: Any, encode_text: EncodeText, slots: int):
        self.model, self.params, self.slots = model, params, slots
        self._encode = encode_text
        # The carry always lies where the parameters lie: were it placed anew by the first call, the second would
        # compile again.
        place = jax.tree.leaves(params)[0].sharding
        place = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
        self._step = jax.jit(functools.partial(control_step, model), donate_argnums=1, out_shardings=place)
        fresh = model.init_head_carry(1)
        self._reset = jax.jit(
            lambda carry, slot: stream.reset(carry, slot, fresh), donate_argnums=0, out_shardings=place
        )
        self._place, self._carry, self._text_length = place, None, 0
        self._text: list[tuple[np.ndarray, np.ndarray] | None] = [None] * slots
        self._images: dict[str, np.ndarray] = {}
        self._extras = encoders.blank(model.config, slots, 1)
        self._planned = np.zeros((slots, 1, ACTION_DIM), np.float32)

    def reset(self, slots: Sequence[int], instructions: Sequence[str]) -> None:
        """Start new episodes in the given slots."""
        for slot, instruction in zip(slots, instructions, strict=True):
            if not instruction.strip():
                raise ValueError("the instruction is empty; say what the robot should do.")
            self._text[slot] = self._encode(instruction)
            self._make_room(len(self._text[slot][0]))
            self._carry = self._reset(self._carry, slot)
            if "past_actions" in self._extras:
                self._extras["past_actions"][slot] = 0
            self._planned[slot] = 0

    def act(self, observations: Sequence[Observation], slots: Sequence[int]) -> list[ActionChunk]:
        """Advance the given slots by one step each."""
        for slot, observation in zip(slots, observations, strict=True):
            if self._text[slot] is None:
                raise RuntimeError("act() before reset(instruction): the policy does not know what to do.")
            self._take(slot, observation)
        ids, mask = self._padded_text()
        active = np.zeros(self.slots, bool)
        active[list(slots)] = True
        actions, self._carry = self._step(self.params, self._carry, self._images, ids, mask, active, self._extras)
        actions = np.asarray(actions)
        for slot in slots:
            if not np.isfinite(actions[slot]).all():
                raise ValueError(
                    f"the policy's actions are not finite: {actions[slot].tolist()}. Either its parameters are not, or "
                    "it decoded a word that is no action (set policy.head.constrained)."
                )
            self._planned[slot] = actions[slot, :1]
        return [ActionChunk(actions[slot]) for slot in slots]

    def _make_room(self, text_length: int) -> None:
        """Prompts are padded to the longest one so far; what is kept between steps follows when it grows."""
        if text_length <= self._text_length:
            return
        self._text_length = text_length
        carry = self.model.init_carry(self.slots, self.params, text_length)
        if self._carry is not None:
            carry = stream.lengthen(self._carry, carry)
        # Copies: leaves that begin as one array would be donated twice.
        self._carry = jax.tree.map(lambda x: jax.device_put(np.array(x), self._place), carry)

    def _take(self, slot: int, observation: Observation) -> None:
        for camera in self.model.config.cameras:
            if camera not in observation.images:
                raise ValueError(
                    f"observation has no {camera!r} image; this policy sees {list(self.model.config.cameras)}."
                )
            image = np.asarray(observation.images[camera])
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise ValueError(
                    f"image {camera!r} is {image.dtype}{list(image.shape)}; expected uint8[height, width, 3] RGB."
                )
            store = self._images.get(camera)
            if store is None or store.shape[1:] != image.shape:
                store = self._images[camera] = np.zeros((self.slots, *image.shape), np.uint8)
            store[slot] = image
        if "proprio" in self._extras:
            self._extras["proprio"][slot, 0] = self._state_of(observation)
        if "past_actions" in self._extras:
            past = self._extras["past_actions"]
            done = self._planned[slot] if observation.executed is None else np.asarray(observation.executed, np.float32)
            # a row of zeros, gripper included, says that there was no action
            done = done[np.any(done != 0, axis=-1)]
            past[slot] = np.concatenate([past[slot], done])[-past.shape[1] :]

    def _state_of(self, observation: Observation) -> np.ndarray:
        """float32[7]. Raises ValueError where the observation has no usable robot state."""
        if observation.proprio is None:
            raise ValueError(
                "observation.proprio is None; this policy needs the robot's state (policy.proprio.enabled)."
            )
        state = states.from_robot_state(np.asarray(observation.proprio, np.float32))
        if state.shape != (states.DIM,) or not np.isfinite(state).all():
            raise ValueError(f"observation.proprio must be one finite robot state; got {state}.")
        return state

    def _padded_text(self) -> tuple[np.ndarray, np.ndarray]:
        texts = [text for text in self._text if text is not None]
        ids = np.zeros((self.slots, self._text_length), np.int32)
        mask = np.zeros((self.slots, self._text_length), bool)
        for slot, text in enumerate(self._text):
            # A slot without an episode borrows a text: its result is discarded, but rows without any real token make
            # NaN.
            row_ids, row_mask = text or texts[0]
            ids[slot, : len(row_ids)], mask[slot, : len(row_mask)] = row_ids, row_mask
        return ids, mask


class VLAPolicy:
    """`interface.Policy` for one robot: `reset(instruction)`, then `act(observation)` at every control step."""

    def __init__(self, model: VLA, params: Any, encode_text: EncodeText):
        self._batched = BatchedVLAPolicy(model, params, encode_text, slots=1)

    def reset(self, instruction: str) -> None:
        self._batched.reset([0], [instruction])

    def act(self, observation: Observation) -> ActionChunk:
        return self._batched.act([observation], [0])[0]
