"""The watchdog that owns the actuators, and the loop around it."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

from robovlms_jax.control.asynchronous import AsyncConfig
from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.deploy.guard import Guard
from robovlms_jax.deploy.limits import MOBILE, Limits
from robovlms_jax.deploy.loop import run
from robovlms_jax.deploy.mobile import base_path
from robovlms_jax.deploy.safety import Measured, SafetyLayer

SLOW = np.array([0.005, 0, 0])
ASK_EARLY = AsyncConfig("switch", ask_below=5)


class Base:
    """A base that does what it is sent."""

    def __init__(self, period_s=0.02):
        self.place, self.sent, self._period_s = np.zeros(3), [], period_s

    def observe(self):
        return Observation({"static": np.zeros((2, 2, 3), np.uint8)})

    def measure(self):
        return Measured(self.place)

    def send(self, action):
        self.sent.append(action)
        self.place = base_path(action[None, None], self.place[None], self._period_s)[0, 0]


def guarded(missing_ticks=5, **changes):
    base = Base()
    layer = SafetyLayer(MOBILE, dataclasses.replace(Limits(), missing_ticks=missing_ticks, **changes))
    return base, layer, Guard(layer, base.measure, base.send)


def rows(*speeds):
    return np.array([[speed, 0, 0] for speed in speeds])


def test_rows_belong_to_ticks_and_late_ones_are_never_executed():
    base, _, guard = guarded()
    guard.tick(), guard.tick()
    assert guard.offer(rows(0.001, 0.002, 0.003, 0.004), observed=0)  # two ticks late
    guard.tick(), guard.tick()
    np.testing.assert_array_equal(np.array(base.sent)[:, 0], [0, 0, 0.003, 0.004])
    assert not guard.offer(rows(9, 9), observed=1)  # all of it is late
    assert not guard.offer(rows(9, 9, 9, 9, 9), observed=0)  # older than the present one
    assert not guard.offer(rows(9), observed=5)  # of an observation that is still to come
    assert guard.counts["chunks refused"] == 3


def test_a_newer_chunk_takes_the_place_of_an_older_one_and_is_a_copy():
    base, _, guard = guarded()
    guard.offer(rows(0.001, 0.001, 0.001), observed=0)
    guard.tick()
    newer = rows(0.002, 0.002, 0.002)
    guard.offer(newer, observed=1)
    newer[:] = 9
    guard.tick()
    assert base.sent[-1][0] == 0.002


def test_a_policy_that_never_answers_is_stopped_by_the_guards_thread():
    base, layer, guard = guarded()
    with guard:
        guard.offer(np.tile([0.1, 0, 0], (20, 1)), observed=0)
        deadline = time.monotonic() + 5
        while layer.latch.state == "run":  # nobody calls the guard
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "missing_action" in layer.latch.reason
    assert not base.sent[-1].any() and max(action[0] for action in base.sent) > 0.05


@pytest.mark.parametrize("part", ["measure", "send"])
def test_a_robot_that_cannot_be_measured_or_commanded_latches_a_stop(part):
    base, layer, _ = guarded()

    def broken(*args):
        raise OSError("cable")

    calls = {"measure": base.measure, "send": base.send} | {part: broken}
    guard = Guard(layer, calls["measure"], calls["send"])
    guard.offer(rows(0.001, 0.001), observed=0)
    guard.tick(), guard.tick()
    assert "failed: OSError: cable" in layer.latch.reason


def test_leaving_brakes_to_rest():
    base, layer, guard = guarded()
    with guard:
        guard.offer(np.tile([0.2, 0, 0], (50, 1)), observed=0)
        time.sleep(0.3)
    assert max(action[0] for action in base.sent) > 0.05 and not base.sent[-1].any()
    assert layer.latch.state == "run"  # that takes more ticks than may be missed, and is no fault


class Remote:
    """A policy that is asked over a line: some answers fail."""

    def __init__(self):
        self.calls, self.thread = 0, threading.get_ident()

    def reset(self, instruction):
        self.instruction = instruction

    def act(self, observation):
        self.calls += 1
        if self.calls == 2:
            raise TimeoutError("no answer within 0.1 s")
        return ActionChunk(np.tile(SLOW, (10, 1)))


def test_the_loop_executes_chunks_beside_inference_and_outlives_a_failed_prediction():
    base, policy = Base(), Remote()
    layer = SafetyLayer(MOBILE, Limits())
    guard = run(base, policy, layer, "forward", done=lambda guard: guard.now >= 40, asynchronous=ASK_EARLY)
    assert policy.instruction == "forward" and policy.calls >= 4
    assert guard.counts["failed predictions"] == 1 and guard.counts["ticks"] >= 40
    assert layer.latch.state == "run" and base.place[0] > 0
    assert not base.sent[-1].any()
