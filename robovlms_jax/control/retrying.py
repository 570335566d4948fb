"""Trying again: a policy that gets nowhere has its hand moved a little way at random, and begins anew there.

A policy that sees one moment does the same wherever it is in the same place: it stands still for good, or misses in the
same way again. From another place it often succeeds. NumPy only, so it runs on the robot's computer.
"""

from __future__ import annotations

import dataclasses
import math
import zlib

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.control.interface import Observation

_UPWARD = 0.7
"""Added to the upward part of a random direction (a normal draw's size): away from what the hand may have hit."""


@dataclasses.dataclass(frozen=True)
class Retry:
    """When a policy that has not ended its task tries again from another place, for robots that are sent changes of
    the hand's position. Whether a task is done is not asked: whoever judges that gives the next instruction, which
    begins the count anew."""

    after: int = 0
    """Control steps since the instruction or the last move after which the hand is moved; 0: never for that reason.
    Choose more than the slowest task takes: what is under way is broken off."""
    still: int = 0
    """Moved sooner where, over so many control steps, the hand was within a box of `within_m`; 0: not watched."""
    within_m: float = 0.01
    """Edge of that box, in metres."""
    steps: int = 12
    """Control steps that a move takes. The gripper stays as it was."""
    distance_m: float = 0.3
    """Length of a move, in metres; less where the robot's bounds allow less in these steps."""
    seed: int = 0
    """Of the directions: random, rather upwards than downwards. They also depend on the instruction and on where the
    hand began, and on nothing else."""

    def __post_init__(self):
        for field in ("after", "still"):
            if getattr(self, field) < 0:
                raise ValueError(f"execution.retry.{field}={getattr(self, field)} must not be negative; 0: not used.")
        if self.steps < 1:
            raise ValueError(f"execution.retry.steps={self.steps} must be at least 1.")
        for field in ("within_m", "distance_m"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"execution.retry.{field}={value} must be a finite length above 0, in metres.")
        if not self.still and self.within_m != Retry.within_m:
            raise ValueError(
                f"execution.retry.within_m={self.within_m} says what standing still is, which is not watched: set "
                "execution.retry.still, too."
            )
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if changed and not self.on:
            raise ValueError(
                f"execution.retry has {', '.join(changed)} but no time: set execution.retry.after or .still, too."
            )

    @property
    def on(self) -> bool:
        return self.after > 0 or self.still > 0

    @property
    def label(self) -> str:
        """For tables, e.g. "retry after 90 or 30 still"; "" where nothing is tried again. Fields at their defaults are
        not said."""
        if not self.on:
            return ""
        when = [str(self.after)] * (self.after > 0) + [f"{self.still} still"] * (self.still > 0)
        rest = [
            f"{field.name} {getattr(self, field.name)}"  # whole: other settings are other results
            for field in dataclasses.fields(self)
            if field.name not in ("after", "still") and getattr(self, field.name) != field.default
        ]
        return ", ".join([f"retry after {' or '.join(when)}", *rest])


