"""The page and its visitors: one port, websockets, many who watch and one who controls.

GET / is the page, /healthz says whether the demonstration runs, and the page's own websocket is /live:

* to the page: binary messages, a snapshot each (`loop.pack`), at most one that is not acknowledged, the newest first
  and never a queue; text messages, JSON: {"type": "hello" | "you" | "preparing" | "refused" | "ended", ...}.
* from the page: JSON objects with a "type": ack, instruct {text}, stop, release, reset, next, speed {value},
  limit {value}, control {want: "take" | "give" | "leave"}.

The first visitor controls, the others watch. Anybody may stop the robot; only who controls may release the stop.
Runs in one event loop; `loop` has the threads that work.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from robovlms_jax.demo.access import LIVE, Access, page_headers
from robovlms_jax.demo.loop import Message

log = logging.getLogger(__name__)

MAX_VISITORS = 32
MAX_MESSAGE_BYTES = 2048
MAX_MESSAGES_PER_S = 200
"""Of one visitor: acknowledgements and commands; who sends more is sent away."""
ACKS_PER_REPORT = 30
"""A visitor is told its round trip every so many acknowledgements."""
IDLE_S = 60.0
"""Who controls and has done nothing for so long loses control to somebody who asks for it."""
SEND_TIMEOUT_S = 10.0

Handler = Callable[[str, Mapping[str, Any], str], None]
"""(type of command, the message, who) -> None; raises ValueError for a value that cannot be used."""


@dataclasses.dataclass(eq=False)
class Visitor:
    """One open page. ready: it has acknowledged what it was sent. pictures: number of those it has."""

    number: int
    socket: Any
    ready: bool = True
    pictures: int = -1
    seen: Message | None = None
    sent_s: float = 0.0
    round_trip_ms: float = 0.0
    acknowledged: int = 0
    acted_s: float = dataclasses.field(default_factory=time.monotonic)
    asks: bool = False
    fresh: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    received: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=MAX_MESSAGES_PER_S)
    )

    @property
    def name(self) -> str:
        return f"visitor {self.number}"


class DemoServer:
    """Serves the page; made and run in an event loop.

    Args:
      access: who may come in, and where it listens.
      page: HTML.
      hello: JSON values that a page is told first; the demonstration is prepared until `open` has them.
      on_command: carries out what the one who controls, or a stop of anybody, says.
      on_left: called when who controls has gone.
      want: called when somebody is ready for a picture.
    """

    def __init__(
        self,
        access: Access,
        page: str,
        on_command: Handler,
        on_left: Callable[[], None] = lambda: None,
        want: Callable[[], None] = lambda: None,
    ):
        self._access, self._page, self._headers = access, page.encode(), page_headers(page)
        self._on_command, self._on_left, self._want = on_command, on_left, want
        self._visitors: dict[int, Visitor] = {}
        self._controller: Visitor | None = None
        self._hello: dict[str, Any] | None = None
        self._preparing = "Starting"
        self._newest: Message | None = None
        self._last_number = 0
        self._server: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def port(self) -> int:
        return self._server.sockets[0].getsockname()[1]

    async def start(self, port: int) -> None:
        """Begins to listen. Raises OSError that says what to do where the port is taken."""
        from websockets.asyncio import server as websockets

        quiet = logging.getLogger("robovlms_jax.demo.websockets")
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
            raise OSError(
                f"nobody can listen at {self._access.host}:{port} ({error.strerror or error}). Choose another port "
                f"with --port {port + 1 if port < 65535 else 8000} (0: any that is free), or end what listens there."
            ) from error

    async def stop(self) -> None:
        """Tells every page that this is the end, and closes."""
        await asyncio.gather(*(self._tell(visitor, {"type": "ended"}) for visitor in list(self._visitors.values())))
        self._server.close(close_connections=True)
        await self._server.wait_closed()

    # Called by other threads --------------------------------------------------------------------------------------

    def prepare(self, what: str) -> None:
        """What is being made ready, for pages that are open already."""
        self._call(self._set_preparing, what)

    def open(self, hello: Mapping[str, Any]) -> None:
        """The demonstration runs from now on."""
        self._call(self._set_hello, dict(hello))

    def deliver(self, message: Message) -> None:
        """The newest snapshot, for everybody who is ready for one."""
        self._call(self._set_newest, message)

    def _call(self, function: Callable[..., None], *values: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *values)

    # In the event loop --------------------------------------------------------------------------------------------

    def _set_preparing(self, what: str) -> None:
        self._preparing = what
        self._tell_all({"type": "preparing", "what": what})

    def _set_hello(self, hello: dict[str, Any]) -> None:
        self._hello = hello
        self._tell_all({"type": "hello", **hello})

    def _set_newest(self, message: Message) -> None:
        self._newest = message
        for visitor in self._visitors.values():
            visitor.fresh.set()

    def _tell_all(self, content: Mapping[str, Any]) -> None:
        for visitor in list(self._visitors.values()):
            self._tell_soon(visitor, content)

    def _tell_soon(self, visitor: Visitor, content: Mapping[str, Any]) -> None:
        task = asyncio.ensure_future(self._tell(visitor, content))
        task.add_done_callback(lambda done: done.exception())

    async def _tell(self, visitor: Visitor, content: Mapping[str, Any]) -> None:
        await self._send(visitor, json.dumps(content))

    async def _send(self, visitor: Visitor, message: bytes | str) -> None:
        """A visitor who does not read is dropped."""
        from websockets.exceptions import ConnectionClosed

        try:
            await asyncio.wait_for(visitor.socket.send(message), SEND_TIMEOUT_S)
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
            return connection.respond(200, "OK\n") if self._hello else connection.respond(503, "preparing\n")
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
        visitor = Visitor(self._last_number, socket)
        self._visitors[visitor.number] = visitor
        if self._controller is None:
            self._controller = visitor
        first = {"type": "hello", **self._hello} if self._hello else {"type": "preparing", "what": self._preparing}
        await self._tell(visitor, first)
        self._tell_roles()
        feeder = asyncio.ensure_future(self._feed(visitor))
        try:
            async for message in socket:
                if not await self._received(visitor, message):
                    break
        except ConnectionClosed:
            pass
        finally:
            feeder.cancel()
            self._leave(visitor)

    async def _feed(self, visitor: Visitor) -> None:
        """Sends the newest snapshot whenever the last one has been acknowledged."""
        self._want()
        while True:
            await visitor.fresh.wait()
            visitor.fresh.clear()
            message = self._newest
            if not visitor.ready or message is None:
                continue
            visitor.ready, visitor.sent_s, visitor.seen = False, time.monotonic(), message
            new, visitor.pictures = message.number != visitor.pictures, message.number
            await self._send(visitor, message.whole if new else message.bare)

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
        if kind == "ack":
            visitor.ready, visitor.round_trip_ms = True, round(1000 * (now - visitor.sent_s), 1)
            visitor.acknowledged += 1
            if self._newest is not visitor.seen:
                visitor.fresh.set()
            if visitor.acknowledged % ACKS_PER_REPORT == 0:
                self._tell_role(visitor)
            self._want()
        elif kind == "control":
            self._change_control(visitor, content.get("want"))
        elif kind != "stop" and visitor is not self._controller:
            self._tell_soon(visitor, {"type": "refused", "why": "You are watching. Take control first."})
        elif self._hello is None:
            self._tell_soon(visitor, {"type": "refused", "why": "The robot is not ready yet."})
        else:
            self._carry_out(visitor, kind, content)
        return True

    def _carry_out(self, visitor: Visitor, kind: str, content: Mapping[str, Any]) -> None:
        visitor.acted_s = time.monotonic()
        try:
            self._on_command(kind, content, visitor.name)
        except ValueError as error:
            self._tell_soon(visitor, {"type": "refused", "why": str(error)})

    def _change_control(self, visitor: Visitor, want: object) -> None:
        holder = self._controller
        if want == "take":
            if holder is None or time.monotonic() - holder.acted_s >= IDLE_S:
                self._give_control(visitor)
            else:
                visitor.asks = visitor is not holder
        elif want == "give" and visitor is holder:
            asking = [other for other in self._visitors.values() if other.asks]
            if asking:
                self._give_control(asking[0])
        elif want == "leave":
            visitor.asks = False
        self._tell_roles()

    def _give_control(self, visitor: Visitor | None) -> None:
        self._controller = visitor
        if visitor is not None:
            visitor.asks, visitor.acted_s = False, time.monotonic()

    def _leave(self, visitor: Visitor) -> None:
        self._visitors.pop(visitor.number, None)
        if visitor is self._controller:
            asking = [other for other in self._visitors.values() if other.asks]
            self._give_control(asking[0] if asking else None)
            self._on_left()
        self._tell_roles()

    def _tell_roles(self) -> None:
        for visitor in list(self._visitors.values()):
            self._tell_role(visitor)

    def _tell_role(self, visitor: Visitor) -> None:
        controls = visitor is self._controller
        asked = controls and any(other.asks for other in self._visitors.values())
        role = {"number": visitor.number, "controls": controls, "free": self._controller is None, "asked": asked}
        role |= {"asks": visitor.asks, "visitors": len(self._visitors), "round_trip_ms": visitor.round_trip_ms}
        self._tell_soon(visitor, {"type": "you", **role})
