"""Progress bars on standard error: several times a second on a terminal, every ten seconds in a file."""

from __future__ import annotations

import sys

import tqdm

EVERY_S = (0.2, 10.0)
"""Seconds between two showings, on a terminal and elsewhere."""


class Bar(tqdm.tqdm):
    """A bar that shows life from the first second: `say` tells what is going on before the first thing is finished."""

    def __init__(self, total: int, unit: str, first: str, *, initial: int = 0, desc: str = ""):
        """first: what goes on before anything is finished, such as "compiling"."""
        every = EVERY_S[0 if sys.stderr.isatty() else 1]
        # miniters 0: a call of `update` that finishes nothing may show the bar again, too
        super().__init__(total=total, unit=unit, initial=initial, desc=desc, mininterval=every, miniters=0)
        self.set_postfix_str(first)

    def say(self, text: str) -> None:
        """What goes on now, shown when the bar is due."""
        self.set_postfix_str(text, refresh=False)
        self.update(0)
