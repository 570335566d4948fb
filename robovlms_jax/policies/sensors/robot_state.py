"""What a policy may know of the robot itself: its state, and what it did. Switched on by `policy.proprio` and
`policy.action_history`, not listed in `policy.sensors`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax import schema
from robovlms_jax.control.interface import Observation
from robovlms_jax.control.robot import Dimension
from robovlms_jax.inputs import proprio
from robovlms_jax.inputs.sensors import Reading
from robovlms_jax.nn.linear import Dense, Kernel
from robovlms_jax.policies.sensors.base import Sensor, windows
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.proprio")
class ProprioConfig:
    """The robot's own state as one more token per frame, between the prompt and the action queries."""

    enabled: bool = False
    """Off: policies are driven by images and text alone, as every released RoboVLMs checkpoint is."""
    center: tuple[float, ...] = (0.0, -0.15, 0.5, 3.1416, 0.0, 1.5708)
    """Subtracted from each number of the robot's state but binary grippers (CALVIN: tcp xyz in m, Euler xyz in rad;
    angles the short way round). The default is the middle of CALVIN's table with the gripper pointing down; with
    another robot it stands for the mean and the standard deviation of the training data, filled in when a run starts.
    Zeros, together with a scale of ones, give the raw values upstream feeds."""
    scale: tuple[float, ...] = (0.25, 0.25, 0.1, 0.5, 0.5, 0.5)
    """What one unit of each centred number is."""
    dropout: float = 0.0
    """Probability of dropping the state token of a training frame. The hand's pose often gives the goal away; without
    dropout a policy can learn the demonstrations without looking at the images."""

    @property
    def is_default(self) -> bool:
        """Whether centre and scale are those of CALVIN, which stand for the data's with other robots."""
        return (self.center, self.scale) == (ProprioConfig.center, ProprioConfig.scale)

    def __post_init__(self):
        require(0 <= self.dropout < 1, f"policy.proprio.dropout={self.dropout} must lie in [0, 1).")
        require(
            len(self.center) == len(self.scale) and all(scale > 0 for scale in self.scale),
            f"policy.proprio.center and policy.proprio.scale need a number each for every number of the state, scales "
            f"positive; got {self.center} and {self.scale}.",
        )


@dataclasses.dataclass(frozen=True)
class RobotState(Sensor):
    """The sensor that `ProprioConfig` switches on. state: the robot's (`RobotSpec.state`)."""

    name: ClassVar[str] = "proprio"
    kind: ClassVar[str] = "proprio"
    scope: ClassVar[str] = "proprio"

    config: ProprioConfig
    state: tuple[Dimension, ...]

    @property
    def dropout(self) -> float:
        return self.config.dropout

    @property
    def can_miss(self) -> bool:
        return self.dropout > 0

    @property
    def reading(self) -> Reading:
        return Reading(self.name, self.kind, "robot_obs", (len(self.state),))

    def observe(self, observation: Observation) -> np.ndarray | None:
        value = observation.sensors.get(self.name, observation.proprio)
        if value is None:
            if self.can_miss:
                return None
            raise ValueError(
                "observation.proprio is None; this policy needs the robot's state (policy.proprio.enabled), for it was "
                "never without in training (policy.proprio.dropout=0)."
            )
        state = _numbers(value, "proprio")
        state = proprio.from_robot_state(state, len(self.state)) if state.ndim == 1 else state
        if state.shape != (len(self.state),) or not np.isfinite(state).all():
            raise ValueError(f"observation.proprio must be one finite robot state; got {state}.")
        return state


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.action_history")
class ActionHistoryConfig:
    """The actions executed before a frame, as more tokens between the prompt and the action queries."""

    length: int = 0
    """How many; each is a token. 0: off."""
    dropout: float = 0.0
    """Probability of dropping the past actions of a training frame: they are a strong hint at the next action, and a
    policy that trusts them alone repeats itself."""

    def __post_init__(self):
        require(self.length >= 0, f"policy.action_history.length={self.length} must be 0 (off) or positive.")
        require(0 <= self.dropout < 1, f"policy.action_history.dropout={self.dropout} must lie in [0, 1).")


@dataclasses.dataclass(frozen=True)
class PastActions(Sensor):
    """The sensor that `ActionHistoryConfig` switches on. action: the robot's (`RobotSpec.action`)."""

    name: ClassVar[str] = "action_history"
    kind: ClassVar[str] = "action_history"
    scope: ClassVar[str] = "action_history"
    can_miss: ClassVar[bool] = False

    config: ActionHistoryConfig
    action: tuple[Dimension, ...]

    @property
    def dropout(self) -> float:
        return self.config.dropout

    @property
    def reading(self) -> Reading:
        return Reading(self.name, self.kind, "rel_actions", (len(self.action),), past=self.config.length - 1)

    def observe(self, observation: Observation) -> np.ndarray | None:
        """float32[n, A], the actions executed since the last observation; None: the first one that was planned."""
        value, size = observation.sensors.get(self.name, observation.executed), len(self.action)
        if value is None:
            return None
        executed = _numbers(value, "executed")
        if executed.ndim != 2 or executed.shape[1] != size or not np.isfinite(executed).all():
            raise ValueError(f"observation.executed must be finite actions float[n, {size}]; got {executed}.")
        return executed

    def remember(self, values: np.ndarray, mask: np.ndarray, seen: np.ndarray | None, is_first: bool) -> None:
        """Let actions float32[n, A] in; a row of NaN says that there was none."""
        if is_first:
            values[:] = np.nan
        done = seen[~np.isnan(seen).any(axis=-1)]
        values[:] = np.concatenate([values, done])[-len(values) :]


