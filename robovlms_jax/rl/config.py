"""Reinforcement learning on PlayTable."""

from __future__ import annotations

import dataclasses
from typing import Literal

from robovlms_jax import schema
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("behaviour")
class BehaviourConfig:
    """How the policy tries things out while it learns. What it serves is without chance, as before."""

    spread: tuple[float, ...] = (0.1,)
    """Regression heads: standard deviation of each number at the beginning, in normalised action units; one for all, or
    one per dimension. It is learned. A policy's error on validation data is a good first value."""
    floor: float = 0.03
    """Smallest standard deviation."""
    correlation: float = 0.8
    """How much the noise of an action resembles that of the one before in its chunk; 0: white noise."""
    temperature: float = 1.0
    """Divides logits, of binary grippers and of discrete heads."""
    flow_noise: float = 0.5
    """Flow heads: size of the noise, a in sigma = a sqrt(r / (1 - r))."""

    def __post_init__(self):
        require(
            len(self.spread) > 0 and min(self.spread) > 0, f"behaviour.spread={self.spread} must be positive numbers."
        )
        require(self.floor > 0, f"behaviour.floor={self.floor} must be positive.")
        require(0 <= self.correlation < 1, f"behaviour.correlation={self.correlation} must lie in [0, 1).")
        require(self.temperature > 0, f"behaviour.temperature={self.temperature} must be positive.")
        require(self.flow_noise > 0, f"behaviour.flow_noise={self.flow_noise} must be positive.")


@dataclasses.dataclass(frozen=True)
@schema.checked("update")
class UpdateConfig:
    """What an update makes of what was tried. Defaults as published for VLAs (RL4VLA, arXiv:2505.19789; RLinf-VLA,
    arXiv:2510.06710), but for the number of decisions."""

    method: Literal["ppo", "grpo"] = "ppo"
    """ppo: advantages from a value function. grpo: compared with other trials from the same state, without one."""
    discount: float = 0.99
    """Per decision."""
    trace: float = 0.95
    """Lambda of the advantage estimates (ppo)."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    """Largest loss in units of |advantage| where that is negative; 0: without bound."""
    level: Literal["chunk", "action", "token"] = "action"
    """What has a ratio of its own: all that is executed of a chunk; each action; each number."""
    epochs: int = 1
    """How often each decision is learned from."""
    minibatches: int = 4
    """Parts of all decisions, an optimizer step each."""
    value_weight: float = 0.5
    value_clip: float = 0.2
    """How far a value may move from the old one and still count in full; 0: any."""
    value_delta: float = 10.0
    """Where the value's Huber loss becomes linear."""
    value_widths: tuple[int, ...] = (512, 128)
    """Hidden layers of the value function, on the hidden state of the first action query."""
    reward_scale: float = 0.1
    """A learned reward has a spread of 1 per decision; times this. Doing the task, where nothing is learned, is worth
    1."""
    entropy_weight: float = 0.0
    divergence_weight: float = 0.0
    """Weight of the divergence from the policy that learning began with. Large for learned rewards (0.01 to 0.1)."""
    divergence_stop: float = 0.05
    """An iteration ends when the policy has moved so far from the one that tried things out; 0: never."""

    def __post_init__(self):
        require(0 < self.discount <= 1, f"update.discount={self.discount} must lie in (0, 1].")
        require(0 <= self.trace <= 1, f"update.trace={self.trace} must lie in [0, 1].")
        for field in ("epochs", "minibatches"):
            require(getattr(self, field) >= 1, f"update.{field}={getattr(self, field)} must be at least 1.")
        for field in ("clip_low", "clip_high", "value_delta", "reward_scale"):
            require(getattr(self, field) > 0, f"update.{field}={getattr(self, field)} must be positive.")
        for field in (
            *("dual_clip", "value_weight", "value_clip", "entropy_weight", "divergence_weight", "divergence_stop"),
        ):
            require(getattr(self, field) >= 0, f"update.{field}={getattr(self, field)} must not be negative.")
        require(self.clip_low < 1, f"update.clip_low={self.clip_low} must be below 1.")
        require(
            self.dual_clip == 0 or self.dual_clip > 1, f"update.dual_clip={self.dual_clip} must be 0 (off) or above 1."
        )
        require(
            all(width >= 1 for width in self.value_widths),
            f"update.value_widths={self.value_widths} must be at least 1 each.",
        )
