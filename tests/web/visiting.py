"""A page's server in a thread of its own, and what a visitor without a browser says to it and hears."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import urllib.error
import urllib.request

import pytest

from robovlms_jax.web.access import LIVE

pytest.importorskip("websockets", reason="the page needs the extra `serve`")

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect


class Serving:
    """A server on any free port. make: makes it, in its event loop."""

    def __init__(self, make):
        self._make, self.up = make, threading.Event()

    def begun(self):
        """Called once it listens."""

    async def run(self):
        self.server = self._make()
        await self.server.start(0)
        self.loop, self.end = asyncio.get_running_loop(), asyncio.Event()
        self.begun()
        self.up.set()
        await self.end.wait()
        await self.server.stop()

    def connect(self, origin=True, path=LIVE, host=None):
        here = f"127.0.0.1:{self.server.port}"
        headers = {"Host": host} if host else {}
        return connect(
            f"ws://{here}{path}", origin=f"http://{here}" if origin is True else origin, additional_headers=headers
        )

    def get(self, path="/", host=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.server.port}{path}")
        if host:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, answer.read().decode(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), error.headers


@contextlib.contextmanager
def serving(it):
    thread = threading.Thread(target=lambda: asyncio.run(it.run()), daemon=True)
    thread.start()
    assert it.up.wait(10)
    try:
        yield it
    finally:
        with contextlib.suppress(RuntimeError):  # the test has ended it, and the loop is closed
            it.loop.call_soon_threadsafe(it.end.set)
        thread.join(10)
        assert not thread.is_alive()


def told(line, kind, **values):
    """The next message of a kind, with these values; others are passed over."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        message = line.recv(5)
        if isinstance(message, str):
            content = json.loads(message)
            if content["type"] == kind and all(content[name] == value for name, value in values.items()):
                return content
    raise AssertionError(f"no {kind} with {values}")


def say(line, kind, **more):
    line.send(json.dumps({"type": kind, **more}))


def ended(line):
    """The code with which the connection is closed."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            line.recv(5)
    return line.close_code


def eventually(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
