"""How a program ends that a signal stops: with one line, which says what is kept and how to go on."""

from __future__ import annotations

import atexit
import os
import select
import signal
import stat
import sys
from types import TracebackType
from typing import Any, NoReturn

STATUS = 128 + signal.SIGINT
"""Exit status of a process that Ctrl-C ended, or SIGTERM and SIGHUP where they are handled."""

_READER_ENDS_MS = 200
"""So long who reads a pipe may take to end by the signal that this process got at the same time."""

ANEW = "nothing was written; the same command begins anew."
WRITTEN = "files are written whole or not at all, so what was not finished is not there."


class Terminated(KeyboardInterrupt):
    """A signal of `stopping_signals` came, the one that it is made with where that is known. What it stopped is kept as
    after Ctrl-C."""


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
        ignore_hangups()
    raise Terminated(signal.Signals(number).name)


def ignore_hangups() -> None:
    """SIGHUP has come, and what it asks for is under way. It comes twice, from the shell and from the kernel when the
    shell has ended; the second must not end the process while it saves."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    without_terminal()


def without_terminal() -> None:
    """What leads to a terminal that has gone leads to the null device from now on, and what leads to a program that
    ended with it (`| tee`): a line that nobody reads must not end what is being saved."""
    for descriptor in (1, 2):
        stream = select.poll()
        stream.register(descriptor, 0)  # that a terminal or a reader has gone is told in any case
        for _, events in stream.poll(_READER_ENDS_MS if _is_pipe(descriptor) else 0):
            if events & (select.POLLHUP | select.POLLERR):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:  # it is closed
        return False


def stopped_by(error: BaseException | None) -> str:
    """What a KeyboardInterrupt stands for, in words."""
    return str(error) or "a signal" if isinstance(error, Terminated) else "Ctrl-C"


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
