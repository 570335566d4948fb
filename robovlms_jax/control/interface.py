"""What simulators and robots see: observations in, action chunks out. NumPy only, so it runs on the robot's
computer."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

CAMERAS = ("static", "wrist")
"""CALVIN's cameras: `static` looks at the scene, `wrist` rides on the gripper."""

ACTION_DIM = 7
"""Of CALVIN's robot and its like: xyz, Euler xyz, gripper."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """One control step as a robot or simulator reports it.

    images: camera name -> uint8[height, width, 3], RGB.
    proprio: float[P] robot state in the environment's own layout (`RobotSpec.state`), or None.
    executed: float[n, A], the actions executed since the previous observation, for policies that look back at them;
      None says that it was the first of the chunk they predicted then.
    sensors: name -> reading of a sensor that the policy names in `policy.sensors`, of the shape its configuration says:
      what was read since the previous observation. A sensor that is silent has no entry, None or NaN only, and the
      policy goes on without it. "proprio" may stand here instead.
    committed: float[n, A], what is left of the chunk before, row i for the i-th tick after this observation, for
      policies that go on from it (real-time chunking); None: nothing. delay: how many of these rows are executed before
      the answer comes.
    """

    images: Mapping[str, np.ndarray]
    proprio: np.ndarray | None = None
    executed: np.ndarray | None = None
    sensors: Mapping[str, np.ndarray | None] = dataclasses.field(default_factory=dict)
    committed: np.ndarray | None = None
    delay: int = 0


@dataclasses.dataclass(frozen=True)
class ActionChunk:
    """The next C actions, ready to execute in order.

    actions: float32[C, A]; columns as the robot's spec names them, in its units, binary grippers exactly +1 (open) or
      -1 (closed). CALVIN: columns 0:3 translation and 3:6 Euler rotation, relative, 1.0 = 0.02 m and 0.05 rad, world
      frame, column 6 the gripper.
    uncertainty: float32[C], how unsure the policy is of each action, in no unit and of no meaning before it is compared
      with others of the same policy; None: it does not say.
    interval: float32[C, A], half the width of the interval around each number that holds the demonstrated action with
      probability `coverage`, the whole action's numbers at once; 0 for binary grippers. In the robot's units; None
      before calibration.
    """

    actions: np.ndarray
    uncertainty: np.ndarray | None = None
    interval: np.ndarray | None = None
    coverage: float | None = None


class EpisodesFailed(ValueError):
    """A batched call in which some episodes ended with an error and the others took their step.

    failed: slot -> what is wrong; these have no episode any more. chunks: slot -> the answer of every other one.
    """

    def __init__(self, failed: Mapping[int, str], chunks: Mapping[int, ActionChunk]):
        self.failed, self.chunks = dict(failed), dict(chunks)
        super().__init__("; ".join(f"slot {slot}: {text}" for slot, text in self.failed.items()))


@runtime_checkable
class Policy(Protocol):
    """Anything that turns observations into actions."""

    def reset(self, instruction: str) -> None:
        """Start an episode: forget all history and follow `instruction` from here on."""

    def act(self, observation: Observation) -> ActionChunk:
        """Advance the history by one step and predict the next actions."""


@runtime_checkable
class Env(Protocol):
    """Anything a policy can be rolled out in. Rendering happens in `observe` only, so unused frames cost nothing."""

    name: str
    """Printed beside every number that comes from this environment."""

    def reset(self, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None) -> None:
        """Put robot and scene into the given state (float[15], float[24] as CALVIN defines them) or the neutral one."""

    def step(self, action: np.ndarray) -> None:
        """Execute one action float[A], the robot's own; raises ValueError on a wrong shape or a value that is not
        finite."""

    def observe(self) -> Observation:
        """Render the cameras and read the robot."""

    @property
    def info(self) -> Mapping[str, Any]:
        """State that task checkers need."""


def is_slot(slot: object, size: int) -> bool:
    """Whether it numbers one of `size` slots: a whole number from 0 on. -1 is no slot, nor is True."""
    return isinstance(slot, numbers.Integral) and not isinstance(slot, bool) and 0 <= int(slot) < size


def check_slots(slots: Sequence[int], size: int) -> list[int]:
    """Numbers of slots, of a policy that serves `size` episodes, as plain ints.

    Raises ValueError that names the first that is none, or that comes twice.
    """
    checked: list[int] = []
    for slot in slots:
        if not is_slot(slot, size):
            raise ValueError(f"slot {slot!r} is none of the policy's {size}: expected whole numbers 0 ... {size - 1}.")
        if slot in checked:
            raise ValueError(f"slot {slot} comes twice in {list(slots)}; each advances once per call.")
        checked.append(int(slot))
    return checked
