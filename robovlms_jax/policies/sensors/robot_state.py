"""What a policy may know of the robot itself: its state, and what it did. Switched on by `policy.proprio` and
`policy.action_history`, not listed in `policy.sensors`."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax import schema
from robovlms_jax.control.interface import ACTION_DIM, Observation
from robovlms_jax.inputs import proprio
from robovlms_jax.inputs.sensors import Reading
from robovlms_jax.nn.linear import Dense, Kernel
from robovlms_jax.policies.sensors.base import Sensor, windows
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.proprio")
class ProprioConfig(Sensor):
    """The robot's own state as one more token per frame, between the prompt and the action queries."""

    name: ClassVar[str] = "proprio"
    kind: ClassVar[str] = "proprio"
    scope: ClassVar[str] = "proprio"

    enabled: bool = False
    """Off: policies are driven by images and text alone, as every released RoboVLMs checkpoint is."""
    center: tuple[float, ...] = (0.0, -0.15, 0.5, 3.1416, 0.0, 1.5708)
    """Subtracted from tcp xyz (m) and Euler xyz (rad, the short way round). The default is the middle of CALVIN's table
    with the gripper pointing down; zeros, together with a scale of ones, give the raw values upstream feeds."""
    scale: tuple[float, ...] = (0.25, 0.25, 0.1, 0.5, 0.5, 0.5)
    """What one unit of each centred number is."""
    dropout: float = 0.0
    """Share of training frames that are not told. Where the hand is on its way to something betrays where that is, so a
    policy that is always told can learn the demonstrations without looking. Above 0, observations may lack it."""

    def __post_init__(self):
        require(0 <= self.dropout < 1, f"policy.proprio.dropout={self.dropout} must lie in [0, 1).")
        require(
            len(self.center) == len(self.scale) == 6 and all(scale > 0 for scale in self.scale),
            f"policy.proprio.center and policy.proprio.scale need 6 numbers each, scales positive; got {self.center} "
            f"and {self.scale}.",
        )

    @property
    def can_miss(self) -> bool:
        return self.dropout > 0

    @property
    def reading(self) -> Reading:
        return Reading(self.name, self.kind, "robot_obs", (proprio.DIM,))

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
        state = proprio.from_robot_state(state) if state.ndim == 1 else state
        if state.shape != (proprio.DIM,) or not np.isfinite(state).all():
            raise ValueError(f"observation.proprio must be one finite robot state; got {state}.")
        return state


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.action_history")
class ActionHistoryConfig(Sensor):
    """The actions executed before a frame, as more tokens between the prompt and the action queries."""

    name: ClassVar[str] = "action_history"
    kind: ClassVar[str] = "action_history"
    scope: ClassVar[str] = "action_history"
    can_miss: ClassVar[bool] = False

    length: int = 0
    """How many; each is a token. 0: off."""
    dropout: float = 0.0
    """Share of training frames that are not told: what was done is a strong hint at what comes next, and a policy that
    trusts it alone repeats itself."""

    def __post_init__(self):
        require(self.length >= 0, f"policy.action_history.length={self.length} must be 0 (off) or positive.")
        require(0 <= self.dropout < 1, f"policy.action_history.dropout={self.dropout} must lie in [0, 1).")

    @property
    def reading(self) -> Reading:
        return Reading(self.name, self.kind, "rel_actions", (ACTION_DIM,), past=self.length - 1)

    def observe(self, observation: Observation) -> np.ndarray | None:
        """float32[n, 7], the actions executed since the last observation; None: the first one that was planned."""
        value = observation.sensors.get(self.name, observation.executed)
        if value is None:
            return None
        executed = _numbers(value, "executed")
        if executed.ndim != 2 or executed.shape[1] != ACTION_DIM or not np.isfinite(executed).all():
            raise ValueError(f"observation.executed must be finite actions float[n, {ACTION_DIM}]; got {executed}.")
        return executed

    def remember(self, values: np.ndarray, mask: np.ndarray, seen: np.ndarray | None, is_first: bool) -> None:
        """Let actions float32[n, 7] in; a row of zeros, gripper included, says that there was none."""
        if is_first:
            values[:] = 0
        done = seen[np.any(seen != 0, axis=-1)]
        values[:] = np.concatenate([values, done])[-len(values) :]


