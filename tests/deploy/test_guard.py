"""The watchdog that owns the actuators, and the loop around it."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

from robovlms_jax.control.asynchronous import AsyncConfig
from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.control.robot import CALVIN, Dimension, RobotSpec
from robovlms_jax.deploy.guard import Guard
from robovlms_jax.deploy.limits import MOBILE, Limits
from robovlms_jax.deploy.loop import run
from robovlms_jax.deploy.mobile import BaseMapping, OnBase, base_path
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


@pytest.mark.parametrize("error", [OSError, SystemExit])
@pytest.mark.parametrize("part", ["measure", "send"])
def test_a_robot_that_cannot_be_measured_or_commanded_latches_a_stop(part, error):
    base, layer, _ = guarded()

    def broken(*args):
        raise error("cable")

    calls = {"measure": base.measure, "send": base.send} | {part: broken}
    guard = Guard(layer, calls["measure"], calls["send"])
    guard.offer(rows(0.001, 0.001), observed=0)
    guard.tick(), guard.tick()
    assert f"failed: {error.__name__}: cable" in layer.latch.reason


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


@pytest.mark.parametrize("category", [0, 1])
def test_a_stop_that_asks_for_power_to_be_removed_is_heard_or_refused(category):
    base, asked = Base(), []
    layer = SafetyLayer(MOBILE, Limits(category=category))
    with pytest.raises(ValueError, match=f"category={category} asks for power to be removed, and nobody hears it"):
        run(base, Remote(), layer, "forward", done=lambda guard: True)

    def done(guard):
        if guard.now > 5:
            layer.stop("a person at the fence")
        return False

    run(base, Remote(), layer, "forward", done=done, on_decision=lambda decision: asked.append(decision.remove_power))
    assert not asked[0] and asked[-1] and not base.sent[-1].any()


class Arm:
    """A policy of an arm, that turns and goes back and to the left."""

    def __init__(self):
        self.executed = []

    def reset(self, instruction): ...

    def act(self, observation):
        self.executed.append(observation.executed)
        action = np.array([-0.02, 0.01, 0.5, 0.1, 0.1, 0.02, 1.0], np.float32)
        return ActionChunk(np.tile(action, (10, 1)), np.ones(10), np.ones((10, 7)), 0.9)


def test_the_loop_drives_a_base_with_a_policy_of_an_arm():
    base, mapping = Base(), BaseMapping(drive="differential", lateral="turn")
    layer = SafetyLayer(MOBILE, Limits())
    run(base, Arm(), layer, "go", done=lambda guard: guard.now >= 15, asynchronous=ASK_EARLY, base=mapping)
    fastest = min(base.sent, key=lambda action: action[0])
    # asked for are -0.01 m/s, and 0.02 * 1.5 of the yaw and 0.005 * 2 rad/s of what goes to the side; how the layer
    # begins and ends a motion keeps their ratio
    assert fastest[0] <= -0.008 and fastest[1] == 0
    np.testing.assert_allclose(fastest[2] / fastest[0], 0.04 / -0.01, rtol=0.05)
    assert base.place[0] < 0 < base.place[2]


def test_a_policy_of_an_arm_on_a_base_says_what_still_holds_and_hears_nothing_in_a_bases_numbers():
    policy = Arm()
    on_base = OnBase(policy, BaseMapping())
    on_base.reset("go")
    chunk = on_base.act(Observation({}, executed=np.zeros((1, 3))))
    assert chunk.actions.shape == (10, 3) and chunk.uncertainty.shape == (10,) and chunk.interval is None
    assert policy.executed == [None]
    with pytest.raises(ValueError, match=r"leave asynchronous\.tell off"):
        on_base.act(Observation({}, committed=np.zeros((2, 3))))


@pytest.mark.parametrize("base", [BaseMapping(), None])
def test_what_a_base_cannot_be_shown_is_refused_before_it_moves(base):
    drive = Base()
    layer = SafetyLayer(MOBILE, Limits())
    with pytest.raises(ValueError, match=r"asynchronous\..*roll_forward"):
        run(
            drive,
            Arm(),
            layer,
            "go",
            done=lambda guard: True,
            base=base,
            asynchronous=AsyncConfig("freeze", roll_forward=True),
        )
    if base is not None:
        with pytest.raises(ValueError, match=r"asynchronous\.tell"):
            run(
                drive,
                Arm(),
                layer,
                "go",
                done=lambda guard: True,
                base=base,
                asynchronous=AsyncConfig("freeze", tell=True),
            )
    assert not drive.sent


def test_a_base_mapping_for_an_arm_is_refused():
    layer = SafetyLayer(CALVIN, Limits())
    with pytest.raises(ValueError, match=r"robot 'calvin' has the 7 action dimensions \['x'.*those of a base"):
        run(Base(), Arm(), layer, "go", done=lambda guard: True, base=BaseMapping())
    joints = tuple(Dimension(name, "rad", "absolute", "joint", "base", -1.0, 1.0) for name in ("j1", "j2", "j3"))
    with pytest.raises(ValueError, match=r"'three joints' has the 3 action dimensions \['j1', 'j2', 'j3'\]"):
        OnBase(Arm(), BaseMapping(), RobotSpec("three joints", 10.0, action=joints, state=()))


@pytest.mark.parametrize(
    "wrong",
    [None, Measured(np.zeros(3), age_s=None), Measured(np.zeros(3), obstacles=None), Measured(np.full(3, np.nan))],
    ids=["none", "age", "obstacles", "nan"],
)
@pytest.mark.parametrize("writable", [True, False])
def test_whatever_a_robots_code_measures_and_the_disk_does_the_robot_is_braked(tmp_path, wrong, writable):
    (tmp_path / "file").touch()
    base = Base()
    layer = SafetyLayer(MOBILE, Limits(), latch_file=tmp_path / ("stop.json" if writable else "file/stop.json"))
    guard = Guard(layer, lambda: wrong if len(base.sent) > 20 else base.measure(), base.send)
    guard.offer(rows(*[0.3] * 200), observed=0)
    for _ in range(80):
        guard.tick()
    assert max(np.abs(base.sent[20])) > 0.1 and not np.any(base.sent[-1])
    assert guard.state == "hold" and (tmp_path / "stop.json").exists() == writable


def test_a_layer_that_fails_and_an_onlooker_that_fails_leave_the_ticks_going(monkeypatch):
    base, layer, _ = guarded()
    guard = Guard(layer, base.measure, base.send, on_decision=lambda decision: 1 / 0)
    guard.offer(rows(*[0.3] * 200), observed=0)
    for _ in range(20):
        guard.tick()
    assert guard.state == "run"
    monkeypatch.setattr(layer, "check", lambda *_: 1 / 0)
    for _ in range(60):
        guard.tick()
    assert guard.state == "hold" and not np.any(base.sent[-1]) and "checking failed" in layer.latch.reason


def test_the_loop_waits_for_its_first_answer_and_outlives_errors_of_any_kind():
    class Lost(Exception):
        pass

    class Late:
        asked = 0

        def reset(self, instruction):
            pass

        def act(self, observation):
            self.asked += 1
            if self.asked > 1:
                raise Lost("the line is gone")
            time.sleep(0.3)  # longer than missing_ticks
            return ActionChunk(rows(*[0.1] * 40).astype(np.float32))

    base, layer, _ = guarded()
    guard = run(base, Late(), layer, "go", done=lambda guard: guard.now > 100)
    assert np.array(base.sent).max() > 0.01 and guard.counts["failed predictions"] >= 1
    assert guard.state == "hold" and "missing_action" in layer.latch.reason  # once it drove, silence stops it


def test_a_gripper_that_nobody_told_anything_is_left_alone_until_the_first_action():
    gripper = Dimension("gripper", "m", "continuous", "gripper", low=0.02, high=0.08, open_at="low")
    xyz = [Dimension(name, "m", "delta", "position") for name in "xyz"]
    sent = []
    layer = SafetyLayer(RobotSpec("arm", 50.0, action=(*xyz, gripper)), Limits())
    guard = Guard(layer, lambda: Measured(np.array([0, 0, 0.1])), sent.append)
    guard.tick(), guard.tick()
    assert sent == []
    guard.offer(np.array([[0.001, 0, 0, 0.05]]), observed=guard.now)
    guard.tick(), guard.tick()
    assert [action[3] for action in sent] == [0.05] * len(sent) and sent
    measured = SafetyLayer(layer.spec, Limits()).brake(Measured(np.array([0, 0, 0.1]), grippers=np.array([0.07])))
    assert measured.action[3] == 0.07


def test_a_camera_that_fails_while_pictures_are_watched_ends_no_drive():
    # Fails if an error of `observe` leaves the loop: the robot would then stand still for good after one lost picture.
    class Blinking(Base):
        looked = 0

        def observe(self):
            self.looked += 1
            if self.looked < 3:
                raise OSError("no picture")
            return super().observe()

    drive = Blinking()
    watching = AsyncConfig("switch", picture_change=0.1)
    layer = SafetyLayer(MOBILE, Limits(missing_ticks=100))
    guard = run(
        drive, Arm(), layer, "go", done=lambda guard: drive.looked > 5, base=BaseMapping(), asynchronous=watching
    )
    assert guard.counts["failed observations"] == 2
    assert sum(guard.counts[name] for name in guard.counts if name.startswith("asked: ")) >= 1
