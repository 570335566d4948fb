"""Roll a batched policy out in many environments at once: the loop behind every closed-loop number.

All environments advance in lockstep: one control step, then one policy call for those whose actions are used up. A
frame is rendered only when the policy is asked (or the rollout is being filmed). An environment that breaks is
restarted and its trial repeated from the start; everybody else goes on.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.control.execution import BatchedPolicy, robot_of
from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.envs.vector import EnvError, Info, VectorEnv, Viewed

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One reset and the tasks asked after it, each in the state the previous one left."""

    index: int
    start: Mapping[str, Any]
    """Keyword arguments for `Env.reset`."""
    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """JSON values kept with the result, e.g. {"scene": "D", "seen_scene": False}."""

    def __post_init__(self):
        if not self.tasks or len(self.tasks) != len(self.instructions):
            raise ValueError(
                f"trial {self.index} has {len(self.tasks)} tasks and {len(self.instructions)} instructions; expected "
                "at least one task, and one instruction for each."
            )


@dataclasses.dataclass(frozen=True)
class SuccessCriterion:
    """When a task is over, and whether it was done."""

    max_steps: int = 360
    """Control steps per task."""
    completed: Callable[[Sequence[Info], Sequence[Info]], Sequence[Collection[str]]] = tasks.completed_in_each
    """(infos when the tasks were given, infos now) -> for each environment the names of the tasks done since."""
    stop_at_success: bool = True
    """Stop at the first step that completes the task. False: run all steps, success is judged at the last one."""

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """What became of a trial. Lists run over the attempted tasks: up to the first failed one, or all."""

    index: int
    tasks: tuple[str, ...]
    """All tasks of the trial, attempted or not."""
    instructions: tuple[str, ...]
    success: tuple[bool, ...]
    steps: tuple[int, ...]
    """Control steps spent on each attempted task."""
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    partial: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Last `info["partial"]` of environments that grade parts of a task."""
    restarts: int = 0
    """How often the environment broke before the trial came to an end."""
    uncertainty: tuple[tuple[float | None, ...], ...] = ()
    """`ActionChunk.uncertainty` of each action executed, for each attempted task; None where none was said, () where
    none was all along, and in results of versions that did not keep it."""

    @property
    def score(self) -> int:
        """Tasks solved in a row, from the first."""
        return sum(self.success)


_Look = tuple[Observation, Callable[[], np.ndarray] | None]
"""What a policy would see, and what draws what people see."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """One filmed control step: what was seen, and the action that followed."""

    observation: Observation
    action: np.ndarray
    instruction: str
    task: int
    """Position of the task in the trial."""
    step: int
    view: Callable[[], np.ndarray] | None = None
    """Draws what people are shown of the moment, where the environment has a camera for them (`vector.Viewed`)."""

    @property
    def shown(self) -> np.ndarray:
        """What people are shown, uint8[height, width, 3]: the view, or else the policy's first camera."""
        return np.asarray(self.view() if self.view else next(iter(self.observation.images.values())))


@dataclasses.dataclass
class Recording:
    """A filmed trial."""

    env: str
    trial: Trial
    every: int
    """Control steps between two frames."""
    frames: list[Frame]
    result: TrialResult
    robot: robots.RobotSpec = robots.CALVIN
    """Whose actions the frames hold."""


@dataclasses.dataclass(frozen=True)
class Films:
    """Which trials are filmed, and what is done with the films."""

    trials: Collection[int]
    """Indices of trials."""
    keep: Callable[[Recording], None]
    """Gets each film when its trial ends."""
    every: int = 3
    """Control steps between two frames; the end is always a frame."""


def run(
    policy: BatchedPolicy,
    envs: VectorEnv,
    trials: Iterable[Trial],
    criterion: SuccessCriterion | None = None,
    *,
    max_restarts: int = 3,
    films: Films | None = None,
    watch: Callable[[int], None] | None = None,
) -> Iterator[TrialResult]:
    """Run trials, as many at a time as there are environments.

    Args:
      policy: every action it returns is executed; see `execution.ExecutedBatch` for execution modes.
      max_restarts: a trial whose environment breaks more often than this ends the run.
      watch: called after every control step with how many there were.
    Yields:
      results in the order in which trials end.
    Raises:
      ValueError: the policy returned an unusable action; names trial, task and step.
      EnvError: a trial's environment broke more than `max_restarts` times.
    """
    loop = _Loop(policy, envs, criterion or SuccessCriterion(), max_restarts, films)
    loop.queue.extend(_Run(trial) for trial in trials)
    for step in itertools.count(1):
        if not (loop.queue or loop.runs):
            break
        loop.fill()
        loop.plan()
        ended = loop.step()
        if watch is not None:
            watch(step)
        for done, last_look in ended:
            if films is not None and done.film:
                films.keep(_recording(envs.name, done, last_look, films.every, robot_of(policy)))
            yield done.result()


