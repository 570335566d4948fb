"""A page and its visitors: one port, plain GETs and a websocket, each message checked before it counts.

GET / is the page, /healthz says whether what is behind it is ready, and the page's own websocket is `access.LIVE`. From
the page come JSON objects with a "type"; what they mean is for the class that serves the page (`demo.server`,
`labeling.server`). Runs in one event loop.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from robovlms_jax.web import addresses
from robovlms_jax.web.access import LIVE, Access, page_headers

MAX_VISITORS = 32
MAX_MESSAGE_BYTES = 2048
MAX_MESSAGES_PER_S = 200
"""Of one visitor; who sends more is sent away."""
SEND_TIMEOUT_S = 10.0


@dataclasses.dataclass(eq=False)
class Visitor:
    """One open page."""

    number: int
    socket: Any
    received: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=MAX_MESSAGES_PER_S)
    )

    @property
    def name(self) -> str:
        return f"visitor {self.number}"


class PageServer:
    """Serves a page; made and run in an event loop. What is said to and by its visitors is for those who inherit.

    Args:
      access: who may come in, and where it listens.
      page: HTML.
    """

    visitor_type: type[Visitor] = Visitor

    def __init__(self, access: Access, page: str):
        self._access, self._page, self._headers = access, page.encode(), page_headers(page)
        self._visitors: dict[int, Any] = {}
        self._last_number = 0
        self._preparing: dict[str, Any] = {"what": "Starting", "done": 0, "of": 0}
        self._begun_s = time.monotonic()
        self._tasks: set[asyncio.Task] = set()
        """All that run; the event loop itself would forget them."""
        self._server: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # For those who inherit ----------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """What /healthz says."""
        raise NotImplementedError

    async def _entered(self, visitor: Any) -> None:
        """A page was opened; it is among `_visitors` already."""
        raise NotImplementedError

    def _said(self, visitor: Any, kind: str, content: Mapping[str, Any]) -> None:
        """A visitor said something; the content is JSON of this type."""
        raise NotImplementedError

    def _left(self, visitor: Any) -> None:
        """A page was closed; it is no longer among `_visitors`."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------------------

    def prepare(self, what: str, done: int = 0, of: int = 0) -> None:
        """What is being made ready, for pages that are open already; called by other threads. of: parts, if counted."""
        self._call(self._set_preparing, what, done, of)

    def _set_preparing(self, what: str, done: int, of: int) -> None:
        self._preparing = {"what": what, "done": done, "of": of}
        self._tell_all(self._preparation)

    @property
    def _preparation(self) -> dict[str, Any]:
        """What a page is told before there is more to say. seconds: since the server was made."""
        return {"type": "preparing", **self._preparing, "seconds": round(time.monotonic() - self._begun_s)}

    @property
    def port(self) -> int:
        return self._server.sockets[0].getsockname()[1]

    async def start(self, port: int) -> None:
        """Begins to listen. Raises OSError that says what to do where the port is taken."""
        from websockets.asyncio import server as websockets

        quiet = logging.getLogger("robovlms_jax.web.websockets")
        quiet.setLevel(logging.CRITICAL)  # hostile handshakes would fill the log with tracebacks
        self._loop = asyncio.get_running_loop()
        try:
            self._server = await websockets.serve(
                self._connected,
                self._access.host,
                port,
                process_request=self._http,
                compression=None,  # JPEG gets no smaller
                max_size=MAX_MESSAGE_BYTES,
                max_queue=8,
                close_timeout=1,
                logger=quiet,
                server_header=None,
            )
        except OSError as error:
            raise OSError(addresses.why(error, self._access.host, port)) from error

    async def stop(self) -> None:
        """Tells every page that this is the end, and closes."""
        await asyncio.gather(*(self._tell(visitor, {"type": "ended"}) for visitor in list(self._visitors.values())))
        self._server.close(close_connections=True)
        await self._server.wait_closed()
        running = list(self._tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task:
        """Runs it beside everything else; until the server's end at the latest."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _call(self, function: Callable[..., None], *values: Any) -> None:
        """In the event loop, soon; for other threads."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *values)

    def _tell_all(self, content: Mapping[str, Any]) -> None:
        for visitor in list(self._visitors.values()):
            self._tell_soon(visitor, content)

    def _tell_soon(self, visitor: Visitor, content: Mapping[str, Any]) -> None:
        self._start(self._tell(visitor, content))

    async def _tell(self, visitor: Visitor, content: Mapping[str, Any]) -> None:
        await self._send(visitor, json.dumps(content))

    async def _send(self, visitor: Visitor, message: bytes | str) -> None:
        """A visitor who does not read is dropped; one who is gone already is told nothing."""
        from websockets.exceptions import ConnectionClosed

        if visitor.socket.transport.is_closing():
            return
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):  # no task of its own, before which the visitor may have gone
                await visitor.socket.send(message)
        except TimeoutError:
            visitor.socket.transport.abort()
        except ConnectionClosed:
            pass

    def _http(self, connection: Any, request: Any) -> Any:
        """Answers plain GETs; None lets a websocket in."""
        hosts, origins = request.headers.get_all("Host"), request.headers.get_all("Origin")
        if len(hosts) > 1 or len(origins) > 1:
            return connection.respond(400, "Host or Origin is given twice.\n")
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(200, "OK\n") if self.ready else connection.respond(503, "preparing\n")
        refused = self._access.refusal(request.path, *(found[0] if found else None for found in (hosts, origins)))
        if refused:
            return connection.respond(refused[0], refused[1] + "\n")
        if path == LIVE:
            return None
        if path != "/":
            return connection.respond(404, "There is only one page here: /\n")
        response = connection.respond(200, "")
        response.body = self._page
        for name, value in {**self._headers, "Content-Length": str(len(self._page))}.items():
            if name in response.headers:
                del response.headers[name]
            response.headers[name] = value
        return response

    async def _connected(self, socket: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        if len(self._visitors) >= MAX_VISITORS:
            await socket.close(1013, f"{MAX_VISITORS} people are watching; try again later")
            return
        self._last_number += 1
        visitor = self.visitor_type(self._last_number, socket)
        self._visitors[visitor.number] = visitor
        try:
            await self._entered(visitor)
            async for message in socket:
                if not await self._received(visitor, message):
                    break
        except ConnectionClosed:
            pass
        finally:
            self._visitors.pop(visitor.number, None)
            self._left(visitor)

    async def _received(self, visitor: Visitor, message: bytes | str) -> bool:
        """Whether the visitor may stay."""
        now = time.monotonic()
        full = len(visitor.received) == MAX_MESSAGES_PER_S
        if full and now - visitor.received[0] < 1:
            await visitor.socket.close(1008, f"more than {MAX_MESSAGES_PER_S} messages in a second")
            return False
        visitor.received.append(now)
        try:
            content = json.loads(message)
            kind = content["type"] if isinstance(message, str) else None
        except (ValueError, KeyError, TypeError, RecursionError):
            kind = None
        if not isinstance(kind, str):
            await visitor.socket.close(1007, "expected JSON text, an object with a type")
            return False
        self._said(visitor, kind, content)
        return True
