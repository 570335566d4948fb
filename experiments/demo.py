"""A robot that obeys a sentence, in the browser: PlayTable live, with a trained policy that comes with this package.

    python -m experiments.demo                                         # then open the address that it prints
    python -m experiments.demo --checkpoint runs/playtable_fixtures    # a policy of your own that drives PlayTable

Needs pip install -e .[serve]. docs/demo.md says what the page shows, and who may control the robot.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import pathlib
import secrets
import signal
import sys
import threading
import webbrowser
from collections.abc import Callable

from robovlms_jax import cli
from robovlms_jax.control import robot as robots
from robovlms_jax.demo import access, show, twin
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.runs import logs
from robovlms_jax.runs.load import load_config, load_policy
from robovlms_jax.runs.robots import require_same

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What to show, and where."""

    checkpoint: str = ""
    """Run directory or one of its checkpoints/<step> folders, of a policy that drives PlayTable; empty: the trained
    twin that comes with this package."""
    port: int = 8000
    """0: any that is free."""
    host: str = "127.0.0.1"
    """Address to listen at. Others than this machine reach it only if you say so, such as with 0.0.0.0; the page's
    address then has a token."""
    token: str = ""
    """What the page's address must end with; empty: nothing on this machine, a random one for other hosts."""
    open_browser: bool = False
    """Open the page in this machine's browser."""
    picture_size: int = 600
    """Pixels of the fixed camera's picture on the page; the hand camera's has half of it."""
    seed: int = 0
    """Of the scenes."""

    def __post_init__(self):
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} must be 0 ... 65535.")
        if not 100 <= self.picture_size <= 1200:
            raise ValueError(f"picture_size={self.picture_size} must be 100 ... 1200 pixels.")


def describe(config: DemoConfig) -> show.ShowConfig:
    """What is to be shown. Raises ValueError, FileNotFoundError for a checkpoint that cannot drive PlayTable."""
    path = pathlib.Path(config.checkpoint) if config.checkpoint else twin.DIRECTORY
    trained = load_config(path)
    require_same(trained.policy, robots.CALVIN, "PlayTable is driven as")
    names = trained.rollouts.tasks or trained.demonstrations.tasks or tuple(tasks.TASKS)
    whose = f"The policy in {path.name}" if config.checkpoint else "The trained twin that comes with this repository"
    return show.ShowConfig(
        about=f"PlayTable, a simulated table. {whose} ({trained.backbone.name}, {len(names)} tasks).",
        tasks=names,
        image_sizes=dict(zip(("static", "wrist"), trained.rollouts.image_size, strict=True)),
        view_sizes={"static": config.picture_size, "wrist": config.picture_size // 2},
        execution=trained.rollouts.execution,
        max_steps=trained.rollouts.max_steps,
        seed=config.seed,
    )


def address(config: DemoConfig, token: str, port: int) -> str:
    name = "localhost" if config.host in ("127.0.0.1", "::1", "0.0.0.0", "::") else config.host
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")


async def run(config: DemoConfig, shown: show.ShowConfig) -> bool:
    """Until SIGINT or SIGTERM. Raises OSError where nobody can listen, and what loading the policy raises.

    Returns whether everything has ended; else programs are still being compiled, and nobody needs them.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    here = config.host in ("127.0.0.1", "::1", "localhost")
    token = config.token or ("" if here else secrets.token_urlsafe(16))
    playing = show.Show(access.Access(config.host, token))
    await playing.server.start(config.port)
    url = address(config, token, playing.server.port)
    log.info("the page: %s   (Ctrl-C ends it)", url)
    if config.open_browser:
        webbrowser.open(url)
    path = config.checkpoint or twin.DIRECTORY
    preparing = beside(lambda: playing.prepare(shown, lambda: load_policy(path)))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((preparing, stopping), return_when=asyncio.FIRST_COMPLETED)
        if preparing.done():
            preparing.result()
            log.info("the robot is ready")
            await stopping
        log.info("ending")
        return preparing.done()
    finally:
        await playing.server.stop()
        playing.close()


def beside(work: Callable[[], None]) -> asyncio.Future:
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


def main() -> None:
    logs.to_stderr(absl=logging.ERROR)
    config = cli.read(DemoConfig, description=__doc__)
    try:
        ended = asyncio.run(run(config, describe(config)))
    except (ValueError, FileNotFoundError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    if not ended:
        os._exit(0)  # a compilation cannot be stopped, and Python would wait for it


if __name__ == "__main__":
    main()
