"""A robot that obeys a sentence, in the browser: PlayTable live, with a trained policy that comes with this package.

    python -m experiments.demo                                         # then open the address that it prints
    python -m experiments.demo --checkpoint runs/playtable_fixtures    # a policy of your own that drives PlayTable

Needs pip install -e '.[serve]'. docs/demo.md says what the page shows, and who may control the robot.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Coroutine
from typing import Any

from experiments import pages
from robovlms_jax import hub
from robovlms_jax.control import robot as robots
from robovlms_jax.demo import show, twin
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.runs import played
from robovlms_jax.runs.load import load_config, load_policy
from robovlms_jax.runs.robots import require_same
from robovlms_jax.training import checkpoints
from robovlms_jax.web import running
from robovlms_jax.web.access import Access


@dataclasses.dataclass(frozen=True)
class DemoConfig(running.PageConfig):
    """What to show, and where."""

    checkpoint: str = ""
    """Run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME, of a policy that drives PlayTable;
    empty: the trained twin that comes with this package."""
    picture_size: int = 600
    """Pixels of the fixed camera's picture on the page; the hand camera's has half of it."""
    seed: int = 0
    """Of the scenes."""

    def __post_init__(self):
        super().__post_init__()
        if not 100 <= self.picture_size <= 1200:
            raise ValueError(f"picture_size={self.picture_size} must be 100 ... 1200 pixels.")


def describe(config: DemoConfig, directory: pathlib.Path) -> show.ShowConfig:
    """What is to be shown of the step directory that the checkpoint is.

    Raises ValueError, FileNotFoundError for one that cannot drive PlayTable.
    """
    trained = load_config(directory)
    require_same(trained.policy, robots.CALVIN, "PlayTable is driven as")
    own = played.of(trained)
    names = own.tasks or tuple(tasks.TASKS)
    whose = "The trained twin that comes with this repository"
    if config.checkpoint:
        whose = f"The policy {_name(config.checkpoint)}"
    return show.ShowConfig(
        about=f"PlayTable, a simulated table. {whose} ({trained.backbone.name}, {len(names)} tasks).",
        tasks=names,
        image_sizes=dict(zip(("static", "wrist"), own.image_size, strict=True)),
        view_sizes={"static": config.picture_size, "wrist": config.picture_size // 2},
        execution=own.execution,
        max_steps=own.max_steps,
        seed=config.seed,
    )


def _name(checkpoint: str) -> str:
    """As the page calls it: of a path on this machine, visitors see the last part alone."""
    return checkpoint if hub.is_name(checkpoint) else f"in {pathlib.Path(checkpoint).resolve().name}"


async def run(config: DemoConfig, directory: pathlib.Path, shown: show.ShowConfig) -> None:
    """Until SIGINT or SIGTERM; see `running.serve`. Raises what loading the policy raises, too."""
    access = Access.at(config.host, config.token)
    playing = show.Show(access)
    try:
        await running.serve(
            playing.server,
            access,
            config.port,
            lambda: playing.prepare(shown, lambda: load_policy(directory)),
            ready="the robot is ready",
            open_browser=config.open_browser,
        )
    finally:
        playing.close()


def _work(config: DemoConfig) -> Coroutine[Any, Any, None]:
    directory = checkpoints.locate(config.checkpoint or twin.DIRECTORY)
    return run(config, directory, describe(config, directory))


def main() -> None:
    pages.main(DemoConfig, __doc__, _work)


if __name__ == "__main__":
    main()
