"""From the messages of openpi's and vla-eval's clients to observations, every field checked; and answers back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.control.robot import RobotSpec, unit_scale
from robovlms_jax.deploy import codec

log = logging.getLogger(__name__)

IMAGE_KEYS = {
    "static": ("observation/image", "observation/exterior_image_1_left", "rgb_static", "agentview", "primary"),
    "wrist": ("observation/wrist_image", "observation/wrist_image_left", "rgb_gripper"),
}
"""Other names that clients have for cameras, beside `observation/NAME`, `observation/NAME_image` and NAME in a map
`images`."""

STATE_KEYS = ("observation/state", "state", "states")
MAX_UNKNOWN = 20
"""Names of sensors that are remembered as unknown; a client could send others for ever."""
MAX_STATE = 256
LARGEST = 1e6
"""No robot's state or action is larger, in any unit; what is overflows in a network and would spoil a batch."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One observation as it arrived. restart: a new episode, whatever the instruction."""

    observation: Observation
    instruction: str
    restart: bool


@dataclasses.dataclass(frozen=True)
class Reader:
    """What a policy needs to see.

    cameras: all are required. max_pixels: of one picture. state: whether the state is required. sensors: name -> shape
    of a reading, None where a length may be any; all may be silent. committed: whether the policy goes on from what is
    left of its last chunk.
    """

    cameras: tuple[str, ...]
    max_pixels: int = 4_000_000
    state: bool = False
    sensors: Mapping[str, tuple[int | None, ...]] = dataclasses.field(default_factory=dict)
    committed: bool = False
    _unknown: set[str] = dataclasses.field(default_factory=set, init=False, repr=False, compare=False)
    """Names of sensors that clients sent and nobody reads; each is said once."""

    def keys(self) -> list[str]:
        """Names of what a client sends, for metadata and messages."""
        images = [_first_key(camera) for camera in self.cameras]
        sensors = [f"observation/sensors/{name}" for name in self.sensors]
        ahead = ["committed", "delay"] if self.committed else []
        return [*images, *([STATE_KEYS[0]] if self.state else []), *sensors, *ahead, "prompt"]

    def read(self, message: Any, *, prompt: str = "prompt", restart: str = "reset") -> Step:
        """An observation's map. Raises ValueError that names the field, what was expected and what was found.
        Compressed pictures of other cameras are not decoded."""
        instruction, again = self.begins(message, prompt=prompt, restart=restart)
        images = {camera: self._image(message, camera) for camera in self.cameras}
        executed = message.get("executed")
        if executed is not None:
            executed = _numbers(executed, "executed", 2)
        seen = Observation(images, self._state(message), executed, self._sensors(message), *self._committed(message))
        return Step(seen, instruction, again)

    def begins(self, message: Any, *, prompt: str = "prompt", restart: str = "reset") -> tuple[str, bool]:
        """The instruction, and whether an episode is asked to begin; raises as `read`, which looks at the rest, too."""
        if not isinstance(message, dict):
            raise ValueError(f"the message is a {type(message).__name__}; expected a map with {self.keys()}.")
        instruction = message.get(prompt)
        if isinstance(instruction, np.ndarray) and instruction.dtype.kind in "SU" and instruction.size == 1:
            instruction = str(instruction.reshape(())[()])
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(f"{prompt!r} is {codec.brief(instruction, 60)!r}; say what the robot should do.")
        again = message.get(restart, False)
        if not isinstance(again, bool | np.bool_):
            raise ValueError(f"{restart!r} is {codec.brief(again, 60)!r}; expected true or false.")
        return instruction, bool(again)

    def _committed(self, message: Mapping[str, Any]) -> tuple[np.ndarray | None, int]:
        """What is left of the last chunk, and how many of its actions are executed before the answer."""
        left, delay = message.get("committed"), message.get("delay", 0)
        if left is None:
            return None, 0
        if not self.committed:
            raise ValueError("'committed': this policy does not go on from what is left of its last chunk; send none.")
        left = _numbers(left, "committed", 2)
        if type(delay) is not int or not 0 <= delay <= len(left):
            raise ValueError(f"'delay' is {codec.brief(delay, 60)!r}; expected a whole number 0 ... {len(left)}.")
        return left, delay

    def _image(self, message: Mapping[str, Any], camera: str) -> np.ndarray:
        names = (f"observation/{camera}", f"observation/{camera}_image", *IMAGE_KEYS.get(camera, ()))
        inner = message.get("images")
        inner = inner if isinstance(inner, dict) else {}
        places = [(message, name) for name in names] + [(inner, name) for name in (camera, *names)]
        for place, name in places:
            if name in place:
                return self._pixels(place[name], str(name))
        found = sorted(codec.brief(key, 40) for key in (*message, *inner))[:20]
        raise ValueError(
            f"there is no {camera!r} picture: expected {_first_key(camera)!r} or images[{camera!r}]; found {found}."
        )

    def _pixels(self, value: Any, name: str) -> np.ndarray:
        if isinstance(value, codec.Compressed):
            try:
                value = value.pixels()
            except ValueError as error:
                raise ValueError(f"picture {name!r}: {error}") from error
        if not isinstance(value, np.ndarray) or value.ndim != 3 or value.dtype.kind not in "uf":
            found = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"picture {name!r} is {found}; expected uint8[height, width, 3].")
        if value.shape[0] == 3 and value.shape[2] != 3:  # channels first, as ALOHA's cameras send
            value = value.transpose(1, 2, 0)
        if value.shape[2] != 3 or 0 in value.shape or value.shape[0] * value.shape[1] > self.max_pixels:
            raise ValueError(
                f"picture {name!r} is {list(value.shape)}; expected [height, width, 3] and at most {self.max_pixels} "
                "pixels."
            )
        if value.dtype.kind == "f":
            if not (np.isfinite(value).all() and value.min() >= 0 and value.max() <= 1):
                raise ValueError(f"picture {name!r} is {value.dtype} outside 0 ... 1, or not finite; send uint8.")
            value = np.rint(value * 255).astype(np.uint8)
        if value.dtype != np.uint8:
            raise ValueError(f"picture {name!r} is {value.dtype}; expected uint8[height, width, 3].")
        return np.ascontiguousarray(value)

    def _state(self, message: Mapping[str, Any]) -> np.ndarray | None:
        name = next((name for name in STATE_KEYS if message.get(name) is not None), None)
        if name is None:
            if self.state:
                raise ValueError(f"there is no {STATE_KEYS[0]!r}; this policy needs the robot's state.")
            return None
        return _numbers(message[name], name, 1)

    def _sensors(self, message: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Readings float32; NaN and infinity have a meaning of their own there."""
        found, prefix = {}, "observation/sensors/"
        sent = {key.removeprefix(prefix) for key in message if isinstance(key, str) and key.startswith(prefix)}
        for name in sorted(sent - set(self.sensors) - self._unknown)[: MAX_UNKNOWN - len(self._unknown)]:
            self._unknown.add(name)
            log.warning(
                "a client sends %r, which this policy does not read; it reads %s",
                *(f"{prefix}{name[:60]}", [prefix + name for name in self.sensors]),
            )
        for name, shape in self.sensors.items():
            value = message.get(f"{prefix}{name}")
            if value is None:
                continue
            array = isinstance(value, np.ndarray) and value.dtype.kind in "iuf"
            sizes = zip(value.shape, shape, strict=False) if array else ()
            if not array or value.ndim != len(shape) or any(size not in (n, None) for n, size in sizes):
                what = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
                expected = ", ".join("any" if size is None else str(size) for size in shape)
                raise ValueError(f"'observation/sensors/{name}' is {what}; expected numbers [{expected}].")
            with np.errstate(over="ignore"):
                found[name] = value.astype(np.float32)
            if np.any(np.isfinite(value) & (np.abs(value) > LARGEST)):
                raise ValueError(f"'observation/sensors/{name}' has finite numbers above {LARGEST:g}.")
        return found


def _first_key(camera: str) -> str:
    return (IMAGE_KEYS.get(camera) or (f"observation/{camera}",))[0]


def _numbers(value: Any, name: str, rank: int) -> np.ndarray:
    if isinstance(value, list) and all(isinstance(x, int | float) for x in value):
        value = np.array(value, np.float64)
    if not isinstance(value, np.ndarray) or value.ndim != rank or value.dtype.kind not in "iuf":
        found = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name!r} is {found}; expected an array of numbers with {rank} axes.")
    if value.size > MAX_STATE * 16 or value.shape[-1] > MAX_STATE:
        raise ValueError(f"{name!r} has {list(value.shape)} numbers; at most {MAX_STATE} in a row are read.")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)
    if not (np.abs(value) <= LARGEST).all():  # NaN is refused, too
        raise ValueError(
            f"{name!r} has numbers that are not finite, or above {LARGEST:g}: {value.ravel()[:20].tolist()}."
        )
    return value


def within_bounds(actions: Any, spec: RobotSpec, horizon: int) -> tuple[np.ndarray, list[str]]:
    """A policy's answer, float32[horizon, A], within the robot's bounds; names of the dimensions that were not.

    Raises ValueError for a wrong shape or numbers that are not finite: those never leave.
    """
    actions = np.asarray(actions, np.float32)
    if actions.shape != (horizon, len(spec.action)) or not np.isfinite(actions).all():
        raise ValueError(
            f"the policy's actions are {list(actions.shape)}, finite: {bool(np.isfinite(actions).all())}; expected "
            f"[{horizon}, {len(spec.action)}], all finite. They are not sent."
        )
    low = np.array([dimension.low for dimension in spec.action], np.float32)
    high = np.array([dimension.high for dimension in spec.action], np.float32)
    clipped = np.clip(actions, low, high)
    outside = np.flatnonzero((np.abs(clipped - actions) > 1e-6).any(axis=0))
    return clipped, [spec.action[column].name for column in outside]


def confidence(chunk: ActionChunk, spec: RobotSpec, horizon: int) -> dict[str, Any]:
    """What an answer says beside its actions of how far to trust them; what the policy does not say is left out.

    Infinite half widths (a calibration with too few episodes) are sent as such. Raises ValueError for a wrong shape or
    numbers that are none.
    """
    shapes = {"uncertainty": (horizon,), "interval": (horizon, len(spec.action))}
    found: dict[str, Any] = {}
    for name, shape in shapes.items():
        if (value := getattr(chunk, name)) is not None:
            found[name] = np.asarray(value, np.float32)
            if found[name].shape != shape or np.isnan(found[name]).any():
                raise ValueError(f"the policy's {name} is {list(found[name].shape)}; expected numbers {list(shape)}.")
    if chunk.coverage is not None and "interval" in found:
        found["coverage"] = float(chunk.coverage)
    return found


def in_si_units(actions: np.ndarray, spec: RobotSpec) -> np.ndarray:
    """Actions float[..., A] in m and rad, as vla-eval's CALVIN takes them; dimensions of unknown unit stay."""
    scale = []
    for dimension in spec.action:
        try:
            scale.append(1.0 if dimension.quantity == "gripper" else unit_scale(dimension))
        except ValueError:
            scale.append(1.0)
    return (actions * np.array(scale)).astype(np.float32)


def calvin_state(states: Sequence[float]) -> np.ndarray:
    """vla-eval's CALVIN state (tcp xyz, tcp Euler xyz, gripper width, gripper command) without the width."""
    return np.concatenate([np.asarray(states)[:6], np.asarray(states)[7:8]])
