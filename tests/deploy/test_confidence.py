"""Confidence and real-time chunking over the line, and the loop's ways to drive a policy."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from robovlms_jax.control.asynchronous import AsyncConfig
from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.control.robot import CALVIN
from robovlms_jax.deploy import client as clients
from robovlms_jax.deploy import codec, messages
from robovlms_jax.deploy import conversation as conversations
from robovlms_jax.deploy.client import Client
from robovlms_jax.deploy.limits import MOBILE, Limits
from robovlms_jax.deploy.loop import run
from robovlms_jax.deploy.safety import SafetyLayer
from tests.deploy.served import HORIZON, Counting, observation, picture, serving, url
from tests.deploy.test_guard import SLOW, Base

pytest.importorskip("websockets", reason="the server needs the extra `serve`")

DOUBT = np.linspace(0.1, 0.4, HORIZON).astype(np.float32)
WIDTH = np.full((HORIZON, 7), 0.25, np.float32)


class Doubting(Counting):
    """Says how uncertain it is."""

    beside = (DOUBT, WIDTH, 0.9)

    def act(self, observations, slots):
        return [ActionChunk(chunk.actions, *self.beside) for chunk in super().act(observations, slots)]


def test_confidence_travels_with_every_action():
    policy = Doubting()
    with serving(policy) as server, Client(url(server)) as robot:
        robot.reset("open the drawer")
        chunk = robot.act(observation())
        np.testing.assert_array_equal(chunk.uncertainty, DOUBT)
        np.testing.assert_array_equal(chunk.interval, WIDTH)
        assert chunk.coverage == 0.9
        policy.beside = (DOUBT, None, None)
        chunk = robot.act(observation())
        assert chunk.interval is None and chunk.coverage is None
        policy.beside = (DOUBT[:2], None, None)
        with pytest.raises(clients.ServerError, match=r"the policy's uncertainty is \[2\]; expected numbers \[4\]"):
            robot.act(observation())


@pytest.mark.parametrize(
    "wrong", [{"uncertainty": DOUBT[:1]}, {"interval": WIDTH * np.nan}, {"coverage": "much"}, {"uncertainty": "low"}]
)
def test_an_answer_with_impossible_confidence_is_refused(wrong):
    conversation = conversations.Conversation()
    conversation.metadata = {"action_dim": 7}
    with pytest.raises(clients.ServerError, match=next(iter(wrong))):
        conversation.answered(codec.pack({"actions": np.zeros((HORIZON, 7), np.float32), **wrong}), 0.0)


def test_what_is_left_of_a_chunk_travels_to_policies_that_go_on_from_it():
    seen = Observation({"static": picture()}, committed=np.ones((3, 7)), delay=2)
    conversation = conversations.Conversation()
    conversation.instruction = "go"
    message = codec.unpack(conversation.request(seen), conversations.BOUNDS)
    reader = messages.Reader(("static",), committed=True)
    step = reader.read(message)
    np.testing.assert_array_equal(step.observation.committed, np.ones((3, 7)))
    assert step.observation.delay == 2 and {"committed", "delay"} <= set(reader.keys())
    for wrong in ({"delay": 4}, {"delay": 1.5}, {"delay": True}, {"committed": np.ones(7)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            reader.read(message | wrong)
    with pytest.raises(ValueError, match="does not go on from"):
        dataclasses.replace(reader, committed=False).read(message)


class Remote:
    """Remembers what it is asked; takes a while."""

    def __init__(self, seconds=0.0):
        self.instructions, self.seen, self.seconds = [], [], seconds

    def reset(self, instruction):
        self.instructions.append(instruction)

    def act(self, observation):
        self.seen.append(observation)
        time.sleep(self.seconds)
        return ActionChunk(np.tile(SLOW, (20, 1)))


def drive(asynchronous, policy, instruction="forward", ticks=40):
    base = Base()
    layer = SafetyLayer(MOBILE, dataclasses.replace(Limits(), missing_ticks=40))
    guard = run(base, policy, layer, instruction, done=lambda guard: guard.now >= ticks, asynchronous=asynchronous)
    assert layer.latch.state == "run"
    return guard


def test_the_loop_asks_when_an_event_says_so_and_says_why():
    policy = Remote()
    guard = drive(AsyncConfig("switch", max_interval=6), policy)
    assert guard.counts["asked: instruction"] == 1 and guard.counts["asked: interval"] >= 3
    held = Remote()
    guard = drive(AsyncConfig("switch"), held)
    assert len(held.seen) <= 3 < len(policy.seen)


def test_the_loop_tells_a_policy_what_is_left_while_it_thinks():
    policy = Remote(seconds=0.07)
    drive(AsyncConfig("freeze", tell=True, ask_below=4), policy, ticks=60)
    later = [seen for seen in policy.seen if seen.committed is not None]
    assert later and all(1 <= seen.delay <= len(seen.committed) for seen in later)


def test_another_instruction_is_told_and_an_answer_to_the_old_one_discarded():
    policy = Remote(seconds=0.05)
    said = iter(["forward"] * 2 + ["back"] * 10_000)  # changes while the first answer is on its way
    guard = drive(AsyncConfig("switch"), policy, instruction=lambda: next(said), ticks=20)
    assert policy.instructions == ["forward", "back"]
    assert guard.counts["asked: instruction"] == 2


def test_calvins_answers_are_bounded_but_intervals_are_not():
    chunk = ActionChunk(np.zeros((HORIZON, 7)), None, np.full((HORIZON, 7), np.inf), 0.9)
    assert np.isinf(messages.confidence(chunk, CALVIN, HORIZON)["interval"]).all()
