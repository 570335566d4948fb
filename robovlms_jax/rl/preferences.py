"""Rewards from preferences (Christiano et al. 2017, arXiv:1706.03741): which of two segments is better, answered many
times, makes an ensemble of reward functions. And what needs no reward function: preferences between chunks themselves
(DPO, Rafailov et al. 2023, arXiv:2305.18290), and demonstrations weighted by how good they were.

Letters: N pairs, M members of the ensemble, k frames of a segment, F numbers of a frame (features and action).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from robovlms_jax.nn.linear import Dense
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.rl.objective import Decisions, Reconsidered, by_level, mean_of
from robovlms_jax.schema import require


@flax.struct.dataclass
class Pairs:
    """Answers. first, second: float32[N, k, F]. first_better: float32[N], 1, 0, or 0.5 where both are as good; pairs
    that could not be compared are left out."""

    first: jax.Array
    second: jax.Array
    first_better: jax.Array

    def take(self, rows: Any) -> Pairs:
        return jax.tree.map(lambda x: x[rows], self)


def preference_loss(first: jax.Array, second: jax.Array, first_better: jax.Array, noise: float) -> jax.Array:
    """Cross-entropy of the Bradley-Terry model, float32[...].

    Args:
      first, second: float32[...], the segments' sums of rewards.
      first_better: float32[...] in [0, 1].
      noise: share of answers that are given at random.
    """
    share = (1 - noise) * jax.nn.sigmoid(first - second) + noise / 2
    return -first_better * jnp.log(share) - (1 - first_better) * jnp.log1p(-share)


class Reward(nn.Module):
    """One member: float32[..., F] -> float32[...], the reward of a frame."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer, width in enumerate(self.widths):
            x = jax.nn.gelu(Dense(width, (None, "hidden"), name=f"layer_{layer}")(x))
        return Dense(1, ("hidden", None), name="out")(x)[..., 0]


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """members: of the ensemble, each on pairs drawn with replacement. noise: share of answers that are taken for
    random. decay: weight decay, so that many parameters do not learn few answers by heart. held_out: share of the pairs
    that measure and do not teach."""

    members: int = 3
    widths: tuple[int, ...] = (128, 128)
    noise: float = 0.1
    learning_rate: float = 1e-3
    decay: float = 1e-2
    steps: int = 500
    batch: int = 128
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self):
        for field in ("members", "steps", "batch"):
            require(getattr(self, field) >= 1, f"reward.{field}={getattr(self, field)} must be at least 1.")
        require(0 <= self.noise < 1, f"reward.noise={self.noise} must lie in [0, 1).")
        require(0 < self.held_out < 1, f"reward.held_out={self.held_out} must lie between 0 and 1.")
        require(
            self.learning_rate > 0 and self.decay >= 0, "reward.learning_rate must be positive, decay not negative."
        )


@flax.struct.dataclass
class RewardModel:
    """An ensemble. params: leading axis M. center, scale: float32[F], of frames. offset, spread: float32[M], of each
    member's rewards, which are standardised by them."""

    params: Any
    center: jax.Array
    scale: jax.Array
    offset: jax.Array
    spread: jax.Array
    widths: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def members(self, frames: jax.Array) -> jax.Array:
        """float32[..., F] -> float32[M, ...], mean 0 and standard deviation 1 over what was learned from."""
        x = (frames - self.center) / self.scale
        raw = jax.vmap(lambda params: Reward(self.widths).apply({"params": params}, x))(self.params)
        shape = (-1, *[1] * (raw.ndim - 1))
        return (raw - self.offset.reshape(shape)) / self.spread.reshape(shape)

    def __call__(self, frames: jax.Array) -> jax.Array:
        """float32[..., F] -> float32[...], the mean of the members."""
        return self.members(frames).mean(0)


