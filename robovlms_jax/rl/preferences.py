"""Rewards from preferences (Christiano et al. 2017, arXiv:1706.03741): which of two segments is better, answered many
times, makes an ensemble of reward functions. What needs none is in `rl.direct`.

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

from robovlms_jax import schema
from robovlms_jax.nn.linear import Dense
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.schema import require

_STILL, _SILENT = 1e-4, 1e6
"""Numbers of frames with a smaller standard deviation than this (a tenth of a millimetre; flags: never changed) say
nothing: their scale is so large that they count nothing."""
_FARTHEST = 10.0
"""Standard deviations: where a number goes further, rewards know nothing, and count it as if it were there."""


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

    def log_share(difference: jax.Array) -> jax.Array:
        """By logarithms: without noise, a share that is rounded to 0 or 1 would have an infinite loss."""
        given = jnp.log1p(-noise) + jax.nn.log_sigmoid(difference)
        return jnp.logaddexp(given, jnp.log(noise / 2)) if noise else given

    return -first_better * log_share(first - second) - (1 - first_better) * log_share(second - first)


class Reward(nn.Module):
    """One member: float32[..., F] -> float32[...], the reward of a frame.

    choices: see `RewardConfig`.
    """

    widths: tuple[int, ...]
    choices: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        chosen = 0.0
        if self.choices:
            own = Dense(self.choices, (None, None), name="own")(x[..., : -self.choices])
            chosen = (own * x[..., -self.choices :]).sum(-1)
            if not self.widths:
                return chosen
        for layer, width in enumerate(self.widths):
            x = jax.nn.gelu(Dense(width, (None, "hidden"), name=f"layer_{layer}")(x))
        return chosen + Dense(1, ("hidden", None), name="out")(x)[..., 0]


@dataclasses.dataclass(frozen=True)
@schema.checked("reward")
class RewardConfig:
    """How rewards are learned from answers."""

    members: int = 3
    """Of the ensemble, each on pairs drawn with replacement."""
    widths: tuple[int, ...] = (128, 128)
    """Hidden layers of each."""
    choices: int = 0
    """The last so many numbers of a frame say which task it is (1 at one of them, 0 elsewhere), and each task has a
    linear reward of its own, beside the hidden layers if there are any; 0: hidden layers alone."""
    noise: float = 0.1
    """Share of answers that are taken for random."""
    learning_rate: float = 1e-3
    decay: float = 1e-2
    """Weight decay, so that many parameters do not learn few answers by heart."""
    steps: int = 500
    batch: int = 128
    held_out: float = 0.2
    """Share of the pairs that measure and do not teach."""
    seed: int = 0

    def __post_init__(self):
        for field in ("members", "steps", "batch"):
            require(getattr(self, field) >= 1, f"reward.{field}={getattr(self, field)} must be at least 1.")
        require(
            all(width >= 1 for width in self.widths), f"reward.widths={self.widths} must be at least 1 each, or none."
        )
        for field in ("choices", "seed"):
            require(getattr(self, field) >= 0, f"reward.{field}={getattr(self, field)} must not be negative.")
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
    choices: int = flax.struct.field(pytree_node=False, default=0)

    @jax.jit
    def members(self, frames: jax.Array) -> jax.Array:
        """float32[..., F] -> float32[M, ...], mean 0 and standard deviation 1 over what was learned from."""
        x = _standardised(frames, self.center, self.scale)
        raw = jax.vmap(lambda params: Reward(self.widths, self.choices).apply({"params": params}, x))(self.params)
        shape = (-1, *[1] * (raw.ndim - 1))
        return (raw - self.offset.reshape(shape)) / self.spread.reshape(shape)

    def __call__(self, frames: jax.Array) -> jax.Array:
        """float32[..., F] -> float32[...], the mean of the members."""
        return self.members(frames).mean(0)


def _standardised(frames: jax.Array, center: jax.Array, scale: jax.Array) -> jax.Array:
    """Policies that learn go where no answer has been: a frame with a block in the hand, which no answer had, would be
    worth more than all others together."""
    return jnp.clip((frames - center) / scale, -_FARTHEST, _FARTHEST)


def _center_and_scale(frames: jax.Array, choices: int) -> tuple[jax.Array, jax.Array]:
    """float32[F] each, of frames float32[n, F], whose last numbers are choices and stay as they are."""
    chosen = jnp.arange(frames.shape[-1]) >= frames.shape[-1] - choices
    scale = scale_of(frames.std(0))
    return jnp.where(chosen, 0.0, frames.mean(0)), jnp.where(chosen, 1.0, scale)


def scale_of(std: jax.Array) -> jax.Array:
    """float32[F], by which numbers of frames of such standard deviations are divided."""
    return jnp.where(std > _STILL, std, _SILENT)


def fit(pairs: Pairs, config: RewardConfig, held: Pairs | None = None) -> tuple[RewardModel, dict[str, float]]:
    """Learn rewards from answers.

    Args:
      held: pairs that measure; None: a share of the pairs, at random.
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
    pairs = jax.tree.map(jnp.asarray, pairs)
    rng = np.random.default_rng(config.seed)
    held, teaching = _part(pairs, config.held_out, rng) if held is None else (held, pairs)
    frames = jnp.concatenate([teaching.first, teaching.second]).reshape(-1, pairs.first.shape[-1])
    center, scale = _center_and_scale(frames, config.choices)
    count = len(teaching.first_better)
    rows = rng.integers(count, size=(config.members, count))  # each member's own pairs
    module = Reward(config.widths, config.choices)
    tx = optax.adamw(config.learning_rate, weight_decay=config.decay)

    def loss(params: Any, own: Pairs) -> jax.Array:
        both = (_standardised(x, center, scale) for x in (own.first, own.second))
        sums = (module.apply({"params": params}, x).sum(-1) for x in both)
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
    raw = RewardModel(
        params, center, scale, jnp.zeros(config.members), jnp.ones(config.members), config.widths, config.choices
    )
    rewards = raw.members(frames)
    model = raw.replace(offset=rewards.mean(1), spread=jnp.maximum(rewards.std(1), 1e-6))
    losses = [(float(value), float(jax.jit(loss)(member, held))) for member, value in learned]
    numbers = dict(zip(("loss", "loss_held_out"), np.mean(losses, axis=0).tolist(), strict=True))
    return model, {"accuracy": accuracy(model, held), **numbers}


def _part(pairs: Pairs, share: float, rng: np.random.Generator) -> tuple[Pairs, Pairs]:
    """A share of the pairs, at random, and the others."""
    order = rng.permutation(len(pairs.first_better))
    count = int(len(order) * share)
    require(0 < count < len(order), f"{len(order)} pairs are too few to hold out a share of {share}.")
    return pairs.take(order[:count]), pairs.take(order[count:])


def accuracy(model: RewardModel, pairs: Pairs) -> float:
    """Share of answers that the model gives, ties left out. Raises ValueError where there is none but ties."""
    better = model(pairs.first).sum(-1) > model(pairs.second).sum(-1)
    clear = np.asarray(pairs.first_better) != 0.5
    require(clear.any(), f"none of {len(clear)} pairs that measure has a clear answer; give more answers.")
    return float((np.asarray(better) == (np.asarray(pairs.first_better) > 0.5))[clear].mean())


def disagreement(model: RewardModel, first: jax.Array, second: jax.Array) -> jax.Array:
    """float32[N, k, F] each -> float32[N]: the variance of the members' answers. The pairs that are worth asking about
    are those with the most."""
    sums = (model.members(x).sum(-1) for x in (first, second))
    return jax.nn.sigmoid(jnp.subtract(*sums)).var(0)
