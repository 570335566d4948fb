"""How a program ends that a signal stops: with one line, which says what is kept and how to go on."""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
from types import TracebackType
from typing import Any, NoReturn

STATUS = 128 + signal.SIGINT
"""Exit status of a process that Ctrl-C ended, or SIGTERM and SIGHUP where they are handled."""

ANEW = "nothing was written; the same command begins anew."
WRITTEN = "files are written whole or not at all, so what was not finished is not there."


class Terminated(KeyboardInterrupt):
    """SIGTERM came, or the signal that it is made with, and what it stopped is kept as after Ctrl-C."""


def stopping_signals() -> tuple[signal.Signals, ...]:
    """What else than Ctrl-C asks a program to save and end: SIGTERM, and SIGHUP, which says that its terminal has gone
    (a window that was closed, a connection that broke). Not SIGHUP where it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGHUP)


def on_sigterm() -> None:
    """From now on SIGTERM, and SIGHUP where it is not ignored, raise `Terminated` in the main thread."""
    for number in stopping_signals():
        signal.signal(number, _terminate)


def _terminate(number: int, *_: Any) -> NoReturn:
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)  # it comes twice, to who leads the session and to who is in front
        without_terminal()
    raise Terminated(signal.Signals(number).name)


def without_terminal() -> None:
    """What leads to a terminal that has gone leads to the null device from now on: a line that nobody reads must not
    end what is being saved."""
    streams = select.poll()
    for descriptor in (1, 2):
        streams.register(descriptor, 0)  # that a terminal or a reader has gone is told in any case
    for descriptor, events in streams.poll(0):
        if events & (select.POLLHUP | select.POLLERR):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def stopped_by(error: BaseException | None) -> str:
    """What a KeyboardInterrupt stands for, in words."""
    return str(error) or "SIGTERM" if isinstance(error, Terminated) else "Ctrl-C"


def say(kept: str) -> None:
    """The line, where a KeyboardInterrupt is handled, which says what came."""
    print(f"stopped by {stopped_by(sys.exception())}; {kept}", file=sys.stderr, flush=True)


def stop(kept: str) -> NoReturn:
    """Raise SystemExit with status `STATUS`, where a KeyboardInterrupt is handled. kept: what is kept, and how to go
    on."""
    say(kept)
    sys.exit(STATUS)


def stop_at_once(kept: str) -> NoReturn:
    """`stop` for a program that has closed what it writes: nothing is cleaned up, or waited for. Threads of XLA that
    compile at Python's exit took it down with a segmentation fault."""
    say(kept)
    sys.stdout.flush()
    os._exit(STATUS)


def without_traceback() -> None:
    """From now on this process ends without a traceback where no program says more: after a signal that raises
    KeyboardInterrupt, as while it is imported, and where nobody reads its output any more, as behind `| head`."""
    before = sys.excepthook
    if getattr(before, "__module__", "") == __name__:
        return

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"stopped by {stopped_by(error)}; {WRITTEN}", file=sys.stderr, flush=True)
        elif not (issubclass(kind, BrokenPipeError) and _nobody_reads()):
            before(kind, error, trace)

    sys.excepthook = tell
    atexit.register(_nobody_reads)  # what Python writes at its end is the first that is written of a short text


def show(text: str) -> None:
    """Print what a program found. Where nobody reads it any more it is left out: BrokenPipeError, an OSError, would be
    taken for an error of what the program did."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _nobody_reads()


def _nobody_reads() -> bool:
    """Whether standard output leads nowhere; it leads to the null device then, since Python would complain."""
    try:
        sys.stdout.flush()
        # Where Python has no buffer (PYTHONUNBUFFERED), there is nothing left that could not be flushed.
        at = select.poll()
        at.register(sys.stdout.fileno(), select.POLLERR)
        gone = any(events & select.POLLERR for _, events in at.poll(0))
    except BrokenPipeError:
        gone = True
    except (AttributeError, OSError, ValueError):  # there is none, it is closed, or it is no file
        gone = False
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
