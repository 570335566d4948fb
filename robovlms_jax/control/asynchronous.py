"""Inference beside execution: which action belongs to which tick, and when a policy is asked anew.

A policy takes time. While it thinks, the robot executes what is left of the chunk before; the new chunk, predicted from
what was seen `delay` ticks ago, is joined to that at a seam. `ActionQueue` knows the actions of coming ticks,
`Scheduler` decides when to ask and what the policy is told. Nothing here waits or has a clock: `deploy.loop` drives it
beside a robot, `control.delayed` in simulators, with a delay of one's choice.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
from typing import Any, Literal, NamedTuple

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.control.interface import ActionChunk, Observation

_THUMBNAIL = 16
"""Pixels of the edge of what pictures are compared by: noise of single pixels is no change."""


@dataclasses.dataclass(frozen=True)
class AsyncConfig:
    """When a policy is asked, and how its answers follow each other. Times are control ticks."""

    seam: Literal["wait", "switch", "blend", "freeze"] = "wait"
    """wait: synchronous; the robot holds still until the answer, which begins then. Otherwise a chunk's rows are for
    the ticks since its observation, and those that passed meanwhile are left out. switch: the newest chunk's row is
    taken at once (naive asynchronous). blend: old and new rows are mixed over the first `blend` ticks. freeze: the old
    chunk is followed until the expected delay is over, also when the answer comes earlier."""
    blend: int = 5
    """Seam blend: mixed ticks; the old row's share falls linearly, and with it a jump at the seam to 1 / (blend + 1)
    of it a tick."""
    tell: bool = False
    """Real-time chunking: the policy is told what is left of its last chunk and how much of that is executed before it
    can answer, and goes on from there (flow heads, `policy.head.guidance`). Not with seam wait."""
    roll_forward: bool = False
    """The policy is shown the robot's state as it will be when its answer can begin, and the answer's first row is for
    that tick (VLASH, arXiv:2512.01031). For actions that are changes or velocities of the state. Not with seam wait or
    tell."""
    ask_below: int = 0
    """Ask when no more rows are left than this, beside those that are executed while the policy thinks."""
    delay: int = 0
    """What is expected before the first answer; later the largest of the last `delays` measured."""
    delays: int = 5
    max_age: int = 0
    """Rows whose observation is older than this are not executed; the robot holds still. 0: no limit."""
    max_interval: int = 0
    """Ask at the latest so long after the last observation. 0: no limit."""
    min_interval: int = 1
    """Events (the four below and max_interval) do not ask more often than every so many ticks."""
    picture_change: float = 0.0
    """Ask when a picture differs from the one last asked about by more than this, as a share of full brightness: the
    largest over blocks of a 16th of its edge, 0: do not look. Needs an observation every tick, as state_change does."""
    state_change: float = 0.0
    """Ask when a number of the robot's state has moved by more than this since it was asked about; 0: do not look."""
    uncertainty: float = 0.0
    """Ask when the coming row's `ActionChunk.uncertainty` is above this; 0: never."""

    def __post_init__(self):
        if self.seam not in ("wait", "switch", "blend", "freeze"):
            raise ValueError(f"asynchronous.seam={self.seam!r} is none of wait, switch, blend, freeze.")
        for field in ("ask_below", "delay", "max_age", "max_interval", "picture_change", "state_change", "uncertainty"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) >= 0):
                raise ValueError(f"asynchronous.{field}={getattr(self, field)} must be 0 or more.")
        for field in ("blend", "delays", "min_interval"):
            if getattr(self, field) < 1:
                raise ValueError(f"asynchronous.{field}={getattr(self, field)} must be at least 1.")
        if self.seam == "wait" and (self.tell or self.roll_forward):
            raise ValueError("asynchronous.seam=wait leaves nothing to tell or to roll forward; choose another seam.")
        if self.tell and self.roll_forward:
            raise ValueError(
                "asynchronous.tell and roll_forward exclude each other: either the chunk begins at the "
                "observation and goes on from what is executed, or it begins when that is over."
            )

    @property
    def looks(self) -> bool:
        """Whether it takes an observation to tell if the policy is to be asked."""
        return self.picture_change > 0 or self.state_change > 0


class Row(NamedTuple):
    """One action float[A]; the tick of the observation it came from, and how uncertain the policy was of it, nan where
    it did not say."""

    action: np.ndarray
    observed: int
    uncertainty: float


