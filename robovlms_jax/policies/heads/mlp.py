"""MLP policy head: every step by itself (upstream `FCDecoder`, policy_head/base_policy.py)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from robovlms_jax.policies.heads import base
from robovlms_jax.policies.heads.continuous import ContinuousHead, ContinuousHeadConfig, Trunk


@dataclasses.dataclass(frozen=True)
class MLPHeadConfig(ContinuousHeadConfig):
    """Two linear layers on a step's features, then one MLP for the arm (tanh) and one for the gripper (logit)."""

    # With `policy_head` history nothing would remember: that is `one_step`.
    histories: ClassVar[tuple[str, ...]] = ("one_step", "interleaved", "video")

    hidden_size: int = 1024
    """Per action query, as upstream has it."""


@base.register("mlp", MLPHeadConfig)
class MLPHead(ContinuousHead):
    """See `base.ActionHead` for the contract."""

    remembers = False

    def setup(self):
        super().setup()
        width = self.feature_dim * self.num_queries
        self.mlp = Trunk((width // 2, self.config.hidden_size * self.num_queries), self.kernel)

    def encode(self, features: jax.Array, mask: jax.Array) -> jax.Array:
        return self.mlp(features.reshape(*features.shape[:2], -1))
