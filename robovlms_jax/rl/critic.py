"""What a state is worth, from the hidden state of the first action query: an MLP that shares the policy's trunk."""

from __future__ import annotations

import flax.linen as nn
import jax

from robovlms_jax.nn.linear import Dense
from robovlms_jax.nn.norms import LayerNorm


class Critic(nn.Module):
    """float[B, Q, D] features -> float32[B]. The policy does not learn from it: the features' gradient is stopped."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        x = jax.lax.stop_gradient(features[:, 0]).astype("float32")
        x = LayerNorm(1e-5, name="norm")(x)
        for layer, width in enumerate(self.widths):
            x = jax.nn.gelu(Dense(width, (None, "hidden"), name=f"layer_{layer}")(x))
        init = nn.initializers.normal(0.02)
        return Dense(1, ("hidden", None), kernel_init=init, name="out")(x)[..., 0]
