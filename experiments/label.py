"""Which of two clips is better? A local page asks a person, and stores the answers that rewards are learned from.

    python -m experiments.label --out runs/labels                                # the trained twin's rollouts
    python -m experiments.label --checkpoint runs/playtable_fixtures --out runs/own_labels
    python -m experiments.label --rollouts runs/labels --reward runs/reward --out runs/more_labels

Both clips are of the same task. Answer with the buttons or the arrow keys. The same command goes on where answering was
stopped. Needs pip install -e '.[serve]'. docs/reinforcement.md says what becomes of the answers.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib

from experiments import pages
from robovlms_jax import bars
from robovlms_jax.demo import twin
from robovlms_jax.labeling import answers, asking, server
from robovlms_jax.rl import rewards, segments
from robovlms_jax.runs import trying
from robovlms_jax.schema import require
from robovlms_jax.training import directory
from robovlms_jax.web import pages as web_pages
from robovlms_jax.web import running
from robovlms_jax.web.access import Access

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LabelConfig(running.PageConfig):
    """What to ask about, and where."""

    out: str = "runs/labels"
    """Where answers.jsonl is, and rollouts.npz where they are made here."""
    rollouts: str = ""
    """Recorded rollouts, or a folder with some (rollouts.npz); empty: those in `out`, made by the checkpoint where
    there are none."""
    checkpoint: str = ""
    """A policy that drives PlayTable, whose rollouts are asked about: a run directory, one of its checkpoints/<step>
    folders, or hf://OWNER/NAME; empty: the trained twin that comes with this package."""
    record: trying.TryingConfig = trying.TryingConfig()
    """How rollouts are made."""
    reward: str = ""
    """A learned reward (experiments.reward): pairs that its members disagree about are asked first; empty: pairs are
    drawn at random."""
    pairs: int = 500
    """Questions altogether, those of earlier calls included."""
    steps: int = 50
    """Control steps of a clip, 30 a second."""
    every: int = 5
    """Control steps of a frame of the reward's; the same in the reinforcement (its horizon)."""
    picture_size: int = 300
    """Pixels of the fixed camera's clips; the hand camera's have half of it."""
    seed: int = 0
    """Of the pairs."""

    def __post_init__(self):
        super().__post_init__()
        for field in ("pairs", "steps", "every"):
            require(getattr(self, field) >= 1, f"{field}={getattr(self, field)} must be at least 1.")
        require(self.seed >= 0, f"seed={self.seed} must not be negative.")
        require(self.steps % self.every == 0, f"steps={self.steps} is no multiple of every={self.every}.")
        require(100 <= self.picture_size <= 600, f"picture_size={self.picture_size} must be 100 ... 600 pixels.")


SHOWN_EVERY = 2
"""Control steps between two pictures of a clip."""


def prepare(config: LabelConfig, page: server.LabelServer) -> None:
    """Everything before the first question. Raises ValueError, OSError that say what is wrong."""
    out = pathlib.Path(config.out)
    if config.rollouts:
        _keep(pathlib.Path(config.rollouts), out / segments.FILE)
    elif not (out / segments.FILE).exists():
        page.prepare("Rollouts are being made, which takes some minutes")
        with bars.waiting(f"making {config.record.count} rollouts"):
            trying.record(config.checkpoint or twin.DIRECTORY, config.record).save(out / segments.FILE)
    found = segments.load(out)
    trying.require_asked_for(found, out / segments.FILE, config.checkpoint, config.record)
    about = {"rollouts": segments.identity(out), "steps": config.steps, "every": config.every}
    given = answers.Answers(out / answers.FILE, about)
    answers.require_within(found, given.given, config.steps, given.path)
    page.prepare("Pairs are being chosen")
    learned = rewards.load(config.reward) if config.reward else None
    require(
        learned is None or learned.every == config.every,
        f"{config.reward} reads frames of {learned and learned.every} control steps; give that as --every.",
    )
    each = found.segments(config.steps, max(config.steps // 2, 1))
    wanted = config.pairs + len(given.given)  # as many may be drawn that were answered before
    reward, how = learned and learned.model, {"steps": config.steps, "every": config.every}
    chosen, asked = asking.draw(found, each, wanted, config.seed, reward, **how), given.asked
    fresh = [pair for pair in chosen if pair.key not in asked][: max(config.pairs - len(given.given), 0)]
    sizes = {"static": config.picture_size, "wrist": config.picture_size // 2}

    def show(pair: answers.Pair) -> tuple[dict, dict]:
        clips = {
            f"{side}_{camera}": clip
            for side, segment in pair._asdict().items()
            for camera, clip in segments.pictures(found, segment, config.steps, SHOWN_EVERY, sizes).items()
        }
        return {"instruction": found.instructions[pair.left.rollout], "rate_hz": 30 / SHOWN_EVERY}, clips

    if fresh:
        page.prepare("The first pair is being drawn")
        with bars.waiting("compiling what draws the pairs"):
            show(fresh[0])
    page.open(server.Work(given, fresh, show))
    log.info("%d answers so far, %d questions left", len(given.given), len(fresh))


def _keep(given: pathlib.Path, own: pathlib.Path) -> None:
    """Recorded rollouts beside the answers about them. Raises ValueError where others are there."""
    found = segments.load(given)
    if not own.exists():
        found.save(own)
        return
    require(
        segments.same(found, segments.load(own)),
        f"{own} has other rollouts than {given}; leave --rollouts out to go on with those, or choose another --out.",
    )


async def run(config: LabelConfig) -> None:
    """Until SIGINT or SIGTERM; see `running.serve`. Raises ValueError where another program writes there."""
    access, out = Access.at(config.host, config.token), pathlib.Path(config.out)
    page = server.LabelServer(access, web_pages.read(server.PAGE))
    with directory.claim(out):  # two programs would ask the same pairs, and one cut off the other's lines
        await running.serve(
            page,
            access,
            config.port,
            lambda: prepare(config, page),
            ready=f"answers go to {out / answers.FILE}",
            open_browser=config.open_browser,
        )


def main() -> None:
    pages.main(LabelConfig, __doc__, run)


if __name__ == "__main__":
    main()
