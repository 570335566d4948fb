"""One control step of one robot as a pure function of a flat list of arrays: what other run times can be given.

    actions, *carry = program.step(*weights, *carry, *observed)

The carry that comes out goes in again with the next observation; `carry` holds what goes in first, in every episode.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.policies import serving
from robovlms_jax.policies.sensors import base as sensors
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import load

FORMAT = "robovlms_jax.program"
VERSION = 1

EXPLAINED = {
    "image": "RGB; resized to this size whatever its aspect ratio, columns first, then rows, each rounded to uint8 "
    "(Pillow: image.resize((size, image.height), FILTER).resize((size, size), FILTER))",
    "text_ids": "the prompt's tokens, padded on the right; see `instructions`. With a last axis of two: the language "
    "model's tokens, and those that the connector's own tokenizer makes of the instruction",
    "text_mask": "True: a real token",
    "sensor": "the reading of this step, and where the second axis is longer those of the steps before it, newest "
    "last; before an episode's first step its first reading; all in the dataset's units, not normalised",
    "sensor_mask": "True: there is a reading (False: zeros stand for it)",
    "action_history": "the actions executed before this step, newest last, in the dataset's units; NaN where the "
    "episode had not begun",
    "carry": "what the last step gave under this name; in an episode's first step what the tensors' file has",
    "weight": "what the tensors' file has",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A control step of batch 1.

    model, encode: of the checkpoint.
    weights: path -> array, the parameters; carry: name -> the values before an episode's first step; observed: name ->
      array of the shape and type that each step needs, in the order of the arguments.
    """

    model: VLA
    weights: Mapping[str, jax.Array]
    carry: Mapping[str, np.ndarray]
    observed: Mapping[str, np.ndarray]
    encode: serving.EncodeText
    carry_tree: Any

    def step(self, *arguments: jax.Array) -> tuple[jax.Array, ...]:
        """Weights, carry and what is observed, in their orders -> float32[1, C, A] in dataset units, and the carry."""
        named = dict(zip([*self.weights, *self.carry, *self.observed], arguments, strict=True))
        params = unflatten_dict({path: named[path] for path in self.weights}, sep="/")
        carry = jax.tree.unflatten(self.carry_tree, [named[name] for name in self.carry])
        images = {camera: named[f"image_{camera}"] for camera in self.model.config.cameras}
        extras = {
            field: {name: named[_name(field, name)] for name in values}
            for field, values in sensors.blank(self.model.config.all_sensors, 1, 1).items()
        }
        actions, carry = serving.control_step(
            self.model, params, carry, images, named["text_ids"], named["text_mask"], jnp.ones(1, bool), extras
        )
        return actions, *jax.tree.leaves(carry)

    def frozen(self, *arguments: jax.Array) -> tuple[jax.Array, ...]:
        """The same with the weights inside: carry and what is observed."""
        return self.step(*self.weights.values(), *arguments)

    @property
    def results(self) -> list[str]:
        """Names of what comes out."""
        return ["actions", *self.carry]

    def describe(self, instructions: Sequence[str], *, weights: bool) -> dict[str, Any]:
        """What a caller has to know, as JSON values.

        Args:
          instructions: are given with their tokens. Raises ValueError for one that is too long.
          weights: whether they are arguments, too.
        """
        config, image = self.model.config, self.model.vlm.image
        arguments = {"weight": self.weights if weights else {}, "carry": self.carry, "": self.observed}
        inputs = [
            {"name": name, "dtype": str(x.dtype), "shape": list(x.shape), "what": kind or _kind(name)}
            for kind, arrays in arguments.items()
            for name, x in arrays.items()
        ]
        length = len(self.observed["text_ids"][0])
        return {
            "format": FORMAT,
            "version": VERSION,
            "inputs": inputs,
            "outputs": self.results,
            "what": {kind: EXPLAINED[kind] for kind in dict.fromkeys(entry["what"] for entry in inputs)},
            "resize": {"size": image.size, "filter": image.interpolation},
            "actions": {
                "shape": [1, config.chunk, config.action_dim],
                "representation": config.representation,
                "what": "the coming control steps' actions, in the units of robot.action; `representation` other than "
                "'robot': poses or motions that robovlms_jax/actions/representations.py turns into the robot's own",
            },
            "robot": config.predicted.to_json(),
            "prompt": {"template": self.model.vlm.prompt, "special_tokens": self.model.vlm.special_tokens},
            "instructions": {text: _tokens(self.encode, text, length) for text in instructions},
        }


def make(
    checkpoint: str | pathlib.Path,
    weights: load.Weights | None = None,
    instructions: Sequence[str] = (),
    dtype: str | None = None,
) -> Program:
    """The control step of a checkpoint.

    Args:
      weights, dtype: see `load.open_model`.
      instructions: the prompt is as long as the longest of them, and not shorter than training's.
    Raises:
      FileNotFoundError, ValueError: no checkpoint, or an instruction that is empty or far too long.
    """
    model, params, encode = load.open_model(checkpoint, weights=weights, dtype=dtype)
    for text in instructions:
        if not text.strip():
            raise ValueError("an instruction is empty; say what the robot should do.")
    length = max(len(encode(text)[0]) for text in instructions or ("move",))
    leaves, tree = jax.tree.flatten(model.init_carry(1, params, length))
    size = model.vlm.image.size
    observed = {f"image_{camera}": np.zeros((1, size, size, 3), np.uint8) for camera in model.config.cameras}
    text = (1, *model.vlm.text_shape(length))
    observed |= {"text_ids": np.zeros(text, np.int32), "text_mask": np.zeros(text, bool)}
    for field, values in sensors.blank(model.config.all_sensors, 1, 1).items():
        observed |= {_name(field, name): x for name, x in values.items()}
    return Program(
        model,
        dict(sorted(flatten_dict(params, sep="/").items())),
        {f"carry_{index}": np.asarray(x) for index, x in enumerate(leaves)},
        observed,
        encode,
        tree,
    )


def _name(field: str, sensor: str) -> str:
    return f"{'sensor_mask' if field == 'sensor_mask' else 'sensor'}_{sensor}"


def _kind(name: str) -> str:
    """Which line of EXPLAINED speaks about an observed argument."""
    if name == "sensor_action_history":
        return "action_history"
    return next(kind for kind in ("image", "text_ids", "text_mask", "sensor_mask", "sensor") if name.startswith(kind))


def _tokens(encode: serving.EncodeText, instruction: str, length: int) -> dict[str, list]:
    ids, mask = encode(instruction)
    more = [(0, length - len(ids))] + [(0, 0)] * (ids.ndim - 1)
    return {"text_ids": np.pad(ids, more).tolist(), "text_mask": np.pad(mask, more).tolist()}