@dataclasses.dataclass
class _Run:
    """A trial under way, or waiting to be."""

    trial: Trial
    restarts: int = 0
    start_info: Info = dataclasses.field(default_factory=dict)
    info: Info = dataclasses.field(default_factory=dict)
    instruction: str = ""
    unheard: bool = False
    """The policy has not been told the instruction yet."""
    over: bool = False
    actions: collections.deque[tuple[np.ndarray, float | None]] = dataclasses.field(default_factory=collections.deque)
    """Still to be executed before the policy is asked again, and how uncertain each is."""
    step: int = 0
    success: list[bool] = dataclasses.field(default_factory=list)
    steps: list[int] = dataclasses.field(default_factory=list)
    doubts: list[list[float | None]] = dataclasses.field(default_factory=list)
    """For each task begun, how uncertain each executed action was."""
    film: list[Frame] = dataclasses.field(default_factory=list)

    @property
    def position(self) -> int:
        return len(self.success)

    def where(self) -> str:
        task = self.trial.tasks[self.position]
        return (
            f"trial {self.trial.index}, task {task} ({self.position + 1} of {len(self.trial.tasks)}), step {self.step}"
        )

    def follow(self, instruction: str) -> None:
        """A new instruction: what was planned for the old one is void."""
        self.instruction, self.unheard = instruction, True
        self.actions.clear()

    def begin_task(self, info: Info) -> None:
        self.step, self.info, self.start_info = 0, info, info
        self.doubts.append([])
        self.follow(info.get("instruction", self.trial.instructions[self.position]))

    def advance(self, info: Info, completed: Collection[str], criterion: SuccessCriterion) -> None:
        """Book one executed step and the tasks that are done after it."""
        self.info = info
        self.step += 1
        at_end = self.step >= criterion.max_steps
        success = (at_end or criterion.stop_at_success) and self.trial.tasks[self.position] in completed
        if success or at_end:
            self.success.append(success)
            self.steps.append(self.step)
            self.over = not success or self.position == len(self.trial.tasks)
            if not self.over:
                self.begin_task(info)
        elif info.get("instruction", self.instruction) != self.instruction:  # some environments have tasks in stages
            self.follow(info["instruction"])

    def result(self) -> TrialResult:
        trial = self.trial
        partial = {name: float(value) for name, value in self.info.get("partial", {}).items()}
        said = any(doubt is not None for doubts in self.doubts for doubt in doubts)
        return TrialResult(
            trial.index,
            trial.tasks,
            trial.instructions,
            tuple(self.success),
            tuple(self.steps),
            trial.labels,
            partial,
            self.restarts,
            tuple(map(tuple, self.doubts)) if said else (),
        )


