"""What heads that regress actions share: the two MLPs that end them, their loss, and a carry of recent features."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.nn.attention import Attention
from robovlms_jax.nn.linear import Dense, Kernel
from robovlms_jax.nn.mlp import MLP
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.policies import losses
from robovlms_jax.policies.heads import base


@dataclasses.dataclass(frozen=True)
class ContinuousHeadConfig(base.HeadConfig):
    """One MLP for the numbers of an action (the arm, continuous grippers; tanh) and one for its binary grippers
    (logits), and the loss on both."""

    trunk: tuple[int, ...] = (1024, 512, 256)
    """Hidden widths of both MLPs."""
    arm_loss: Literal["huber", "smooth_l1", "mse"] = "huber"
    """huber: quadratic below huber_delta, slope huber_delta beyond. smooth_l1: huber / huber_delta, slope 1 beyond
    (huber_delta is torch's beta). mse: squared error."""
    huber_delta: float = 1.0
    gripper_loss_weight: float = 0.01
    """loss = arm + gripper_loss_weight * BCE(binary grippers)."""
    spread: bool = False
    """A third MLP says how far off each number may be: the standard deviation of a Gaussian around the prediction, by
    its negative log-likelihood. Nothing but that MLP learns from it, so actions are learned as without it (but for
    optimizer.clip_norm, which sees its gradient, too)."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("loss_arm", *(("loss_spread",) if self.spread else ()), "loss_gripper", "acc_gripper")

    def __post_init__(self):
        if self.arm_loss not in losses.REGRESSION:
            raise ValueError(f"policy.head.arm_loss={self.arm_loss!r} is unknown; known: {sorted(losses.REGRESSION)}.")
        if self.huber_delta <= 0:
            raise ValueError(f"policy.head.huber_delta={self.huber_delta} must be positive.")
        require_positive(self, *(f for f in ("hidden_size", "num_layers", "num_heads") if hasattr(self, f)))
        heads, hidden = getattr(self, "num_heads", 1), getattr(self, "hidden_size", 0)
        if hidden % heads:
            raise ValueError(f"policy.head.hidden_size={hidden} does not divide over num_heads={heads}.")


def require_positive(config: base.HeadConfig, *fields: str) -> None:
    """Raises ValueError naming the first of `fields` that is below 1."""
    for field in fields:
        if getattr(config, field) < 1:
            raise ValueError(f"policy.head.{field}={getattr(config, field)} must be at least 1.")


@flax.struct.dataclass
class ContinuousPrediction:
    """What the columns of an action are made of, in their order.

    arm: float32[..., C, numbers] in [-1, 1]. gripper_logit: float32[..., C, binary grippers], positive = open. Either
    may have no column.
    """

    arm: jax.Array
    gripper_logit: jax.Array
    log_scale: jax.Array | None = None
    """float32[..., C, numbers], logarithm of the standard deviation of `arm`; None: not asked for."""


LOG_SCALE = (-5.0, 2.0)
"""What it is kept in, as in soft actor-critic (Haarnoja et al. 2018, arXiv:1801.01290)."""


class Trunk(nn.Module):
    """Linear-ReLU stack; Xavier-uniform kernels and zero biases as upstream initialises its heads."""

    widths: tuple[int, ...]
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer, width in enumerate(self.widths):
            x = dense(width, self.kernel, f"layer_{layer}")(x)
            x = x if layer == len(self.widths) - 1 else jax.nn.relu(x)
        return x


def dense(width: int, kernel: Kernel, name: str | None = None) -> Dense:
    """Linear with upstream's initial values."""
    init = nn.initializers.xavier_uniform()
    return Dense(width, ("embed", "hidden"), kernel_init=init, kernel=kernel, name=name)


class Block(nn.Module):
    """Pre-norm transformer layer on float32[N, S, D]: x + attention(norm(x)), then x + mlp(norm(x))."""

    num_heads: int
    activation: str = "gelu"
    dropout: float = 0.0
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, deterministic: bool) -> jax.Array:
        """mask: bool[N, S, S], True = may attend."""
        width = x.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        size = width // self.num_heads
        attention = Attention(self.num_heads, size, dropout=self.dropout, kernel=self.kernel, name="attn")
        x = x + drop(attention(LayerNorm(1e-5, name="attn_norm")(x), mask=mask, deterministic=deterministic)[0])
        mlp = MLP(4 * width, self.activation, kernel=self.kernel, name="mlp")
        return x + drop(mlp(LayerNorm(1e-5, name="mlp_norm")(x)))