class ActionQueue:
    """Actions of the coming ticks. Calls from several threads wait for each other.

    Raises ValueError for seam blend and a robot with absolute rotations, whose numbers have no mean.
    """

    def __init__(self, config: AsyncConfig, robot: robots.RobotSpec):
        turned = [d.name for d in robot.action if d.kind == "absolute" and d.quantity in _TURNS]
        if config.seam == "blend" and turned:
            raise ValueError(
                f"asynchronous.seam=blend: {turned} of {robot.name!r} are absolute rotations, whose "
                "numbers have no mean; choose seam freeze or switch."
            )
        self.config, self.robot = config, robot
        self._lock = threading.RLock()
        self._rows: dict[int, Row] = {}
        self._from = -1
        self.now = 0
        """The tick that comes next."""

    @property
    def remaining(self) -> int:
        """Ticks from now on that have a row."""
        with self._lock:
            return len(self._rows)

    @property
    def next_row(self) -> Row | None:
        with self._lock:
            return self._rows.get(self.now)

    def offer(
        self, actions: Any, observed: int, *, starts: int | None = None, frozen: int = 0, uncertainty: Any = None
    ) -> bool:
        """A chunk float[C, A], predicted from the observation at tick `observed`; it is copied. False: nothing of it is
        used, for it is older than the present one, wholly late, or from the future.

        Args:
          starts: tick of its first row; None: now with seam wait, `observed` otherwise.
          frozen: with seam freeze, so many ticks from `observed` on keep the row they have.
          uncertainty: float[C] or None.
        """
        new = np.array(actions)
        doubt = np.full(len(new), np.nan) if uncertainty is None else np.asarray(uncertainty, float)
        with self._lock:
            if starts is None:
                starts = self.now if self.config.seam == "wait" else observed
            if observed <= self._from or observed > self.now or starts + len(new) <= self.now:
                return False
            self._from, old = observed, self._rows
            self._rows = {
                starts + i: Row(self._joined(old.get(starts + i), new[i], starts + i), observed, float(doubt[i]))
                for i in range(len(new))
                if starts + i >= self.now
            }
            self._rows |= {tick: row for tick, row in old.items() if tick < starts}  # until the new chunk begins
            if self.config.seam == "freeze":
                self._rows |= {tick: row for tick, row in old.items() if tick < observed + frozen}
            return True

    def _joined(self, old: Row | None, new: np.ndarray, tick: int) -> np.ndarray:
        share = 1 - (tick - self.now + 1) / (self.config.blend + 1)
        if self.config.seam != "blend" or old is None or share <= 0 or old.action.shape != new.shape:
            return new
        mixed = (share * old.action + (1 - share) * new).astype(new.dtype)
        binary = list(self.robot.binary)  # a decision, not a quantity: a weighted vote, ties to the newest
        mixed[binary] = np.where(mixed[binary] == 0, new[binary], np.sign(mixed[binary]))
        return mixed

    def take(self) -> Row | None:
        """The row of the coming tick, which then is over; None where there is none, or it is too old."""
        with self._lock:
            row = self._rows.pop(self.now, None)
            age = 0 if row is None else self.now - row.observed
            self.now += 1
            return None if self.config.max_age and age > self.config.max_age else row

    def left(self) -> np.ndarray:
        """float[n, A]: rows from now on, as far as they follow each other."""
        with self._lock:
            rows: list[np.ndarray] = []
            while (row := self._rows.get(self.now + len(rows))) is not None:
                rows.append(row.action)
            return np.array(rows) if rows else np.zeros((0, len(self.robot.action)), np.float32)

    def clear(self) -> None:
        with self._lock:
            self._rows = {}


_TURNS = ("euler_xyz", "quaternion_xyzw", "axis_angle", "rotation_6d")


def roll_forward(state: np.ndarray, actions: np.ndarray, robot: robots.RobotSpec) -> np.ndarray:
    """The state float[P] that a robot which does what it is sent has after `actions` float[n, A].

    Actions and state are matched by the names of their dimensions, and units are reckoned with. Binary grippers are
    where they were last sent, in a CALVIN robot_obs float[15] in its last column. Raises ValueError where no number of
    the action moves one of the state.
    """
    state, columns = np.array(state, np.float64), {d.name: i for i, d in enumerate(robot.state)}
    moved = False
    for column, dimension in enumerate(robot.action):
        place = columns.get(dimension.name)
        if place is None or place >= len(state) or dimension.kind == "continuous":
            continue
        if dimension.kind == "binary":
            if len(actions):
                whole = len(state) == len(robot.state)
                state[place if whole else -1] = actions[-1, column]
            continue
        unit = robots.unit_scale(dimension) / robots.unit_scale(robot.state[place])
        if dimension.kind == "absolute":
            if len(actions):
                state[place] = actions[-1, column] * unit
        else:
            seconds = 1 / robot.rate_hz if dimension.kind == "velocity" else 1.0
            state[place] += actions[:, column].sum() * unit * seconds
            if dimension.quantity == "euler_xyz":
                state[place] = (state[place] + np.pi) % (2 * np.pi) - np.pi
        moved = True
    if not moved:
        raise ValueError(
            f"asynchronous.roll_forward: no action of {robot.name!r} ({list(robot.action_names)}) has the name of a "
            f"number of its state ({list(columns)}) that it moves."
        )
    return state.astype(np.float32)


