"""What is learned from decisions that were tried: several losses on one forward pass, as tasks are on demonstrations.

The parameters are the policy's and, under `rl/`, those of its behaviour and of the critic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies.vla import VLA, Carry
from robovlms_jax.rl import estimates
from robovlms_jax.rl.behaviours import Behaviour
from robovlms_jax.rl.config import UpdateConfig
from robovlms_jax.rl.critic import Critic
from robovlms_jax.rl.rollouts import prepared
from robovlms_jax.types import Inputs

Metrics = dict[str, jax.Array]

SCOPE = "rl"
"""Where the parameters lie that only learning needs."""

_LARGEST = 20.0
"""Logarithms of ratios are held within: of a whole chunk they are sums of dozens, and an infinite ratio of a decision
whose advantage is 0, as of those that are held, would be no number."""


@flax.struct.dataclass
class View:
    """What the policy knew before a decision, so that it can be decided again; leaves [N, ...].

    seen: what it was shown, and carry: what it remembered, all of it. Or, where only the head learns, features
      [N, Q, D] and the head's part of the carry.
    """

    seen: Inputs | None
    features: jax.Array | None
    carry: Any


@flax.struct.dataclass
class Decisions:
    """N decisions to learn from, and what became of them.

    view: what was known. drawn: what was drawn (`Behaviour.draw`).
    mask: bool[N, E], which of the E actions were executed; none where a decision is not to be learned from.
    log_prob: float32[N, E, A], of what was drawn; reference: the same by the policy that learning began with.
    value, advantage, target: float32[N]. held: bool[N], of a task that is not trained, and stays as it was.
    """

    view: View
    drawn: Any
    mask: jax.Array
    log_prob: jax.Array
    reference: jax.Array
    value: jax.Array
    advantage: jax.Array
    target: jax.Array
    held: jax.Array

    @property
    def counts(self) -> jax.Array:
        """float32[N], 1 where anything was executed."""
        return self.mask.any(-1).astype(jnp.float32)


class Reconsidered(NamedTuple):
    """One forward pass over decisions: log_prob, entropy float32[N, E, A] and value float32[N]."""

    log_prob: jax.Array
    entropy: jax.Array
    value: jax.Array


class Task(Protocol):
    """One loss on reconsidered decisions. name: in metrics; weight: in the sum.

    Returns float32[N], the loss of each decision, and further numbers of each, float32[N], for metrics.
    """

    name: str
    weight: float

    def __call__(self, now: Reconsidered, decisions: Decisions) -> tuple[jax.Array, dict[str, jax.Array]]: ...


def by_level(x: jax.Array, mask: jax.Array, level: str) -> tuple[jax.Array, jax.Array]:
    """float32[N, E, A] log-probabilities and bool[N, E] -> those of what has a ratio of its own, float32[N, U], and
    which count, bool[N, U]."""
    masked = jnp.where(mask[..., None], x, 0.0)
    if level == "chunk":
        return masked.sum((1, 2))[:, None], mask.any(1, keepdims=True)
    if level == "action":
        return masked.sum(2), mask
    return masked.reshape(len(x), -1), jnp.repeat(mask, x.shape[2], axis=1)


def mean_of(x: jax.Array, mask: jax.Array) -> jax.Array:
    """float32[N, U] -> float32[N], over what counts."""
    return jnp.where(mask, x, 0.0).sum(1) / jnp.maximum(mask.sum(1), 1)


@dataclasses.dataclass(frozen=True)
class PolicyTask:
    """The clipped policy gradient."""

    low: float
    high: float
    dual: float | None
    level: str
    weight: float = 1.0
    name: str = "policy"

    def __call__(self, now: Reconsidered, decisions: Decisions) -> tuple[jax.Array, dict[str, jax.Array]]:
        ratio, counts, numbers = _moved(now, decisions, self.level)
        advantage = decisions.advantage[:, None]
        loss = estimates.clipped_loss(advantage, ratio, low=self.low, high=self.high, dual=self.dual)
        clipped = (ratio < 1 - self.low) | (ratio > 1 + self.high)
        return mean_of(loss, counts), {"clipped": mean_of(clipped.astype(jnp.float32), counts), **numbers}


def _moved(now: Reconsidered, decisions: Decisions, level: str) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Ratios float32[N, U], which count, and their mean and how far the policy has moved, of each decision."""
    difference, counts = by_level(now.log_prob - decisions.log_prob, decisions.mask, level)
    ratio = jnp.exp(jnp.clip(difference, -_LARGEST, _LARGEST))
    # From actions of the old policy: E[r - 1 - log r].
    return ratio, counts, {"ratio": mean_of(ratio, counts), "moved": mean_of(ratio - 1 - difference, counts)}


