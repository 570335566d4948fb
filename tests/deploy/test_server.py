"""The server, driven over a real socket of this machine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time

import numpy as np
import pytest

from robovlms_jax.control.interface import EpisodesFailed
from robovlms_jax.control.robot import CALVIN
from robovlms_jax.deploy import codec
from robovlms_jax.deploy.batching import InferenceThread
from robovlms_jax.deploy.client import Client, ClientConfig
from robovlms_jax.deploy.config import ServerConfig
from robovlms_jax.deploy.messages import Reader
from robovlms_jax.deploy.server import PolicyServer, Session
from tests.deploy.served import Counting, ask, envelope, message, observation, read, serving, steps, url, wait_until

pytest.importorskip("websockets", reason="the server needs the extra `serve`")

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect


def test_a_conversation_as_openpis_clients_have_it():
    with serving(Counting()) as server, connect(url(server, "/any/path")) as line:
        metadata = read(line)
        assert metadata["action_horizon"] == 4 and metadata["action_dim"] == 7 and metadata["control_rate_hz"] == 30
        assert metadata["robot"]["action"][0]["name"] == "x"
        first, second = ask(line), ask(line)
        assert first["actions"].shape == (4, 7) and first["actions"].dtype == np.float32
        assert [steps(first), steps(second)] == [1, 2]
        assert "prev_total_ms" in second["server_timing"] and "prev_total_ms" not in first["server_timing"]
        arrays = [x for x in (*first.values(), *first["server_timing"].values()) if isinstance(x, np.ndarray)]
        assert all(x.shape[0] == 4 for x in arrays)  # openpi's chunk broker cuts every array along this axis


def test_an_episode_begins_with_a_connection_another_prompt_or_when_asked_for():
    with serving(Counting()) as server:
        with connect(url(server)) as line:
            read(line)
            found = [steps(ask(line, **more)) for more in ({}, {}, {"prompt": "other"}, {"prompt": "other"})]
            assert [*found, steps(ask(line, prompt="other", reset=True))] == [1, 2, 1, 2, 1]
        with connect(url(server)) as line:
            read(line)
            assert steps(ask(line)) == 1


def test_clients_share_calls_of_one_thread_and_have_their_own_histories():
    policy = Counting(slots=3, delay_s=0.02)
    with serving(policy, max_wait_s=0.05) as server:

        def robot(number):
            with connect(url(server)) as line:
                read(line)
                return [steps(ask(line, prompt=f"task {number}")) for _ in range(5 + number)]

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            found = list(pool.map(robot, range(3)))
        assert found == [list(range(1, 6 + number)) for number in range(3)]
        assert len(policy.threads) == 1 and max(policy.batches) >= 2
        wait_until(lambda: not policy.steps)  # nothing is kept of clients that have gone


def test_a_robot_at_work_does_not_wait_for_one_that_is_only_connected():
    with (
        serving(Counting(slots=2), max_wait_s=2.0) as server,
        connect(url(server)) as line,
        connect(url(server)) as idle,
    ):
        read(line), read(idle)
        started = time.monotonic()
        ask(line), ask(line)
        assert time.monotonic() - started < 1.5


def test_one_client_more_than_slots_is_sent_away_and_let_in_when_another_leaves():
    with serving(Counting(slots=1)) as server:
        with connect(url(server)) as line:
            read(line)
            with connect(url(server)) as other, pytest.raises(ConnectionClosed, match=r"1013.*all 1 slots are taken"):
                other.recv(5)
        with Client(url(server), ClientConfig(connect_timeout_s=5)) as robot:  # tries again until there is room
            robot.reset("open")
            robot.act(observation())


@pytest.mark.parametrize(
    ("sent", "what"),
    [
        ("text", "expected a binary msgpack map"),
        (b"\x81", "cannot be read"),
        (codec.pack([1]), "expected a map"),
        (codec.pack({"prompt": "x"}), "there is no 'static' picture"),
        (codec.pack(message(**{"observation/state": np.array([np.nan])})), "'observation/state' has numbers"),
    ],
)
def test_a_bad_message_ends_its_connection_with_an_error_that_names_the_field(sent, what):
    with serving(Counting()) as server:
        with connect(url(server)) as line, connect(url(server)) as other:
            read(line), read(other), ask(other)
            line.send(sent)
            assert what in line.recv(5)
            with pytest.raises(ConnectionClosed, match="1011"):
                line.recv(5)
            assert steps(ask(other)) == 2
        assert server.metrics.get("errors_total", "ValueError") == 1


@pytest.mark.parametrize("bad", [np.full((4, 7), np.nan), np.full((4, 7), np.inf), np.zeros((4, 6)), "none"])
def test_actions_that_are_none_never_leave(bad):
    policy = Counting()
    with serving(policy) as server, connect(url(server)) as line:
        read(line), ask(line)
        policy.bad = bad
        line.send(codec.pack(message()))
        assert isinstance(line.recv(5), str)


def test_an_episode_that_fails_within_a_batch_fails_alone():
    class Failing(Counting):
        def act(self, observations, slots):
            chunks = dict(zip(slots, super().act(observations, slots)))
            bad = {slot: "its actions are not finite" for slot in slots if self.instructions[slot] == "fail"}
            if not bad:
                return list(chunks.values())
            self.release(bad)
            raise EpisodesFailed(bad, {slot: chunk for slot, chunk in chunks.items() if slot not in bad})

    policy = Failing()
    thread = InferenceThread(policy, max_wait_s=0.1)
    asked = [thread.submit(slot, observation(), text) for slot, text in enumerate(["go on", "fail"])]
    thread.start()
    assert asked[0].result(10).actions[0, 1] == np.float32(0.01)
    with pytest.raises(ValueError, match="its actions are not finite"):
        asked[1].result(10)
    assert thread.submit(0, observation(), None).result(10).actions[0, 1] == np.float32(0.02)  # one step each, not two
    with pytest.raises(RuntimeError, match="no episode"):
        thread.submit(1, observation(), None).result(10)
    thread.stop(5)
    assert policy.batches[0] == 2


@pytest.mark.parametrize("wrong", ["exits", "too few answers", "failures of other slots"])
def test_whatever_a_policy_does_the_thread_that_answers_goes_on(wrong):
    class Odd(Counting):
        def act(self, observations, slots):
            good = super().act(observations, slots)
            if self.steps[slots[0]] > 1:
                return good
            if wrong == "exits":
                raise SystemExit(1)
            if wrong == "failures of other slots":
                raise EpisodesFailed({99: "not finite"}, {})
            return []

    policy = Odd()
    inference = InferenceThread(policy)
    inference.start()
    with pytest.raises(RuntimeError, match="gave no answer"):
        inference.submit(0, observation(), "push").result(5)
    assert steps({"actions": inference.submit(0, observation(), None).result(5).actions}) == 2
    inference.stop(5)


def test_actions_out_of_bounds_are_clipped_and_it_is_said():
    policy = Counting()
    policy.bad = np.full((4, 7), 2.0)
    with serving(policy) as server, Client(url(server)) as robot:
        robot.reset("open")
        assert robot.act(observation()).actions.max() == 1
        assert robot.last_reply["clipped"][:2] == ["x", "y"]


def test_an_answer_that_takes_too_long_is_an_error():
    with serving(Counting(delay_s=0.5), request_timeout_s=0.1) as server, connect(url(server)) as line:
        read(line)
        line.send(codec.pack(message()))
        assert "did not answer in 0.1 s" in line.recv(5)


def test_a_conversation_as_vla_evals_harness_has_it():
    with serving(Counting(), executed=2) as server, connect(url(server, "/vla-eval")) as line:
        line.send(envelope("hello", {"harness_version": "0.8.0", "protocol_version": 1}, 7))
        hello = read(line)
        assert (hello["type"], hello["seq"], hello["payload"]["protocol_version"]) == ("hello", 7, 1)
        assert hello["payload"]["observation_params"] == {"send_wrist_image": False, "send_state": False}
        line.send(envelope("episode_start", {"task": {}}, 8))  # is answered with nothing
        seen = {"images": {"rgb_static": message()["observation/image"]}, "task_description": "push"}

        def act(seq, **more):
            line.send(envelope("observation", seen | more, seq))
            answer = read(line)
            assert (answer["type"], answer["seq"]) == ("action", seq)
            return round(float(answer["payload"]["actions"][1]) / 0.02 * 100)

        assert [act(9), act(10), act(11)] == [1, 1, 2]  # two of a chunk, in metres
        assert act(12, episode_restart=True) == 1
        line.send(envelope("observation", {"images": {}}, 13))
        error = read(line)
        assert (error["type"], error["seq"]) == ("error", 13) and "task_description" in error["payload"]["error"]
        assert act(14) == 1  # the connection stays; the episode begins anew


def test_after_an_observation_of_vla_evals_that_failed_nothing_of_the_old_episode_is_left():
    with serving(Counting(), executed=2) as server, connect(url(server, "/vla-eval")) as line:
        seen = {"images": {"static": message()["observation/image"]}, "task_description": "push"}
        for sequence, what, step in ((1, {}, 1), (2, {}, 1), (3, {}, 2), (4, {"images": {}}, None), (5, {}, 1)):
            restart = {"episode_restart": True} if step is None else {}  # it is lost with its observation
            line.send(envelope("observation", seen | what | restart, sequence))
            answer = read(line)
            found = None if answer["type"] == "error" else float(answer["payload"]["actions"][1]) / 0.02 * 100
            assert found == (step if step is None else pytest.approx(step))


def test_a_long_text_where_none_is_expected_keeps_nobody_waiting():
    with serving(Counting(), executed=2) as server, connect(url(server, "/vla-eval")) as line:
        line.send(envelope("observation", {"task_description": b"\xff" * 4_000_000}, 1))
        assert len(read(line)["payload"]["error"]) < 200


def test_vla_evals_connection_is_closed_after_an_answer_that_takes_too_long():
    with (
        serving(Counting(delay_s=0.5), request_timeout_s=0.1) as server,
        connect(url(server, "/vla-eval")) as line,
    ):
        seen = {"images": {"static": message()["observation/image"]}, "task_description": "push"}
        line.send(envelope("observation", seen, 3))
        error = read(line)
        assert (error["type"], error["seq"]) == ("error", 3) and "did not answer in 0.1 s" in error["payload"]["error"]
        with pytest.raises(ConnectionClosed, match=r"1011.*did not answer in time"):
            line.recv(5)


def test_only_pictures_that_the_policy_looks_at_are_decoded():
    decoded = []

    def decode(data):
        decoded.append(data)
        return message()["observation/image"]

    def picture(data):
        return {"__image__": True, "format": "png", "data": data}

    images = {"static": picture(b"static"), "wrist": picture(b"wrist"), "depth": picture(b"\0" * 100_000)}
    with (
        serving(Counting(), executed=2, decode_image=decode) as server,
        connect(url(server)) as openpi,
        connect(url(server, "/vla-eval")) as harness,
    ):
        read(openpi)
        assert steps(ask(openpi, images=images, **{"observation/image": picture(b"image")})) == 1
        assert decoded == [b"image"]
        for seq in range(3):  # the second is answered from the chunk: nothing of it is looked at
            harness.send(envelope("observation", {"images": images, "task_description": "push"}, seq))
            assert read(harness)["type"] == "action"
        assert decoded[1:] == [b"static", b"static"]


def test_messages_are_read_in_threads_of_the_servers_own_and_not_in_more():
    names, room = set(), threading.Barrier(2, timeout=5)

    def decode(data):
        names.add(threading.current_thread().name)
        room.wait()
        return message()["observation/image"]

    picture = {"__image__": True, "format": "png", "data": b"x"}
    with serving(Counting(slots=4), decode_image=decode, reading_threads=2) as server:

        def robot(number):
            with connect(url(server)) as line:
                read(line)
                return steps(ask(line, **{"observation/image": picture}))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert list(pool.map(robot, range(4))) == [1] * 4
    assert {name.rpartition("_")[0] for name in names} == {"reading"} and len(names) == 2


def test_a_client_that_does_not_read_its_answers_is_dropped():
    class Full:
        """A connection whose buffers are full."""

        aborted = False

        async def send(self, message):
            await asyncio.sleep(10)

        @property
        def transport(self):
            return self

        def abort(self):
            self.aborted = True

    full = Full()
    server = PolicyServer(Counting(), CALVIN, Reader(("static",)), 4, ServerConfig(send_timeout_s=0.05))
    assert not asyncio.run(server._send(Session(full, 0), b"answer"))
    assert full.aborted
