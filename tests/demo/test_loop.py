"""Control in time, whatever those who watch do."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from robovlms_jax.demo import loop as loops
from robovlms_jax.demo.loop import Camera, ControlLoop
from robovlms_jax.web.messages import unpack
from tests.demo.fakes import make_stage


@pytest.fixture
def drawn(monkeypatch):
    """Moments that were drawn; drawing takes 20 ms, and hardly any processor time."""
    moments = []

    def draw(self, moment, camera):
        time.sleep(0.02)
        moments.append(moment.state)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(loops.Painter, "draw", draw)
    return moments


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_control_goes_on_while_a_picture_is_never_taken(drawn):
    stage, *_ = make_stage()
    stuck = threading.Event()
    camera = Camera({"static": 8, "wrist": 8}, lambda message: stuck.wait(20), lambda: {})
    control = ControlLoop(stage, camera.see)
    camera.start()
    camera.want()
    control.start()
    try:
        control.do(lambda stage: stage.instruct("turn on the green light"))
        wait_for(lambda: stage.score == [1, 1])
        wait_for(lambda: stage.tick_number > 60)
        assert len(drawn) == 2  # both cameras, once
        assert control.numbers["ticks_per_s"] > 10
    finally:
        control.stop()
        stuck.set()
        camera.stop()


def test_nothing_is_drawn_while_nobody_wants_a_picture_and_nothing_twice(drawn):
    stage, _, _ = make_stage()
    messages = []
    camera = Camera({"static": 8, "wrist": 8}, messages.append, lambda: {"speed": 1.0})
    camera.start()
    try:
        camera.see(stage.tick())
        time.sleep(0.1)
        assert not messages and not drawn
        camera.want()
        wait_for(lambda: len(messages) == 1)
        for _ in range(60):
            snapshot = stage.tick()  # the robot comes to rest
        for count in (2, 3):
            camera.see(snapshot)
            camera.want()
            wait_for(lambda n=count: len(messages) == n)
        assert messages[1].number == messages[2].number and len(drawn) == 4
        facts, pictures = unpack(messages[2].whole)
        assert facts["tick"] == 61 and facts["speed"] == 1.0 and set(pictures) == {"static", "wrist"}
        assert unpack(messages[2].bare) == (facts, {})
    finally:
        camera.stop()


def test_slow_motion_slows_time_but_no_command():
    stage, _, _ = make_stage()
    control = ControlLoop(stage, lambda snapshot: None)
    control.set_speed(0.1)
    control.start()
    try:
        wait_for(lambda: stage.tick_number >= 1)
        done = threading.Event()
        control.do(lambda stage: done.set())
        assert done.wait(0.25)  # a tick takes 0.33 s
        started, first = time.monotonic(), stage.tick_number
        wait_for(lambda: stage.tick_number >= first + 3)
        assert time.monotonic() - started > 0.6
        assert control.numbers["ticks_per_s"] is None  # so few say nothing, and those of another speed are forgotten
        with pytest.raises(ValueError, match="speed 7 is none of"):
            control.set_speed(7)
    finally:
        control.stop()


def test_a_command_that_fails_ends_neither_control_nor_the_others():
    stage, _, _ = make_stage()
    control = ControlLoop(stage, lambda snapshot: None)
    control.start()
    try:
        control.do(lambda stage: 1 / 0)
        control.do(lambda stage: stage.instruct("turn on the green light"))
        wait_for(lambda: stage.score == [1, 1])
        assert not stage.broken
    finally:
        control.stop()


def test_a_control_step_that_fails_reaches_the_page_and_the_scene_can_begin_again():
    stage, world, _ = make_stage()
    seen = []
    control = ControlLoop(stage, seen.append)
    control.start()
    try:
        wait_for(lambda: seen)
        world.bad = KeyError("led")
        control.do(lambda stage: stage.instruct("turn on the green light"))
        wait_for(lambda: seen[-1].facts["broken"] == "KeyError: 'led'")
        count = len(seen)
        wait_for(lambda: len(seen) > count + 3)  # the page goes on
        world.bad = None
        control.do(lambda stage: stage.reset())
        wait_for(lambda: seen[-1].facts["latch"] == "hold" and not seen[-1].facts["broken"])
        control.do(lambda stage: 1 / 0)
        wait_for(lambda: "That failed" in seen[-1].facts["said"][-1]["text"])
        assert "and was not done: ZeroDivisionError: " in seen[-1].facts["said"][-1]["text"]
    finally:
        control.stop()


def test_a_picture_that_cannot_be_drawn_is_said_and_does_not_keep_the_facts_from_the_page(monkeypatch, caplog):
    def draw(self, moment, camera):
        raise MemoryError("no room")

    monkeypatch.setattr(loops.Painter, "draw", draw)
    stage, _, _ = make_stage()
    messages = []
    camera = Camera({"static": 8}, messages.append, lambda: {})
    camera.start()
    try:
        for count in (1, 2):
            camera.see(stage.tick())
            camera.want()
            wait_for(lambda n=count: len(messages) == n)
            facts, pictures = unpack(messages[-1].whole)
            assert facts["undrawn"] == "MemoryError: no room" and facts["tick"] == count and not pictures
        monkeypatch.setattr(loops.Painter, "draw", lambda self, moment, camera: np.zeros((8, 8, 3), np.uint8))
        camera.see(stage.tick())
        camera.want()
        wait_for(lambda: len(messages) == 3)
        facts, pictures = unpack(messages[-1].whole)
        assert facts["undrawn"] == "" and set(pictures) == {"static"}
    finally:
        camera.stop()
    assert caplog.text.count("a picture could not be drawn") == 1
