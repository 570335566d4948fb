"""LSTM policy head with two MLP trunks: RoboVLMs' default head (upstream `LSTMDecoder`, policy_head/base_policy.py)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from robovlms_jax.nn.linear import Kernel, Matrix
from robovlms_jax.policies.heads import base
from robovlms_jax.policies.heads.continuous import ContinuousHead, ContinuousHeadConfig, ContinuousPrediction


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
    def __call__(
        self, x: jax.Array, mask: jax.Array, state: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """float[N, W, D], bool[N, W] -> float[N, W, hidden] and the state behind it, (h, c) float[N, hidden] each.

        The state stands still where `mask` is False. state: in front of the first step; None: zero. With fewer rows of
        x than of `mask`, each is that of as many rows that follow one another: its product is made once.
        """
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
        projected = jnp.repeat(projected, len(mask) // len(x), axis=1)

        def step(state, inputs):
            h, c = state
            gates, real = inputs
            i, f, g, o = jnp.moveaxis(gates + hidden_kernel.einsum("NH,HGJ->NGJ", h), 1, 0)
            new_c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            new_h = jax.nn.sigmoid(o) * jnp.tanh(new_c)
            h, c = jnp.where(real, new_h, h), jnp.where(real, new_c, c)
            return (h, c), h

        zero = jnp.zeros((len(mask), hidden), x.dtype)
        state, out = jax.lax.scan(step, state or (zero, zero), (projected, mask.T[..., None]))
        return jnp.moveaxis(out, 0, 1), state


@flax.struct.dataclass
class RunningWindows:
    """The windows that the steps to come will end: each goes on by one step at a time, so that a control step reads
    every matrix once. Run again from its first step, a window would read them W times.

    state: float32[B, W, L, 2, hidden], (h, c) of each layer; window w has seen the last W - 1 - w steps. count:
      int32[B], how many steps there were, at most W - 1.
    """

    state: jax.Array
    count: jax.Array


@base.register("lstm", LSTMHeadConfig)
class LSTMHead(ContinuousHead):
    """Zero state at the beginning of every window; steps in front of the first real one leave it at that."""

    def setup(self):
        super().setup()
        hidden = self.config.hidden_size * self.num_queries
        self.layers = [LSTMLayer(hidden, self.kernel, name=f"lstm_{layer}") for layer in range(self.config.num_layers)]

    def encode(self, features: jax.Array, mask: jax.Array) -> jax.Array:
        return self._run(features, mask)[0]

    def _run(self, features: jax.Array, mask: jax.Array, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """`encode`, and float32[N, L, 2, hidden] behind it. state: in front of it, alike; None: zero."""
        x, after = features.reshape(*features.shape[:2], -1), []
        for index, layer in enumerate(self.layers):
            before = None if state is None else (state[:, index, 0], state[:, index, 1])
            x, found = layer(x, mask, before)
            after.append(jnp.stack(found, axis=1))
        return x, jnp.stack(after, axis=1)

    def init_carry(self, batch: int) -> RunningWindows:
        shape = (batch, self.window, self.config.num_layers, 2, self.config.hidden_size * self.num_queries)
        return RunningWindows(jnp.zeros(shape, jnp.float32), jnp.zeros(batch, jnp.int32))

    def step(self, features: jax.Array, carry: RunningWindows) -> tuple[ContinuousPrediction, RunningWindows]:
        batch, window = carry.state.shape[:2]
        x, mask = features.astype(jnp.float32)[:, None], jnp.ones((batch * window, 1), bool)
        hidden, state = self._run(x, mask, carry.state.reshape(-1, *carry.state.shape[2:]))
        state = state.reshape(carry.state.shape)
        # The oldest window ends here; the next step begins one.
        state = jnp.concatenate([state[:, 1:], jnp.zeros_like(state[:, :1])], axis=1)
        hidden = hidden.reshape(batch, window, -1)[:, 0]
        return self._decode(hidden), RunningWindows(state, jnp.minimum(carry.count + 1, window - 1))

    def renew(self, carry: RunningWindows, features: jax.Array, due: jax.Array) -> RunningWindows:
        """See `base.ActionHead`. All windows are run again, which happens once in many steps."""
        window = carry.state.shape[1]
        before = features[:, :-1].astype(jnp.float32)  # `step` has the newest

        def again(head: LSTMHead, state: jax.Array) -> jax.Array:
            place = jnp.arange(window - 1)
            real = place >= window - 1 - carry.count[:, None]
            mask = real[:, None] & (place >= jnp.arange(window)[:, None])
            found = head._run(before, mask.reshape(-1, window - 1))[1]
            return jnp.where(due[:, None, None, None, None], found.reshape(state.shape), state)

        return carry.replace(state=nn.cond(due.any(), again, lambda _, state: state, self, carry.state))
