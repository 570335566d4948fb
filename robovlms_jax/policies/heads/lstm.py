"""LSTM policy head with two MLP trunks: RoboVLMs' default head (upstream `LSTMDecoder`, policy_head/base_policy.py)."""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from robovlms_jax.policies import losses
from robovlms_jax.policies.heads import base


@dataclasses.dataclass(frozen=True)
class LSTMHeadConfig(base.HeadConfig):
    """LSTM over the window, then one MLP for the arm (tanh) and one for the gripper (logit)."""

    hidden_size: int = 1024
    """Per action query, as upstream has it."""
    num_layers: int = 4
    trunk: tuple[int, ...] = (1024, 512, 256)
    """Hidden widths of both MLPs."""
    gripper_loss_weight: float = 0.01
    """loss = Huber(arm) + gripper_loss_weight * BCE(gripper)."""
    huber_delta: float = 1.0

    def __post_init__(self):
        for field in ("hidden_size", "num_layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"policy.head.{field}={getattr(self, field)} must be at least 1.")
        if self.huber_delta <= 0:
            raise ValueError(f"policy.head.huber_delta={self.huber_delta} must be positive.")


@flax.struct.dataclass
class ContinuousPrediction:
    """arm: float32[..., C, A - 1] in [-1, 1]; gripper_logit: float32[..., C], positive = open."""

    arm: jax.Array
    gripper_logit: jax.Array


@flax.struct.dataclass
class WindowCarry:
    """The most recent features. buffer: float32[B, W, Q, D], newest last; count: int32[B], how many are real, at most
    W."""

    buffer: jax.Array
    count: jax.Array


class LSTMLayer(nn.Module):
    """One layer in PyTorch's parametrisation (gates i, f, g, o; two biases), so that released checkpoints map one to
    one."""

    hidden_size: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """float[N, W, D], bool[N, W] -> float[N, W, hidden]; the state stands still where `mask` is False."""
        width, hidden = x.shape[-1], self.hidden_size
        bound = hidden**-0.5

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        def parameter(name, shape, axes):
            return self.param(name, nn.with_logical_partitioning(uniform, axes), shape).astype(x.dtype)

        input_kernel = parameter("input_kernel", (width, 4, hidden), ("embed", "gates", "hidden"))
        hidden_kernel = parameter("hidden_kernel", (hidden, 4, hidden), ("recurrent", "gates", "hidden"))
        bias = parameter("input_bias", (4, hidden), ("gates", "hidden")) + parameter(
            "hidden_bias", (4, hidden), ("gates", "hidden")
        )
        # The input's share of the gates needs no recurrence: one matrix product for all steps.
        projected = jnp.einsum("NWD,DGH->WNGH", x, input_kernel) + bias

        def step(state, inputs):
            h, c = state
            gates, real = inputs
            i, f, g, o = jnp.moveaxis(gates + jnp.einsum("NH,HGJ->NGJ", h, hidden_kernel), 1, 0)
            new_c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            new_h = jax.nn.sigmoid(o) * jnp.tanh(new_c)
            h, c = jnp.where(real, new_h, h), jnp.where(real, new_c, c)
            return (h, c), h

        zero = jnp.zeros((x.shape[0], hidden), x.dtype)
        _, out = jax.lax.scan(step, (zero, zero), (projected, mask.T[..., None]))
        return jnp.moveaxis(out, 0, 1)


class Trunk(nn.Module):
    """Linear-ReLU stack; Xavier-uniform kernels and zero biases as upstream initialises its heads."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer, width in enumerate(self.widths):
            x = nn.Dense(
                width,
                kernel_init=nn.with_logical_partitioning(nn.initializers.xavier_uniform(), ("embed", "hidden")),
                bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("hidden",)),
                name=f"layer_{layer}",
            )(x)
            x = x if layer == len(self.widths) - 1 else jax.nn.relu(x)
        return x


@base.register("lstm", LSTMHeadConfig)
class LSTMHead(nn.Module):
    """See `base.ActionHead` for the contract. Computes in float32 whatever the backbone's type."""

    config: LSTMHeadConfig
    window: int
    chunk: int
    action_dim: int
    feature_dim: int
    num_queries: int

    def setup(self):
        hidden = self.config.hidden_size * self.num_queries
        self.layers = [LSTMLayer(hidden, name=f"lstm_{layer}") for layer in range(self.config.num_layers)]
        self.arm = Trunk((*self.config.trunk, self.chunk * (self.action_dim - 1)))
        self.gripper = Trunk((*self.config.trunk, self.chunk))

    def __call__(self, features: jax.Array, step_mask: jax.Array) -> ContinuousPrediction:
        return self._decode(self._remember(features, step_mask))

    def loss(self, prediction: ContinuousPrediction, actions: jax.Array, mask: jax.Array, count: jax.Array):
        """Masked Huber on the arm plus weighted BCE on the gripper; `acc_gripper` is reported beside them."""
        chex.assert_equal_shape([prediction.arm, actions[..., :-1]])
        is_open = actions[..., -1] > 0
        arm = losses.masked_mean(
            optax.losses.huber_loss(prediction.arm, actions[..., :-1], delta=self.config.huber_delta), mask, count
        )
        bce = optax.losses.sigmoid_binary_cross_entropy(prediction.gripper_logit, is_open.astype(jnp.float32))
        gripper = losses.masked_mean(bce, mask, count)
        accuracy = losses.masked_mean(((prediction.gripper_logit > 0) == is_open).astype(jnp.float32), mask, count)
        loss = arm + self.config.gripper_loss_weight * gripper
        return loss, {"loss": loss, "loss_arm": arm, "loss_gripper": gripper, "acc_gripper": accuracy}

    def actions(self, prediction: ContinuousPrediction) -> jax.Array:
        gripper = jnp.where(prediction.gripper_logit > 0, 1.0, -1.0)
        return jnp.concatenate([prediction.arm, gripper[..., None]], axis=-1)

    def init_carry(self, batch: int) -> WindowCarry:
        buffer = jnp.zeros((batch, self.window, self.num_queries, self.feature_dim), jnp.float32)
        return WindowCarry(buffer, jnp.zeros((batch,), jnp.int32))

    def step(self, features: jax.Array, carry: WindowCarry) -> tuple[ContinuousPrediction, WindowCarry]:
        # Upstream carries the LSTM state until the window is full and re-runs the window after that; re-running it
        # always gives
        # the same numbers (zero state over the newest min(t, W) features) at one constant, small cost.
        buffer = jnp.concatenate([carry.buffer[:, 1:], features.astype(jnp.float32)[:, None]], axis=1)
        count = jnp.minimum(carry.count + 1, self.window)
        mask = jnp.arange(self.window) >= self.window - count[:, None]
        prediction = self._decode(self._remember(buffer, mask)[:, -1])
        return prediction, WindowCarry(buffer, count)

    def _remember(self, features: jax.Array, mask: jax.Array) -> jax.Array:
        """float[N, W, Q, D] -> float32[N, W, hidden]."""
        chex.assert_shape(features, (None, None, self.num_queries, self.feature_dim))
        x = features.reshape(*features.shape[:2], -1).astype(jnp.float32)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def _decode(self, hidden: jax.Array) -> ContinuousPrediction:
        arm = jnp.tanh(self.arm(hidden))
        arm = arm.reshape(*hidden.shape[:-1], self.chunk, self.action_dim - 1)
        return ContinuousPrediction(arm, self.gripper(hidden))
