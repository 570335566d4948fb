"""The page's protocol over a real socket of this machine: who watches, who controls, who is kept out."""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import struct
import time

import pytest

from robovlms_jax.demo import server as servers
from robovlms_jax.demo.live import number
from robovlms_jax.demo.loop import Message
from robovlms_jax.demo.server import DemoServer
from robovlms_jax.demo.show import PAGE
from robovlms_jax.web import addresses, pages
from robovlms_jax.web import server as page_servers
from robovlms_jax.web.access import LIVE, Access, page_headers
from robovlms_jax.web.messages import pack, unpack
from tests.web.visiting import Serving, ended, eventually, say, serving, told

pytest.importorskip("websockets", reason="the page needs the extra `serve`")

from websockets.exceptions import ConnectionClosed, InvalidStatus

HELLO = {"about": "a test"}


class Running(Serving):
    """A demonstration, and what it was told. open: whether it is ready."""

    def __init__(self, token="", opened=True):
        self.commands, self.left, self.wanted = [], 0, 0
        self._opened = opened
        super().__init__(
            lambda: DemoServer(Access(token=token), "<script>1</script>page", self.command, self.gone, self.want)
        )

    def command(self, kind, content, who):
        if kind == "bad":
            raise ValueError("there is no command 'bad'.")
        self.commands.append((kind, content.get("text"), who))

    def gone(self):
        self.left += 1

    def want(self):
        self.wanted += 1

    def begun(self):
        if self._opened:
            self.server.open(HELLO)

    def deliver(self, number, size=10):
        whole = pack({"tick": number}, {"static": b"x" * size})
        self.server.deliver(Message(number, whole, pack({"tick": number}, {})))


def running(**options):
    return serving(Running(**options))


def picture(line, timeout=5):
    """(facts, pictures) of the next picture."""
    while isinstance(message := line.recv(timeout), str):
        pass
    return unpack(message)