class ContinuousHead(nn.Module):
    """A head whose subclass only says how features of a window become one vector per step (`encode`).

    See `base.ActionHead` for the contract. Computes in float32 whatever the backbone's type.
    """

    config: Any
    window: int
    chunk: int
    action_dim: int
    binary: tuple[int, ...]
    feature_dim: int
    num_queries: int
    kernel: Kernel = Kernel()

    remembers = True
    """Whether `encode` lets a step see earlier ones."""

    def setup(self):
        numbers, decisions = len(self.scaled), len(self.binary)
        trunk = self.config.trunk
        self.arm = Trunk((*trunk, self.chunk * numbers), self.kernel) if numbers else None
        self.gripper = Trunk((*trunk, self.chunk * decisions), self.kernel) if decisions else None
        uncertain = self.config.spread and numbers
        self.scale = Trunk((*trunk, self.chunk * numbers), self.kernel) if uncertain else None

    @property
    def scaled(self) -> tuple[int, ...]:
        """Columns of the actions that are regressed."""
        return tuple(column for column in range(self.action_dim) if column not in self.binary)

    def encode(self, features: jax.Array, mask: jax.Array) -> jax.Array:
        """float32[N, W, Q, D], bool[N, W] -> float32[N, W, hidden]; a step sees itself and real earlier ones."""
        raise TypeError(f"{type(self).__name__} does not say how it encodes features")

    def __call__(self, features: jax.Array, step_mask: jax.Array) -> ContinuousPrediction:
        return self._decode(self._encode(features, step_mask))

    def loss(self, prediction: ContinuousPrediction, actions: jax.Array, mask: jax.Array, count: jax.Array):
        """Masked regression of the numbers plus weighted BCE of the binary grippers, whose accuracy is reported, too;
        what the robot does not have is in no sum and no metric."""
        config, metrics, parts = self.config, {}, []
        if self.scaled:
            target = actions[..., np.array(self.scaled)]
            chex.assert_equal_shape([prediction.arm, target])
            errors = losses.REGRESSION[config.arm_loss](prediction.arm, target, config.huber_delta)
            metrics["loss_arm"] = losses.masked_mean(errors, mask, count)
            parts.append(metrics["loss_arm"])
        if prediction.log_scale is not None:
            likelihood = losses.gaussian(jax.lax.stop_gradient(prediction.arm), prediction.log_scale, target)
            metrics["loss_spread"] = losses.masked_mean(likelihood, mask, count)
            parts.append(metrics["loss_spread"])
        if self.binary:
            logits, is_open = prediction.gripper_logit, actions[..., np.array(self.binary)] > 0
            metrics["loss_gripper"] = losses.masked_mean(losses.binary_cross_entropy(logits, is_open), mask, count)
            right = ((logits > 0) == is_open).astype(jnp.float32)
            metrics["acc_gripper"] = losses.masked_mean(right, mask, count)
            parts.append(config.gripper_loss_weight * metrics["loss_gripper"])
        loss = sum(parts[1:], parts[0])
        return loss, {"loss": loss, **metrics}

    def actions(self, prediction: ContinuousPrediction) -> jax.Array:
        gripper = jnp.where(prediction.gripper_logit > 0, 1.0, -1.0)
        return jnp.concatenate([prediction.arm, gripper], axis=-1)[..., np.argsort((*self.scaled, *self.binary))]

    def spread(self, prediction: ContinuousPrediction) -> base.Spread | None:
        if prediction.log_scale is None:
            return None
        wrong = jax.nn.sigmoid(-jnp.abs(prediction.gripper_logit))
        scale = jnp.concatenate([jnp.exp(prediction.log_scale), wrong], axis=-1)
        return base.Spread.of(scale[..., np.argsort((*self.scaled, *self.binary))], self.binary)

    def init_carry(self, batch: int) -> base.WindowCarry | tuple:
        if not self.remembers:
            return ()
        return base.WindowCarry.create(batch, self.window, self.num_queries, self.feature_dim)

    def renew(self, carry: Any, features: jax.Array, due: jax.Array) -> Any:
        return carry.renew(features, due) if self.remembers else carry

    def step(self, features: jax.Array, carry: Any) -> tuple[ContinuousPrediction, Any]:
        # Re-running the window gives the same numbers as a recurrent state that forgets what leaves the window
        # (upstream's LSTM does so once the window is full), at one constant, small cost.
        if self.remembers:
            carry = carry.push(features)
            hidden = self._encode(carry.buffer, carry.mask)
        else:
            hidden = self._encode(features[:, None], jnp.ones((len(features), 1), bool))
        return self._decode(hidden[:, -1]), carry

    def _encode(self, features: jax.Array, mask: jax.Array) -> jax.Array:
        chex.assert_shape(features, (None, None, self.num_queries, self.feature_dim))
        return self.encode(features.astype(jnp.float32), mask)

    def _decode(self, hidden: jax.Array) -> ContinuousPrediction:
        shape = (*hidden.shape[:-1], self.chunk)
        none = jnp.zeros((*shape, 0), hidden.dtype)
        arm = jnp.tanh(self.arm(hidden)).reshape(*shape, len(self.scaled)) if self.scaled else none
        gripper = self.gripper(hidden).reshape(*shape, len(self.binary)) if self.binary else none
        log_scale = None
        if self.scale is not None:
            log_scale = jnp.clip(self.scale(jax.lax.stop_gradient(hidden)), *LOG_SCALE).reshape(arm.shape)
        return ContinuousPrediction(arm, gripper, log_scale)


def step_positions(mask: jax.Array) -> jax.Array:
    """int32[N, W]: place of each step among the real ones of its window, so that padding in front changes nothing."""
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def step_attention(mask: jax.Array, queries: int = 1) -> jax.Array:
    """bool[N, W * queries, W * queries]: tokens of a step may attend those of real steps up to their own."""
    steps = jnp.repeat(jnp.arange(mask.shape[1]), queries)
    return (steps[:, None] >= steps) & jnp.repeat(mask, queries, axis=1)[:, None]
