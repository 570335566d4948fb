"""A program that serves a page until it is told to end: its settings, and its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import webbrowser
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from robovlms_jax.web.access import Access
from robovlms_jax.web.server import PageServer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageConfig:
    """Where a page is served."""

    port: int = 8000
    """0: any that is free."""
    host: str = "127.0.0.1"
    """Address to listen at. Others than this machine reach it only if you say so, such as with 0.0.0.0; the page's
    address then has a token."""
    token: str = ""
    """What the page's address must end with; empty: nothing on this machine, a random one for other hosts."""
    open_browser: bool = False
    """Open the page in this machine's browser."""

    def __post_init__(self):
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} must be 0 ... 65535.")


def run(work: Coroutine[Any, Any, Any]) -> NoReturn:
    """Runs it until its end and then ends the process, with status 0. What it raises is raised.

    Nothing is waited for but `work`, so that has to save what must be saved. Python would wait for threads that compile
    or draw, which cannot be stopped, and JAX forgets its programs one by one at exit, which takes longer than ten
    seconds on a busy machine.
    """

    async def whole() -> None:
        await work
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(0)

    asyncio.run(whole())
    raise AssertionError("unreachable")


async def serve(
    server: PageServer,
    access: Access,
    port: int,
    prepare: Callable[[], None],
    *,
    ready: str,
    open_browser: bool = False,
) -> None:
    """Until SIGINT or SIGTERM. The page is there at once.

    Args:
      prepare: what takes its time; runs in a thread. What it raises ends the program.
      ready: logged when that is done.
    Raises:
      OSError: nobody can listen there.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await server.start(port)
    url = access.address(server.port)
    log.info("the page: %s   (Ctrl-C ends it)", url)
    if access.is_open:
        log.info(
            "from other computers: the same with this one's name or address for localhost, such as %s",
            access.from_elsewhere(server.port),
        )
    if open_browser:
        webbrowser.open(url)
    preparing = _beside(prepare)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((preparing, stopping), return_when=asyncio.FIRST_COMPLETED)
        if preparing.done():
            preparing.result()
            log.info(ready)
            await stopping
        log.info("ending")
    finally:
        await server.stop()


def _beside(work: Callable[[], None]) -> asyncio.Future:
    """Runs it in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def run_it() -> None:
        error = None
        try:
            work()
        except BaseException as caught:  # told where it is waited for
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run_it, name="prepare", daemon=True).start()
    return done
