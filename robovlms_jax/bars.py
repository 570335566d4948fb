"""Progress bars on standard error: several times a second on a terminal, every ten seconds in a file."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import tqdm

EVERY_S = (0.2, 10.0)
"""Seconds between two showings, on a terminal and elsewhere."""
ALIVE_S = 1.0
"""A bar that nobody has moved for so long is shown again, on a terminal: its clock goes on."""


class Bar(tqdm.tqdm):
    """A bar that shows life from the first second: `say` tells what is going on before the first thing is finished, and
    its clock goes on while the program compiles and says nothing."""

    def __init__(
        self, total: int | None, unit: str, first: str = "", *, initial: int = 0, desc: str = "", **options: Any
    ):
        """first: what goes on before anything is finished, such as "compiling". total: None where it is not known.
        options: tqdm's."""
        self._ended, self._shown_s = threading.Event(), time.monotonic()
        every = EVERY_S[0 if sys.stderr.isatty() else 1]
        # miniters 0: a call of `update` that finishes nothing may show the bar again, too
        self._first = ""
        super().__init__(total=total, unit=unit, initial=initial, desc=desc, mininterval=every, miniters=0, **options)
        self.set_postfix_str(first)
        self._first = self.postfix
        threading.Thread(target=self._live, args=(max(every, ALIVE_S),), name="bar", daemon=True).start()

    def say(self, text: str) -> None:
        """What goes on now, shown when the bar is due."""
        self.set_postfix_str(text, refresh=False)
        self.update(0)

    def update(self, n: float | None = 1) -> bool | None:
        if n and self.postfix and self.postfix == self._first:  # something is finished: that is over
            self.set_postfix_str("", refresh=False)
        return super().update(n)

    def display(self, *arguments: Any, **options: Any) -> Any:
        self._shown_s = time.monotonic()
        return super().display(*arguments, **options)

    def close(self) -> None:
        self._ended.set()
        super().close()

    def _live(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            if time.monotonic() - self._shown_s >= every_s:
                with self.get_lock():
                    if not self._ended.is_set():
                        self.refresh(nolock=True)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[Bar]:
    """A line about one thing that takes long and cannot be counted, with the time that it has taken so far.

    what: such as "compiling". The bar's `say` adds to it.
    """
    with Bar(None, "", desc=what, bar_format="{desc}: {elapsed}{postfix}") as bar:
        yield bar