def _numbers(value: object, name: str) -> np.ndarray:
    try:
        return np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"observation.{name}={value!r} is no array of numbers: {error}") from error


class ProprioToken(nn.Module):
    """One token per frame from the robot's state: Linear(arm) beside an embedding of the gripper, fused by a Linear.

    The structure of upstream's `use_state` (base_backbone.py), which cannot be switched on there.
    """

    config: ProprioConfig
    width: int
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(
        self, values: jax.Array, mask: jax.Array | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """float[B, G, 7] (see `inputs.proprio`) -> float32[B, G, 1, D] and bool[B, G, 1], all True.

        The token of a frame that is not told, or has no state (False in `mask` bool[B, G]), is the last layer's bias.
        """
        arm = scale_arm(values[..., :6].astype(jnp.float32), self.config)
        arm = Dense(self.width, (None, "embed"), kernel=self.kernel, name="arm")(arm)
        table = self.param(
            "gripper", nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "embed")), (2, self.width)
        )
        gripper = jnp.where(values[..., 6:] > 0, table[1], table[0])
        # The token starts as large as a word: language models embed words with a standard deviation near D^-0.5.
        init = nn.initializers.normal((2 * self.width) ** -0.5 * self.width**-0.5)
        state = jnp.concatenate([arm, gripper], axis=-1)
        if self.config.dropout and not deterministic:
            told = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.config.dropout, (*state.shape[:2], 1))
            state = jnp.where(told, state, 0)
        if mask is not None:
            state = jnp.where(mask[..., None], state, 0)
        fused = Dense(self.width, ("embed", None), kernel_init=init, kernel=self.kernel, name="fuse")(state)
        return fused[..., None, :], jnp.ones((*state.shape[:2], 1), bool)


class ActionHistory(nn.Module):
    """One token per executed action: what upstream's LinearActionEncoder does to each, plus an embedding of its age.

    Arm and gripper go through a Linear each, are added, and go through two more; there is no nonlinearity. (Upstream
    has the class, and no place where it is used.)
    """

    config: ActionHistoryConfig
    width: int
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(
        self, actions: jax.Array, mask: jax.Array | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Normalised float[B, H + G - 1, 7], gripper 0 before the episode began -> float32[B, G, H, D], and bool[B, G,
        H], all True."""
        half, length = self.width // 2, self.config.length
        enter = functools.partial(Dense, half, (None, "embed"), kernel=self.kernel)
        x = actions.astype(jnp.float32)
        x = enter(name="arm")(x[..., :6]) + enter(name="gripper")(x[..., 6:])
        x = Dense(half, ("embed", None), kernel=self.kernel, name="mix")(x)
        init = nn.initializers.normal((half * self.width) ** -0.5)  # as large as a word, see `ProprioToken`
        x = Dense(self.width, ("embed", None), kernel_init=init, kernel=self.kernel, name="out")(x)
        x, known = windows(x, length), windows(actions[..., 6:] != 0, length)
        if self.config.dropout and not deterministic:
            told = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.config.dropout, (*x.shape[:2], 1, 1))
            known &= told
        age = nn.with_logical_partitioning(nn.initializers.normal(self.width**-0.5), (None, "embed"))
        tokens = jnp.where(known, x, 0) + self.param("age", age, (length, self.width))
        return tokens, jnp.ones(tokens.shape[:3], bool)


def scale_arm(arm: jax.Array, config: ProprioConfig) -> jax.Array:
    """(arm - center) / scale, angles taken the short way round: float[..., 6] -> float[..., 6]."""
    centered = arm - jnp.asarray(config.center, arm.dtype)
    angles = centered[..., 3:]
    # CALVIN's gripper points down at roll = pi, where readings jump between pi and -pi.
    angles = angles - 2 * np.pi * jnp.round(angles / (2 * np.pi))
    return jnp.concatenate([centered[..., :3], angles], axis=-1) / jnp.asarray(config.scale, arm.dtype)