def _numbers(value: object, name: str) -> np.ndarray:
    try:
        return np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"observation.{name}={value!r} is no array of numbers: {error}") from error


def _columns(dimensions: Sequence[Dimension]) -> tuple[np.ndarray, np.ndarray]:
    """Columns of numbers, and of binary grippers."""
    binary = np.array([dimension.kind == "binary" for dimension in dimensions], bool)
    return np.flatnonzero(~binary), np.flatnonzero(binary)


class ProprioToken(nn.Module):
    """One token per frame from the robot's state: Linear(numbers) beside an embedding of each binary gripper, fused by
    a Linear.

    The structure of upstream's `use_state` (base_backbone.py), which cannot be switched on there.
    """

    sensor: RobotState
    width: int
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(
        self, values: jax.Array, mask: jax.Array | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """float[B, G, P] (see `inputs.proprio`) -> float32[B, G, 1, D] and bool[B, G, 1], all True.

        The token of a dropped frame, or of one without state (False in `mask` bool[B, G]), is the last layer's bias.
        """
        numbers, decisions = _columns(self.sensor.state)
        parts = []
        if len(numbers):
            dimensions = [self.sensor.state[column] for column in numbers]
            x = scale_state(values[..., numbers].astype(jnp.float32), self.sensor.config, dimensions)
            parts.append(Dense(self.width, (None, "embed"), kernel=self.kernel, name="arm")(x))
        if len(decisions):
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "embed"))
            table = self.param("gripper", init, (2 * len(decisions), self.width))
            parts += [
                jnp.where(values[..., column, None] > 0, table[2 * i + 1], table[2 * i])
                for i, column in enumerate(decisions)
            ]
        # The token starts as large as a word: language models embed words with a standard deviation near D^-0.5.
        init = nn.initializers.normal((2 * self.width) ** -0.5 * self.width**-0.5)
        state = jnp.concatenate(parts, axis=-1)
        if self.sensor.dropout and not deterministic:
            present = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.sensor.dropout, (*state.shape[:2], 1))
            state = jnp.where(present, state, 0)
        if mask is not None:
            state = jnp.where(mask[..., None], state, 0)
        fused = Dense(self.width, ("embed", None), kernel_init=init, kernel=self.kernel, name="fuse")(state)
        return fused[..., None, :], jnp.ones((*state.shape[:2], 1), bool)


class ActionHistory(nn.Module):
    """One token per executed action: what upstream's LinearActionEncoder does to each, plus an embedding of its age.

    Numbers and binary grippers go through a Linear each, are added, and go through two more; there is no nonlinearity.
    (Upstream has the class, and no place where it is used.)
    """

    sensor: PastActions
    width: int
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(
        self, actions: jax.Array, mask: jax.Array | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Normalised float[B, H + G - 1, A], NaN before the episode began -> float32[B, G, H, D] and bool[B, G, H], all
        True."""
        half, length = self.width // 2, self.sensor.config.length
        enter = functools.partial(Dense, half, (None, "embed"), kernel=self.kernel)
        known = ~jnp.isnan(actions).any(axis=-1, keepdims=True)
        x = jnp.where(known, actions, 0).astype(jnp.float32)
        parts = zip(("arm", "gripper"), _columns(self.sensor.action), strict=True)
        parts = [enter(name=name)(x[..., chosen]) for name, chosen in parts if len(chosen)]
        x = sum(parts[1:], parts[0])
        x = Dense(half, ("embed", None), kernel=self.kernel, name="mix")(x)
        init = nn.initializers.normal((half * self.width) ** -0.5)  # as large as a word, see `ProprioToken`
        x = Dense(self.width, ("embed", None), kernel_init=init, kernel=self.kernel, name="out")(x)
        x, known = windows(x, length), windows(known, length)
        if self.sensor.dropout and not deterministic:
            present = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.sensor.dropout, (*x.shape[:2], 1, 1))
            known &= present
        age = nn.with_logical_partitioning(nn.initializers.normal(self.width**-0.5), (None, "embed"))
        tokens = jnp.where(known, x, 0) + self.param("age", age, (length, self.width))
        return tokens, jnp.ones(tokens.shape[:3], bool)


def scale_state(numbers: jax.Array, config: ProprioConfig, dimensions: Sequence[Dimension]) -> jax.Array:
    """(numbers - center) / scale, Euler angles taken the short way round: float[..., n] -> float[..., n]."""
    x = numbers - jnp.asarray(config.center, numbers.dtype)
    # CALVIN's gripper points down at roll = pi, where readings jump between pi and -pi.
    turns = {"rad": 2 * np.pi, "deg": 360.0}
    turn = np.array([turns.get(d.unit, 0.0) if d.quantity == "euler_xyz" else 0.0 for d in dimensions], x.dtype)
    wrapped = x - turn * jnp.round(x / np.where(turn > 0, turn, 1))
    return jnp.where(turn > 0, wrapped, x) / jnp.asarray(config.scale, x.dtype)
