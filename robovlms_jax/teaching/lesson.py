"""What happens at every tick while a person watches a policy and takes over: who acts, and what is kept of it.

No threads, no clocks, no sockets, as in `demo.stage`: `Lesson.tick` is one control step of 1/30 s, and everything else
is called between two of them.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from robovlms_jax.control.execution import Executed, Execution
from robovlms_jax.control.interface import Policy
from robovlms_jax.demo.stage import Snapshot
from robovlms_jax.demo.world import World
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.playtable.demonstrations import HOLD_STEPS

log = logging.getLogger(__name__)

Phase = Literal["paused", "policy", "person", "over", "finished"]
"""paused: nothing moves. policy, person: who acts. over: the trial has ended. finished: there is no trial left."""

SETTLE_STEPS = 8
"""Steps after a person has let go of everything: the hand arrives and the fingers close; then time stands still."""
FORGOTTEN_TICKS = 15
"""So long what a person holds down counts without being said again."""
LONGEST_STEPS = 9000
"""Control steps of a trial, five minutes; more are not kept in memory, and nobody acts any more."""
LEAD_M, LEAD_RAD = 0.04, 0.15
"""So far a person may send the hand ahead of where it is; what does not move stops the order, too."""


class Exercise(NamedTuple):
    """A trial. number: counted from 0. robot_obs: float[15]. scene_obs: float[24]; see `World.put`."""

    number: int
    table: str
    task: str
    instruction: str
    robot_obs: np.ndarray
    scene_obs: np.ndarray


class Step(NamedTuple):
    """What is kept of a control step. state: of bodies, before it. robot_obs, scene_obs: there. action: float32[7].
    by_person: whose it was. done: the task was done after it."""

    state: Any
    robot_obs: np.ndarray
    scene_obs: np.ndarray
    action: np.ndarray
    by_person: bool
    done: bool


class Kept(NamedTuple):
    """How much there is on the disk. trials: that have ended, with or without corrections. corrections, frames: in
    recordings."""

    trials: int
    corrections: int
    frames: int


Keep = Callable[[Exercise, Sequence[Step]], Kept]
"""Called when a trial has ended; no steps: nothing of it is to be kept. On the disk when it returns."""


@dataclasses.dataclass
class _Wish:
    """What a person holds down. drive: float[4], along x, y, z and the turn about z, -1 to 1. age: ticks since it was
    said. quiet: steps since anything moved by it."""

    drive: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(4))
    grip: float = 1.0
    age: int = 0
    quiet: int = 0


class Lesson:
    """The table, the policy and the person. Calls come from one thread.

    Args:
      exercises: what is still to be done, in this order.
      keep: stores a trial that has ended.
      max_steps: control steps that the policy has for a task, before it stands still.
      begun: how much there is already.
    """

    def __init__(
        self,
        world: World,
        policy: Policy,
        exercises: Sequence[Exercise],
        keep: Keep,
        *,
        execution: Execution,
        max_steps: int,
        begun: Kept,
    ):
        self.world, self._policy, self._keep = world, Executed(policy, execution), keep
        self._waiting, self._max_steps = collections.deque(exercises), max_steps
        self.kept, self._total = begun, begun.trials + len(exercises)
        self.phase: Phase = "paused"
        self._said: collections.deque[dict[str, Any]] = collections.deque(maxlen=12)
        self._count, self._tick = 0, 0
        self.exercise: Exercise | None = None
        self.steps: list[Step] = []
        self._begin_trial()

    # What people do -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The policy acts, or acts again; after a trial, the next one waits for this."""
        if self.phase == "over":
            self._waiting.popleft()
            self._begin_trial()
        elif self.phase in ("paused", "person"):
            self._act_anew()
            self.phase = "policy"

    def take(self) -> None:
        """The person acts from here."""
        if self.phase in ("paused", "policy"):
            self.phase = "person"
            self._wish = _Wish(grip=self._grip(), quiet=SETTLE_STEPS)

    def drive(self, drive: np.ndarray) -> None:
        """What the person holds down, float[4]; takes over where it is anything."""
        if drive.any():
            self.take()
        if self.phase == "person":
            self._wish.drive, self._wish.age = np.clip(drive, -1.0, 1.0), 0

    def grip(self, opens: bool) -> None:
        """The person opens or closes the fingers; takes over."""
        self.take()
        if self.phase == "person":
            self._wish.grip, self._wish.quiet = 1.0 if opens else -1.0, 0

    def again(self) -> None:
        """The same trial from its beginning; nothing of this attempt is kept."""
        if self.phase != "finished" and self.phase != "over":
            self._begin_trial()
            self._say("note", "The same trial again. Nothing of the last attempt is kept.")

    def skip(self) -> None:
        """Ends the trial; nothing of it is kept."""
        if self.phase not in ("over", "finished"):
            self._end("failed", "Given up. Nothing of this trial is kept.", [])

    def hold(self, reason: str) -> None:
        """Nobody acts."""
        if self.phase in ("policy", "person"):
            self.phase = "paused"
            self._say("stop", reason)

    # What happens by itself ---------------------------------------------------------------------------------------

    def tick(self) -> Snapshot:
        """One control step, if anybody acts. One that fails is said, not raised, and nobody acts any more."""
        self._tick += 1
        try:
            self._step()
        except Exception as error:  # whatever a world, a policy or a full disk raises
            log.exception("a control step failed")
            self.failed(error)
        return Snapshot(self._tick, self.world.frozen, self._facts())

    def failed(self, error: Exception) -> None:
        if self.phase in ("policy", "person"):
            self.phase = "paused"
        self._say("problem", f"That failed: {type(error).__name__}: {error}. Nothing moves; go on, or do it again.")

    def _step(self) -> None:
        if len(self.steps) >= LONGEST_STEPS:
            self.hold(f"The trial has had {LONGEST_STEPS} steps, and no more are kept. Do it again, or give up.")
        action = {"policy": self._predicted, "person": self._wanted}.get(self.phase, lambda: None)()
        if action is None:
            return
        if self._execute(action):
            self._settle(action)
        elif self.phase == "policy" and self._acted >= self._max_steps:
            self.hold(f"The policy has had its {self._max_steps} steps. Take over, or do it again.")

    def _execute(self, action: np.ndarray) -> bool:
        """One step, written down. Whether the task is done."""
        before, state = self.world.info, self.world.frozen.state
        self.world.step(action)
        done = self.exercise.task in tasks.completed_tasks(self._begun, self.world.info)
        by_person = self.phase == "person"
        self.steps.append(Step(state, before["robot_obs"], before["scene_obs"], action, by_person, done))
        return done

    def _settle(self, action: np.ndarray) -> None:
        """The task is done: a few steps in which nothing is wanted, as demonstrations have them, and the trial ends."""
        for _ in range(HOLD_STEPS):
            self._execute(np.array([0, 0, 0, 0, 0, 0, action[6]], np.float32))
        mine = sum(step.by_person for step in self.steps)
        if mine:
            self._end("done", f"Done, with {mine} of {len(self.steps)} steps by you. They are stored.", self.steps)
        else:
            self._end("done", "The policy did it alone; there is nothing to store.", [])

    def _end(self, kind: str, text: str, steps: Sequence[Step]) -> None:
        try:
            self.kept = self._keep(self.exercise, steps)
        except OSError as error:
            self.phase = "paused"
            self._say("problem", f"This trial could not be stored ({error}). Make room, then do it again.")
            return
        self.phase = "over" if len(self._waiting) > 1 else "finished"
        self._say(kind, text)

    def _predicted(self) -> np.ndarray:
        if not self._queue:
            self._queue.extend(self._policy.act(self.world.observe()).actions)
        self._acted += 1
        return np.asarray(self._queue.popleft(), np.float32)

    def _wanted(self) -> np.ndarray | None:
        """What the person holds down; None: nothing, and all has come to rest."""
        wish = self._wish
        wish.age += 1
        if wish.age > FORGOTTEN_TICKS:
            wish.drive = np.zeros(4)
        drive = np.where(self._leads(wish.drive), 0.0, wish.drive)
        wish.quiet = 0 if drive.any() else wish.quiet + 1
        if wish.quiet > SETTLE_STEPS:
            return None
        return np.array([*drive[:3], 0.0, 0.0, drive[3], wish.grip], np.float32)

    def _leads(self, drive: np.ndarray) -> np.ndarray:
        """bool[4]: where the hand was sent as far ahead as it may be."""
        ahead = self.world.target - self.world.robot_obs[:6]
        turn = (ahead[5] + np.pi) % (2 * np.pi) - np.pi
        return np.array([*ahead[:3], turn]) * np.sign(drive) > np.array([*[LEAD_M] * 3, LEAD_RAD])

    def _grip(self) -> float:
        return 1.0 if self.world.robot_obs[14] > 0 else -1.0

    def _act_anew(self) -> None:
        """The policy forgets what it planned and saw."""
        self._queue: collections.deque[np.ndarray] = collections.deque()
        self._acted = 0
        self._policy.reset(self.exercise.instruction)

    def _begin_trial(self) -> None:
        self.steps, self._wish = [], _Wish()
        if not self._waiting:
            self.exercise, self.phase, self._acted = None, "finished", 0
            return
        self.exercise, self.phase = self._waiting[0], "paused"
        self.world.put(self.exercise.table, self.exercise.robot_obs, self.exercise.scene_obs)
        self._begun = dict(self.world.info)
        self._act_anew()

    # What the page shows ------------------------------------------------------------------------------------------

    def _say(self, kind: str, text: str) -> None:
        self._count += 1
        self._said.append({"number": self._count, "kind": kind, "text": text})

    def _facts(self) -> dict[str, Any]:
        return {
            "tick": self._tick,
            "phase": self.phase,
            "table": self.world.table,
            "task": self.exercise.task if self.exercise else "",
            "instruction": self.exercise.instruction if self.exercise else "",
            "trial": self.kept.trials + (self.phase not in ("over", "finished")),
            "total": self._total,
            "acted": self._acted,
            "max_steps": self._max_steps,
            "steps": len(self.steps),
            "by_person": sum(step.by_person for step in self.steps),
            "opens": self._grip() > 0,
            "kept": self.kept._asdict(),
            "said": list(self._said),
        }