@dataclasses.dataclass
class _Loop:
    policy: BatchedPolicy
    envs: VectorEnv
    criterion: SuccessCriterion
    max_restarts: int
    films: Films | None
    queue: collections.deque[_Run] = dataclasses.field(default_factory=collections.deque)
    runs: dict[int, _Run] = dataclasses.field(default_factory=dict)
    """Slot -> what runs in it."""

    def fill(self) -> None:
        """Start waiting trials in free slots."""
        free = [slot for slot in range(self.envs.size) if slot not in self.runs][: len(self.queue)]
        if not free:
            return
        self.runs |= {slot: self.queue.popleft() for slot in free}
        infos = self._sound(free, self.envs.reset(free, [self.runs[slot].trial.start for slot in free]))
        for slot, info in infos.items():
            self.runs[slot].begin_task(info)

    def plan(self) -> None:
        """Ask the policy for those whose actions are used up; film those whose turn it is."""
        unheard = [slot for slot, run in self.runs.items() if run.unheard]
        if unheard:
            self.policy.reset(unheard, [self.runs[slot].instruction for slot in unheard])
        for slot in unheard:
            self.runs[slot].unheard = False
        asking = [slot for slot, run in self.runs.items() if not run.actions]
        filmed = [slot for slot in self.runs if self._filmed(slot) and self.runs[slot].step % self.films.every == 0]
        looking = sorted({*asking, *filmed})
        seen = self._sound(looking, self.envs.observe(looking)) if looking else {}
        asking = [slot for slot in asking if slot in seen]
        if asking:
            try:
                chunks = self.policy.act([seen[slot] for slot in asking], asking)
            except Exception as error:
                error.add_note(f"The policy failed at {'; '.join(self.runs[slot].where() for slot in asking[:3])}.")
                raise
            for slot, chunk in zip(asking, chunks, strict=True):
                actions = _checked(chunk.actions, self.runs[slot].where(), robot_of(self.policy))
                self.runs[slot].actions.extend(zip(actions, _doubts(chunk, self.runs[slot].where()), strict=True))
        views = self._views(filmed)
        for slot in filmed:
            if slot in seen:
                run = self.runs[slot]
                now = (run.instruction, run.position, run.step, views.get(slot))
                run.film.append(Frame(seen[slot], run.actions[0][0], *now))

    def step(self) -> list[tuple[_Run, _Look | None]]:
        """One control step everywhere; returns the trials that ended, those filmed with a last look."""
        slots = list(self.runs)
        if not slots:
            return []
        actions, doubts = zip(*[self.runs[slot].actions.popleft() for slot in slots], strict=True)
        for slot, doubt in zip(slots, doubts, strict=True):
            self.runs[slot].doubts[-1].append(doubt)
        infos = self._sound(slots, self.envs.step(slots, np.stack(actions)))
        completed = self.criterion.completed([self.runs[slot].start_info for slot in infos], list(infos.values()))
        for (slot, info), names in zip(infos.items(), completed, strict=True):
            self.runs[slot].advance(info, names, self.criterion)
        ended = [slot for slot in infos if self.runs[slot].over]
        filmed = [slot for slot in ended if self._filmed(slot)]
        looks = dict(zip(filmed, self.envs.observe(filmed))) if filmed else {}
        # the trial is over, so an environment that breaks at this last look only spoils the film
        views = self._views(filmed)
        looks = {slot: (look, views.get(slot)) for slot, look in looks.items() if not isinstance(look, EnvError)}
        return [(self.runs.pop(slot), looks.get(slot)) for slot in ended]

    def _views(self, slots: Sequence[int]) -> dict[int, Callable[[], np.ndarray]]:
        """What draws these slots for people; empty where the environment has no camera for them."""
        if not slots or not isinstance(self.envs, Viewed):
            return {}
        return dict(zip(slots, self.envs.views(slots), strict=True))

    def _filmed(self, slot: int) -> bool:
        return self.films is not None and self.runs[slot].trial.index in self.films.trials

    def _sound(self, slots: Sequence[int], answers: Sequence[Any]) -> dict[int, Any]:
        """The answers of environments that did not break; trials of the others go back to the queue."""
        for slot, answer in zip(slots, answers, strict=True):
            if isinstance(answer, EnvError):
                self._repeat(slot, answer)
        return {slot: answer for slot, answer in zip(slots, answers) if not isinstance(answer, EnvError)}

    def _repeat(self, slot: int, error: EnvError) -> None:
        run = self.runs.pop(slot)
        trial, restarts = run.trial, run.restarts + 1
        if restarts > self.max_restarts:
            raise EnvError(
                f"the environment broke {restarts} times in trial {trial.index}, last at {run.where()}. Results so far "
                f"are kept; start the evaluation again to go on from here. The last failure: {error}"
            ) from error
        log.warning("environment %d broke at %s; restarting it and repeating the trial: %s", slot, run.where(), error)
        self.queue.appendleft(_Run(trial, restarts))
        try:
            self.envs.restart(slot)
        except EnvError as again:  # the next reset fails at once and counts as the next attempt
            log.warning("environment %d did not come back: %s", slot, again)


def _checked(actions: np.ndarray, where: str, robot: robots.RobotSpec) -> np.ndarray:
    """The actions, if a robot could execute them."""
    actions = np.asarray(actions)
    remedy = "Check the policy's head and un-normalisation."
    if actions.ndim != 2 or actions.shape[1] != len(robot.action) or len(actions) == 0:
        expected = f"[C, {len(robot.action)}]"
        raise ValueError(f"{where}: the policy returned shape {actions.shape}, expected {expected}. {remedy}")
    if not np.isfinite(actions).all():
        row, column = np.argwhere(~np.isfinite(actions))[0]
        raise ValueError(f"{where}: the policy's action {row} has {actions[row, column]} in column {column}. {remedy}")
    for column in robot.binary:
        if not np.isin(actions[:, column], (-1, 1)).all():
            raise ValueError(
                f"{where}: the policy's {robot.action[column].name} commands {actions[:, column].tolist()} must be "
                "exactly -1 (close) or 1 (open); binarise them first."
            )
    return actions


def _doubts(chunk: ActionChunk, where: str) -> list[float | None]:
    """How uncertain each action of a chunk is, to five digits; None where the policy does not say (nan)."""
    if chunk.uncertainty is None:
        return [None] * len(chunk.actions)
    doubts = np.asarray(chunk.uncertainty, float)
    if doubts.shape != (len(chunk.actions),) or np.isinf(doubts).any():
        infinite = " and an infinite value" if np.isinf(doubts).any() else ""
        raise ValueError(
            f"{where}: the policy's uncertainty has shape {doubts.shape}{infinite}, expected a finite number for each "
            f"of its {len(chunk.actions)} actions. Check the policy's head."
        )
    return [None if np.isnan(doubt) else float(f"{doubt:.5g}") for doubt in doubts]


def _recording(env: str, run: _Run, last_look: _Look | None, every: int, robot: robots.RobotSpec) -> Recording:
    frames = run.film
    if last_look is not None:
        seen, view = last_look
        now = {"observation": seen, "task": len(run.steps) - 1, "step": run.steps[-1], "view": view}
        frames = [*frames, dataclasses.replace(frames[-1], **now)]
    return Recording(env, run.trial, every, frames, run.result(), robot)
