"""Our own client against a real server of this machine."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import numpy as np
import pytest

from robovlms_jax.control.interface import Observation
from robovlms_jax.deploy import client as clients
from robovlms_jax.deploy import codec
from robovlms_jax.deploy import conversation as conversations
from robovlms_jax.deploy.client import Client, ClientConfig, ServerError
from tests.deploy.served import Counting, observation, serving, steps, url

pytest.importorskip("websockets", reason="the server needs the extra `serve`")


def test_a_clock_that_is_set_meanwhile_is_measured_anew(monkeypatch):
    conversation = conversations.Conversation()
    conversation.metadata = {"action_dim": 7}

    def exchange(sent_s, received_s, answered_s, came_s):
        timing = {"received_s": received_s, "sent_s": answered_s}
        reply = codec.pack({"actions": np.zeros((4, 7), np.float32), "server_timing": timing})
        monkeypatch.setattr(conversations.time, "time", lambda: came_s)
        conversation.answered(reply, sent_s)
        return conversation.clock

    clock = exchange(10.0, 110.5, 111.0, 11.5)  # half a second each way
    assert (clock.offset_s, clock.round_trip_s) == (100.0, 1.0)
    assert exchange(20.0, 120.9, 121.0, 22.9).offset_s == 100.0  # a slower one says less
    assert exchange(30.0, 130.1, 130.2, 30.3).round_trip_s == pytest.approx(0.2)
    assert exchange(40.0, 140.1, 140.2, 5.0) is None  # our clock was set back
    assert exchange(6.0, 140.3, 140.4, 6.3).offset_s == pytest.approx(134.2)


def test_our_client_knows_the_servers_clock_and_times_out():
    policy = Counting()
    with serving(policy) as server, Client(url(server), ClientConfig(timeout_s=0.3)) as robot:
        with pytest.raises(RuntimeError, match="act\\(\\) before reset"):
            robot.act(observation())
        robot.reset("open the drawer")
        found = [steps({"actions": robot.act(observation()).actions}) for _ in range(3)]
        assert found == [1, 2, 3]
        robot.reset("open the drawer")
        assert steps({"actions": robot.act(observation()).actions}) == 1
        assert abs(robot.clock.offset_s) <= robot.clock.round_trip_s / 2 + 1e-3
        policy.delay_s = 0.6
        with pytest.raises(TimeoutError, match=r"no answer within 0\.3 s"):
            robot.act(observation())
        policy.delay_s = 0.0
        # the late answer is not taken for this one's
        assert steps({"actions": ClientRetry(robot).act(observation())}) == 1


class ClientRetry:
    """The slot of the late answer is taken until it came; there are two."""

    def __init__(self, robot):
        self._robot = robot

    def act(self, seen):
        time.sleep(0.5)
        return self._robot.act(seen).actions


def test_our_client_connects_again_and_says_that_the_episode_began_anew(caplog):
    with serving(Counting()) as server, Client(url(server)) as robot:
        robot.reset("open")
        robot.act(observation()), robot.act(observation())
        robot._line.socket.shutdown(2)
        assert steps({"actions": robot.act(observation()).actions}) == 1
        assert robot.episodes_lost == 1 and "the episode begins anew there" in caplog.text


def test_our_client_waits_for_a_server_and_gives_up_in_time():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="no policy server answered"):
        Client("ws://127.0.0.1:9", ClientConfig(connect_timeout_s=0.4)).connect()
    assert time.monotonic() - started < 2
    with pytest.raises(ValueError, match="expected ws://HOST:PORT"):
        Client("localhost:8000")


def test_the_client_of_event_loops_does_the_same():
    async def run(server):
        config = ClientConfig(timeout_s=0.3, connect_timeout_s=2)
        async with clients.AsyncClient(url(server), config) as robot:
            await robot.reset("open")
            found = [steps({"actions": (await robot.act(observation())).actions}) for _ in range(2)]
            policy.delay_s = 0.6
            with pytest.raises(TimeoutError, match="no answer"):
                await robot.act(observation())
            return found

    policy = Counting()
    with serving(policy) as server:
        assert asyncio.run(run(server)) == [1, 2]


def test_a_servers_error_reaches_our_client():
    with serving(Counting(), cameras=("static", "wrist")) as server, Client(url(server)) as robot:
        robot.reset("open")
        with pytest.raises(ServerError, match="there is no 'wrist' picture"):
            robot.act(observation())


def test_a_clock_that_jumps_without_a_trace_in_the_round_trip_is_measured_anew(monkeypatch):
    conversation = conversations.Conversation()

    def exchange(offset, round_trip):
        monkeypatch.setattr(conversations.time, "time", lambda: 10 + round_trip)
        timing = {"received_s": 10 + round_trip / 2 + offset, "sent_s": 10 + round_trip / 2 + offset}
        conversation._set_clock(timing, 10.0, 10.0 + round_trip)
        return conversation.clock.offset_s

    assert exchange(0.0, 0.002) == pytest.approx(0)
    assert exchange(3600.0, 0.0023) == pytest.approx(3600)  # a longer round trip, but the two contradict each other
    assert exchange(3600.0001, 0.5) == pytest.approx(3600)  # a slower one that agrees says less


def silent_server(reads):
    """A websocket server that shakes hands and, with `reads`, says who it is, and then reads nothing more; without, it
    says nothing and counts connections that are closed."""
    from websockets.server import ServerProtocol

    listening = socket.create_server(("127.0.0.1", 0))
    closed = []

    def one(line):
        protocol = ServerProtocol()
        while not (events := protocol.events_received()):
            protocol.receive_data(line.recv(4096))
        protocol.send_response(protocol.accept(events[0]))
        if reads:  # greets like a policy server
            protocol.send_binary(codec.pack({"action_dim": 7}))
        for data in protocol.data_to_send():
            line.sendall(data)
        while reads == 0 and line.recv(4096):
            pass
        closed.append(line)
        for _ in range(20):
            if reads == 2:  # a little, again and again
                line.recv(65536)
            threading.Event().wait(0.15)
        line.close()

    def run():
        while True:
            try:
                line, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(line,), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    return listening, closed, f"ws://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("reads", [1, 2], ids=["nothing", "a little"])
@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_a_call_ends_in_time_although_the_server_hardly_reads(kind, reads):
    listening, _, address = silent_server(reads)
    config = ClientConfig(timeout_s=0.3, connect_timeout_s=2, reconnects=0)
    large = Observation({"static": np.zeros((4000, 4000, 3), np.uint8)})
    begin = time.monotonic()
    with listening:
        if kind == "blocking":
            robot = Client(address, config)
            robot.connect()
            robot.reset("go")
            with pytest.raises(TimeoutError, match="no answer within"):
                robot.act(large)
        else:

            async def drive():
                robot = clients.AsyncClient(address, config)
                await robot.connect()
                await robot.reset("go")
                with pytest.raises(TimeoutError, match="no answer within"):
                    await robot.act(large)

            asyncio.run(drive())
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_a_connection_that_is_not_greeted_is_closed_and_holds_no_slot(kind):
    listening, closed, address = silent_server(reads=0)
    config = ClientConfig(connect_timeout_s=0.4)

    def connect():
        if kind == "blocking":
            Client(address, config).connect()
        else:
            asyncio.run(clients.AsyncClient(address, config).connect())

    with listening, pytest.raises(TimeoutError):
        connect()
    deadline = time.monotonic() + 2
    while not closed and time.monotonic() < deadline:
        time.sleep(0.02)
    assert closed