def test_the_page_is_one_file_that_loads_nothing_from_elsewhere():
    page = pages.read(PAGE)
    assert "://" not in re.sub(r'"wss?://"', "", page)
    assert not re.search(r"(src|href)=\"(?!data:,)", page) and "@import" not in page and "innerHTML" not in page
    policy = page_headers(page)["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert len(re.findall(r"'sha256-", policy)) == 3 and not re.search(r"\sstyle=|\son\w+=\"", page)


def test_page_health_and_nothing_else_are_answered():
    with running(opened=False) as it:
        assert it.get("/healthz")[0] == 503
        it.server.open(HELLO)
        eventually(lambda: it.get("/healthz")[0] == 200)
        status, text, headers = it.get()
        assert status == 200 and text.endswith("page") and headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
        assert it.get("/etc/passwd")[0] == it.get("/../secret")[0] == 404


def test_a_page_of_another_site_and_a_foreign_name_are_refused():
    with running() as it:
        for origin in ("http://evil.example", "null", f"http://127.0.0.1:{it.server.port + 1}", "file://"):
            with pytest.raises(InvalidStatus) as refused, it.connect(origin=origin):
                pass
            assert refused.value.response.status_code == 403
        assert it.get(host="evil.example")[0] == 403  # a name that was made to point here
        assert it.get(host="localhost:9999")[0] == 200  # a port forwarded by ssh


def test_with_a_token_only_who_has_it_comes_in():
    with running(token="s3cret") as it:
        assert it.get("/")[0] == it.get("/?token=wrong")[0] == 401
        assert it.get("/?token=s3cret", host="robot.example")[0] == 200
        for path in (LIVE, f"{LIVE}?token=wrong"):
            with pytest.raises(InvalidStatus), it.connect(path=path):
                pass
        with it.connect(path=f"{LIVE}?token=s3cret") as line:
            assert told(line, "hello")["about"] == "a test"


def test_a_page_that_comes_early_is_told_what_is_being_prepared():
    with running(opened=False) as it, it.connect() as line:
        assert told(line, "preparing")["what"] == "Starting"
        it.server.prepare("Compiling: the policy", 5, 6)
        assert told(line, "preparing", what="Compiling: the policy", done=5, of=6)["seconds"] >= 0
        say(line, "instruct", text="open the drawer")
        assert "not ready" in told(line, "refused")["why"]
        it.server.open(HELLO)
        told(line, "hello", about="a test")
    assert not it.commands


def test_the_first_controls_the_others_watch_and_anybody_may_stop():
    with running() as it, it.connect() as first, it.connect() as second:
        assert told(first, "you", visitors=2)["controls"] and not told(second, "you", visitors=2)["controls"]
        for kind in ("instruct", "release", "reset", "next", "speed", "limit"):
            say(second, kind, text="x", value=1)
            assert "You are watching" in told(second, "refused")["why"]
        say(second, "stop")
        text = 'open "the" <b>drawer</b> ä'
        say(first, "instruct", text=text)
        eventually(lambda: len(it.commands) == 2)
        assert it.commands == [("stop", None, "visitor 2"), ("instruct", text, "visitor 1")]
        say(first, "bad")
        assert told(first, "refused")["why"] == "there is no command 'bad'."


def test_control_is_handed_over_when_asked_for_and_freed_by_leaving():
    with running() as it, it.connect() as second:
        with it.connect() as third:
            assert told(second, "you", controls=True)
            say(third, "control", want="take")
            assert told(second, "you", asked=True) and told(third, "you", asks=True)["controls"] is False
            say(second, "control", want="give")
            assert told(third, "you", controls=True) and told(second, "you", controls=False)
            say(second, "control", want="take")
            told(second, "you", asks=True)
        assert told(second, "you", controls=True)  # who asked has it, once the other is gone
        assert it.left == 1


def test_who_controls_and_does_nothing_loses_control_to_who_asks(monkeypatch):
    monkeypatch.setattr(servers, "IDLE_S", 0.0)
    with running() as it, it.connect() as first, it.connect() as second:
        told(first, "you", visitors=2)
        say(second, "control", want="take")
        assert told(second, "you", controls=True) and told(first, "you", controls=False)


def test_who_asked_early_has_control_once_the_other_has_done_nothing_for_long(monkeypatch):
    monkeypatch.setattr(servers, "IDLE_S", 0.6)
    with running() as it, it.connect() as first, it.connect() as second, it.connect() as third:
        told(first, "you", visitors=3)
        say(first, "instruct", text="open the drawer")
        eventually(lambda: it.commands)
        for one in (second, third):
            say(one, "control", want="take")
            told(one, "you", asks=True, controls=False)
        say(first, "instruct", text="close the drawer")
        eventually(lambda: len(it.commands) == 2)
        acted = time.monotonic()
        assert told(second, "you", controls=True)["asks"] is False  # without a further word of anybody
        assert time.monotonic() - acted > 0.5 and told(first, "you", controls=False)
        assert told(third, "you", controls=True) and told(second, "you", controls=False)


def test_who_asks_no_longer_gets_no_control(monkeypatch):
    monkeypatch.setattr(servers, "IDLE_S", 0.3)
    with running() as it, it.connect() as first, it.connect() as second:
        told(first, "you", visitors=2)
        say(first, "instruct", text="open the drawer")
        eventually(lambda: it.commands)
        say(second, "control", want="take")
        told(second, "you", asks=True)
        say(second, "control", want="leave")
        told(second, "you", asks=False)
        with pytest.raises(TimeoutError):
            second.recv(0.6)


def test_pictures_come_one_at_a_time_and_the_newest_first():
    with running() as it, it.connect() as line:
        told(line, "you")
        it.deliver(1)
        facts, pictures = picture(line)
        assert facts == {"tick": 1} and pictures == {"static": b"x" * 10}
        for number in (2, 3, 4):
            it.deliver(number)
        with pytest.raises(TimeoutError):
            picture(line, 0.1)  # nothing before the acknowledgement
        say(line, "ack")
        assert picture(line)[0]["tick"] == 4  # 2 and 3 were never sent
        say(line, "ack")
        it.deliver(4)
        assert picture(line) == ({"tick": 4}, {})  # it has those pictures


def test_a_visitor_who_never_reads_keeps_nobody_waiting():
    with running() as it, it.connect() as deaf, it.connect() as line:
        told(line, "you", visitors=2)
        started, seen = time.monotonic(), 0
        for number in range(40):
            it.deliver(number, size=200_000)
            seen += picture(line)[0]["tick"] == number
            say(line, "ack")
            eventually(lambda n=number: it.wanted >= n + 3)
        assert seen == 40 and time.monotonic() - started < 10
        assert deaf.protocol.state is not None


@pytest.mark.parametrize("message", ["x" * 10_000, "[1]", "no JSON", '{"kind": 1}', '{"type": 7}', b"\x00\x01"])
def test_what_is_no_command_ends_the_connection(message):
    with running() as it:
        with it.connect() as line:
            line.send(message)
            ended(line)
        with it.connect() as line:
            assert told(line, "you", controls=True)


def test_a_flood_of_messages_ends_the_connection():
    with running() as it, it.connect() as line:
        for _ in range(page_servers.MAX_MESSAGES_PER_S + 1):
            say(line, "ack")
        assert ended(line) == 1008


def test_more_visitors_than_there_is_room_for_are_sent_away(monkeypatch):
    monkeypatch.setattr(page_servers, "MAX_VISITORS", 1)
    with running() as it, it.connect() as line:
        told(line, "you")
        with it.connect() as other, pytest.raises(ConnectionClosed) as closed:
            other.recv(5)
        assert closed.value.rcvd.code == 1013


def test_pages_are_told_that_the_demonstration_ends():
    with running() as it, it.connect() as line:
        told(line, "you")
        it.loop.call_soon_threadsafe(it.end.set)
        told(line, "ended")
        assert ended(line) == 1001  # going away, which a browser does not take for an error


def test_visitors_who_leave_abruptly_leave_nothing_behind(caplog):
    with running() as it:
        lines = [it.connect() for _ in range(3)]
        for line in lines:
            told(line, "you")
        for number, line in enumerate(lines):
            line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            line.socket.close()  # with a reset, no farewell
            for _ in range(8):
                it.deliver(number)
                it.server.prepare("still told")
        eventually(lambda: not it.server._visitors)
        gc.collect()
    assert not it.server._tasks
    assert not [x for x in caplog.messages if "destroyed" in x or "socket.send()" in x]


@pytest.mark.parametrize("value", [10**400, -(10**400), True, None, "1", [1], float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused_and_says_which(value):
    with pytest.raises(ValueError, match=r"^limit='.{1,40}': expected a number"):
        number({"limit": value}, "limit")
    assert number({"limit": 3}, "limit") == 3.0


def test_an_address_is_checked_before_anything_is_loaded_and_the_advice_fits_the_fault():
    with running() as it:
        taken = it.server.port
        with pytest.raises(OSError, match=rf"127.0.0.1:{taken} .* Choose another port with --port {taken + 1} "):
            addresses.check("127.0.0.1", taken)
    for foreign in ("203.0.113.7", "no.such.host.invalid"):
        with pytest.raises(OSError, match=r"no such address\. Choose one of its own with --host: 127.0.0.1") as error:
            addresses.check(foreign, 0)
        assert "port" not in str(error.value)
    addresses.check("127.0.0.1", 0)


def test_a_port_that_is_taken_is_named_with_the_way_out():
    async def again(port):
        await DemoServer(Access(), "page", lambda *_: None).start(port)

    with running() as it, pytest.raises(OSError, match=rf"127.0.0.1:{it.server.port} .*--port {it.server.port + 1}"):
        asyncio.run(again(it.server.port))
