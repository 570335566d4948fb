"""LSTM policy head with two MLP trunks: RoboVLMs' default head (upstream `LSTMDecoder`, policy_head/base_policy.py)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.linear import Kernel, Matrix
from robovlms_jax.policies.heads import base
from robovlms_jax.policies.heads.continuous import ContinuousHead, ContinuousHeadConfig


@dataclasses.dataclass(frozen=True)
class LSTMHeadConfig(ContinuousHeadConfig):
    """LSTM over the window, then one MLP for the arm (tanh) and one for the gripper (logit)."""

    # One step is nothing to remember.
    histories: ClassVar[tuple[str, ...]] = ("interleaved", "policy_head")

    hidden_size: int = 1024
    """Per action query, as upstream has it."""
    num_layers: int = 4


class LSTMLayer(nn.Module):
    """One layer in PyTorch's parametrisation (gates i, f, g, o; two biases), so that released checkpoints map one to
    one."""

    hidden_size: int
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """float[N, W, D], bool[N, W] -> float[N, W, hidden]; the state stands still where `mask` is False."""
        width, hidden = x.shape[-1], self.hidden_size
        bound = hidden**-0.5

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        def matrix(name: str, rows: int, axis: str) -> Matrix:
            shape, axes = (rows, 4, hidden), (axis, "gates", "hidden")
            return self.kernel.matrix(self, shape, axes, uniform, channels=(1, 2), name=name)

        def bias(name: str) -> jax.Array:
            init = nn.with_logical_partitioning(uniform, ("gates", "hidden"))
            return self.param(name, init, (4, hidden)).astype(x.dtype)

        input_kernel = matrix("input_kernel", width, "embed")
        hidden_kernel = matrix("hidden_kernel", hidden, "recurrent")
        # The input's share of the gates needs no recurrence: one matrix product for all steps.
        projected = input_kernel.einsum("NWD,DGH->WNGH", x) + (bias("input_bias") + bias("hidden_bias"))

        def step(state, inputs):
            h, c = state
            gates, real = inputs
            i, f, g, o = jnp.moveaxis(gates + hidden_kernel.einsum("NH,HGJ->NGJ", h), 1, 0)
            new_c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            new_h = jax.nn.sigmoid(o) * jnp.tanh(new_c)
            h, c = jnp.where(real, new_h, h), jnp.where(real, new_c, c)
            return (h, c), h

        zero = jnp.zeros((x.shape[0], hidden), x.dtype)
        _, out = jax.lax.scan(step, (zero, zero), (projected, mask.T[..., None]))
        return jnp.moveaxis(out, 0, 1)


@base.register("lstm", LSTMHeadConfig)
class LSTMHead(ContinuousHead):
    """Zero state at the beginning of every window; steps in front of the first real one leave it at that."""

    def setup(self):
        super().setup()
        hidden = self.config.hidden_size * self.num_queries
        self.layers = [LSTMLayer(hidden, self.kernel, name=f"lstm_{layer}") for layer in range(self.config.num_layers)]

    def encode(self, features: jax.Array, mask: jax.Array) -> jax.Array:
        x = features.reshape(*features.shape[:2], -1)
        for layer in self.layers:
            x = layer(x, mask)
        return x
