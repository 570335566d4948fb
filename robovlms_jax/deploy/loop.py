"""A reference robot loop: observe, ask the policy, let the guard execute; inference runs beside execution."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np

from robovlms_jax.control.interface import Observation, Policy
from robovlms_jax.deploy.guard import Guard
from robovlms_jax.deploy.safety import Measured, SafetyLayer

log = logging.getLogger(__name__)


class Robot(Protocol):
    """A robot as the loop needs it. `measure` and `send` are called in the guard's thread, `observe` in the loop's."""

    def observe(self) -> Observation: ...

    def measure(self) -> Measured: ...

    def send(self, action: np.ndarray) -> None: ...


def run(
    robot: Robot,
    policy: Policy,
    layer: SafetyLayer,
    instruction: str,
    *,
    done: Callable[[Guard], bool],
    ask_below: int = 0,
) -> Guard:
    """Drives the robot until `done` or a latched stop, and brakes it to rest.

    Args:
      policy: such as `client.Client`. What it raises is logged, and the robot is braked meanwhile.
      layer: `Limits.missing_ticks` must outlast an answer of the policy that `ask_below` does not cover.
      done: asked between predictions; `Guard.now` counts ticks.
      ask_below: the policy is asked when no more than so many rows of its chunk are left. 0: when it is used up; the
        robot then waits for each answer.
    Returns:
      The guard, whose `counts` say what happened.
    """
    policy.reset(instruction)
    with Guard(layer, robot.measure, robot.send) as guard:
        while not done(guard) and guard.state == "run":
            if guard.remaining > ask_below:
                guard.wait()
                continue
            observed = guard.now
            try:
                chunk = policy.act(robot.observe())
            except (OSError, RuntimeError, ValueError) as error:  # TimeoutError is an OSError
                log.warning("no action: %s", error)
                guard.counts["failed predictions"] += 1
                guard.wait()
                continue
            guard.offer(chunk.actions, observed)
    return guard
