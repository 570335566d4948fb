"""The robot's side of the server: a policy like any other, on another computer. NumPy, websockets and msgpack; no JAX.

    with Client("ws://gpu-box:8000", ClientConfig(token="...")) as policy:
        policy.reset("open the drawer")
        chunk = policy.act(observation)

Every call ends within its time-out, with an answer or an exception (a line that was lost may be made anew once more,
within connect_timeout_s); an answer that comes later is thrown away, for the connection it comes on is closed. What a
robot does without an answer is not decided here: see `loop` and `safety`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.deploy import conversation
from robovlms_jax.deploy.conversation import Ask, ClientConfig, Clock, Close, Open, Pause, ServerError, Steps

__all__ = ["AsyncClient", "Client", "ClientConfig", "Clock", "ServerError"]

GOODBYE_S = 0.2
"""How long a closed line waits for the server's goodbye."""


class _Client:
    """What both clients share: all but waiting."""

    def __init__(self, url: str, config: ClientConfig | None = None):
        self._course = conversation.Course(url, config or ClientConfig())
        self._line: Any = None  # websockets' connection, of threads or of an event loop

    @property
    def config(self) -> ClientConfig:
        return self._course.config

    @property
    def metadata(self) -> dict[str, Any]:
        """What the server says of its policy; {} before the first connection."""
        return self._course.conversation.metadata

    @property
    def clock(self) -> Clock | None:
        return self._course.conversation.clock

    @property
    def last_reply(self) -> dict[str, Any]:
        """The last answer without its actions: timings, and `clipped`, names of dimensions that were out of bounds."""
        return self._course.conversation.last_reply

    @property
    def episodes_lost(self) -> int:
        """How often the connection was lost within an episode."""
        return self._course.episodes_lost

    def _options(self, seconds: float) -> dict[str, Any]:
        token = self.config.token
        return {
            "compression": None,
            "max_size": conversation.BOUNDS.message_bytes,
            "proxy": None,
            "additional_headers": {"Authorization": f"Bearer {token}"} if token else None,
            "ssl": self.config.ssl,
            "open_timeout": seconds,
        }


class Client(_Client):
    """`interface.Policy` that waits for its answers. For one thread."""

    def __enter__(self) -> Client:
        self.connect()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def connect(self) -> None:
        """Raises TimeoutError where no server answers in time, ServerError where it refuses."""
        self._run(self._course.connect())

    def close(self) -> None:
        self._run(self._course.close())

    def reset(self, instruction: str) -> None:
        """The next observation begins an episode."""
        self._course.reset(instruction)

    def act(self, observation: Observation) -> ActionChunk:
        """Raises TimeoutError, ServerError, or OSError and websockets' ConnectionClosed for a line that stays lost."""
        return self._run(self._course.act(observation))

    def _run(self, steps: Steps) -> Any:
        """Does what the steps say until they return."""
        go_on: Callable[[Any], Open | Ask | Close | Pause] = steps.send
        came: Any = None
        while True:
            try:
                step = go_on(came)
            except StopIteration as end:
                return end.value
            try:
                go_on, came = steps.send, self._do(step)
            except BaseException as error:  # Ctrl-C, too: the line is closed before it goes on
                go_on, came = steps.throw, error

    def _do(self, step: Open | Ask | Close | Pause) -> bytes | str | None:
        from websockets.sync.client import connect

        if isinstance(step, Open):
            deadline = time.monotonic() + step.seconds
            self._line = connect(self._course.url, **self._options(step.seconds)).__enter__()
            return self._line.recv(max(deadline - time.monotonic(), 0.001))
        if isinstance(step, Ask):
            deadline = time.monotonic() + step.seconds
            with _cut_after(self._line.socket, step.seconds):
                self._line.send(step.message)
                return self._line.recv(max(deadline - time.monotonic(), 0.001))
        if isinstance(step, Pause):
            time.sleep(step.seconds)
        elif self._line is not None:
            line, self._line = self._line, None
            if not step.goodbye:
                with contextlib.suppress(OSError):
                    line.socket.shutdown(socket.SHUT_RDWR)
            line.close_timeout = GOODBYE_S
            line.close()
        return None


class AsyncClient(_Client):
    """The same for an event loop."""

    async def __aenter__(self) -> AsyncClient:
        await self.connect()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """As `Client.connect`."""
        await self._run(self._course.connect())

    async def close(self) -> None:
        await self._run(self._course.close())

    async def reset(self, instruction: str) -> None:
        """As `Client.reset`."""
        self._course.reset(instruction)

    async def act(self, observation: Observation) -> ActionChunk:
        """As `Client.act`."""
        return await self._run(self._course.act(observation))

    async def _run(self, steps: Steps) -> Any:
        go_on: Callable[[Any], Open | Ask | Close | Pause] = steps.send
        came: Any = None
        while True:
            try:
                step = go_on(came)
            except StopIteration as end:
                return end.value
            try:
                go_on, came = steps.send, await self._do(step)
            except BaseException as error:  # a cancelled task, too: the line is closed before it goes on
                go_on, came = steps.throw, error

    async def _do(self, step: Open | Ask | Close | Pause) -> bytes | str | None:
        from websockets.asyncio.client import connect

        if isinstance(step, Open):
            async with asyncio.timeout(step.seconds):
                self._line = await connect(self._course.url, **self._options(step.seconds)).__aenter__()
                return await self._line.recv()
        if isinstance(step, Ask):
            async with asyncio.timeout(step.seconds):
                await self._line.send(step.message)
                return await self._line.recv()
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
        elif self._line is not None:
            line, self._line = self._line, None
            if not step.goodbye:
                line.transport.abort()
            line.close_timeout = GOODBYE_S
            await line.close()
        return None


@contextlib.contextmanager
def _cut_after(line: socket.socket, seconds: float) -> Iterator[None]:
    """Cut the line if the block takes longer: sending waits for as long as the server reads, however little."""

    def cut() -> None:
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
