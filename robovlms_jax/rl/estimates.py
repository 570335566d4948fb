"""The arithmetic of policy gradients: advantages, clipped objectives, divergences. Pure functions of arrays.

Letters: T decisions one after the other, B tables or rows side by side, G trials of one group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def advantages(
    rewards: jax.Array, values: jax.Array, ended: jax.Array, cut: jax.Array, *, discount: float, trace: float
) -> jax.Array:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv:1506.02438).

    Args:
      rewards: float32[T, ...], after each decision.
      values: float32[T + 1, ...], before each decision, and after the last one.
      ended: bool[T, ...], True = the decision led to an end, after which there is nothing to gain.
      cut: bool[T, ...], True = the decision belongs to no trial, or the next one is of another: nothing flows across.
      discount, trace: gamma and lambda, per decision.
    Returns:
      float32[T, ...]; A_t = r_t + gamma V_(t+1) - V_t + gamma lambda A_(t+1), without what lies behind an end.
    """
    goes_on = (~ended).astype(jnp.float32)
    errors = rewards + discount * goes_on * values[1:] - values[:-1]
    flows = discount * trace * goes_on * ~cut

    def back(after: jax.Array, xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        error, flow = xs
        found = error + flow * after
        return found, found

    return jax.lax.scan(back, jnp.zeros_like(values[0]), (errors, flows), reverse=True)[1]


def group_advantages(returns: jax.Array, groups: jax.Array, count: int) -> jax.Array:
    """How much better each trial was than those of its group (GRPO, Shao et al. 2024, arXiv:2402.03300).

    Args:
      returns: float32[N]. groups: int32[N], in [0, count).
      count: number of groups.
    Returns:
      float32[N]: (return - mean) / (std + 1e-6) of its group, the standard deviation with n - 1; 0 in groups where all
      are equal, and in those of one.
    """
    one_hot = jax.nn.one_hot(groups, count, dtype=jnp.float32)
    size = one_hot.sum(0)
    mean = (returns @ one_hot) / jnp.maximum(size, 1.0)
    centred = returns - mean[groups]
    std = jnp.sqrt((jnp.square(centred) @ one_hot) / jnp.maximum(size - 1, 1.0))
    return centred / (std[groups] + 1e-6)


def standardised(values: jax.Array, weights: jax.Array) -> jax.Array:
    """float32[...] with mean 0 and standard deviation 1 over what `weights` float32[...] count."""
    total = jnp.maximum(weights.sum(), 1.0)
    mean = (values * weights).sum() / total
    std = jnp.sqrt((jnp.square(values - mean) * weights).sum() / total)
    return (values - mean) / (std + 1e-6)


def clipped_loss(
    advantage: jax.Array, ratio: jax.Array, *, low: float, high: float, dual: float | None = 3.0
) -> jax.Array:
    """PPO's loss of each entry (Schulman et al. 2017, arXiv:1707.06347), with a wider range upwards ("clip-higher", Yu
    et al. 2025, arXiv:2503.14476) and a bound where the advantage is negative ("dual clip", Ye et al. 2020,
    arXiv:1912.09729).

    Args:
      advantage, ratio: float32[...], pi(a) / pi_old(a).
      low, high: the ratio counts in [1 - low, 1 + high].
      dual: largest loss in units of |advantage| where that is negative; None: without bound.
    """
    loss = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - low, 1 + high))
    if dual is None:
        return loss
    return jnp.where(advantage < 0, jnp.minimum(loss, -dual * advantage), loss)


def divergence(log_prob: jax.Array, reference: jax.Array) -> jax.Array:
    """KL(pi || reference) from actions of pi, float32[...]: exp(-d) - 1 + d with d = log pi - log reference, which is
    unbiased and never negative ("k3", Schulman 2020, joschu.net/blog/kl-approx.html)."""
    difference = log_prob - reference
    return jnp.exp(-difference) - 1 + difference


def value_loss(value: jax.Array, old: jax.Array, target: jax.Array, *, clip: float, delta: float) -> jax.Array:
    """Huber loss of values float32[...] that are held within `clip` of the old ones: the larger of both counts.

    Args:
      clip: 0: they are not held.
      delta: where the loss becomes linear.
    """

    def huber(error: jax.Array) -> jax.Array:
        size = jnp.abs(error)
        return jnp.where(size <= delta, 0.5 * jnp.square(error), delta * (size - 0.5 * delta))

    free = huber(value - target)
    if not clip:
        return free
    return jnp.maximum(free, huber(old + jnp.clip(value - old, -clip, clip) - target))


def explained_variance(value: jax.Array, target: jax.Array, weights: jax.Array) -> jax.Array:
    """1 - Var(target - value) / Var(target), float32[]; 1 = all of it, 0 = no better than a constant."""
    total = jnp.maximum(weights.sum(), 1.0)

    def variance(x: jax.Array) -> jax.Array:
        mean = (x * weights).sum() / total
        return (jnp.square(x - mean) * weights).sum() / total

    return 1 - variance(target - value) / jnp.maximum(variance(target), 1e-8)
