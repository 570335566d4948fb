"""What goes into the safety layer and comes out of it at every tick."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from robovlms_jax.deploy import geometry
from robovlms_jax.deploy.latch import State
from robovlms_jax.deploy.limits import is_number


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the robot knows of itself and its surroundings at a tick.

    position: float[D], one per action dimension that is no gripper, in their order: a tool's x, y, z (m) and angles
      (rad), joints (rad); of a base x, y (m) and heading (rad) of its odometry. NaN where it is unknown and unbounded.
    obstacles: in the frame of `position`. body: the robot's own links that the tool could meet, in the same frame.
    age_s: how old all this is.
    grippers: float[G], of every gripper the command that it is at, for those that were not told anything yet; None
      where that is unknown.
    """

    position: np.ndarray
    obstacles: tuple[geometry.Obstacle, ...] = ()
    body: tuple[geometry.Capsule, ...] = ()
    gripper_force_n: float = 0.0
    age_s: float = 0.0
    grippers: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """What the layer changed or noticed. stage: which check. before, after: of the action, lists of numbers."""

    tick: int
    stage: str
    reason: str
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Decision:
    """action: float64[A], to send; NaN for a gripper that was neither told nor measured (before the first action:
    nothing moves then, so send nothing). stop: None, or {"action": "STOP", "reason": ..., "safe_action": float64[A]}.
    remove_power: ask the drives' own safety function to remove power (stop categories 0 and 1)."""

    action: np.ndarray
    events: tuple[Event, ...]
    state: State
    stop: dict[str, Any] | None = None
    remove_power: bool = False


def wrong_types(measured: Any, grippers: int) -> str:
    """What of a measurement is not what it should be, for it comes from a robot's own code; "" if nothing is."""
    if not isinstance(measured, Measured):
        return f"it is a {type(measured).__name__}, expected safety.Measured"
    for name in ("gripper_force_n", "age_s"):
        if not is_number(getattr(measured, name)):
            return f"{name}={getattr(measured, name)!r}, expected a number"
    for name, kind in (("obstacles", geometry.Obstacle), ("body", geometry.Capsule)):
        parts = getattr(measured, name)
        if not isinstance(parts, tuple | list) or not all(isinstance(part, kind) for part in parts):
            return f"{name}={parts!r:.80}, expected a tuple of what geometry has for it"
    if measured.grippers is not None:
        try:
            shape = np.asarray(measured.grippers, np.float64).shape
        except (TypeError, ValueError):
            shape = None
        if shape != (grippers,):
            return f"grippers={measured.grippers!r:.80}, expected {grippers} numbers or None"
    return ""
