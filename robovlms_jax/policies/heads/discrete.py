"""Actions as vocabulary tokens, learned by cross-entropy (upstream `DiscreteDecoder`; RT-2, Brohan et al. 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.actions import discretize
from robovlms_jax.policies import losses
from robovlms_jax.policies.heads import base


@dataclasses.dataclass(frozen=True)
class DiscreteHeadConfig(base.HeadConfig):
    """One vocabulary token per action dimension, chunk after chunk. Has no parameters of its own."""

    # A head that only names tokens remembers nothing, so the steps have to meet before it.
    histories: ClassVar[tuple[str, ...]] = ("one_step", "interleaved", "video")
    readouts: ClassVar[tuple[str, ...]] = ("token",)

    num_bins: int = 256
    low: float = -1.0
    high: float = 1.0
    """Bins span [low, high] in normalised actions; the gripper is -1 or 1."""
    binning: Literal["uniform", "quantile"] = "uniform"
    """uniform: equal bins, the same for all dimensions (upstream's). quantile: each dimension but binary grippers has
    bins with equally many training actions in them."""
    quantile_edges: tuple[float, ...] = ()
    """Edges of quantile bins, dimension after dimension; filled in when a run starts, saved with its checkpoints."""
    vocab_end: int = 0
    """One past the last action id; bin b is id vocab_end - 1 - b. 0: from the tokenizer as upstream counts it (see
    `actions.discretize.vocabulary_end`) when a run starts, the end of the vocabulary without a tokenizer."""
    decoding: Literal["autoregressive", "parallel"] = "autoregressive"
    """autoregressive: each token sees those before it, and control decodes one after the other. parallel: learned
    placeholders stand where the tokens would be, and one pass decodes them all; it is trained the same way."""
    constrained: bool = True
    """Decode action ids only. Otherwise any word may win; one that is no action id makes its action NaN, which `act`
    refuses to hand out."""
    spread: bool = False
    """Report how uncertain actions are, from the distribution over action ids."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("acc_arm", "acc_gripper", "action_l1")

    @property
    def bins(self) -> discretize.Bins:
        """Where the edges lie. Raises ValueError where they still have to come from training data."""
        if self.binning == "uniform":
            return discretize.UniformBins(self.num_bins, self.low, self.high)
        if not self.quantile_edges:
            raise ValueError(
                "policy.head.binning='quantile' takes its edges from training data; call `with_actions` before the "
                "policy is used (training does)."
            )
        edges = zip(*[iter(self.quantile_edges)] * self.num_bins, strict=True)
        return discretize.QuantileBins(tuple(edges))

    def with_actions(self, actions: np.ndarray, binary: Sequence[int]) -> DiscreteHeadConfig:
        """With the edges that `binning` asks for, from normalised training actions float[N, A]; `binary`: columns that
        are decisions."""
        if self.binning == "uniform":
            return self
        table = discretize.QuantileBins.of(actions, self.num_bins, binary).table
        return dataclasses.replace(self, quantile_edges=tuple(edge for row in table for edge in row))

    def __post_init__(self):
        if self.decoding not in ("autoregressive", "parallel"):
            raise ValueError(f"policy.head.decoding={self.decoding!r} is neither 'autoregressive' nor 'parallel'.")
        if self.binning not in ("uniform", "quantile"):
            raise ValueError(f"policy.head.binning={self.binning!r} is neither 'uniform' nor 'quantile'.")
        if len(self.quantile_edges) % self.num_bins:
            raise ValueError(
                f"policy.head.quantile_edges has {len(self.quantile_edges)} numbers, no multiple of "
                f"num_bins={self.num_bins}; leave them empty to take them from the training data."
            )
        discretize.UniformBins(self.num_bins, self.low, self.high)  # says what is wrong with them
        if self.low > -1 or self.high < 1:
            raise ValueError(f"policy.head.low={self.low} and high={self.high} must span [-1, 1], the gripper's ends.")
        if 0 < self.vocab_end < self.num_bins:
            raise ValueError(f"policy.head.vocab_end={self.vocab_end} leaves no room for num_bins={self.num_bins}.")


@flax.struct.dataclass
class TokenPrediction:
    """logits: float32[..., C, A, V]."""

    logits: jax.Array


@base.register("discrete", DiscreteHeadConfig)
class DiscreteHead(base.Memoryless, nn.Module):
    """See `base.ActionHead` for the contract; features are logits float[N, W, C * A, V] of the action tokens."""

    config: DiscreteHeadConfig
    window: int
    chunk: int
    action_dim: int
    binary: tuple[int, ...]
    feature_dim: int
    num_queries: int

    @property
    def vocab_end(self) -> int:
        """One past the last action id."""
        end = self.config.vocab_end or self.feature_dim
        if not self.config.num_bins <= end <= self.feature_dim:
            raise ValueError(
                f"action ids {end - self.config.num_bins} ... {end - 1} (policy.head.num_bins={self.config.num_bins}, "
                f"vocab_end={end}) do not lie in a vocabulary of {self.feature_dim} tokens."
            )
        return end

    def ids(self, actions: jax.Array) -> jax.Array:
        """Normalised actions float[..., C, A] -> int32[..., C * A]."""
        ids = discretize.to_ids(discretize.discretize(actions, self.config.bins), self.vocab_end)
        return ids.reshape(*actions.shape[:-2], -1)

    def choose(self, logits: jax.Array) -> jax.Array:
        """The most likely token: float[..., V] -> int32[...]; among action ids only when `constrained`."""
        if self.config.constrained:
            ids = jnp.arange(logits.shape[-1])
            allowed = discretize.is_action_id(ids, self.vocab_end, self.config.num_bins)
            logits = jnp.where(allowed, logits, -jnp.inf)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def __call__(self, features: jax.Array, step_mask: jax.Array) -> TokenPrediction:
        shape = (*features.shape[:-2], self.chunk, self.action_dim, features.shape[-1])
        return TokenPrediction(features.reshape(shape).astype(jnp.float32))

    def loss(self, prediction: TokenPrediction, actions: jax.Array, mask: jax.Array, count: jax.Array):
        """Cross-entropy, numbers and binary grippers alike; accuracies and the mean distance of decoded actions
        beside it."""
        ids = self.ids(actions).reshape(actions.shape)
        loss = losses.masked_mean(losses.token_cross_entropy(prediction.logits, ids), mask, count)
        chosen = self.choose(prediction.logits)
        right = (chosen == ids).astype(jnp.float32)
        distance = jnp.abs(self.values(chosen) - self.values(ids))
        return loss, {
            "loss": loss,
            **base.by_kind("acc", right, self.binary, mask, count),
            "action_l1": losses.masked_mean(distance, mask, count),
        }

    def actions(self, prediction: TokenPrediction) -> jax.Array:
        """NaN wherever an unconstrained choice is no action id."""
        ids = self.choose(prediction.logits)
        values = self.values(ids)
        values = base.decide(values, self.binary)
        return jnp.where(discretize.is_action_id(ids, self.vocab_end, self.config.num_bins), values, jnp.nan)

    def spread(self, prediction: TokenPrediction) -> base.Spread | None:
        """Of the distribution over bins: its standard deviation, of grippers the probability of the other half; the
        uncertainty is the mean entropy of an action's tokens over that of the uniform distribution."""
        if not self.config.spread:
            return None
        first = self.vocab_end - self.config.num_bins
        logits = prediction.logits[..., first : self.vocab_end]
        share = jax.nn.softmax(logits, axis=-1)
        ids = jnp.broadcast_to(
            first + jnp.arange(self.config.num_bins)[:, None], (self.config.num_bins, self.action_dim)
        )
        values = self.values(ids).T  # [A, bins]
        mean = (share * values).sum(-1)
        deviation = jnp.sqrt((share * jnp.square(values - mean[..., None])).sum(-1))
        is_open = (share * (values > 0)).sum(-1)
        binary = np.isin(np.arange(self.action_dim), self.binary)
        scale = jnp.where(binary, jnp.minimum(is_open, 1 - is_open), deviation)
        entropy = -(share * jax.nn.log_softmax(logits, axis=-1)).sum(-1).mean(-1) / np.log(self.config.num_bins)
        return base.Spread(scale, entropy)

    def step(self, features: jax.Array, carry: tuple) -> tuple[TokenPrediction, tuple]:
        return self(features, None), carry

    def values(self, ids: jax.Array) -> jax.Array:
        """Token ids int32[..., A] -> the middles of their bins, float32[..., A]."""
        return discretize.undiscretize(discretize.from_ids(ids, self.vocab_end), self.config.bins)
