"""A person takes over where a policy goes wrong (DAgger by hand): PlayTable in the browser, the arm driven by keys.

    python -m experiments.teach --checkpoint runs/playtable_fixtures --out data/taught     # then open the address
    python -m experiments.calvin_abcd --init_from runs/playtable_fixtures --out runs/corrected \\
        --data.further.roots taught data/taught --train.sources robot 0.5 taught 0.5

The policy acts until a person takes over, and again when it is told to go on. Trials that end with the task done are
kept, with who acted in every step; training learns from what the person did. The same command goes on where it was
stopped. Needs pip install -e '.[serve]'. docs/reinforcement.md says more.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from experiments import pages
from robovlms_jax import hub
from robovlms_jax.control import robot as robots
from robovlms_jax.demo import twin
from robovlms_jax.playtable.scene import check_name
from robovlms_jax.rl import starts
from robovlms_jax.runs import played
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.runs.load import load_config, load_policy
from robovlms_jax.runs.robots import require_same
from robovlms_jax.schema import require
from robovlms_jax.teaching import keeping, lesson, show
from robovlms_jax.training import checkpoints, seals
from robovlms_jax.web import running
from robovlms_jax.web.access import Access


@dataclasses.dataclass(frozen=True)
class TeachConfig(running.PageConfig):
    """Whose mistakes are corrected, and where that is kept."""

    checkpoint: str = ""
    """A policy that drives PlayTable: a run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME;
    empty: the trained twin that comes with this package."""
    out: str = "data/taught"
    """Directory to make: a training split as demonstrations have it (data.further.roots)."""
    tasks: tuple[str, ...] = ()
    """What is asked for; empty: the tasks of the checkpoint's own rollouts or demonstrations."""
    scenes: tuple[str, ...] = ()
    """Tables, which take turns; empty: those that the checkpoint learned on."""
    count: int = 50
    """Trials altogether, those of earlier calls included."""
    spread: float = 0.25
    """Metres by which the hand is moved at the beginning, at most."""
    max_steps: int = 0
    """Control steps that the policy has for a task before it stands still and waits for the person; 0: as in the
    checkpoint's own rollouts or demonstrations."""
    picture_size: int = 600
    """Pixels of the fixed camera's picture on the page; the hand camera's has half of it."""
    seed: int = 0
    """Of the trials."""

    def __post_init__(self):
        super().__post_init__()
        require(self.count >= 1, f"count={self.count} must be at least 1.")
        for field in ("max_steps", "seed"):
            require(getattr(self, field) >= 0, f"{field}={getattr(self, field)} must not be negative.")
        require(self.spread >= 0, f"spread={self.spread} must not be negative.")
        require(100 <= self.picture_size <= 1200, f"picture_size={self.picture_size} must be 100 ... 1200 pixels.")
        for name in self.scenes:
            check_name(name)


def resolved(config: TeachConfig, trained: ExperimentConfig) -> TeachConfig:
    """With what the checkpoint knows where `config` leaves it open. Raises ValueError where nobody names a task."""
    config = played.filled(config, trained, ("tasks", "scenes", "max_steps"))
    require(
        len(config.tasks) > 0,
        "tasks is empty, and the checkpoint's rollouts and demonstrations name none; name the tasks to try.",
    )
    return config


def exercises(config: TeachConfig) -> list[lesson.Exercise]:
    """All trials. Raises ValueError for tasks that there are not."""
    trials = starts.draw(config.tasks, config.scenes, config.count, config.seed, spread=config.spread)
    return [
        lesson.Exercise(trial.index, trial.labels["scene"], trial.tasks[0], trial.instructions[0], **trial.start)
        for trial in trials
    ]


def settings(config: TeachConfig, trained: ExperimentConfig, directory: pathlib.Path) -> dict[str, Any]:
    """What has to be the same for a recording to be gone on with, JSON values. More trials may be asked for."""
    names = ("tasks", "scenes", "spread", "max_steps", "seed")
    chosen = {name: getattr(config, name) for name in names} | {"image_size": played.of(trained).image_size}
    return json.loads(json.dumps(chosen)) | {"identity": seals.identity(directory).label}


async def run(config: TeachConfig, directory: pathlib.Path) -> None:
    """Until SIGINT or SIGTERM; see `running.serve`. Raises what loading the policy raises, too."""
    trained = load_config(directory)
    require_same(trained.policy, robots.CALVIN, "PlayTable is driven as")
    config, own = resolved(config, trained), played.of(trained)
    every = exercises(config)
    name = config.checkpoint if hub.is_name(config.checkpoint) else pathlib.Path(config.checkpoint).resolve().name
    whose = f"The policy {name}" if config.checkpoint else "The trained twin that comes with this repository"
    shown = show.TeachingConfig(
        about=f"{whose} acts on PlayTable, a simulated table, until you take over.",
        image_sizes=dict(zip(("static", "wrist"), own.image_size, strict=True)),
        view_sizes={"static": config.picture_size, "wrist": config.picture_size // 2},
        execution=own.execution,
        max_steps=config.max_steps,
    )
    access, out = Access.at(config.host, config.token), pathlib.Path(config.out)
    tables = tuple(dict.fromkeys(config.scenes))
    with keeping.keeper(out, settings(config, trained, directory), tables, own.image_size) as keeper:
        left = [exercise for exercise in every if exercise.number not in keeper.numbers]
        page = show.Teaching(access)
        try:
            await running.serve(
                page.server,
                access,
                config.port,
                lambda: page.prepare(shown, lambda: load_policy(directory), left, keeper),
                ready=f"corrections go to {out}",
                open_browser=config.open_browser,
            )
        finally:
            page.close()


def main() -> None:
    pages.main(
        TeachConfig, __doc__, lambda config: run(config, checkpoints.locate(config.checkpoint or twin.DIRECTORY))
    )


if __name__ == "__main__":
    main()
