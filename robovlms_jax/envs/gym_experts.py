"""Scripted experts for Gymnasium environments: the environment's own observation -> an action. They see what policies
do not, such as where the goal is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_GAIN, _FASTEST = 6.0, 0.6  # slower than the arm could, so that a reach has about ten steps to learn from


def fetch_reach(seen: Mapping[str, np.ndarray]) -> np.ndarray:
    """FetchReach of gymnasium-robotics: to the goal. float64[4]: xyz, of which 1.0 is 0.05 m, and a blocked gripper."""
    gap = np.asarray(seen["desired_goal"]) - np.asarray(seen["achieved_goal"])
    return np.append(np.clip(_GAIN * gap, -_FASTEST, _FASTEST), 0.0)
