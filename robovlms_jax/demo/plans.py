"""What a policy means to do next, as the page shows it: the path of its hand, and how sure it is."""

from __future__ import annotations

import numpy as np

from robovlms_jax.control.interface import ActionChunk, Observation, Policy
from robovlms_jax.control.robot import CALVIN
from robovlms_jax.demo.world import project


class Remembering:
    """The policy, and the whole of its last chunk, of which only a part is executed."""

    def __init__(self, policy: Policy):
        self._policy, self.robot = policy, CALVIN
        self.chunk: ActionChunk | None = None

    def reset(self, instruction: str) -> None:
        self.chunk = None
        self._policy.reset(instruction)

    def act(self, observation: Observation) -> ActionChunk:
        self.chunk = self._policy.act(observation)
        return self.chunk


def path(begin: np.ndarray, chunk: ActionChunk | None) -> list[list[float]]:
    """The predicted path in the static picture, [right, down, 1 if the gripper is open] for each action, with where it
    begins before them. begin: float[3], m, world."""
    if chunk is None:
        return []
    scale = CALVIN.action[0].measure[0]
    points = np.vstack([begin, begin + np.cumsum(chunk.actions[:, :3], axis=0) * scale])
    opens = np.concatenate([chunk.actions[:1, 6], chunk.actions[:, 6]]) > 0
    return rounded(np.column_stack([project(points), opens]))


def uncertainty(chunk: ActionChunk | None, row: int) -> float | None:
    """Of the action that is executed, in the policy's own measure, which only compares its actions with each other.

    A calibrated policy has intervals, too, and they are not shown: they hold all seven numbers of an action at once, at
    times more millimetres than a step can have.
    """
    if chunk is None or chunk.uncertainty is None:
        return None
    return round(float(chunk.uncertainty[min(row, len(chunk.actions) - 1)]), 4)


def rounded(points: np.ndarray) -> list[list[float]]:
    return [[round(float(x), 4) for x in point] for point in points]
