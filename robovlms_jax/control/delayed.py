"""A policy whose answers come late, in simulators: asynchronous control on the simulator's own clock."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.control.asynchronous import AsyncConfig, Scheduler
from robovlms_jax.control.execution import BatchedPolicy, robot_of
from robovlms_jax.control.interface import ActionChunk, Observation


class AsynchronousBatch:
    """A `BatchedPolicy` whose answers come `latency` ticks late, on the simulator's clock.

    It answers with the actions up to the next tick at which the policy may be asked, holding still where there are
    none. counts: of all episodes' schedulers, and executed ticks as `ticks`.
    """

    def __init__(self, policy: BatchedPolicy, config: AsyncConfig, latency: int):
        if latency < 0:
            raise ValueError(f"latency={latency} ticks must be 0 or more.")
        self._policy, self._config, self._latency, self.robot = policy, config, latency, robot_of(policy)
        self._episodes: dict[int, _Episode] = {}
        self.counts: collections.Counter[str] = collections.Counter()

    def reset(self, slots: Sequence[int], instructions: Sequence[str]) -> None:
        for slot in slots:
            self._episodes.pop(slot, None)
        self._policy.reset(slots, instructions)
        self._episodes |= {slot: _Episode(Scheduler(self._config, self.robot)) for slot in slots}

    def act(self, observations: Sequence[Observation], slots: Sequence[int]) -> list[ActionChunk]:
        for slot in slots:
            if slot not in self._episodes:
                raise RuntimeError(f"slot {slot} has no episode: act() before reset(instruction), or its reset failed.")
        requests: dict[int, Observation] = {}
        for slot, observation in zip(slots, observations, strict=True):
            episode = self._episodes[slot]
            episode.land()
            if reason := episode.scheduler.due(observation):
                self.counts[reason] += 1
                executed = np.array(episode.executed).reshape(-1, len(self.robot.action))
                episode.scheduler.ask(reason)
                requests[slot] = dataclasses.replace(episode.scheduler.see(observation), executed=executed)
                episode.executed = []
        if requests:
            for slot, chunk in zip(requests, self._policy.act(list(requests.values()), list(requests)), strict=True):
                episode = self._episodes[slot]
                episode.coming = (episode.scheduler.queue.now + self._latency, chunk)
        return [self._ahead(self._episodes[slot]) for slot in slots]

    def _ahead(self, episode: _Episode) -> ActionChunk:
        """Actions until the next tick at which somebody has to look; holding still is as uncertain as nan says."""
        actions: list[np.ndarray] = []
        doubts: list[float] = []
        while True:
            episode.land()
            if actions and (self._config.looks or episode.scheduler.due()):
                unsaid = np.isnan(doubts).all()
                return ActionChunk(np.stack(actions), None if unsaid else np.array(doubts, np.float32))
            waits = self._config.seam == "wait" and episode.coming is not None
            row = None if waits else episode.scheduler.queue.take()
            if waits:
                episode.wait()
            if row is None:
                self.counts["held"] += 1
                action = robots.rest(self.robot.action, episode.last(self.robot))
            else:
                action = row.action
                self.counts["age"] += episode.scheduler.queue.now - 1 - row.observed
            self.counts["ticks"] += 1
            episode.executed.append(action)
            episode.latest = action
            actions.append(action)
            doubts.append(np.nan if row is None else row.uncertainty)


@dataclasses.dataclass
class _Episode:
    """coming: tick and chunk of the answer under way. executed: since the policy saw something. latest: action."""

    scheduler: Scheduler
    coming: tuple[int, ActionChunk] | None = None
    executed: list[np.ndarray] = dataclasses.field(default_factory=list)
    latest: np.ndarray | None = None

    def land(self) -> None:
        if self.coming is not None and self.scheduler.queue.now >= self.coming[0]:
            chunk, self.coming = self.coming[1], None
            self.scheduler.answer(chunk)

    def wait(self) -> None:
        """A tick passes in which nothing is executed."""
        self.scheduler.queue.clear()
        self.scheduler.queue.take()

    def last(self, robot: robots.RobotSpec) -> np.ndarray:
        """The action before; before the first one nothing moves, and grippers are open."""
        if self.latest is not None:
            return self.latest
        return np.array([1.0 if d.kind == "binary" else 0.0 for d in robot.action], np.float32)
