"""The page that asks which of two clips is better, over `web.server`.

* to the page: binary messages (`web.messages`), a pair of clips each; text messages, JSON: {"type": "preparing" |
  "done" | "refused" | "ended", ...}.
* from the page: {"type": "answer", "pair": number, "answer": "left" | "right" | "equal" | "skip"}.

Several people may answer at a time; each is asked about another pair. An answer is on the disk before the next pair is
sent.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax.labeling.answers import Answers, Pair
from robovlms_jax.web import messages, server
from robovlms_jax.web.access import Access

log = logging.getLogger(__name__)

PAGE = pathlib.Path(__file__).with_name("page.html")

Show = Callable[[Pair], tuple[Mapping[str, Any], Mapping[str, np.ndarray]]]
"""What is said of a pair, JSON values, and its clips: (left or right)_(camera) -> uint8[frames, size, size, 3]."""


@dataclasses.dataclass(eq=False)
class Visitor(server.Visitor):
    """One open page. asked: its pair, by number; None: none."""

    asked: tuple[int, Pair] | None = None


@dataclasses.dataclass
class Work:
    """What there is to ask. pairs: in this order, those that were answered before left out."""

    answers: Answers
    pairs: Sequence[Pair]
    show: Show


class LabelServer(server.PageServer):
    """Serves the page; made and run in an event loop. Asks nothing before `open`."""

    visitor_type = Visitor

    def __init__(self, access: Access, page: str):
        super().__init__(access, page)
        self._work: Work | None = None
        self._waiting: collections.deque[Pair] = collections.deque()
        self._total, self._numbered = 0, 0
        self._kept: dict[Pair, bytes] = {}

    @property
    def ready(self) -> bool:
        return self._work is not None

    # Called by other threads --------------------------------------------------------------------------------------

    def open(self, work: Work) -> None:
        """Questions are asked from now on."""
        self._call(self._begin, work)

    # In the event loop --------------------------------------------------------------------------------------------

    def _begin(self, work: Work) -> None:
        asked = work.answers.asked
        self._work, self._waiting = work, collections.deque(pair for pair in work.pairs if pair.key not in asked)
        self._total = len(work.answers.given) + len(self._waiting)
        for visitor in list(self._visitors.values()):
            self._ask(visitor)

    async def _entered(self, visitor: Visitor) -> None:
        if self._work is None:
            await self._tell(visitor, self._preparation)
        else:
            self._ask(visitor)

    def _left(self, visitor: Visitor) -> None:
        if visitor.asked is not None:  # it is somebody else's now
            self._waiting.appendleft(visitor.asked[1])
            visitor.asked = None
            for other in list(self._visitors.values()):
                if other.asked is None:
                    self._ask(other)

    def _ask(self, visitor: Visitor) -> None:
        if not self._waiting:
            visitor.asked = None
            counts = {"answered": len(self._work.answers.given), "total": self._total}
            self._tell_soon(visitor, {"type": "done", **counts})
            return
        self._numbered += 1
        visitor.asked = (self._numbered, self._waiting.popleft())
        self._start(self._send_pair(visitor, *visitor.asked)).add_done_callback(_report)

    async def _send_pair(self, visitor: Visitor, number: int, pair: Pair) -> None:
        clips = self._kept.pop(pair, None) or await asyncio.to_thread(self._drawn, pair)
        facts = {"type": "pair", "pair": number, "answered": len(self._work.answers.given), "total": self._total}
        if visitor.asked == (number, pair):
            said, pictures = clips
            await self._send(visitor, messages.pack({**facts, **said}, pictures))
        await self._look_ahead()

    async def _look_ahead(self) -> None:
        """The next pair is drawn while a person looks at this one."""
        if self._waiting and self._waiting[0] not in self._kept:
            pair = self._waiting[0]
            clips = await asyncio.to_thread(self._drawn, pair)
            self._kept = {pair: clips}

    def _drawn(self, pair: Pair) -> tuple[Mapping[str, Any], dict[str, bytes]]:
        said, clips = self._work.show(pair)
        pictures = {
            f"{name}_{i}": messages.jpeg(picture) for name, clip in clips.items() for i, picture in enumerate(clip)
        }
        return said, pictures

    def _said(self, visitor: Visitor, kind: str, content: Mapping[str, Any]) -> None:
        refusal = ""
        if kind != "answer":
            refusal = f"There is no command {kind[:40]!r}."
        elif visitor.asked is None or content.get("pair") != visitor.asked[0]:
            refusal = "That pair is not asked about now."
        else:
            try:
                self._work.answers.add(visitor.asked[1], str(content.get("answer")))
            except ValueError as error:
                refusal = str(error)
            except OSError as error:
                log.error("an answer could not be written: %s", error)
                refusal = f"The answer was not stored ({error.strerror or error}). Make room, then answer again."
        if refusal:
            self._tell_soon(visitor, {"type": "refused", "why": refusal})
        else:
            self._ask(visitor)


def _report(task: asyncio.Future) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("a pair could not be shown", exc_info=task.exception())
