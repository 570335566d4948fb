"""A trained VLA as a policy: what is kept between control steps, and the one jitted function that advances it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from robovlms_jax.actions import representations
from robovlms_jax.control.interface import ActionChunk, EpisodesFailed, Observation
from robovlms_jax.nn import attended, stack
from robovlms_jax.parallel import gpu
from robovlms_jax.policies import chunking, confidence, episodes, objective, observed
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.policies.sensors import control
from robovlms_jax.policies.vla import VLA
from robovlms_jax.types import Inputs

log = logging.getLogger(__name__)

EncodeText = Callable[[str], tuple[np.ndarray, np.ndarray]]
"""Instruction -> (int32[T], bool[T]), padded on the right; or [T, 2] each, as `types.Inputs` has them. Raises
ValueError for one that is far too long, see `inputs.prompts.served_length`."""


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
      params: nested; with layers apart (`nn.stack.parted`) for `served_step`.
      carry: `model.init_carry(B, ...)` or the previous step's result.
      images: camera -> uint8[B, height, width, 3].
      text_ids, text_mask: int32[B, T], bool[B, T], or as `types.Inputs` has them.
      extras: what a policy takes beside images and text, fields of `Inputs` for one frame (see
        `sensors.base.blank`).
      active: bool[B]; where False the carry stays as it is (the actions there mean nothing).
    Returns:
      float32[B, C, A] in dataset units (binary grippers exactly -1 or 1), and the new carry.
    """
    actions, _, carry = confident_step(model, params, carry, images, (text_ids, text_mask), active, extras)
    return actions, carry


def confident_step(
    model: VLA,
    params: Any,
    carry: Any,
    images: Mapping[str, jax.Array],
    text: tuple[jax.Array, jax.Array],
    active: jax.Array,
    extras: Mapping[str, jax.Array] | None = None,
    plan: heads.Plan | None = None,
) -> tuple[jax.Array, heads.Spread | None, Any]:
    """`control_step`, and between its results how uncertain the actions are; text: ids and mask, plan: as
    `VLA.control` takes it."""
    steps = jnp.ones((len(text[0]), 1), bool)
    images = {camera: x[:, None] for camera, x in images.items()}
    inputs = Inputs(images, *text, steps, **(extras or {}))
    inputs = objective.prepare(inputs, model.vlm.image, model.config.cameras)
    params = {"params": stack.joined(params)}
    actions, spread, carry = model.apply(params, inputs, carry, active, plan, method="control")
    return model.config.normalizer.unnormalize(actions), spread, carry


def served_step(
    model: VLA, params: Any, *arguments: Any, cudnn: bool = False
) -> tuple[jax.Array, heads.Spread | None, Any]:
    """`confident_step` as it is compiled to be run again and again: layer by layer, so that parameters with layers
    apart are read where they lie, and none is copied out of a stack in every step. cudnn: whether it is there."""
    with stack.unrolled(), attended.on_cudnn(cudnn):
        return confident_step(model, params, *arguments)


