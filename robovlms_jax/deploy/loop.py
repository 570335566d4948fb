"""A reference robot loop: observe, ask the policy, let the guard execute; inference runs beside execution."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np

from robovlms_jax.control.asynchronous import ActionQueue, AsyncConfig, Scheduler
from robovlms_jax.control.interface import Observation, Policy
from robovlms_jax.deploy import mobile
from robovlms_jax.deploy.guard import Guard
from robovlms_jax.deploy.safety import Decision, Measured, SafetyLayer

log = logging.getLogger(__name__)


class Robot(Protocol):
    """A robot as the loop needs it. `measure` and `send` are called in the guard's thread, `observe` in the loop's."""

    def observe(self) -> Observation: ...

    def measure(self) -> Measured: ...

    def send(self, action: np.ndarray) -> None: ...


SWITCH = AsyncConfig("switch")


def run(
    robot: Robot,
    policy: Policy,
    layer: SafetyLayer,
    instruction: str | Callable[[], str],
    *,
    done: Callable[[Guard], bool],
    asynchronous: AsyncConfig = SWITCH,
    base: mobile.BaseMapping | None = None,
    on_decision: Callable[[Decision], None] | None = None,
) -> Guard:
    """Drives the robot until `done` or a latched stop, and brakes it to rest.

    Args:
      policy: such as `client.Client`. What it raises is logged, and the robot goes on with the rest of its chunk, then
        is braked.
      layer: `Limits.missing_ticks` must outlast an answer that the rest does not cover; for the first one it waits.
      instruction: or what says which one holds now; the actions for an older one are executed until there are new ones.
      done: asked between predictions; `Guard.now` counts ticks.
      asynchronous: when the policy is asked. `robot.observe` must take less than a tick where that looks at pictures.
      base: how a policy of an arm drives a base, which `layer` is for; None: the policy's actions are the robot's.
      on_decision: see `Guard`.
    Returns:
      The guard, whose `counts` say what happened; why the policy was asked is "asked: REASON".
    Raises:
      ValueError: a base mapping for a robot that is none, or with `tell` or `roll_forward`; what the robot's
        description or a missing `on_decision` does not allow.
    """
    policy = policy if base is None else _on_base(policy, base, layer, asynchronous)
    current = instruction if callable(instruction) else lambda: instruction
    active = current()
    scheduler = Scheduler(asynchronous, layer.spec, ActionQueue(asynchronous, layer.spec))
    policy.reset(active)
    with Guard(layer, robot.measure, robot.send, queue=scheduler.queue, on_decision=on_decision) as guard:
        while not done(guard) and guard.state == "run":
            if current() != active:
                active = current()
                policy.reset(active)
                scheduler.change_instruction()
            observation = _look(robot, guard) if asynchronous.looks else None
            if (asynchronous.looks and observation is None) or not (reason := scheduler.due(observation)):
                guard.wait()
                continue
            if asynchronous.seam == "wait":
                guard.clear()
            scheduler.ask(reason)
            try:
                chunk = policy.act(scheduler.see(robot.observe() if observation is None else observation))
            except Exception as error:  # lost lines have errors of their own kinds; the guard brakes in any case
                log.warning("no action: %s: %s", type(error).__name__, error)
                guard.counts["failed predictions"] += 1
                scheduler.failed()
                guard.wait()
                continue
            if current() == active:
                guard.took(scheduler.answer(chunk))
            else:  # it answers what is asked no more
                scheduler.failed()
    guard.counts.update({f"asked: {reason}": count for reason, count in scheduler.counts.items()})
    return guard


def _look(robot: Robot, guard: Guard) -> Observation | None:
    """What the robot sees; None where it cannot say: the guard goes on with what is left of the chunk, then brakes."""
    try:
        return robot.observe()
    except Exception as error:  # drivers have errors of their own kinds
        log.warning("no observation: %s: %s", type(error).__name__, error)
        guard.counts["failed observations"] += 1
        return None


def _on_base(policy: Policy, base: mobile.BaseMapping, layer: SafetyLayer, asynchronous: AsyncConfig) -> mobile.OnBase:
    """A policy of an arm for the layer's base."""
    if asynchronous.tell or asynchronous.roll_forward:
        raise ValueError(
            "asynchronous.tell and roll_forward show a policy the robot's own actions, and with a base mapping it has "
            "others: leave both off."
        )
    return mobile.OnBase(policy, base, layer.spec)
