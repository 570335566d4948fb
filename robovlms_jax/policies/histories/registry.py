"""Which object stands for a history's name."""

from __future__ import annotations

from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.histories.apart import FramesApart
from robovlms_jax.policies.histories.base import History
from robovlms_jax.policies.histories.interleaved import Interleaved
from robovlms_jax.policies.histories.video import Video


def make(config: PolicyConfig) -> History:
    """The history of a policy."""
    num_tokens = config.chunk * config.action_dim if config.is_autoregressive else 0
    if config.history == "interleaved":
        return Interleaved(config.window, num_tokens, config.reencode_every)
    if config.history == "video":
        return Video(config.window, len(config.cameras), num_tokens)
    return FramesApart(config.window, num_tokens)