@dataclasses.dataclass(frozen=True)
class WeightedCloningTask:
    """Do again what turned out well: log-probability weighted by exp(advantage / beta), at most `limit` (AWR, Peng et
    al. 2019, arXiv:1910.00177). Tasks that are held teach nothing."""

    level: str = "action"
    beta: float = 1.0
    limit: float = 20.0
    weight: float = 1.0
    name: str = "cloning"

    def __call__(self, now: Reconsidered, decisions: Decisions) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_prob, counts = by_level(now.log_prob, decisions.mask, self.level)
        share = jnp.minimum(jnp.exp(decisions.advantage / self.beta), self.limit)
        share = jnp.where(decisions.held, 0.0, share)
        return -share * mean_of(log_prob, counts), {"share": share, **_moved(now, decisions, self.level)[2]}


@dataclasses.dataclass(frozen=True)
class ValueTask:
    """The critic's error."""

    weight: float
    clip: float
    delta: float
    name: str = "value"

    def __call__(self, now: Reconsidered, decisions: Decisions) -> tuple[jax.Array, dict[str, jax.Array]]:
        return estimates.value_loss(now.value, decisions.value, decisions.target, clip=self.clip, delta=self.delta), {}


@dataclasses.dataclass(frozen=True)
class DivergenceTask:
    """The divergence from the policy that learning began with, of the actions that were tried."""

    weight: float
    level: str
    name: str = "divergence"

    def __call__(self, now: Reconsidered, decisions: Decisions) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_prob, counts = by_level(now.log_prob, decisions.mask, self.level)
        reference, _ = by_level(decisions.reference, decisions.mask, self.level)
        return mean_of(estimates.divergence(log_prob, reference), counts), {}


@dataclasses.dataclass(frozen=True)
class HoldTask:
    """The same divergence, in the tasks that are held alone. It is estimated from actions that were drawn, and its
    gradient vanishes with the divergence: what has not moved is not pushed about."""

    weight: float
    level: str
    name: str = "hold"

    def __call__(self, now: Reconsidered, decisions: Decisions) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_prob, counts = by_level(now.log_prob, decisions.mask & decisions.held[:, None], self.level)
        reference, _ = by_level(decisions.reference, decisions.mask, self.level)
        return mean_of(estimates.divergence(log_prob, reference), counts), {}


@dataclasses.dataclass(frozen=True)
class EntropyTask:
    """Minus the entropy of the behaviour."""

    weight: float
    name: str = "entropy"

    def __call__(self, now: Reconsidered, decisions: Decisions) -> tuple[jax.Array, dict[str, jax.Array]]:
        return -mean_of(now.entropy.mean(-1), decisions.mask), {}


def tasks_of(config: UpdateConfig) -> tuple[Task, ...]:
    """What a configuration asks for."""
    gradient = PolicyTask(config.clip_low, config.clip_high, config.dual_clip or None, config.level)
    out: list[Task] = [WeightedCloningTask(config.level) if config.method == "awr" else gradient]
    if config.method != "grpo" and config.value_weight:
        out.append(ValueTask(config.value_weight, config.value_clip, config.value_delta))
    if config.divergence_weight:
        out.append(DivergenceTask(config.divergence_weight, config.level))
    if config.hold_weight:
        out.append(HoldTask(config.hold_weight, config.level))
    if config.entropy_weight:
        out.append(EntropyTask(config.entropy_weight))
    return tuple(out)


