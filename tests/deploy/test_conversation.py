"""The course of a client's connecting and acting, without a line or a clock that runs."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from robovlms_jax.control.interface import Observation
from robovlms_jax.deploy import codec, conversation
from robovlms_jax.deploy.conversation import Ask, ClientConfig, Close, Course, Open, Pause, ServerError

pytest.importorskip("websockets", reason="knows its exceptions")

HELLO = codec.pack({"action_dim": 2})
ANSWER = codec.pack({"actions": np.zeros((3, 2), np.float32)})
CUT = Close(goodbye=False)
SEEN = Observation({"static": np.zeros((2, 2, 3), np.uint8)})


def follow(steps, *outcomes):
    """Kinds of what is asked for, and the result. outcomes: of `Open` and `Ask`, in their order."""
    done, left, go_on, came = [], list(outcomes), steps.send, None
    while True:
        try:
            step = go_on(came)
        except StopIteration as end:
            return done, end.value
        except Exception as error:
            return done, error
        words = {Close: "close", Pause: "pause", Open: "open", Ask: "ask"}[type(step)]
        done.append(f"pause {step.seconds:g}" if isinstance(step, Pause) else "cut" if step == CUT else words)
        came = left.pop(0) if isinstance(step, Open | Ask) else None
        go_on = steps.throw if isinstance(came, Exception) else steps.send


@pytest.fixture
def course(monkeypatch):
    now = [0.0]

    def tick():
        now[0] += 0.01
        return now[0]

    monkeypatch.setattr(conversation.time, "monotonic", tick)
    course = Course("ws://robot:1", ClientConfig(connect_timeout_s=1.0, timeout_s=0.5))
    course.reset("go")
    return course


def test_a_refused_connection_is_tried_again_after_a_pause(course):
    done, _ = follow(course.connect(), ConnectionRefusedError("no"), HELLO)
    assert done == ["close", "open", "cut", "pause 0.1", "open"] and course.connected


def test_a_first_message_that_is_none_of_a_policy_server_ends_the_line(course):
    done, error = follow(course.connect(), codec.pack({"x": 1}))
    assert done == ["close", "open", "cut"] and isinstance(error, ServerError) and not course.connected


def test_a_line_that_is_lost_is_made_anew_once_and_the_episode_begins_anew(course):
    assert follow(course.act(SEEN), HELLO, ANSWER)[0] == ["close", "open", "ask"]
    done, chunk = follow(course.act(SEEN), ConnectionResetError("gone"), HELLO, ANSWER)
    assert done == ["ask", "cut", "close", "open", "ask"]
    assert chunk.actions.shape == (3, 2) and course.episodes_lost == 1
    lost = ConnectionResetError("gone"), HELLO, ConnectionResetError("again")
    done, error = follow(course.act(SEEN), *lost)
    assert done == ["ask", "cut", "close", "open", "ask", "cut"] and isinstance(error, ConnectionResetError)


def test_an_answer_that_comes_too_late_cuts_the_line_and_is_not_asked_for_again(course):
    follow(course.connect(), HELLO)
    done, error = follow(course.act(SEEN), TimeoutError())
    assert done == ["ask", "cut"] and "no answer within 0.5 s" in str(error)


def test_a_servers_error_closes_the_line_with_a_goodbye(course):
    follow(course.connect(), HELLO)
    done, error = follow(course.act(SEEN), "ValueError: no picture")
    assert done == ["ask", "close"] and isinstance(error, ServerError)


@pytest.mark.parametrize("number", [np.nan, -np.inf, 1e300])
def test_actions_that_are_not_finite_in_float32_are_no_answer(course, number):
    done, error = follow(course.act(SEEN), HELLO, codec.pack({"actions": np.full((3, 2), number)}))
    assert done[-1] == "close" and isinstance(error, ServerError) and "not finite" in str(error)


def test_who_is_stopped_while_connecting_leaves_no_line(course):
    steps = course.connect()
    assert isinstance(next(steps), Close) and isinstance(steps.send(None), Open)
    assert steps.throw(KeyboardInterrupt()) == CUT
    with pytest.raises(KeyboardInterrupt):
        steps.send(None)


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt(), asyncio.CancelledError(), RuntimeError("two threads")])
def test_who_is_stopped_while_waiting_for_an_answer_never_takes_it_for_the_next_one(course, stopped_by):
    follow(course.act(SEEN), HELLO, ANSWER)
    steps = course.act(SEEN)
    assert isinstance(next(steps), Ask) and steps.throw(stopped_by) == CUT
    with pytest.raises(type(stopped_by)):
        steps.send(None)
    assert not course.connected and course.episodes_lost == 1
    assert follow(course.act(SEEN), HELLO, ANSWER)[0] == ["close", "open", "ask"]


def test_pauses_double_and_end_with_the_time_for_connecting(course):
    done, error = follow(course.connect(), *[ConnectionRefusedError("no")] * 100)
    pauses = [float(step.split()[1]) for step in done if step.startswith("pause")]
    assert pauses[:3] == [0.1, 0.2, 0.4] and all(0 <= pause <= 1 for pause in pauses)
    assert "no policy server answered (no) within 1 s" in str(error)