class BatchedVLAPolicy:
    """`slots` episodes served by one compiled step. Slots are independent; any subset may be asked at a time.
    Parameters are as the model has them, or with layers apart (`nn.stack.parted`), as `runs.load` opens them.

    The step is compiled for the pictures' shapes and the length that prompts are padded to, the longest of the episodes
    under way; a new compilation is logged with its reason. With `prompt_lengths` (tokens), prompts are padded to the
    shortest of these that fits and longer ones are refused, so that after `warm_up` nothing is compiled.

    Calls from several threads wait for each other, and one thread acts in an episode (see `episodes.Episodes`). A call
    that is refused changes nothing, except that slots to be reset are left without an episode, as all slots are after a
    step that failed as a whole. Actions that are not finite end the episode they are of, and no other.
    """

    def __init__(
        self,
        model: VLA,
        params: Any,
        encode_text: EncodeText,
        slots: int,
        calibration: confidence.Calibration | None = None,
        prompt_lengths: Sequence[int] = (),
    ):
        if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
            raise ValueError(f"slots={slots!r}: expected how many episodes to serve, at least 1.")
        self.model, self.params, self.slots, self.robot = model, params, slots, model.config.robot
        self.encode_text, self._calibration = encode_text, calibration
        self.prompt_lengths = tuple(sorted(prompt_lengths))
        # The carry always lies where the parameters lie: were it placed anew by the first call, the second would
        # compile again.
        place = jax.tree.leaves(params)[0].sharding
        place = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
        cudnn = isinstance(place, NamedSharding) and gpu.has_cudnn(place.mesh)
        self._step = jax.jit(
            functools.partial(served_step, model, cudnn=cudnn),
            donate_argnums=1,
            out_shardings=place,
            compiler_options=gpu.served(next(iter(place.device_set)).platform),
        )
        fresh = model.init_head_carry(1)
        self._reset = jax.jit(
            lambda carry, slot: model.reset_slot(carry, slot, fresh), donate_argnums=0, out_shardings=place
        )
        self._place, self._carry, self._text_length = place, None, 0
        self._text: tuple[Any, Any] | None = None
        self._episodes = episodes.Episodes(slots)
        self._pictures = observed.Pictures(model.config.cameras, slots, model.vlm.image)
        self._readings = control.Readings(model.config.all_sensors, slots)
        self._planned = np.zeros((slots, 1, model.config.action_dim), np.float32)
        self._compiled: set[Any] = set()
        self._lock = threading.RLock()

    def reset(self, slots: Sequence[int], instructions: Sequence[str]) -> None:
        """Start new episodes in the given slots; when it fails, none of them has an episode.

        Raises ValueError that names the slot: no such slot, an empty instruction, one that is far too long.
        """
        with self._lock:
            slots = list(slots)
            self._episodes.end(slots)
            slots = self._episodes.check(slots, instructions, "instructions")
            texts = [self._text_of(slot, instruction) for slot, instruction in zip(slots, instructions)]
            self._begin(slots, instructions, texts)

    def _begin(self, slots: Sequence[int], instructions: Sequence[str], texts: Sequence[Any]) -> None:
        """New episodes; texts: ids and mask of each."""
        for slot, instruction, text in zip(slots, instructions, texts):
            self._episodes.begin(slot, instruction, *text)
        try:
            self._fit_text()
            for slot in slots:
                self._carry = self._reset(self._carry, slot)
                self._readings.reset(slot)
                self._planned[slot] = np.nan
        except BaseException:
            self._forget()
            raise

    def warm_up(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Compile all that control can meet: prompts of every `prompt_lengths`, in any order, and pictures of
        these sizes (camera -> height, width) and of the one that others are resized to.

        All episodes end. Raises ValueError without `prompt_lengths`: there is no end to the lengths of prompts.
        """
        if not self.prompt_lengths:
            raise ValueError("warm_up needs prompt_lengths, the lengths that prompts are padded to.")
        shapes = [self.model.vlm.text_shape(length) for length in self.prompt_lengths]
        texts = [(np.zeros(shape, np.int32), np.ones(shape, bool)) for shape in shapes]
        slots, words = list(range(self.slots)), ["warm-up"] * self.slots
        with self._lock:
            # Those of these sizes last: they are what the first robot is expected to send.
            for chosen in [self._pictures.model_sizes, dict(sizes)]:
                self._pictures.settle(chosen)
                for text in texts:
                    self._begin(slots, words, [text] * self.slots)
                    self._act_blindly(chosen, len(text[0]))
            for first, then in itertools.permutations(texts, 2):
                self._begin(slots, words, [first] * self.slots)
                self._begin(slots, words, [then] * self.slots)
            self._episodes.end(slots)

    def compile(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Have the step ready that the episodes under way take with pictures of these sizes (camera -> height, width).
        It is not run: parameters may be shapes with shardings until one acts."""
        with self._lock:
            shapes = {camera: (self.slots, *sizes[camera], 3) for camera in self.model.config.cameras}
            images = {camera: np.zeros(shape, np.uint8) for camera, shape in shapes.items()}
            given = (self._carry, images, self._placed_text(), np.ones(self.slots, bool), self._readings.fields, None)
            self._announce(images, (), False)
            self._step.lower(self.params, *given).compile()

    def _act_blindly(self, sizes: Mapping[str, tuple[int, int]], text_length: int) -> None:
        """A step of each kind, in all slots, with black pictures."""
        images = {camera: np.zeros((*sizes[camera], 3), np.uint8) for camera in self.model.config.cameras}
        seen = Observation(images, np.zeros(len(self.robot.state), np.float32) if self.robot.state else None)
        shapes = [(self.slots, *image.shape) for image in images.values()]
        self._compiled |= {(text_length, planned, *shapes) for planned in (False, True)[: 1 + self.takes_plan]}
        slots = list(range(self.slots))
        chunks = self.act([seen] * self.slots, slots)
        if self.takes_plan:  # a step of its own
            self.act([dataclasses.replace(seen, committed=chunk.actions) for chunk in chunks], slots)

    def release(self, slots: Sequence[int]) -> None:
        """Episodes that are over: acting there is an error until the next reset, and their instructions count no more
        for the length that all prompts are padded to."""
        with self._lock:
            self._episodes.end(self._episodes.check(slots, slots, "slots"))

    def act(self, observations: Sequence[Observation], slots: Sequence[int]) -> list[ActionChunk]:
        """Advance the given slots by one step each.

        Raises:
          ValueError: an observation that cannot be used, a number that is no slot.
          EpisodesFailed: actions that are not finite. Their episodes have ended; it holds the other slots' actions.
          RuntimeError: a slot without an episode, or with another thread's.
        """
        with self._lock:
            slots = self._episodes.check(slots, observations, "observations")
            seen = {slot: observed.check(x, self.model.config, slot) for slot, x in zip(slots, observations)}
            for slot, observation in zip(slots, observations):
                self._episodes.enter(slot)
                self._readings.notice(slot, observation.sensors)
            if not slots:
                return []
            actions, spreads = self._advance(seen)
            own = {slot: self._own(x, actions[slot]) for slot, x in seen.items()}
            bad = {slot: episodes.not_finite(own[slot]) for slot in seen if not np.isfinite(own[slot]).all()}
            chunks = {
                slot: ActionChunk(own[slot], *self._confidence(actions[slot], spreads[slot]))
                for slot in seen
                if slot not in bad
            }
            for slot in chunks:
                self._planned[slot] = actions[slot][:1]
            if bad:
                self._episodes.end(bad)
                raise EpisodesFailed(bad, chunks)
            return [chunks[slot] for slot in slots]

    @property
    def takes_plan(self) -> bool:
        """Whether it goes on from what is left of its last chunk (`Observation.committed`)."""
        return observed.takes_plan(self.model.config)

    def _confidence(self, actions: np.ndarray, spread: heads.Spread | None) -> tuple[Any, Any, Any]:
        """Uncertainty, interval and coverage of a chunk; None where there is none."""
        uncertainty = None if spread is None else spread.uncertainty
        config, calibration = self.model.config, self._calibration
        # Of another representation the bounds are no bounds of the robot's own actions.
        if calibration is None or config.representation != "robot":
            return uncertainty, None, None
        interval = calibration.interval(actions, None if spread is None else spread.scale, config.normalizer)
        return uncertainty, interval, calibration.coverage

    def _own(self, seen: observed.Checked, actions: np.ndarray) -> np.ndarray:
        """Predicted actions as the robot's own."""
        representation = self.model.config.representation
        if representation == "robot":
            return actions
        return representations.make(representation, self.robot).decode(actions, seen.state)

    def _advance(
        self, seen: Mapping[int, observed.Checked]
    ) -> tuple[dict[int, np.ndarray], dict[int, heads.Spread | None]]:
        """Slot -> float32[C, A], and how uncertain it is, of each that saw something."""
        images = self._pictures.put(seen)
        for slot, x in seen.items():
            self._remember(slot, x.sensors)
        text = self._placed_text()
        active = np.zeros(self.slots, bool)
        active[list(seen)] = True
        plan = self._plan(seen)
        self._announce(images, self._pictures.changes, plan is not None)
        try:
            actions, spread, self._carry = self._step(
                self.params, self._carry, images, text, active, self._readings.fields, plan
            )
            actions, spread = jax.device_get((actions, spread))
        except BaseException:  # what was kept has been given away to the step
            self._forget()
            raise
        spreads = {slot: jax.tree.map(lambda x, slot=slot: x[slot], spread) for slot in seen}
        return {slot: actions[slot] for slot in seen}, spreads

    def _plan(self, seen: Mapping[int, observed.Checked]) -> heads.Plan | None:
        """What is left of the slots' last chunks; None where there is nothing, which is another compiled step."""
        if all(x.committed is None for x in seen.values()):
            return None
        config = self.model.config
        plan = heads.Plan(
            np.zeros((self.slots, config.chunk, config.action_dim), np.float32),
            np.zeros((self.slots, config.chunk), np.float32),
            np.zeros(self.slots, np.int32),
        )
        for slot, x in seen.items():
            if x.committed is not None:
                left = config.normalizer.normalize(x.committed[: config.chunk])
                plan.actions[slot, : len(left)], plan.delay[slot] = left, x.delay
                plan.weights[slot] = chunking.weights(config.chunk, x.delay, len(left), config.head.guidance_schedule)
        return plan

    def _text_of(self, slot: int, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        """The instruction as `encode_text` has it."""
        if not isinstance(instruction, str) or not instruction.strip():
            found = "empty" if isinstance(instruction, str) else f"{instruction!r}, a {type(instruction).__name__}"
            raise ValueError(f"slot {slot}: the instruction is {found}; say what the robot should do.")
        try:
            ids, mask = self.encode_text(instruction)
        except ValueError as error:
            ready = f" This policy is ready for prompts of {list(self.prompt_lengths)}." if self.prompt_lengths else ""
            raise ValueError(f"slot {slot}: {error}{ready}") from error
        ids, mask = np.asarray(ids, np.int32), np.asarray(mask, bool)
        if not self.prompt_lengths:
            return ids, mask
        tokens = int(mask.reshape(len(mask), -1).any(axis=1).sum())  # padding is on the right
        length = next((length for length in self.prompt_lengths if length >= tokens), 0)
        if not length:
            raise ValueError(
                f"slot {slot}: the prompt of {instruction[:60]!r} has {tokens} tokens, and this policy is ready for "
                f"prompts of {list(self.prompt_lengths)}. Shorten the instruction, or serve with longer prompt_lengths."
            )
        more = [(0, length - tokens), *[(0, 0)] * (ids.ndim - 1)]
        return np.pad(ids[:tokens], more), np.pad(mask[:tokens], more)

    def _fit_text(self) -> None:
        """Prompts are padded to the longest one of the episodes under way; what is kept between steps follows."""
        text_length = max(len(episode.ids) for episode in self._episodes if episode is not None)
        if self._carry is not None and text_length == self._text_length:
            return
        carry = self.model.init_carry(self.slots, jax.eval_shape(stack.joined, self.params), text_length)
        if self._carry is not None:
            carry = self.model.fit_carry(self._carry, carry)
        # Copies: leaves that begin as one array would be donated twice.
        self._carry = jax.tree.map(lambda x: jax.device_put(np.array(x), self._place), carry)
        self._text_length = text_length

    def _remember(self, slot: int, seen: Mapping[str, np.ndarray | None]) -> None:
        """What a slot reads beside pictures. Who does not say what was executed did what was planned."""
        if "action_history" in seen and seen["action_history"] is None:
            seen = {**seen, "action_history": self._planned[slot]}
        self._readings.put(slot, seen)

    def _placed_text(self) -> tuple[jax.Array, jax.Array]:
        """Ids and mask of all prompts where the parameters lie; they stay there until others are asked for."""
        text = self._episodes.prompts(self.model.vlm.text_shape(self._text_length))
        if self._text is None or not all(map(np.array_equal, text, self._text[0])):
            self._text = text, jax.device_put(text, self._place)
        return self._text[1]

    def _announce(self, images: Mapping[str, np.ndarray], changes: Sequence[str], planned: bool) -> None:
        """Log that the coming step is compiled, and why, when it is."""
        shapes = (self._text_length, planned, *(x.shape for x in images.values()))
        if shapes in self._compiled:
            return
        sizes = ", ".join(f"{camera} {x.shape[1]}x{x.shape[2]}" for camera, x in images.items())
        what = f"compiling the control step ({self.slots} at a time): pictures {sizes}, prompts of {shapes[0]} tokens"
        if not self._compiled:
            log.info("%s", what)
        else:
            reasons = list(changes)
            if all(shapes[0] != known[0] for known in self._compiled):
                longest = max((x for x in self._episodes if x is not None), key=lambda x: len(x.ids))
                reasons.append(f"the longest instruction is now {longest.instruction[:60]!r}")
            if planned and not any(known[1] for known in self._compiled):
                reasons.append("for the first time an observation says what is left of the last chunk")
            why = "; ".join(reasons) or "pictures and prompts of these sizes have not met before"
            log.warning("%s: %s. This call takes longer; later ones do not", what, why)
        self._compiled.add(shapes)

    def _forget(self) -> None:
        """After a failure that may have lost what is kept: no slot has an episode."""
        self._episodes.end(range(self.slots))
        self._carry = None


class VLAPolicy:
    """`interface.Policy` for one robot: `reset(instruction)`, then `act(observation)` at every control step. Messages
    call the robot slot 0."""

    def __init__(
        self, model: VLA, params: Any, encode_text: EncodeText, calibration: confidence.Calibration | None = None
    ):
        self._batched = BatchedVLAPolicy(model, params, encode_text, slots=1, calibration=calibration)
        self.robot = model.config.robot

    def reset(self, instruction: str) -> None:
        self._batched.reset([0], [instruction])

    def act(self, observation: Observation) -> ActionChunk:
        return self._batched.act([observation], [0])[0]