@dataclasses.dataclass(frozen=True, eq=False)
class Learner:
    """A policy with its behaviour and its critic, as functions of parameters."""

    model: VLA
    behaviour: Behaviour
    widths: tuple[int, ...]

    @property
    def critic(self) -> Critic:
        return Critic(self.widths)

    def extra_params(self, key: jax.Array) -> dict[str, Any]:
        """What lies under `rl/` in the beginning."""
        shape = jnp.zeros((1, 1, self.model.vlm.width))
        value = meshes.unbox(self.critic.init(key, shape)["params"])
        return {"behaviour": self.behaviour.parameters(), "value": value}

    def perceive(self, params: Any, seen: Inputs, carry: Carry, active: jax.Array) -> tuple[jax.Array, Carry]:
        """`VLA.perceive` of what was seen, as it was taken."""
        inputs = prepared(self.model, seen)
        return self.model.apply({"params": params}, inputs, carry, active, method="perceive")

    def head(self, params: Any, features: jax.Array, carry: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        """Draw: normalised actions float32[B, C, A], what was drawn, the head's new carry."""

        def draw(model: VLA) -> tuple[Any, Any, Any]:
            prediction, after = model.predict(features, carry)
            return *self.behaviour.draw(model.outputs, prediction, behaviour_of(params), key), after

        return nn.apply(draw, self.model)({"params": _policy(params)})

    def log_prob(self, params: Any, features: jax.Array, carry: Any, drawn: Any) -> tuple[jax.Array, jax.Array]:
        """float32[B, C, A] of what was drawn, and the entropy."""

        def evaluate(model: VLA) -> tuple[jax.Array, jax.Array]:
            prediction, _ = model.predict(features, carry)
            return self.behaviour.log_prob(model.outputs, prediction, behaviour_of(params), drawn)

        return nn.apply(evaluate, self.model)({"params": _policy(params)})

    def value(self, params: Any, features: jax.Array) -> jax.Array:
        """float32[B]."""
        return self.critic.apply({"params": params[SCOPE]["value"]}, features)

    def reconsider(self, params: Any, view: View, drawn: Any, actions: int) -> Reconsidered:
        """Decide again what was decided; of the first `actions` of each chunk."""
        if view.features is None:
            active = jnp.ones(len(view.seen.step_mask), bool)
            features, context = self.perceive(_policy(params), view.seen, view.carry, active)
            carry = context.head
        else:
            features, carry = view.features, view.carry
        log_prob, entropy = self.log_prob(params, features, carry, drawn)
        return Reconsidered(log_prob[:, :actions], entropy[:, :actions], self.value(params, features))


def behaviour_of(params: Mapping[str, Any]) -> Mapping[str, jax.Array]:
    """Those of the behaviour; paths do not tell an empty dict from none."""
    return params[SCOPE].get("behaviour", {})


def _policy(params: Mapping[str, Any]) -> dict[str, Any]:
    """The policy's own parameters."""
    return {name: x for name, x in params.items() if name != SCOPE}


@dataclasses.dataclass(frozen=True, eq=False)
class DecisionLoss:
    """What is minimised over decisions, a `training.step.Loss`."""

    learner: Learner
    tasks: tuple[Task, ...]

    def count(self, batch: Decisions) -> jax.Array:
        """float32[]: decisions that count."""
        return jnp.maximum(batch.counts.sum(), 1.0)

    def __call__(self, params: Any, batch: Decisions, key: jax.Array | None, count: Any) -> tuple[jax.Array, Metrics]:
        """Loss and metrics, sums over the whole batch's `count`."""
        now = self.learner.reconsider(params, batch.view, batch.drawn, batch.mask.shape[1])
        counts, total, metrics = batch.counts, jnp.float32(0.0), {}
        for task in self.tasks:
            loss, numbers = task(now, batch)
            metrics[f"loss_{task.name}"] = (loss * counts).sum() / count
            metrics |= {name: (x * counts).sum() / count for name, x in numbers.items()}
            total = total + task.weight * metrics[f"loss_{task.name}"]
        return total, {**metrics, "loss": total}


def mask_of(steps: jax.Array, actions: int) -> jax.Array:
    """int32[...] executed actions -> bool[..., E], which of E."""
    return jnp.asarray(np.arange(actions)) < steps[..., None]
