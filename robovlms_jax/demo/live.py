"""A page on which a table moves: its threads, and what is compiled before they begin."""

from __future__ import annotations

import concurrent.futures
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from robovlms_jax.demo import world as worlds
from robovlms_jax.demo.loop import SPEEDS, Camera, ControlLoop, Steps
from robovlms_jax.demo.server import DemoServer
from robovlms_jax.web.access import Access

log = logging.getLogger(__name__)


class Live:
    """A page that is there at once, and behind it, once it is compiled, the table. What the page's commands do is for
    those who inherit.

    Args:
      page: HTML.
    """

    def __init__(self, access: Access, page: str):
        self.server = DemoServer(access, page, self._command, self._left, self._want)
        self._control: ControlLoop | None = None
        self._camera: Camera | None = None

    def _command(self, kind: str, content: Mapping[str, Any], who: str) -> None:
        """One command of the page; raises ValueError for one that there is not."""
        raise NotImplementedError

    def _left(self) -> None:
        """Who controlled has left."""
        raise NotImplementedError

    def _compile(self, work: Iterable[tuple[str, Callable[[], Any]]]) -> list[Any]:
        """What the named functions return, in their order; they run in two threads."""
        work = list(work)
        left = [name for name, _ in work]
        self._tell_progress(left, len(work))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            running = {pool.submit(function): name for name, function in work}
            for count, done in enumerate(concurrent.futures.as_completed(running), start=1):
                done.result()
                log.info("ready: %s (%d of %d)", running[done], count, len(work))
                left.remove(running[done])
                self._tell_progress(left, len(work))
            return [done.result() for done in running]

    def _tell_progress(self, left: Sequence[str], of: int) -> None:
        self.server.prepare(f"Compiling: {', '.join(left)}" if left else "Making the table", of - len(left), of)

    def _begin(self, steps: Steps, view_sizes: Mapping[str, int], hello: Mapping[str, Any]) -> None:
        """Time goes on from here, and pages are told `hello` and what speeds there are."""
        self._control = ControlLoop(steps, lambda snapshot: self._camera.see(snapshot))
        self._camera = Camera(view_sizes, self.server.deliver, lambda: self._control.numbers)
        self._camera.start()
        self._control.start()
        self.server.open({**hello, "speeds": list(SPEEDS), "rate_hz": worlds.World.rate_hz})
        self._want()

    def close(self) -> None:
        """Ends the threads; the server is stopped by whoever started it."""
        for part in (self._control, self._camera):
            if part is not None:
                part.stop()

    def _want(self) -> None:
        if self._camera is not None:
            self._camera.want()


def number(content: Mapping[str, Any], name: str) -> float:
    """A number of a page's command. Raises ValueError for what is none."""
    value = content.get(name)
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond what a float can hold
        pass
    raise ValueError(f"{name}={str(value)[:40]!r}: expected a number.")
