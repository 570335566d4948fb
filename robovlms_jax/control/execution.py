"""How much of each predicted chunk is executed before the policy is asked again.

`select` is the whole of it, a pure function with explicit state; two classes wrap it around a policy for one episode or
for many, so that whoever runs the policy simply executes every action it is handed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.control.interface import ActionChunk, Observation, Policy, check_slots
from robovlms_jax.control.retrying import Attempts, Retry

Past = tuple[np.ndarray, ...]
"""What is left of earlier chunks, oldest first: each float[1..C, A], row 0 the action for the coming step."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """An execution mode.

    A policy that is asked less than once per step sees only the frames it is asked at (but see `every_frame`); a
    simulator renders only those.
    """

    mode: Literal["first", "chunk", "receding", "ensemble"] = "chunk"
    """first: the first action of every chunk (what upstream does). chunk: all of it. receding: its first `horizon`
    actions. ensemble: ask at every step, average what all chunks say for it (Zhao et al. 2023, arXiv:2304.13705)."""
    horizon: int = 1
    """Actions executed per request in mode receding; a shorter chunk is executed whole."""
    every_frame: bool = False
    """Modes chunk and receding: show the policy every frame all the same, so that its history has no gaps it was not
    trained with, and drop what it predicts while there are actions left. Costs a prediction per step."""
    decay: float = 0.01
    """Mode ensemble weighs the i-th oldest prediction by exp(-decay * i): 0 averages, large values trust the oldest."""
    retry: Retry = Retry()
    """When a policy that gets nowhere tries again from another place."""

    def __post_init__(self):
        if self.mode not in ("first", "chunk", "receding", "ensemble"):
            raise ValueError(f"execution mode {self.mode!r} is not one of first, chunk, receding, ensemble.")
        if self.horizon < 1:
            raise ValueError(f"execution horizon={self.horizon} must be at least 1.")

    def require(self, robot: robots.RobotSpec) -> None:
        """Raises ValueError where this robot's hand cannot be moved as `retry` does it; asked before long work."""
        Attempts(self.retry, robot)

    def conditions(self) -> dict[str, Any]:
        """JSON values that results depend on. Where nothing is tried again, as versions stored them that could not:
        their results are found again."""
        values = dataclasses.asdict(self)
        if not self.retry.on:
            del values["retry"]
        return values

    def executed(self, chunk: int) -> int:
        """Actions that are executed of a chunk of so many before there is another."""
        return {"first": 1, "ensemble": 1, "chunk": chunk, "receding": min(self.horizon, chunk)}[self.mode]

    @property
    def label(self) -> str:
        """Short name for tables, e.g. "receding 5"."""
        names = {"receding": f"receding {self.horizon}", "ensemble": f"ensemble {self.decay:g}"}
        every = " every frame" if self.every_frame and self.mode in ("chunk", "receding") else ""
        again = f", {self.retry.label}" if self.retry.on else ""
        return names.get(self.mode, self.mode) + every + again


def select(
    execution: Execution, past: Past, chunk: np.ndarray, robot: robots.RobotSpec = robots.CALVIN
) -> tuple[np.ndarray, Past]:
    """What to execute of a new chunk.

    Args:
      past: () at the start of an episode, then the previous call's second result.
      chunk: float[C, A], for the coming C steps.
      robot: whose actions they are; its binary grippers vote, everything else is averaged, further columns too.
    Returns:
      float[n, A] to execute before the next request, n >= 1, and the new past.
    """
    if execution.mode != "ensemble":
        count = execution.executed(len(chunk))
        if not execution.every_frame:
            return chunk[:count], ()
        plan = past[0] if past else chunk[:count]
        return plan[:1], (plan[1:],) if len(plan) > 1 else ()
    votes = (*past, chunk)
    weights = np.exp(-execution.decay * np.arange(len(votes)))
    action = np.average([vote[0] for vote in votes], axis=0, weights=weights).astype(chunk.dtype)
    # a binary gripper is a decision, not a quantity: a weighted vote, ties to the newest
    binary = list(robot.binary)
    action[binary] = np.where(action[binary] == 0, chunk[0, binary], np.sign(action[binary]))
    return action[None], tuple(vote[1:] for vote in votes if len(vote) > 1)


def robot_of(policy: object) -> robots.RobotSpec:
    """Whose actions a policy's are: its `robot`; CALVIN's for a policy that does not say."""
    return getattr(policy, "robot", robots.CALVIN)


def _none(robot: robots.RobotSpec) -> np.ndarray:
    """No action, float32[0, A]."""
    return np.zeros((0, len(robot.action)), np.float32)


def _rows(chunk: ActionChunk) -> np.ndarray:
    """Actions, with how uncertain each is as a further column where the policy says so: what is done to an action,
    selected or averaged, is done to that too."""
    if chunk.uncertainty is None:
        return chunk.actions
    return np.column_stack([chunk.actions, np.asarray(chunk.uncertainty, np.asarray(chunk.actions).dtype)])


def _chunk(rows: np.ndarray, robot: robots.RobotSpec) -> ActionChunk:
    """The reverse of `_rows`."""
    count = len(robot.action)
    if np.ndim(rows) != 2 or rows.shape[1] != count + 1:
        return ActionChunk(rows)
    return ActionChunk(rows[:, :count], rows[:, count])


class BatchedPolicy(Protocol):
    """One policy that serves many episodes, each in a slot of its own."""

    def reset(self, slots: Sequence[int], instructions: Sequence[str]) -> None:
        """Start an episode in each of the given slots: forget its history and follow its instruction."""

    def act(self, observations: Sequence[Observation], slots: Sequence[int]) -> Sequence[ActionChunk]:
        """Advance the given slots by one step each; other slots stand still."""


