"""A policy of NumPy behind a real server on this machine, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import urllib.request

import numpy as np

from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.control.robot import CALVIN
from robovlms_jax.deploy import codec
from robovlms_jax.deploy.config import ServerConfig
from robovlms_jax.deploy.messages import Reader
from robovlms_jax.deploy.server import PolicyServer

HORIZON = 4


class Counting:
    """Actions say how many steps the episode has had, in hundredths. Like the real policy it acts in episodes only.

    delay_s: of every call. bad: what the actions are instead, once set.
    """

    def __init__(self, slots=2, delay_s=0.0):
        self.slots, self.delay_s, self.bad = slots, delay_s, None
        self.steps: dict[int, int] = {}
        self.instructions: dict[int, str] = {}
        self.batches: list[int] = []
        self.threads: set[int] = set()

    def reset(self, slots, instructions):
        self.threads.add(threading.get_ident())
        for slot, instruction in zip(slots, instructions, strict=True):
            self.steps[slot], self.instructions[slot] = 0, instruction

    def act(self, observations, slots):
        self.threads.add(threading.get_ident())
        time.sleep(self.delay_s)
        self.batches.append(len(slots))
        chunks = []
        for slot, observation in zip(slots, observations, strict=True):
            if slot not in self.steps:
                raise RuntimeError(f"slot {slot} has no episode")
            self.steps[slot] += 1
            actions = np.full((HORIZON, 7), self.steps[slot] / 100, np.float32)
            actions[:, 0] = observation.images["static"].mean() / 1000
            chunks.append(ActionChunk(actions if self.bad is None else self.bad))
        return chunks

    def release(self, slots):
        for slot in slots:
            self.steps.pop(slot, None)


def picture(value=100):
    return np.full((8, 10, 3), value, np.uint8)


def observation(value=100):
    return Observation({"static": picture(value)})


def message(value=100, prompt="push the button", **more):
    """As openpi's clients send it."""
    return {"observation/image": picture(value), "prompt": prompt, **more}


@contextlib.contextmanager
def serving(policy, *, executed=1, decode_image=None, cameras=("static",), **config):
    """A running server on any free port, in a thread of its own."""
    started, box = threading.Event(), {}

    async def run():
        settings = ServerConfig(port=0, **config)
        reader = Reader(cameras)
        box["server"] = PolicyServer(
            policy, CALVIN, reader, HORIZON, settings, decode_image=decode_image, executed=executed
        )
        await box["server"].start()
        box["loop"], box["stop"] = asyncio.get_running_loop(), asyncio.Event()
        started.set()
        await box["stop"].wait()
        await box["server"].drain()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield box["server"]
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(15)
        assert not thread.is_alive()


def url(server, path="", scheme="ws"):
    return f"{scheme}://127.0.0.1:{server.port}{path}"


def steps(reply):
    """Which step of its episode an answer is: `{"actions": float[C, 7]}`."""
    return round(float(reply["actions"][0, 1]) * 100)


def read(line):
    return codec.unpack(line.recv(5), codec.Bounds())


def ask(line, **more):
    line.send(codec.pack(message(**more)))
    return read(line)


def get(server, path, token=None):
    request = urllib.request.Request(url(server, path, "http"))
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.status, answer.read().decode()


class Lines:
    """Connections that are closed at the end."""

    def __enter__(self):
        self._lines = []
        return self._open

    def _open(self, address):
        from websockets.sync.client import connect

        self._lines.append(connect(address).__enter__())
        return self._lines[-1]

    def __exit__(self, *error):
        for line in self._lines:
            line.close()


def envelope(kind, payload, seq=0):
    return codec.pack({"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0}, text_keys=True)


def wait_until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