class Scheduler:
    """One episode: when the policy is asked, what it is told, and where its answer goes.

    `due`, then `ask` and `see`, then `answer` or `failed`; at most one question is under way. counts: how often
    the policy was asked, by reason. Raises ValueError for `roll_forward` and a robot whose actions move no number
    of its state.
    """

    def __init__(self, config: AsyncConfig, robot: robots.RobotSpec, queue: ActionQueue | None = None):
        self.config, self.robot = config, robot
        if config.roll_forward:  # refused now, and not at every question
            roll_forward(np.zeros(len(robot.state)), np.zeros((0, len(robot.action))), robot)
        self.queue = ActionQueue(config, robot) if queue is None else queue
        self.counts: collections.Counter[str] = collections.Counter()
        self._delays: collections.deque[int] = collections.deque(maxlen=config.delays)
        self._requested: int | None = None
        """Tick of the question under way."""
        self._last: int | None = None
        self._seen: tuple[dict[str, np.ndarray], np.ndarray | None] | None = None
        self._expected, self._left = 0, self.queue.left()
        self.new_instruction = True
        """The policy has not been asked since the instruction was given."""

    @property
    def expected_delay(self) -> int:
        return max(self._delays) if self._delays else self.config.delay

    @property
    def under_way(self) -> bool:
        return self._requested is not None

    def due(self, observation: Observation | None = None) -> str:
        """Why the policy is to be asked now; "" when it is not. observation: for configurations that look."""
        config, queue = self.config, self.queue
        if self.under_way:
            return ""
        if self.new_instruction:
            return "instruction"
        thinking = 0 if config.seam == "wait" else self.expected_delay
        if queue.remaining <= config.ask_below + thinking:
            return "low"
        since = queue.now - (self._last or 0)
        if since < config.min_interval:
            return ""
        if config.max_interval and since >= config.max_interval:
            return "interval"
        row = queue.next_row
        if config.uncertainty and row is not None and row.uncertainty > config.uncertainty:
            return "uncertainty"
        return self._changed(observation) if observation is not None and config.looks else ""

    def _changed(self, observation: Observation) -> str:
        pictures, state = self._seen or ({}, None)
        if self.config.state_change and state is not None and observation.proprio is not None:
            moved = np.asarray(observation.proprio, float) - state
            for column, dimension in enumerate(self.robot.state[: len(moved)]):
                if dimension.quantity == "euler_xyz":
                    moved[column] = (moved[column] + np.pi) % (2 * np.pi) - np.pi
            if np.abs(moved).max() > self.config.state_change:
                return "state"
        for camera, known in pictures.items():
            if np.abs(_thumbnails(observation)[camera] - known).max() > self.config.picture_change:
                return "picture"
        return ""

    def ask(self, reason: str) -> None:
        """The policy is being asked, about an observation of the coming tick."""
        self.counts[reason] += 1
        self._requested = self._last = self.queue.now
        self._expected, self.new_instruction = self.expected_delay, False
        self._left = self.queue.left()

    def see(self, observation: Observation) -> Observation:
        """What the policy is to see of the observation that it is being asked about."""
        if self.config.looks:
            state = None if observation.proprio is None else np.array(observation.proprio, float)
            self._seen = (_thumbnails(observation) if self.config.picture_change else {}, state)
        left = self._left
        if self.config.tell and len(left):
            observation = dataclasses.replace(observation, committed=left, delay=min(self._expected, len(left)))
        if self.config.roll_forward:
            if observation.proprio is None:
                raise ValueError("asynchronous.roll_forward needs the robot's state, and observation.proprio is None.")
            rolled = roll_forward(observation.proprio, left[: self._expected], self.robot)
            observation = dataclasses.replace(observation, proprio=rolled)
        return observation

    def answer(self, chunk: ActionChunk) -> bool:
        """The answer to the question under way. False: it was of no use (see `ActionQueue.offer`)."""
        if self._requested is None:
            raise RuntimeError("there is no question under way: ask() before answer().")
        requested, self._requested = self._requested, None
        self._delays.append(self.queue.now - requested)
        starts = requested + self._expected if self.config.roll_forward else None
        return self.queue.offer(
            chunk.actions, requested, starts=starts, frozen=self._expected, uncertainty=chunk.uncertainty
        )

    def failed(self) -> None:
        """There will be no answer: it is asked again at the next occasion."""
        self._requested = None

    def change_instruction(self) -> None:
        """What was left for the old instruction is executed until the first answer for the new one."""
        self._requested, self.new_instruction = None, True


def _thumbnails(observation: Observation) -> dict[str, np.ndarray]:
    """camera -> float32[blocks, blocks], mean brightness of blocks in [0, 1]."""
    found = {}
    for camera, picture in observation.images.items():
        grey = np.asarray(picture, np.float32).mean(-1) / 255
        height, width = (max(size // _THUMBNAIL, 1) for size in grey.shape)
        rows, columns = grey.shape[0] // height, grey.shape[1] // width
        blocks = grey[: rows * height, : columns * width].reshape(rows, height, columns, width)
        found[camera] = blocks.mean((1, 3))
    return found
