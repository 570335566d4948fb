"""How a policy tries things out, by the kind of its head: how actions are drawn, and how probable they were.

What a policy does in training is drawn from a distribution around what it would do: a Gaussian around regressed
numbers, the softmax over action tokens, one noisy step on the way of a flow. Each gives the logarithm of the
probability of every number of every executed action, which the ratios of policy gradients are made of.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.continuous import ContinuousHeadConfig
from robovlms_jax.policies.heads.discrete import DiscreteHeadConfig
from robovlms_jax.policies.heads.flow import FlowHeadConfig
from robovlms_jax.rl.config import BehaviourConfig
from robovlms_jax.schema import require

Extra = Mapping[str, jax.Array]
"""Parameters of the behaviour itself, name -> array."""


class Behaviour(Protocol):
    """Frozen and static. `head` is bound wherever it is an argument, `prediction` is its, leaves [B, C, ...].
    drawn: the class of what `draw` remembers."""

    drawn: ClassVar[type]

    def parameters(self) -> dict[str, jax.Array]:
        """`Extra` before the first update."""

    def draw(self, head: Any, prediction: Any, extra: Extra, key: jax.Array) -> tuple[jax.Array, Any]:
        """Normalised actions float32[B, C, A] to execute (numbers in [-1, 1], binary grippers -1 or 1), and what
        `log_prob` needs to know of the draw, leaves [B, ...]."""

    def log_prob(self, head: Any, prediction: Any, extra: Extra, drawn: Any) -> tuple[jax.Array, jax.Array]:
        """float32[B, C, A]: of every number, given those of the actions before it. And the entropy, float32[B, C, A];
        0 where it does not depend on parameters."""


@flax.struct.dataclass
class Chosen:
    """A draw that is known by its actions. actions: float32[B, C, A], normalised, not clipped."""

    actions: jax.Array


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Around the numbers of a regression head, with one standard deviation per dimension that is learned; binary
    grippers by their logit. The noise of an action resembles that of the one before (AR(1) over a chunk): white noise
    at 30 Hz shakes the arm and takes it nowhere."""

    spread: tuple[float, ...]
    correlation: float
    floor: float
    temperature: float
    drawn: ClassVar[type] = Chosen

    def parameters(self) -> dict[str, jax.Array]:
        return {"log_std": jnp.log(jnp.asarray(self.spread, jnp.float32))}

    def _log_std(self, extra: Extra) -> jax.Array:
        return jnp.maximum(extra["log_std"], np.log(self.floor))

    def draw(self, head: Any, prediction: Any, extra: Extra, key: jax.Array) -> tuple[jax.Array, Chosen]:
        number_key, gripper_key = jax.random.split(key)
        white = jax.random.normal(number_key, prediction.arm.shape)
        rest = np.sqrt(1 - self.correlation**2)

        def step(before: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
            now = self.correlation * before + rest * noise
            return now, now

        first = white[:, 0]
        later = jax.lax.scan(step, first, jnp.moveaxis(white[:, 1:], 1, 0))[1]
        noise = jnp.concatenate([first[:, None], jnp.moveaxis(later, 0, 1)], axis=1)
        numbers = prediction.arm + jnp.exp(self._log_std(extra)) * noise
        is_open = jax.random.bernoulli(gripper_key, jax.nn.sigmoid(prediction.gripper_logit / self.temperature))
        actions = _ordered(head, numbers, jnp.where(is_open, 1.0, -1.0))
        return jnp.clip(actions, -1, 1), Chosen(actions)

    def log_prob(self, head: Any, prediction: Any, extra: Extra, drawn: Chosen) -> tuple[jax.Array, jax.Array]:
        log_std = self._log_std(extra)
        numbers, grippers = (drawn.actions[..., np.array(c, int)] for c in (head.scaled, head.binary))
        units = (numbers - prediction.arm) * jnp.exp(-log_std)
        expected = self.correlation * jnp.concatenate([jnp.zeros_like(units[:, :1]), units[:, :-1]], axis=1)
        # The first action's noise stands alone, each later one's around what the one before says.
        spread = np.where(np.arange(units.shape[1]) == 0, 1.0, np.sqrt(1 - self.correlation**2))[:, None]
        squared = jnp.square((units - expected) / spread)
        found = -0.5 * (squared + np.log(2 * np.pi)) - log_std - np.log(spread)
        sign = jnp.where(grippers > 0, 1.0, -1.0) / self.temperature
        logit = prediction.gripper_logit
        decided = jax.nn.log_sigmoid(sign * logit)
        wide = 0.5 * np.log(2 * np.pi * np.e) + log_std + np.log(spread)
        share = jax.nn.sigmoid(logit / self.temperature)
        open_or_not = -(
            share * jax.nn.log_sigmoid(logit / self.temperature)
            + (1 - share) * jax.nn.log_sigmoid(-logit / self.temperature)
        )
        entropy = _ordered(head, jnp.broadcast_to(wide, numbers.shape), open_or_not)
        return _ordered(head, found, decided), entropy


def _ordered(head: Any, numbers: jax.Array, grippers: jax.Array) -> jax.Array:
    """Columns of numbers and of binary grippers in the order of the robot's."""
    return jnp.concatenate([numbers, grippers], axis=-1)[..., np.argsort((*head.scaled, *head.binary))]


@flax.struct.dataclass
class Tokens:
    """A draw of action tokens. ids: int32[B, C, A], of the vocabulary."""

    ids: jax.Array


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Over the action ids of a discrete head that decodes all of a chunk's tokens at once; the temperature is part of
    the behaviour, in both probabilities of a ratio."""

    temperature: float
    drawn: ClassVar[type] = Tokens

    def parameters(self) -> dict[str, jax.Array]:
        return {}

    def _logits(self, head: Any, prediction: Any) -> tuple[jax.Array, int]:
        """float32[B, C, A, bins], and the id of the first."""
        first = head.vocab_end - head.config.num_bins
        return prediction.logits[..., first : head.vocab_end] / self.temperature, first

    def draw(self, head: Any, prediction: Any, extra: Extra, key: jax.Array) -> tuple[jax.Array, Tokens]:
        logits, first = self._logits(head, prediction)
        ids = (first + jax.random.categorical(key, logits)).astype(jnp.int32)
        is_binary = np.isin(np.arange(head.action_dim), head.binary)
        values = head.values(ids)
        return jnp.where(is_binary, jnp.where(values > 0, 1.0, -1.0), values), Tokens(ids)

    def log_prob(self, head: Any, prediction: Any, extra: Extra, drawn: Tokens) -> tuple[jax.Array, jax.Array]:
        logits, first = self._logits(head, prediction)
        logs = jax.nn.log_softmax(logits, axis=-1)
        found = jnp.take_along_axis(logs, (drawn.ids - first)[..., None], axis=-1)[..., 0]
        return found, -(jnp.exp(logs) * logs).sum(-1)


@flax.struct.dataclass
class Way:
    """The noisy step of a flow. step: int32[B], which of the integration steps. before, after: float32[B, C, A]."""

    step: jax.Array
    before: jax.Array
    after: jax.Array


def flow_step(time: jax.Array, size: float, noise: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of a flow as a stochastic differential equation with the same marginals (Flow-SDE: Liu et al. 2025,
    arXiv:2505.05470, in this project's direction of time, 0 noise and 1 actions).

    Args:
      time: float32[...], where it begins. size: of the step. noise: a in sigma = a sqrt(r / (1 - r)), r = 1 - time.
    Returns:
      Weights float32[...] of the estimated actions and of the estimated noise in the step's mean, and its standard
      deviation. At the very beginning, where sigma is infinite, the next step's time stands in the denominator.
    """
    rest = 1 - time
    sigma = noise * jnp.sqrt(rest / jnp.where(time > 0, time, size))
    of_noise = rest - size - jnp.square(sigma) * size / (2 * rest)
    return 1 - (rest - size), of_noise, sigma * jnp.sqrt(size)


@dataclasses.dataclass(frozen=True)
class FlowNoise:
    """Noise at one integration step of each decision, drawn at random; all others follow the velocity as in control.
    Only that step's probability counts (the hybrid of arXiv:2510.25889)."""

    noise: float
    drawn: ClassVar[type] = Way

    def parameters(self) -> dict[str, jax.Array]:
        return {}

    def _mean(self, head: Any, prediction: Any, x: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of what follows float32[B, C, A] after integration steps int32[B]: mean, and standard deviation [B, 1, 1]."""
        size = 1.0 / head.config.num_steps
        time = step * size
        velocity = head.velocity(prediction.condition, x, time)
        of_actions, of_noise, std = (w[:, None, None] for w in flow_step(time, size, self.noise))
        at = time[:, None, None]
        return of_actions * (x + (1 - at) * velocity) + of_noise * (x - at * velocity), std

    def draw(self, head: Any, prediction: Any, extra: Extra, key: jax.Array) -> tuple[jax.Array, Way]:
        count, size = prediction.shape[0], 1.0 / head.config.num_steps
        step_key, noise_key = jax.random.split(key)
        chosen = jax.random.randint(step_key, (count,), 0, head.config.num_steps)
        x = head.noise(count)
        noise = jax.random.normal(noise_key, x.shape)
        before = after = x
        for number in range(head.config.num_steps):
            here = (chosen == number)[:, None, None]
            mean, std = self._mean(head, prediction, x, jnp.full(count, number))
            straight = x + size * head.velocity(prediction.condition, x, jnp.full(count, number * size))
            following = jnp.where(here, mean + std * noise, straight)
            before, after = jnp.where(here, x, before), jnp.where(here, following, after)
            x = following
        is_binary = np.isin(np.arange(head.action_dim), head.binary)
        actions = jnp.where(is_binary, jnp.where(x > 0, 1.0, -1.0), jnp.clip(x, -1, 1))
        return actions, Way(chosen, before, after)

    def log_prob(self, head: Any, prediction: Any, extra: Extra, drawn: Way) -> tuple[jax.Array, jax.Array]:
        mean, std = self._mean(head, prediction, drawn.before, drawn.step)
        found = -0.5 * (jnp.square((drawn.after - mean) / std) + np.log(2 * np.pi)) - jnp.log(std)
        return found, jnp.zeros_like(found)


def units(policy: PolicyConfig) -> str:
    """What the numbers of a draw mean (JSON): draws that mean something else have no probability by this policy."""
    head, meaning = policy.head, dataclasses.asdict(policy.normalizer)
    if isinstance(head, DiscreteHeadConfig):
        names = ("num_bins", "low", "high", "binning", "quantile_edges", "vocab_end")
        meaning |= {f"head.{name}": getattr(head, name) for name in names}
    if isinstance(head, FlowHeadConfig):
        meaning |= {"head.num_steps": head.num_steps}
    return json.dumps(meaning)


def make(policy: PolicyConfig, config: BehaviourConfig) -> Behaviour:
    """The behaviour for a policy's head.

    Raises ValueError for a head whose actions have no probability here; says which have.
    """
    head, numbers = policy.head, len(policy.predicted.scaled)
    require(
        not policy.shared.names,
        "policy.other_heads='shared' is not supported by reinforcement; use a policy with a head of its own.",
    )
    if isinstance(head, ContinuousHeadConfig):
        spread = config.spread * (numbers if len(config.spread) == 1 else 1)
        require(
            len(spread) == numbers,
            f"behaviour.spread={config.spread} has {len(config.spread)} numbers; expected one, or {numbers}, one per "
            f"dimension of robot {policy.robot.name!r} that is no binary gripper.",
        )
        return Gaussian(spread, config.correlation, config.floor, config.temperature)
    if isinstance(head, DiscreteHeadConfig):
        require(
            head.decoding == "parallel",
            "policy.head.decoding='autoregressive' chooses each token by those before it, and drawing them is not "
            "supported by reinforcement; use a policy trained with policy.head.decoding='parallel'.",
        )
        return Softmax(config.temperature)
    if isinstance(head, FlowHeadConfig):
        return FlowNoise(config.flow_noise)
    raise ValueError(
        f"reinforcement knows no probabilities of the actions of a {type(head).__name__}; it takes heads that regress "
        "(mlp, lstm, gpt, attention), discrete ones and flow."
    )
