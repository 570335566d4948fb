"""How a program ends that Ctrl-C stops: with one line, which says what is kept and how to go on."""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType
from typing import NoReturn

STATUS = 128 + signal.SIGINT
"""Exit status of a process that Ctrl-C ended."""

ANEW = "nothing was written; the same command begins anew."
WRITTEN = "files are written whole or not at all, so what was not finished is not there."


def stop(kept: str) -> NoReturn:
    """Raise SystemExit with status `STATUS`. kept: what is kept, and how to go on."""
    print(f"stopped by Ctrl-C; {kept}", file=sys.stderr, flush=True)
    sys.exit(STATUS)


def stop_at_once(kept: str) -> NoReturn:
    """`stop` for a program that has closed what it writes: nothing is cleaned up, or waited for. Threads of XLA that
    compile at Python's exit took it down with a segmentation fault."""
    print(f"stopped by Ctrl-C; {kept}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(STATUS)


def without_traceback() -> None:
    """Where no program says more, as while it is imported, Ctrl-C ends this process with a line all the same."""
    before = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"stopped by Ctrl-C; {WRITTEN}", file=sys.stderr, flush=True)
        else:
            before(kind, error, trace)

    sys.excepthook = tell
