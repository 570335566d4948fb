"""What a policy may see besides images and text: small encoders that turn numbers into tokens of the prompt."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.control import interface
from robovlms_jax.inputs import proprio
from robovlms_jax.nn.linear import Dense, Kernel
from robovlms_jax.policies.config import ActionHistoryConfig, PolicyConfig, ProprioConfig


class ProprioToken(nn.Module):
    """One token per frame from the robot's state: Linear(arm) beside an embedding of the gripper, fused by a Linear.

    The structure of upstream's `use_state` (base_backbone.py), which cannot be switched on there.
    """

    config: ProprioConfig
    width: int
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, proprio: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """float[B, G, 7] (see `inputs.proprio`) -> float32[B, G, 1, D]; of a frame that is not told, the last bias."""
        arm = scale_arm(proprio[..., :6].astype(jnp.float32), self.config)
        arm = Dense(self.width, (None, "embed"), kernel=self.kernel, name="arm")(arm)
        table = self.param(
            "gripper", nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "embed")), (2, self.width)
        )
        gripper = jnp.where(proprio[..., 6:] > 0, table[1], table[0])
        # The token starts as large as a word: language models embed words with a standard deviation near D^-0.5.
        init = nn.initializers.normal((2 * self.width) ** -0.5 * self.width**-0.5)
        state = jnp.concatenate([arm, gripper], axis=-1)
        if self.config.dropout and not deterministic:
            told = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.config.dropout, (*state.shape[:2], 1))
            state = jnp.where(told, state, 0)
        fused = Dense(self.width, ("embed", None), kernel_init=init, kernel=self.kernel, name="fuse")(state)
        return fused[..., None, :]


class ActionHistory(nn.Module):
    """One token per executed action: what upstream's LinearActionEncoder does to each, plus an embedding of its age.

    Arm and gripper go through a Linear each, are added, and go through two more; there is no nonlinearity. (Upstream
    has the class, and no place where it is used.)
    """

    config: ActionHistoryConfig
    width: int
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, actions: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Normalised float[B, H + G - 1, 7], gripper 0 before the episode began -> float32[B, G, H, D]."""
        half, length = self.width // 2, self.config.length
        enter = functools.partial(Dense, half, (None, "embed"), kernel=self.kernel)
        x = actions.astype(jnp.float32)
        x = enter(name="arm")(x[..., :6]) + enter(name="gripper")(x[..., 6:])
        x = Dense(half, ("embed", None), kernel=self.kernel, name="mix")(x)
        init = nn.initializers.normal((half * self.width) ** -0.5)  # as large as a word, see `ProprioToken`
        x = Dense(self.width, ("embed", None), kernel_init=init, kernel=self.kernel, name="out")(x)
        x, known = _windows(x, length), _windows(actions[..., 6:] != 0, length)
        if self.config.dropout and not deterministic:
            told = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.config.dropout, (*x.shape[:2], 1, 1))
            known &= told
        age = nn.with_logical_partitioning(nn.initializers.normal(self.width**-0.5), (None, "embed"))
        return jnp.where(known, x, 0) + self.param("age", age, (length, self.width))


def _windows(x: jax.Array, length: int) -> jax.Array:
    """[B, H + G - 1, ...] -> [B, G, H, ...]."""
    return x[:, np.arange(x.shape[1] - length + 1)[:, None] + np.arange(length)]


def blank(config: PolicyConfig, batch: int, frames: int) -> dict[str, np.ndarray]:
    """Fields of `types.Inputs` that a policy takes beside images and text, of nothing."""
    fields = {}
    if config.proprio.enabled:
        fields["proprio"] = np.zeros((batch, frames, proprio.DIM), np.float32)
    if config.action_history.length:
        steps = config.action_history.length + frames - 1
        fields["past_actions"] = np.zeros((batch, steps, interface.ACTION_DIM), np.float32)
    return fields


def scale_arm(arm: jax.Array, config: ProprioConfig) -> jax.Array:
    """(arm - center) / scale, angles taken the short way round: float[..., 6] -> float[..., 6]."""
    centered = arm - jnp.asarray(config.center, arm.dtype)
    angles = centered[..., 3:]
    # CALVIN's gripper points down at roll = pi, where readings jump between pi and -pi.
    angles = angles - 2 * np.pi * jnp.round(angles / (2 * np.pi))
    return jnp.concatenate([centered[..., :3], angles], axis=-1) / jnp.asarray(config.scale, arm.dtype)