def fit(pairs: Pairs, config: RewardConfig) -> tuple[RewardModel, dict[str, float]]:
    """Learn rewards from answers.

    Returns:
      The ensemble, and `accuracy` (share of held-out answers, ties left out, that its mean gives), `loss` and
      `loss_held_out` (means over the members; far apart: raise `decay`).
    Raises:
      ValueError: segments of unequal length or too few pairs; says so.
    """
    require(
        pairs.first.shape == pairs.second.shape and pairs.first.ndim == 3,
        f"pairs are {pairs.first.shape} and {pairs.second.shape}; expected [pairs, frames, numbers], of equal length: "
        "a constant reward per frame would otherwise prefer the longer one.",
    )
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(pairs.first_better))
    held = int(len(order) * config.held_out)
    require(0 < held < len(order), f"{len(order)} pairs are too few to hold out a share of {config.held_out}.")
    kept, teaching = pairs.take(order[:held]), pairs.take(order[held:])
    frames = jnp.concatenate([teaching.first, teaching.second]).reshape(-1, pairs.first.shape[-1])
    center, scale = frames.mean(0), jnp.maximum(frames.std(0), 1e-6)
    rows = rng.integers(len(order) - held, size=(config.members, len(order) - held))  # each member's own pairs
    module = Reward(config.widths)
    tx = optax.adamw(config.learning_rate, weight_decay=config.decay)

    def loss(params: Any, own: Pairs) -> jax.Array:
        sums = (module.apply({"params": params}, (x - center) / scale).sum(-1) for x in (own.first, own.second))
        return preference_loss(*sums, own.first_better, config.noise).mean()

    @jax.jit
    def learn(key: jax.Array, rows: jax.Array) -> tuple[Any, jax.Array]:
        init_key, order_key = jax.random.split(key)
        params = meshes.unbox(module.init(init_key, center))["params"]

        def step(state: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
            params, opt_state = state
            batch = teaching.take(jax.random.choice(key, rows, (min(config.batch, len(rows)),)))
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, opt_state = tx.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        keys = jax.random.split(order_key, config.steps)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        return params, loss(params, teaching)

    learned = [
        learn(jax.random.fold_in(jax.random.key(config.seed), i), jnp.asarray(own)) for i, own in enumerate(rows)
    ]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for params, _ in learned))
    raw = RewardModel(params, center, scale, jnp.zeros(config.members), jnp.ones(config.members), config.widths)
    rewards = raw.members(frames)
    model = raw.replace(offset=rewards.mean(1), spread=jnp.maximum(rewards.std(1), 1e-6))
    losses = [float(value) for _, value in learned]
    held_losses = [float(loss(member, kept)) for member, _ in learned]
    numbers = {"loss": float(np.mean(losses)), "loss_held_out": float(np.mean(held_losses))}
    return model, {"accuracy": accuracy(model, kept), **numbers}


def accuracy(model: RewardModel, pairs: Pairs) -> float:
    """Share of answers that the model gives, ties left out."""
    better = model(pairs.first).sum(-1) > model(pairs.second).sum(-1)
    clear = np.asarray(pairs.first_better) != 0.5
    return float((np.asarray(better) == (np.asarray(pairs.first_better) > 0.5))[clear].mean())


def disagreement(model: RewardModel, first: jax.Array, second: jax.Array) -> jax.Array:
    """float32[N, k, F] each -> float32[N]: the variance of the members' answers. The pairs that are worth asking about
    are those with the most."""
    sums = (model.members(x).sum(-1) for x in (first, second))
    return jax.nn.sigmoid(jnp.subtract(*sums)).var(0)


def direct_loss(
    better: jax.Array, better_reference: jax.Array, worse: jax.Array, worse_reference: jax.Array, *, beta: float = 0.1
) -> jax.Array:
    """DPO's loss float32[...] of log-probabilities float32[...], by the policy and by the one that it began as."""
    return -jax.nn.log_sigmoid(beta * ((better - better_reference) - (worse - worse_reference)))


@dataclasses.dataclass(frozen=True)
class PreferenceTask:
    """DPO on decisions that stand in pairs: the better one in an even row, the worse one behind it."""

    beta: float = 0.1
    weight: float = 1.0
    name: str = "preference"

    def __call__(self, now: Reconsidered, decisions: Decisions) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_prob, _ = by_level(now.log_prob, decisions.mask, "chunk")
        reference, _ = by_level(decisions.reference, decisions.mask, "chunk")
        better, worse = (slice(start, None, 2) for start in (0, 1))
        loss = direct_loss(log_prob[better], reference[better], log_prob[worse], reference[worse], beta=self.beta)
        right = (log_prob - reference)[better] > (log_prob - reference)[worse]
        return jnp.repeat(loss[:, 0], 2), {"preferred": jnp.repeat(right[:, 0].astype(jnp.float32), 2)}


@dataclasses.dataclass(frozen=True)
class WeightedCloningTask:
    """Do again what turned out well: log-probability weighted by exp(advantage / beta), at most `limit` (AWR, Peng et
    al. 2019, arXiv:1910.00177)."""

    beta: float = 1.0
    limit: float = 20.0
    weight: float = 1.0
    name: str = "cloning"

    def __call__(self, now: Reconsidered, decisions: Decisions) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_prob, counts = by_level(now.log_prob, decisions.mask, "action")
        share = jnp.minimum(jnp.exp(decisions.advantage / self.beta), self.limit)
        return -share * mean_of(log_prob, counts), {"share": share}
