"""The page and its visitors: one port, websockets, many who watch and one who controls.

GET / is the page, /healthz says whether the demonstration runs, and the page's own websocket is /live:

* to the page: binary messages, a snapshot each (`web.messages`), at most one that is not acknowledged, the newest first
  and never a queue; text messages, JSON: {"type": "hello" | "you" | "preparing" | "refused" | "ended", ...}.
* from the page: JSON objects with a "type": ack, instruct {text}, stop, release, reset, next, speed {value},
  limit {value}, control {want: "take" | "give" | "leave"}.

The first visitor controls, the others watch. Anybody may stop the robot; only who controls may release the stop.
Runs in one event loop; `loop` has the threads that work.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from robovlms_jax.demo.loop import Message
from robovlms_jax.web import server
from robovlms_jax.web.access import Access

ACKS_PER_REPORT = 30
"""A visitor is told its round trip every so many acknowledgements."""
IDLE_S = 60.0
"""Who controls and has done nothing for so long loses control to somebody who asks for it."""

Handler = Callable[[str, Mapping[str, Any], str], None]
"""(type of command, the message, who) -> None; raises ValueError for a value that cannot be used."""


@dataclasses.dataclass(eq=False)
class Visitor(server.Visitor):
    """One open page. ready: it has acknowledged what it was sent. pictures: number of those it has."""

    ready: bool = True
    pictures: int = -1
    seen: Message | None = None
    sent_s: float = 0.0
    round_trip_ms: float = 0.0
    acknowledged: int = 0
    acted_s: float = dataclasses.field(default_factory=time.monotonic)
    asks: bool = False
    fresh: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    feeder: Any = None


class DemoServer(server.PageServer):
    """Serves the page; made and run in an event loop.

    Args:
      access: who may come in, and where it listens.
      page: HTML.
      hello: JSON values that a page is told first; the demonstration is prepared until `open` has them.
      on_command: carries out what the one who controls, or a stop of anybody, says.
      on_left: called when who controls has gone.
      want: called when somebody is ready for a picture.
    """

    visitor_type = Visitor

    def __init__(
        self,
        access: Access,
        page: str,
        on_command: Handler,
        on_left: Callable[[], None] = lambda: None,
        want: Callable[[], None] = lambda: None,
    ):
        super().__init__(access, page)
        self._on_command, self._on_left, self._want = on_command, on_left, want
        self._controller: Visitor | None = None
        self._hello: dict[str, Any] | None = None
        self._newest: Message | None = None
        self._patience: asyncio.TimerHandle | None = None
        """Looks again whether who controls still does something, while somebody asks for control."""

    @property
    def ready(self) -> bool:
        return self._hello is not None

    # Called by other threads --------------------------------------------------------------------------------------

    def open(self, hello: Mapping[str, Any]) -> None:
        """The demonstration runs from now on."""
        self._call(self._set_hello, dict(hello))

    def deliver(self, message: Message) -> None:
        """The newest snapshot, for everybody who is ready for one."""
        self._call(self._set_newest, message)

    # In the event loop --------------------------------------------------------------------------------------------

    def _set_hello(self, hello: dict[str, Any]) -> None:
        self._hello = hello
        self._tell_all({"type": "hello", **hello})

    def _set_newest(self, message: Message) -> None:
        self._newest = message
        for visitor in self._visitors.values():
            visitor.fresh.set()

    async def _entered(self, visitor: Visitor) -> None:
        if self._controller is None:
            self._controller = visitor
        await self._tell(visitor, {"type": "hello", **self._hello} if self._hello else self._preparation)
        self._tell_roles()
        visitor.feeder = self._start(self._feed(visitor))

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

    def _said(self, visitor: Visitor, kind: str, content: Mapping[str, Any]) -> None:
        if kind == "ack":
            visitor.ready, visitor.round_trip_ms = True, round(1000 * (time.monotonic() - visitor.sent_s), 1)
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

    def _carry_out(self, visitor: Visitor, kind: str, content: Mapping[str, Any]) -> None:
        visitor.acted_s = time.monotonic()
        try:
            self._on_command(kind, content, visitor.name)
        except ValueError as error:
            self._tell_soon(visitor, {"type": "refused", "why": str(error)})

    def _change_control(self, visitor: Visitor, want: object) -> None:
        holder = self._controller
        if want == "take":
            visitor.asks = visitor is not holder
        elif want == "give" and visitor is holder:
            asking = [other for other in self._visitors.values() if other.asks]
            if asking:
                self._give_control(asking[0])
        elif want == "leave":
            visitor.asks = False
        self._wait_for_idle()
        self._tell_roles()

    def _wait_for_idle(self) -> None:
        """Gives control to who asks for it as soon as nobody has it, or who has it has done nothing for IDLE_S."""
        if self._patience is not None:
            self._patience.cancel()
        asking = [other for other in self._visitors.values() if other.asks]
        if not asking:
            return
        left = IDLE_S - (time.monotonic() - self._controller.acted_s) if self._controller else 0.0
        if left > 0:
            self._patience = asyncio.get_running_loop().call_later(left, self._wait_for_idle)
        else:
            self._give_control(asking[0])
            self._wait_for_idle()  # for who asks, too
            self._tell_roles()

    def _give_control(self, visitor: Visitor | None) -> None:
        self._controller = visitor
        if visitor is not None:
            visitor.asks, visitor.acted_s = False, time.monotonic()

    def _left(self, visitor: Visitor) -> None:
        if visitor.feeder is not None:
            visitor.feeder.cancel()
        if visitor is self._controller:
            asking = [other for other in self._visitors.values() if other.asks]
            self._give_control(asking[0] if asking else None)
            self._wait_for_idle()
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
