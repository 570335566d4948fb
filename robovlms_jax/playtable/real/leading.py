"""A policy that acts first in the real simulator, so that experts take over where it has got to (Ross et al. 2011,
arXiv:1011.0686, as `playtable.takeovers` on the embedded one)."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from robovlms_jax.control.execution import BatchedPolicy
from robovlms_jax.control.interface import Observation
from robovlms_jax.envs import process
from robovlms_jax.envs.calvin import tasks


class Led(NamedTuple):
    """done: the policy did the task, so that nothing is left for an expert. situation: `Stage.situation` then."""

    done: bool
    situation: Mapping[str, Any]


class Leader:
    """Acts for a drawn number of control steps.

    Args:
      load: makes the policy, whose chunks are executed whole (`execution.ExecutedBatch`), when it is first asked; what
        else is wrong has been said by then. Called once; the policy is called from several threads.
      slots: simulators that are led at the same time, at most; the policy has as many.
      steps: control steps at most; the fewest are half of them.
      label: which policy that is, for recordings that go on only with the same one.

    asked, done: tasks that the policy began, and those that it did itself.
    """

    def __init__(self, load: Callable[[], BatchedPolicy], *, slots: int, steps: int, label: str):
        self.steps, self.label = steps, label
        self.asked = self.done = 0
        self._lock = threading.Lock()
        self._load = functools.cache(load)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)

    def lead(
        self,
        env: process.ProcessEnv,
        situation: Mapping[str, Any],
        task: str,
        sentences: Sequence[str],
        rng: np.random.Generator,
    ) -> Led:
        """From a situation, with one of the sentences.

        Raises:
          EnvError: the simulator broke.
          RuntimeError: the policy failed, such as by actions that are not finite; names the task.
        """
        steps = int(rng.integers(-(-self.steps // 2), self.steps + 1))
        sentence = sentences[rng.integers(len(sentences))]
        with self._lock:
            policy = self._load()
        slot = self._free.get_nowait()
        try:
            led = _led(policy, slot, env, situation, task, sentence, steps)
        finally:
            self._free.put(slot)
        with self._lock:
            self.asked, self.done = self.asked + 1, self.done + led.done
        return led


def _led(
    policy: BatchedPolicy,
    slot: int,
    env: process.ProcessEnv,
    start: Mapping[str, Any],
    task: str,
    sentence: str,
    steps: int,
) -> Led:
    number, situation = list(tasks.TASKS).index(task), start
    policy.reset([slot], [sentence])
    while steps > 0:
        env.send("observe")
        for action in _actions(policy, slot, env.receive(), task)[:steps]:
            env.send("step+situation", action)
            situation, steps = env.receive(), steps - 1
            if tasks.conditions(start, situation, as_released=True)[number]:
                return Led(True, situation)
    return Led(False, situation)


def _actions(policy: BatchedPolicy, slot: int, observation: Observation, task: str) -> np.ndarray:
    try:
        return np.asarray(policy.act([observation], [slot])[0].actions)
    except (ValueError, RuntimeError) as error:
        raise RuntimeError(f"the policy failed at {task}: {error}") from error
