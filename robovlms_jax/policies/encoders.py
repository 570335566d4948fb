"""What a policy may see besides images and text: small encoders that turn numbers into tokens of the prompt."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.config import ProprioConfig
from robovlms_jax.types import Tokens


class ProprioToken(nn.Module):
    """One token per frame from the robot's state: Linear(arm) beside an embedding of the gripper, fused by a Linear.

    The structure of upstream's `use_state` (base_backbone.py), which cannot be switched on there.
    """

    config: ProprioConfig
    width: int

    @nn.compact
    def __call__(self, proprio: jax.Array) -> jax.Array:
        """float[B, G, 7] (see `inputs.proprio`) -> float32[B, G, 1, D]."""
        arm = scale_arm(proprio[..., :6].astype(jnp.float32), self.config)
        arm = _dense(self.width, nn.initializers.lecun_normal(), (None, "embed"), "arm")(arm)
        table = self.param(
            "gripper", nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "embed")), (2, self.width)
        )
        gripper = jnp.where(proprio[..., 6:] > 0, table[1], table[0])
        # The token starts as large as a word: language models embed words with a standard deviation near D^-0.5.
        init = nn.initializers.normal((2 * self.width) ** -0.5 * self.width**-0.5)
        fused = _dense(self.width, init, ("embed", None), "fuse")(jnp.concatenate([arm, gripper], axis=-1))
        return fused[..., None, :]


def before(extra: jax.Array, queries: jax.Array) -> jax.Array:
    """Extra tokens float[N, E, D] before the queries float[Q, D]: float[N, E + Q, D], as `VLM.embed` takes them."""
    queries = jnp.broadcast_to(queries.astype(extra.dtype), (len(extra), *queries.shape))
    return jnp.concatenate([extra, queries], axis=1)


def name_runs(tokens: Tokens, num_extra: int) -> Tokens:
    """Tokens embedded from `before`'s: the first `num_extra` of the run "query" become a run of their own, "extra"."""
    runs = []
    for run, length in tokens.layout:
        runs += [("extra", num_extra), (run, length - num_extra)] if run == "query" else [(run, length)]
    return tokens.replace(layout=tuple(runs))


def scale_arm(arm: jax.Array, config: ProprioConfig) -> jax.Array:
    """(arm - center) / scale, angles taken the short way round: float[..., 6] -> float[..., 6]."""
    centered = arm - jnp.asarray(config.center, arm.dtype)
    angles = centered[..., 3:]
    # CALVIN's gripper points down at roll = pi, where readings jump between pi and -pi.
    angles = angles - 2 * np.pi * jnp.round(angles / (2 * np.pi))
    return jnp.concatenate([centered[..., :3], angles], axis=-1) / jnp.asarray(config.scale, arm.dtype)


def _dense(width: int, init: nn.initializers.Initializer, axes: tuple[str | None, ...], name: str) -> nn.Dense:
    return nn.Dense(
        width,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), (axes[-1],)),
        name=name,
    )
