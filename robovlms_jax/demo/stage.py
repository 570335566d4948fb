"""What happens at every tick: a sentence obeyed through the safety layer, a stop that stays, the way back to the start.

No threads, no clocks, no sockets: `Stage.tick` is one control step of 1/30 s, and everything else is called between two
of them. `loop` calls it in time, `server` says what people want.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from robovlms_jax.control.execution import Executed, Execution
from robovlms_jax.control.interface import Policy
from robovlms_jax.control.robot import CALVIN
from robovlms_jax.demo import homing, plans
from robovlms_jax.demo.sentences import Match, Reading, Sentences, clean
from robovlms_jax.demo.world import Frozen, Start, World, project, why_not
from robovlms_jax.deploy.limits import Limits
from robovlms_jax.deploy.safety import SafetyLayer
from robovlms_jax.deploy.signals import Event, Measured
from robovlms_jax.envs.calvin import tasks

log = logging.getLogger(__name__)

Phase = Literal["waiting", "acting", "returning"]

SPEEDS_M_S = (0.8, 0.25, 0.1)
"""Speed limits of the tool that people may choose. 0.8: more than the simulated arm can do. 0.25: what ISO 10218-1
calls reduced speed, for people who stand beside a robot."""

LIMITS = Limits(
    speed_m_s=SPEEDS_M_S[0],
    # Of Franka Emika's Panda in Cartesian space, as its maker states them.
    acceleration_m_s2=13.0,
    jerk_m_s3=6500.0,
    turn_rad_s=2.5,
    turn_acceleration_rad_s2=25.0,
    turn_jerk_rad_s3=12500.0,
    workspace_m=((-0.5, 0.5), (-0.6, 0.3), (0.3, 0.9)),
    # Relative actions add up: a policy that pushes against what does not move sends the hand ever further into it, and
    # may find its way out. The workspace ends that, not a stop.
    following_error_m=1.0,
    following_error_rad=1.0,
)
"""Above the table, and as quick as the real arm may be; what the twin asks for is hardly ever changed."""

TRAIL = 90
"""Ticks of the hand's path that are kept to be drawn."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What was asked: the words, what they were taken for, and the scene when it began."""

    typed: str
    match: Match
    before: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A tick as the page shows it. facts: JSON values. moment: to be drawn."""

    tick: int
    moment: Frozen
    facts: dict[str, Any]


class Stage:
    """The table, the policy and the safety layer. Calls come from one thread.

    Args:
      sentences: what the policy was trained on.
      execution: how much of a chunk is executed.
      max_steps: control steps after which a task counts as failed.
      scenes: where to begin, and what "next scene" shows.
    """

    def __init__(
        self,
        world: World,
        policy: Policy,
        sentences: Sentences,
        scenes: Iterator[Start],
        *,
        execution: Execution,
        max_steps: int,
    ):
        self.world, self.sentences, self._scenes = world, sentences, scenes
        self._seen = plans.Remembering(policy)
        self._policy, self._max_steps = Executed(self._seen, execution), max_steps
        self.tick_number, self.interventions = 0, 0
        self.phase: Phase = "waiting"
        self.task: Task | None = None
        self._waiting: Task | None = None
        """Begins when the hand is back."""
        self._speed_m_s, self._layer = SPEEDS_M_S[0], self._new_layer(SPEEDS_M_S[0])
        self._intervention: Event | None = None
        self._said: collections.deque[dict[str, Any]] = collections.deque(maxlen=12)
        self._count = 0
        self._choices: list[str] = []
        """Known sentences that are asked about; the next answer to a sentence takes their place."""
        self.score = [0, 0]
        """Tasks done, and tasks that ended."""
        self.broken = ""
        """Why no step is made until the scene begins again: the error of the one that failed."""
        self._start = next(scenes)
        self._begin_scene()
        self._last = Snapshot(0, world.frozen, self._facts(np.zeros(len(CALVIN.action))))

    # What people do -----------------------------------------------------------------------------------------------

    def instruct(self, text: object, who: str = "a visitor") -> bool:
        """Whether it is obeyed; what became of it is said on the page either way. What asks for a stop stops."""
        typed = clean(text)
        reading = self.sentences.read(typed)
        self._choices = []
        if reading.kind == "stop":
            self._stop_in_words(typed, who)
        elif reading.kind == "refused":
            self._say("problem", f"“{typed}”: {reading.why}. {self._stand_still()}")
        elif not reading.understood:
            self._ask(typed, reading)
        elif self._layer.latch.state != "run":
            first = "Begin the scene again" if self.broken else "Release the stop"
            self._say("problem", f"“{typed}”: the robot is stopped. {first} first.")
        else:
            return self._take_on(typed, reading.matches[0], exact=reading.kind == "known")
        return False

    def _take_on(self, typed: str, match: Match, *, exact: bool) -> bool:
        words = f"“{typed}”" if exact else f"“{typed}”, understood as “{match.sentence}”"
        if match.task not in self.world.possible([match.task]):
            self._say("problem", f"{words}: {why_not(match.task)}. {self._goes_on()}")
            return False
        self._waiting = Task(typed, match, {})
        if self.phase == "waiting" and homing.is_home(self.world.robot_obs):
            self._say("note", f"{words}: the robot begins.")
            self._begin_task()
        else:
            self._say("note", f"{words}: the robot first goes back to where tasks begin, then begins.")
            self._go_home()
        return True

    def _ask(self, typed: str, reading: Reading) -> None:
        """What is not obeyed because it is not clear; the page has the choices as buttons."""
        if reading.kind == "empty":
            self._say("problem", f"That was empty. Say what the robot should do. {self._goes_on()}")
        elif reading.kind == "unknown":
            way_on = "try one of the buttons below"
            self._say("problem", f"“{typed}”: the robot knows nothing like that; {way_on}. {self._goes_on()}")
        elif not self.world.possible([match.task for match in reading.matches]):
            self._say("problem", f"“{typed}”: {why_not(reading.matches[0].task)}. {self._goes_on()}")
        else:
            self._choices = [match.sentence for match in reading.matches]
            asked = "which of these is meant?" if len(self._choices) > 1 else "is this meant?"
            self._say("question", f"“{typed}”: {asked} {self._goes_on()}")

    def _stop_in_words(self, typed: str, who: str) -> None:
        if self._layer.latch.state in ("run", "ready"):
            self.stop(f"{who}, who typed “{typed}”")
        else:
            self._say("stop", f"“{typed}”: the robot is stopped already.")

    def _goes_on(self) -> str:
        """What the robot does about a sentence that it does not obey: what it did before."""
        if self._layer.latch.state != "run":
            return "The robot is stopped."
        task = self._waiting or self.task
        if task:
            return f"It goes on with “{task.match.sentence}”."
        return "It goes on back to where tasks begin." if self.phase == "returning" else "Nothing moves."

    def _stand_still(self) -> str:
        """Whoever forbids or asks something while the robot moves is not told that it goes on: it does not."""
        task = self._waiting or self.task
        moved = self.phase != "waiting" and self._layer.latch.state == "run"
        self._end_task()
        if not moved:
            return "Nothing moves."
        return f"The robot stands still; “{task.match.sentence}” has ended." if task else "The robot stands still."

    def stop(self, who: str) -> None:
        """Latches a stop: brakes, forgets the task, and obeys nobody until `release`."""
        if self._layer.latch.state in ("run", "ready"):
            self._layer.stop(f"stop pressed by {who}")
            self._end_task()
            self._say("stop", f"Stopped by {who}. Nothing moves until somebody releases the stop.")

    def release(self, who: str) -> None:
        """A person lifts the stop. Nothing moves by that alone: it takes a new sentence."""
        if self.broken:
            self._say("problem", "The stop stays: a control step failed. Begin the scene again first.")
            return
        try:
            self._layer.reset(who)
            self._layer.start(who)
        except RuntimeError as error:
            self._say("problem", f"The stop stays: {error}")
            return
        self._say("note", f"Stop released by {who}. The robot waits for a sentence.")

    def hold(self, reason: str) -> None:
        """Brakes and forgets the task, without a latched stop."""
        if self.task or self._waiting:
            self._end_task()
            self._say("note", reason)

    def reset(self) -> None:
        """The same scene from its beginning. A latched stop stays."""
        self._begin_scene()
        self._say("note", "The scene begins again.")

    def next_scene(self) -> None:
        """Another table and another state of it. A latched stop stays."""
        self._start = next(self._scenes)
        self._begin_scene()
        self._say("note", f"Next scene, on table {self._start.table}.")

    def limit_speed(self, metres_per_second: float) -> None:
        """Raises ValueError for a speed that is none of SPEEDS_M_S."""
        if metres_per_second not in SPEEDS_M_S:
            raise ValueError(f"speed limit {metres_per_second!r} m/s is none of {list(SPEEDS_M_S)}.")
        self._speed_m_s = metres_per_second
        self._layer = self._new_layer(metres_per_second)
        self._say("note", f"Speed limit: {metres_per_second:g} m/s.")

    # What happens by itself ---------------------------------------------------------------------------------------

    def tick(self) -> Snapshot:
        """One control step. One that fails stops the robot until the scene begins again; that is said, not raised."""
        self.tick_number += 1
        if not self.broken:
            try:
                self._last = self._step()
                return self._last
            except Exception as error:  # whatever a world, a policy or a mistake of ours raises
                log.exception("a control step failed")
                self._break(f"{type(error).__name__}: {error}")
        return self._still()

    def failed(self, error: Exception) -> None:
        """What people asked for raised this; they are told."""
        self._say("problem", f"That failed, and was not done: {type(error).__name__}: {error}.")

    def _break(self, why: str) -> None:
        self.broken = why
        self._layer.stop(f"a control step failed ({why})")
        self._end_task()
        self._say("stop", f"Stopped: a control step failed ({why}). Begin the scene again, then release the stop.")

    def _still(self) -> Snapshot:
        """The last good step's picture, and that nothing moves."""
        latch = self._layer.latch
        nothing = {"typed": "", "instruction": "", "task": "", "steps": 0, "chunk": [], "uncertainty": None}
        facts = self._last.facts | nothing | {"tick": self.tick_number, "phase": "stopped", "said": list(self._said)}
        facts |= {"choices": list(self._choices)}
        facts |= {"latch": latch.state, "reason": latch.reason, "broken": self.broken}
        return Snapshot(self.tick_number, self._last.moment, facts)

    def _step(self) -> Snapshot:
        measured = Measured(self.world.robot_obs[:6], grippers=self.world.robot_obs[14:15])
        action = self._wanted() if self._layer.latch.state == "run" else None
        decision = self._layer.brake(measured) if action is None else self._layer.check(action, measured)
        for event in decision.events:
            if event.stage != "latch":
                self.interventions, self._intervention = self.interventions + 1, event
        if action is not None or not self._rests:
            self.world.step(decision.action)
            self._path.append(self.world.robot_obs[:3])
        self._rests = action is None and self._layer.at_rest and self._quiet_ticks() > CALVIN.rate_hz
        if decision.stop and self.phase != "waiting":  # the layer itself stopped
            self._say("stop", f"Stopped by the safety layer: {self._layer.latch.reason}.")
            self._end_task()
        if self.task and self.phase == "acting":
            self._judge()
        return Snapshot(self.tick_number, self.world.frozen, self._facts(decision.action))

    def _quiet_ticks(self) -> int:
        self._quiet = self._quiet + 1 if self.phase == "waiting" else 0
        return self._quiet

    def _wanted(self) -> np.ndarray | None:
        """The action that is asked for now; None: to stand still."""
        if self.phase == "returning":
            action = self._homing.action(self.world.robot_obs, self.world.target)
            if action is not None:
                return action
            self.phase = "waiting"
            if self._waiting:
                self._begin_task()
        return self._predicted() if self.phase == "acting" else None

    def _predicted(self) -> np.ndarray | None:
        if not self._queue:
            try:
                chunk = self._policy.act(self.world.observe())
            except Exception as error:  # a policy fails in its own ways; the robot must come to rest in any case
                log.exception("the policy failed")
                self._layer.stop(f"the policy failed: {error}")
                return None
            self._queue.extend(chunk.actions)
            self._plan_from, self._row = self.world.target[:3].copy(), -1
        self._steps, self._row = self._steps + 1, self._row + 1
        return np.asarray(self._queue.popleft(), np.float64)

    def _judge(self) -> None:
        done = self.task.match.task in tasks.completed_tasks(self.task.before, self.world.info)
        if not done and self._steps < self._max_steps:
            return
        seconds = self._steps / CALVIN.rate_hz
        self.score = [self.score[0] + done, self.score[1] + 1]
        words = f"Done in {seconds:.1f} s" if done else f"Not done after {seconds:.1f} s, gave up"
        self._say("done" if done else "failed", f"{words}: “{self.task.match.sentence}”.")
        self._go_home()

    def _begin_task(self) -> None:
        self.task, self._waiting = dataclasses.replace(self._waiting, before=dict(self.world.info)), None
        self._forget_plan()
        self._policy.reset(self.task.match.sentence)
        self.phase = "acting"

    def _go_home(self) -> None:
        """Back to where tasks begin, for that is where the policy has seen them begin."""
        self.task, self.phase = None, "returning"
        self._forget_plan()
        self._homing = homing.Homing(self.world.robot_obs)

    def _end_task(self) -> None:
        self.task, self._waiting, self.phase = None, None, "waiting"
        self._forget_plan()

    def _begin_scene(self) -> None:
        self.world.reset(self._start)
        self._layer = self._new_layer(self._speed_m_s)
        self._path: collections.deque[np.ndarray] = collections.deque(maxlen=TRAIL)
        self._quiet, self._rests = 0, False
        self._known_possible: list[str] = []
        self._end_task()
        self.broken = ""

    def _forget_plan(self) -> None:
        self._queue: collections.deque[np.ndarray] = collections.deque()
        self._steps, self._seen.chunk = 0, None
        self._plan_from, self._row = np.zeros(3), 0
        """Where the drawn path begins, and which of its actions was executed last."""

    def _new_layer(self, metres_per_second: float) -> SafetyLayer:
        """A layer that begins where the robot is; a stop that is latched stays latched."""
        layer = SafetyLayer(CALVIN, dataclasses.replace(LIMITS, speed_m_s=metres_per_second))
        before = getattr(self, "_layer", None)
        if before is not None and before.latch.state != "run":
            layer.stop(before.latch.reason)
        return layer

    # What the page shows ------------------------------------------------------------------------------------------

    def _say(self, kind: str, text: str) -> None:
        self._count += 1
        self._said.append({"number": self._count, "kind": kind, "text": text})

    def _facts(self, action: np.ndarray) -> dict[str, Any]:
        event, latch = self._intervention, self._layer.latch
        asked = self.task or self._waiting
        return {
            "tick": self.tick_number,
            "table": self._start.table,
            "phase": self.phase if latch.state == "run" else "stopped",
            "latch": latch.state,
            "reason": latch.reason,
            "broken": "",
            "typed": asked.typed if asked else "",
            "instruction": asked.match.sentence if asked else "",
            "task": asked.match.task if asked else "",
            "steps": self._steps,
            "max_steps": self._max_steps,
            "score": list(self.score),
            "said": list(self._said),
            "choices": list(self._choices),
            "possible": self._possible(),
            "action": [round(float(x), 3) for x in action],
            "chunk": plans.path(self._plan_from, self._seen.chunk),
            "trail": plans.rounded(project(np.array(self._path))) if self._path else [],
            "uncertainty": plans.uncertainty(self._seen.chunk, self._row),
            "interventions": self.interventions,
            "intervention": None if event is None else {"tick": event.tick, "stage": event.stage, "why": event.reason},
            "speed_limit": self._speed_m_s,
        }

    def _possible(self) -> list[str]:
        if not self._known_possible or self.tick_number % 10 == 0:
            self._known_possible = self.world.possible(list(self.sentences.known))
        return self._known_possible
