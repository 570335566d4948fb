"""A world on a line, for the tests of rollouts: actions move a point, tasks ask to move it by so much."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.evaluation.rollout import SuccessCriterion, Trial


class LineEnv:
    """The point is at `info["x"]`; how often it was looked at is in `renders`."""

    name = "Line"

    def __init__(self, fail: Callable[[LineEnv], bool] = lambda env: False):
        self.x, self.renders, self.resets, self.restarts = 0.0, 0, 0, 0
        self.steps = 0
        self._fail = fail

    def reset(self, robot_obs=None, scene_obs=None, *, x: float = 0.0) -> None:
        self.x = x
        self.resets += 1

    def step(self, action: np.ndarray) -> None:
        self.steps += 1
        if self._fail(self):
            raise RuntimeError("the line broke")
        self.x += float(action[0])

    def observe(self) -> Observation:
        self.renders += 1
        level = np.uint8(np.clip(self.x * 20, 0, 255))
        return Observation(
            {"static": np.full((8, 8, 3), level), "wrist": np.full((4, 4, 3), 90, np.uint8)}, np.array([self.x])
        )

    def restart(self) -> None:
        self.restarts += 1

    @property
    def info(self):
        return {"x": self.x}


class LinePolicy:
    """Goes +1 per step when told to "go", stays when told to "stay"; keeps a log of what it is asked."""

    def __init__(self, chunk: int = 1, gripper: float = 1.0):
        self.chunk, self.gripper = chunk, gripper
        self.instructions: dict[int, str] = {}
        self.resets: list[tuple[int, str]] = []
        self.calls: list[list[int]] = []

    def reset(self, slots: Sequence[int], instructions: Sequence[str]) -> None:
        for slot, instruction in zip(slots, instructions, strict=True):
            self.instructions[slot] = instruction
            self.resets.append((slot, instruction))

    def act(self, observations: Sequence[Observation], slots: Sequence[int]) -> list[ActionChunk]:
        self.calls.append(list(slots))
        return [self._chunk(self.instructions[slot]) for slot in slots]

    def _chunk(self, instruction: str) -> ActionChunk:
        actions = np.zeros((self.chunk, 7), np.float32)
        actions[:, 0] = instruction.startswith("go")
        actions[:, 6] = self.gripper
        return ActionChunk(actions)


def moved(starts, nows) -> list[set[str]]:
    """ "3" is done once the point has moved by 3 or more since the task was given."""
    return [{str(d) for d in range(1, int(now["x"] - start["x"]) + 1)} for start, now in zip(starts, nows)]


CRITERION = SuccessCriterion(max_steps=10, completed=moved)


def trial(index: int, *distances: int, instruction: str = "go", **labels) -> Trial:
    names = tuple(map(str, distances))
    return Trial(index, {"x": float(index)}, names, tuple(f"{instruction} {name}" for name in names), labels)
