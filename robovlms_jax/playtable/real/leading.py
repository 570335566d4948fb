"""A policy that acts first in the real simulator, so that experts take over where it has got to (Ross et al. 2011,
arXiv:1011.0686, as `playtable.takeovers` on the embedded one)."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from robovlms_jax.control.execution import BatchedPolicy
from robovlms_jax.envs import process
from robovlms_jax.envs.calvin import tasks


class Led(NamedTuple):
    """done: the policy did the task, so that nothing is left for an expert. situation: `Stage.situation` then."""

    done: bool
    situation: Mapping[str, Any]


class Leader:
    """Acts for a drawn number of control steps.

    Args:
      policy: its chunks are executed whole (`execution.ExecutedBatch`); called from several threads.
      slots: simulators that are led at the same time, at most; the policy has as many.
      steps: control steps at most; the fewest are half of them, before which a good policy has not failed yet.
      label: which policy that is, for recordings that go on only with the same one.
    """

    def __init__(self, policy: BatchedPolicy, *, slots: int, steps: int, label: str):
        self.steps, self.label, self._policy = steps, label, policy
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
        """From a situation, with one of the sentences. Raises EnvError: the simulator broke; ValueError: an action is
        not finite."""
        number, start = list(tasks.TASKS).index(task), situation
        left = int(rng.integers(-(-self.steps // 2), self.steps + 1))
        slot = self._free.get()
        try:
            self._policy.reset([slot], [sentences[rng.integers(len(sentences))]])
            while left > 0:
                env.send("observe")
                actions = np.asarray(self._policy.act([env.receive()], [slot])[0].actions)
                if not np.isfinite(actions).all():
                    raise ValueError(f"{task}: the policy's actions are not finite; check head and un-normalisation.")
                for action in actions[:left]:
                    situation, left = _step(env, action), left - 1
                    if tasks.conditions(start, situation, as_released=True)[number]:
                        return Led(True, situation)
        finally:
            self._free.put(slot)
        return Led(False, situation)


def _step(env: process.ProcessEnv, action: np.ndarray) -> Mapping[str, Any]:
    """The situation after one control step. Both messages are sent before either is answered: a step costs one wait."""
    env.send("step", action)
    env.send("situation")
    env.receive()
    return env.receive()
