"""A robot that obeys a sentence, in the browser: PlayTable live, with a trained policy that comes with this package.

    python -m experiments.demo                                         # then open the address that it prints
    python -m experiments.demo --checkpoint runs/playtable_fixtures    # a policy of your own that drives PlayTable

Needs pip install -e .[serve]. docs/demo.md says what the page shows, and who may control the robot.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import pathlib
import sys

from robovlms_jax import cli
from robovlms_jax.control import robot as robots
from robovlms_jax.demo import show, twin
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.runs import logs
from robovlms_jax.runs.load import load_config, load_policy
from robovlms_jax.runs.robots import require_same
from robovlms_jax.web import running
from robovlms_jax.web.access import Access


@dataclasses.dataclass(frozen=True)
class DemoConfig(running.PageConfig):
    """What to show, and where."""

    checkpoint: str = ""
    """Run directory or one of its checkpoints/<step> folders, of a policy that drives PlayTable; empty: the trained
    twin that comes with this package."""
    picture_size: int = 600
    """Pixels of the fixed camera's picture on the page; the hand camera's has half of it."""
    seed: int = 0
    """Of the scenes."""

    def __post_init__(self):
        super().__post_init__()
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


async def run(config: DemoConfig, shown: show.ShowConfig) -> bool:
    """Until SIGINT or SIGTERM; see `running.serve`. Raises what loading the policy raises, too."""
    access = Access.at(config.host, config.token)
    playing = show.Show(access)
    path = config.checkpoint or twin.DIRECTORY
    try:
        return await running.serve(
            playing.server,
            access,
            config.port,
            lambda: playing.prepare(shown, lambda: load_policy(path)),
            ready="the robot is ready",
            open_browser=config.open_browser,
        )
    finally:
        playing.close()


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
