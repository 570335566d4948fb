"""Bad input for the policy server, on this machine only and bounded: what broken and malicious clients send.

    python -m tests.deploy.hostile 1000000

Beside it a good robot works on: its every answer must be of its own episode, finite and in bounds. At the end all slots
are free and the process is not larger than it was.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import logging
import pathlib
import random
import socket
import struct
import time

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from robovlms_jax.deploy import codec
from robovlms_jax.deploy.client import Client
from tests.deploy.served import Counting, message, observation, serving, url

LIMIT = 50_000
"""Bytes of a message that the attacked server reads."""


def envelope(kind, payload, seq=0):
    return {"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0}


def strange_value(rng):
    """A value of a kind that no field expects, or of the right kind and wrong."""
    raw = {b"__ndarray__": True, b"data": b"\0" * 12, b"dtype": "<f4", b"shape": [3]}
    return rng.choice(
        [
            lambda: None,
            lambda: "",
            lambda: "ㄱ" * rng.randrange(1, 3000),
            lambda: "\x00\ud7ff\U0010ffff",
            lambda: rng.getrandbits(63),
            lambda: -1,
            lambda: [float("nan")] * 7,
            lambda: float("inf"),
            lambda: np.full(7, rng.choice([np.nan, np.inf, 3e38, -1e30])),
            lambda: np.zeros(rng.randrange(300), np.float32),
            lambda: np.zeros((rng.randrange(4), rng.randrange(50), 3), np.uint8),
            lambda: np.full((4, 4, 3), rng.choice([np.nan, -1.0, 2.0])),
            lambda: np.array("text"),
            lambda: {"a": [[[[]]]]},
            lambda: raw | {b"shape": [rng.choice([-1, 2**31, 2**62, 3.0, "3"])]},
            lambda: raw | {b"dtype": rng.choice(["O", "V12", "<c8", "<m8[s]", "f4,f4", "(3,)f4", "<U0", "é", 3])},
            lambda: raw | {b"data": "text"},
            lambda: {b"__npgeneric__": True, b"data": 1e300, b"dtype": "<f2"},
            lambda: {b"__npgeneric__": True, b"data": 10**10, b"dtype": rng.choice(["S1", "<U1"])},
            lambda: np.array("가" * 9000),
            lambda: b"\xff" * 40_000,
            lambda: {"__image__": True, "format": "png", "data": b"\x89PNG\r\n\x1a\n", "shape": [4, 4, 3]},
            lambda: {"__ndarray__": True},
        ]
    )()


def strange_message(rng):
    """bytes or text. Some of it is right, in the wrong place."""
    good = [
        message(),
        envelope("observation", {"images": {"static": message()["observation/image"]}, "task_description": "x"}),
        envelope("hello", {"protocol_version": 1}),
        envelope("episode_start", {"task": {}}),
        envelope("episode_end", {}),
    ]
    chosen = rng.choice(good)
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        whole = codec.pack(chosen)
        return whole[: rng.randrange(len(whole))]
    if kind == 2:
        whole = bytearray(codec.pack(chosen, text_keys=rng.random() < 0.5))
        for _ in range(rng.randrange(1, 6)):
            whole[rng.randrange(len(whole))] = rng.randrange(256)
        return bytes(whole)
    if kind == 3:
        return "text" * rng.randrange(50)
    if kind == 4:
        return rng.choice([b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 3000, b"\xc9\0\0\0\1\1x"])
    if kind == 5:
        return codec.pack(chosen)  # well-formed, perhaps of the other protocol or out of order
    if kind == 6 and rng.random() < 0.02:
        return b"\0" * (LIMIT + 1)
    place = chosen["payload"] if "payload" in chosen and rng.random() < 0.8 else chosen
    place = dict(place)
    key = rng.choice([*place, "reset", "observation/state", "executed", "images", "sensors", "states"])
    place[key] = strange_value(rng)
    return codec.pack(chosen | {"payload": place} if "payload" in chosen else place)


def strange_line(rng, port):
    """Bytes below the level of messages: half handshakes, broken frames, a client that goes in mid-message."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as line:
        handshake = (
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        kind = rng.randrange(5)
        if kind == 0:
            line.sendall(rng.randbytes(rng.randrange(500)))
        elif kind == 1:
            line.sendall(handshake[: rng.randrange(len(handshake))])
        elif kind == 2:
            line.sendall(b"POST /metrics HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n")
        else:
            line.sendall(handshake)
            line.recv(4096)
            head = bytes([rng.choice([0x82, 0x02, 0x00, 0x8F, 0xF2]), rng.choice([0x7F, 0xFF, 0x05, 0x85])])
            line.sendall(head + struct.pack(">Q", rng.choice([10, 2**40, 2**63])) + rng.randbytes(20))
        if rng.random() < 0.5:  # reset instead of a polite end
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def attack(messages, seed=0, report=lambda text: None):
    """Raises AssertionError where the server does something that it should not.

    Returns how many megabytes the process grew after the first tenth.
    """
    # A client that does not say goodbye keeps its slot for a second: with few slots most would be sent away unread.
    rng, policy = random.Random(seed), Counting(slots=256)
    with serving(policy, max_message_bytes=LIMIT, max_wait_s=0.0) as server, Client(url(server)) as robot:
        robot.reset("work on")
        sent = steps = early = tenths = 0
        while sent < messages:
            if sent * 10 // messages > tenths:
                tenths = sent * 10 // messages
                report(f"{sent} bad messages, {steps} good steps, {_megabytes() - early:.1f} MB more than at a tenth")
            if rng.random() < 0.03:
                strange_line(rng, server.port)
                sent += 1
            sent += _conversation(rng, url(server, rng.choice(["", "/vla-eval", "/vla-eval", "/vla-eval"])))
            steps += 1
            actions = robot.act(observation()).actions
            assert np.isfinite(actions).all() and (np.abs(actions) <= 1).all()
            expected = np.float32(min(steps / 100, 1))
            assert actions[0, 1] == expected, f"step {steps} of the good robot was answered with {actions[0, 1] * 100}"
            if not early and sent >= messages / 10:
                early = _megabytes()
        grown = _megabytes() - early
        deadline = time.monotonic() + 10
        while set(policy.steps) - {slot for slot in policy.steps if policy.instructions[slot] == "work on"}:
            assert time.monotonic() < deadline, "slots of clients that have gone are not given back"
            time.sleep(0.05)
        report(f"{sent} bad messages, {steps} good steps, {grown:.1f} MB more; {server.metrics.text()}")
    return grown


def _conversation(rng, address):
    """Up to forty bad messages on one connection; returns how many, 0 where the server had no slot to read them."""
    sent = 0
    options = {"max_size": None, "max_queue": None, "close_timeout": 0.2}
    with contextlib.suppress(InvalidHandshake, OSError), connect(address, **options) as line:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(rng.randrange(1, 40)):
                line.send(strange_message(rng))
                sent += 1
                with contextlib.suppress(TimeoutError):
                    while True:
                        line.recv(0)
        if rng.random() < 0.3:
            line.socket.shutdown(socket.SHUT_RDWR)
    return 0 if line.close_code == 1013 else sent


def _megabytes():
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("messages", type=int)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    attack(chosen.messages, chosen.seed, functools.partial(print, flush=True))
