"""What a policy takes from an observation, checked: whatever cannot be used is refused with the slot it came for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from robovlms_jax.control.interface import Observation
from robovlms_jax.inputs import images as pictures
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.sensors import robot_state


@dataclasses.dataclass(frozen=True)
class Checked:
    """One slot's observation.

    images: camera -> uint8[height, width, 3].
    sensors: name -> what `Sensor.observe` returns, of every sensor that the policy has; None: no reading.
    state: float32[P], the robot's state, for policies whose actions depend on where the arm is (representation).
    committed: float32[n, A], what is left of the last chunk, and how many of its rows are executed meanwhile.
    """

    images: Mapping[str, np.ndarray]
    sensors: Mapping[str, np.ndarray | None]
    state: np.ndarray | None = None
    committed: np.ndarray | None = None
    delay: int = 0


def takes_plan(config: PolicyConfig) -> bool:
    """Whether a policy goes on from what is left of its last chunk: with a flow head, and actions that mean the same
    whenever they are predicted."""
    return hasattr(config.head, "guidance") and config.representation == "robot"


def check(observation: Observation, config: PolicyConfig, slot: int) -> Checked:
    """The parts that a policy takes. Raises ValueError that names the slot, the part, what was expected and found."""
    try:
        if not isinstance(observation, Observation):
            raise ValueError(f"the observation is a {type(observation).__name__}; expected interface.Observation.")
        if not isinstance(observation.images, Mapping):
            raise ValueError(f"observation.images is a {type(observation.images).__name__}; expected camera -> image.")
        if not isinstance(observation.sensors, Mapping):
            kind = type(observation.sensors).__name__
            raise ValueError(f"observation.sensors is a {kind}; expected name -> reading, {{}} where there is none.")
        return Checked(
            {camera: _image(observation, camera, config.cameras) for camera in config.cameras},
            {sensor.name: sensor.observe(observation) for sensor in config.all_sensors},
            None if config.representation == "robot" else _state(observation, config),
            *_committed(observation, config),
        )
    except ValueError as error:
        raise ValueError(f"slot {slot}: {error}") from error


def _committed(observation: Observation, config: PolicyConfig) -> tuple[np.ndarray | None, int]:
    if observation.committed is None:
        return None, 0
    if not takes_plan(config):
        raise ValueError(
            f"observation.committed asks a policy to go on from its last chunk; this one (head "
            f"{type(config.head).__name__}, representation {config.representation!r}) cannot. Leave asynchronous.tell "
            "off."
        )
    left, width = np.asarray(observation.committed), len(config.robot.action)
    if left.ndim != 2 or left.shape[1] != width or not np.isfinite(left).all():
        raise ValueError(f"observation.committed is {left.dtype}{list(left.shape)}; expected finite float[n, {width}].")
    known, delay = min(len(left), config.chunk), observation.delay
    most = config.head.max_delay if config.head.guidance == "prefix" else known
    if not isinstance(delay, int | np.integer) or not 0 <= delay <= min(known, most):
        raise ValueError(
            f"observation.delay is {delay!r}; expected a whole number 0 ... {min(known, most)}: at most the "
            f"{known} actions that are left" + (f" and policy.head.max_delay={most}." if most < known else ".")
        )
    return left.astype(np.float32), int(delay)


def _state(observation: Observation, config: PolicyConfig) -> np.ndarray:
    if observation.proprio is None and "proprio" not in observation.sensors:
        raise ValueError(
            f"observation.proprio is None; policy.representation={config.representation!r} turns actions into the "
            "robot's own by the arm's pose."
        )
    return robot_state.RobotState(robot_state.ProprioConfig(), config.robot.state).observe(observation)


def _image(observation: Observation, camera: str, cameras: Sequence[str]) -> np.ndarray:
    if camera not in observation.images:
        found = sorted(observation.images)
        raise ValueError(f"observation has no {camera!r} image, only {found}; this policy sees {list(cameras)}.")
    image = np.asarray(observation.images[camera])
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"image {camera!r} is {image.dtype}{list(image.shape)}; expected uint8[height, width, 3] RGB.")
    return image


class Pictures:
    """The pictures of all slots, as one array per camera.

    While all slots send one size per camera, pictures are batched as they are and resized on the device. As soon as a
    camera's second size comes, all cameras' are resized to the model's before they are batched, and so it stays: a
    slot's pictures never depend on what the others send, and a policy's pictures have two sets of shapes in its life at
    most.
    """

    def __init__(self, cameras: Sequence[str], slots: int, spec: pictures.ImageSpec):
        self._cameras, self._slots, self._spec = tuple(cameras), slots, spec
        self._arrays: dict[str, np.ndarray] = {}
        self.changes: list[str] = []
        """Why shapes are not what they were before the last `put`."""

    @property
    def model_sizes(self) -> dict[str, tuple[int, int]]:
        """Camera -> height and width of what the model sees."""
        return dict.fromkeys(self._cameras, (self._spec.size, self._spec.size))

    def settle(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Pictures are batched in these sizes, camera -> height and width, until another comes."""
        self._arrays = {camera: np.zeros((self._slots, *sizes[camera], 3), np.uint8) for camera in self._cameras}

    def put(self, seen: Mapping[int, Checked]) -> dict[str, np.ndarray]:
        """Slot -> observation; camera -> uint8[slots, height, width, 3]. Rows of other slots mean nothing."""
        self.changes = []
        if not self._arrays:
            first = next(iter(seen.values()))
            self.settle({camera: first.images[camera].shape[:2] for camera in self._cameras})
        sizes = {camera: array.shape[1:3] for camera, array in self._arrays.items()}
        if sizes != self.model_sizes and (other := self._other(seen, sizes)):
            self.changes.append(other)
            self.settle(self.model_sizes)
        for camera, array in self._arrays.items():
            for slot, x in seen.items():
                image = x.images[camera]
                if image.shape != array.shape[1:]:
                    image = pictures.resize_on_host(image, self._spec.size, self._spec.interpolation)
                array[slot] = image
        return dict(self._arrays)

    def _other(self, seen: Mapping[int, Checked], sizes: Mapping[str, tuple[int, int]]) -> str:
        """What is of another size than `sizes` say, in words; "" if nothing is."""
        for slot, x in seen.items():
            for camera, size in sizes.items():
                if x.images[camera].shape[:2] != size:
                    return (
                        f"slot {slot}'s {camera} picture is {_text(x.images[camera].shape)} and others were "
                        f"{_text(size)}, so from now on each is resized to {self._spec.size}x{self._spec.size} before "
                        "they are batched"
                    )
        return ""


def _text(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"