class Attempts:
    """One episode's attempts: says when its hand is to be moved, and how.

    Raises ValueError for a robot whose hand it cannot move: it needs one hand, three neighbouring actions that are
    changes of its position in a unit of length, each of which may go both ways, and for `still` the position among the
    states.
    """

    def __init__(self, retry: Retry, robot: robots.RobotSpec):
        self._retry, self._robot = retry, robot
        self._columns = _columns(robot.action, "delta", f"actions of robot {robot.name!r}") if retry.on else ()
        for dimension in (robot.action[column] for column in self._columns):
            if not dimension.low < 0 < dimension.high:
                raise ValueError(
                    f"execution.retry moves the hand any way, but the action {dimension.name!r} of robot "
                    f"{robot.name!r} lies in {dimension.low:g} to {dimension.high:g}. Leave it out for this robot."
                )
        self._places = _columns(robot.state, "absolute", f"states of robot {robot.name!r}") if retry.still else ()
        self.begin("")

    def begin(self, instruction: str) -> None:
        """A new episode, or a new instruction in it."""
        self.instruction, self._count = instruction, 0
        self._origin = b""
        self._again()
        self._last: np.ndarray | None = None

    def _again(self) -> None:
        self._steps = 0
        self._path: list[tuple[int, np.ndarray]] = []
        """Where the hand was (m), and after how many steps of this attempt; one entry at least as old as `still`."""

    def move(self, observation: Observation) -> np.ndarray | None:
        """float32[steps, A] to execute now instead of what the policy would say, where it is time for another
        attempt, which begins when `did` hears of it; otherwise None. Raises ValueError for an observation without the
        position that `still` needs."""
        retry = self._retry
        if not retry.on:
            return None
        if not self._origin:
            self._origin = np.asarray(() if observation.proprio is None else observation.proprio, np.float32).tobytes()
        stuck = self._stuck(observation) if retry.still else False
        late = 0 < retry.after <= self._steps
        if self._last is None or not (stuck or late):
            return None
        rows = np.tile(self._rest(), (retry.steps, 1))
        rows[:, self._columns] = self._step()
        return rows

    def did(self, actions: np.ndarray, *, moved: bool = False) -> None:
        """These float[n, A] are executed next. moved: they are what `move` gave."""
        self._last = np.asarray(actions[-1], np.float32)
        if moved:
            self._count += 1
            self._again()
        else:
            self._steps += len(actions)

    def _stuck(self, observation: Observation) -> bool:
        proprio = observation.proprio
        if proprio is None or len(proprio) <= max(self._places):
            raise ValueError(
                f"execution.retry.still needs the hand's position, but the observation's proprio is "
                f"{'missing' if proprio is None else f'of {len(proprio)} numbers'}; use execution.retry.after alone."
            )
        scales = [robots.unit_scale(self._robot.state[column]) for column in self._places]
        self._path.append((self._steps, np.asarray(proprio, float)[list(self._places)] * scales))
        old = [entry for entry in self._path if entry[0] <= self._steps - self._retry.still]
        self._path = old[-1:] + [entry for entry in self._path if entry[0] > self._steps - self._retry.still]
        if not old:
            return False
        places = np.array([place for _, place in self._path])
        if not np.isfinite(places).all():  # nobody knows; a policy that is under way is not broken off for it
            return False
        return bool(np.ptp(places, axis=0).max() <= self._retry.within_m)

    def _rest(self) -> np.ndarray:
        return robots.rest(self._robot.action, np.asarray(self._last))

    def _step(self) -> np.ndarray:
        """float[3], what is sent in each step of the move, in the robot's units."""
        words = zlib.crc32(self.instruction.encode())
        rng = np.random.default_rng([self._retry.seed, words, zlib.crc32(self._origin), self._count])
        way = rng.normal(size=3)
        dimensions = [self._robot.action[column] for column in self._columns]
        if dimensions[2].frame != "tcp":  # the hand's own third axis may point anywhere
            way[2] = abs(way[2]) + _UPWARD
        scales = np.array([robots.unit_scale(dimension) for dimension in dimensions])
        step = way / np.linalg.norm(way) * self._retry.distance_m / self._retry.steps / scales
        # the same direction, as far as every part may go; 1 where that is far enough
        bounds = np.where(step > 0, [d.high for d in dimensions], [-d.low for d in dimensions])
        return step * min(1.0, *(bounds / np.maximum(np.abs(step), 1e-12)))


def _columns(dimensions: tuple[robots.Dimension, ...], kind: str, what: str) -> tuple[int, ...]:
    """The three that are a position of this kind. Raises ValueError: there are none, more, or in no unit of length."""
    found = [i for i, d in enumerate(dimensions) if d.quantity == "position" and d.kind == kind]
    if len(found) > 3:  # two arms, or a place of something else: which one it is, nobody says
        raise ValueError(
            f"execution.retry moves one hand, but the {what} have {len(found)} numbers that are {kind} positions: "
            f"{[dimensions[i].name for i in found]}. Leave it out for this robot"
            + ("; execution.retry.after alone needs no states." if kind == "absolute" else ".")
        )
    if len(found) < 3:
        raise ValueError(
            f"execution.retry moves the hand by changes of its position, but the {what} are "
            f"{[f'{d.name} ({d.kind} {d.quantity})' for d in dimensions]}: no {kind} position is among them. Leave it "
            "out for this robot" + ("; execution.retry.after alone needs no states." if kind == "absolute" else ".")
        )
    for column in found:
        robots.unit_scale(dimensions[column])
    return tuple(found)