class Executed:
    """A `Policy` whose chunks are to be executed whole: `policy` under an execution mode.

    Each observation that `policy` sees says which actions were executed since the one before (`executed`). Calls from
    several threads wait for each other.
    """

    def __init__(self, policy: Policy, execution: Execution):
        self._policy, self._execution, self.robot = policy, execution, robot_of(policy)
        self._past: Past = ()
        self._attempts = Attempts(execution.retry, self.robot)
        self._executed: np.ndarray | None = None
        """None: no episode."""
        self._lock = threading.RLock()

    def reset(self, instruction: str) -> None:
        with self._lock:
            self._attempts.begin(instruction)
            self._start(instruction)

    def _start(self, instruction: str) -> None:
        self._executed = None
        self._policy.reset(instruction)
        self._past, self._executed = (), _none(self.robot)

    def act(self, observation: Observation) -> ActionChunk:
        with self._lock:
            if self._executed is None:
                raise RuntimeError("there is no episode: act() before reset(instruction), or the reset failed.")
            move = self._attempts.move(observation)
            if move is not None:
                self._start(self._attempts.instruction)
                self._attempts.did(move, moved=True)
                return ActionChunk(move)
            observation = dataclasses.replace(observation, executed=self._executed)
            rows, self._past = select(self._execution, self._past, _rows(self._policy.act(observation)), self.robot)
            chunk = _chunk(rows, self.robot)
            self._executed = np.array(chunk.actions)  # a robot's driver may scale what it is sent in place
            self._attempts.did(self._executed)
            return chunk


class ExecutedBatch:
    """A `BatchedPolicy` whose chunks are to be executed whole: `policy` under an execution mode. Calls from several
    threads wait for each other."""

    def __init__(self, policy: BatchedPolicy, execution: Execution):
        self._policy, self._execution, self.robot = policy, execution, robot_of(policy)
        execution.require(self.robot)
        self._past: dict[int, Past] = {}
        self._executed: dict[int, np.ndarray] = {}
        self._attempts: dict[int, Attempts] = {}
        self._lock = threading.RLock()

    def reset(self, slots: Sequence[int], instructions: Sequence[str]) -> None:
        with self._lock:
            self._start(slots, instructions)
            for slot, instruction in zip(slots, instructions, strict=True):
                self._attempts[slot] = Attempts(self._execution.retry, self.robot)
                self._attempts[slot].begin(instruction)

    def _start(self, slots: Sequence[int], instructions: Sequence[str]) -> None:
        for slot in slots:
            self._executed.pop(slot, None)
        self._policy.reset(slots, instructions)
        for slot in slots:
            self._past[slot], self._executed[slot] = (), _none(self.robot)

    def act(self, observations: Sequence[Observation], slots: Sequence[int]) -> list[ActionChunk]:
        with self._lock:
            for slot in slots:
                if slot not in self._executed:
                    raise RuntimeError(
                        f"slot {slot} has no episode: act() before reset(instruction), or its reset failed."
                    )
            moves = self._moves(observations, slots)
            asked = [slot for slot in slots if slot not in moves]
            reported = [
                dataclasses.replace(observation, executed=self._executed[slot])
                for slot, observation in zip(slots, observations, strict=True)
                if slot not in moves
            ]
            chunks = self._policy.act(reported, asked) if asked else ()
            chosen = self._begin_again(moves)  # not before the policy has acted: if it fails, nobody hears of them
            for slot, chunk in zip(asked, chunks, strict=True):
                rows, self._past[slot] = select(self._execution, self._past[slot], _rows(chunk), self.robot)
                chosen[slot] = _chunk(rows, self.robot)
                self._executed[slot] = np.array(chosen[slot].actions)
                self._attempts[slot].did(self._executed[slot])
            return [chosen[slot] for slot in slots]

    def _moves(self, observations: Sequence[Observation], slots: Sequence[int]) -> dict[int, np.ndarray]:
        """float32[steps, A] for the slots whose time it is to try again."""
        return {
            slot: move
            for slot, observation in zip(slots, observations, strict=True)
            if (move := self._attempts[slot].move(observation)) is not None
        }

    def _begin_again(self, moves: Mapping[int, np.ndarray]) -> dict[int, ActionChunk]:
        """These are executed, and the policy begins anew there."""
        if moves:
            self._start(list(moves), [self._attempts[slot].instruction for slot in moves])
        for slot, move in moves.items():
            self._attempts[slot].did(move, moved=True)
        return {slot: ActionChunk(move) for slot, move in moves.items()}


class Separate:
    """Single policies as a `BatchedPolicy`, one per slot: each keeps its own history. A slot whose policy could not be
    reset has no episode, and refuses to act."""

    def __init__(self, policies: Sequence[Policy]):
        self._policies = list(policies)
        self.robot = robot_of(self._policies[0]) if self._policies else robots.CALVIN
        self._begun: set[int] = set()

    def reset(self, slots: Sequence[int], instructions: Sequence[str]) -> None:
        self._begun -= set(slots)
        slots = check_slots(slots, len(self._policies))
        for slot, instruction in zip(slots, instructions, strict=True):
            self._policies[slot].reset(instruction)
            self._begun.add(slot)

    def act(self, observations: Sequence[Observation], slots: Sequence[int]) -> list[ActionChunk]:
        slots = check_slots(slots, len(self._policies))
        for slot in slots:
            if slot not in self._begun:
                raise RuntimeError(f"slot {slot} has no episode: act() before reset(instruction), or its reset failed.")
        return [self._policies[slot].act(observation) for slot, observation in zip(slots, observations, strict=True)]
