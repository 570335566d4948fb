"""Scripted demonstrations in CALVIN's on-disk layout, ready to train on.

An episode is a chain of tasks, each done in the state the one before it left, as a person would play; every task that
the checker calls done is an annotated segment. A recording that was stopped (killed, full disk) goes on when it is
asked for again.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from typing import Any

from robovlms_jax import bars
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.playtable import demonstrations, splits
from robovlms_jax.playtable.config import DemonstrationConfig
from robovlms_jax.playtable.scene import check_name, random_tables
from robovlms_jax.training.directory import claim


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordConfig(DemonstrationConfig):
    """How many demonstrations, of what, where."""

    out: str
    """Directory to make; gets training/ and validation/."""
    episodes: int = 2000
    """Training chains."""
    pack: bool = False
    """Write the packed layout, which trains faster (data/README.md), instead of one npz per frame."""

    def __post_init__(self):
        super().__post_init__()
        if self.episodes < 1:
            raise ValueError(f"episodes={self.episodes} must be at least 1.")
        splits.require_room(self.picture_every, pack=self.pack)
        unknown = sorted(set(self.tasks) - set(tasks.TASKS))
        if unknown:
            raise ValueError(f"tasks has unknown {unknown}; known: {', '.join(tasks.TASKS)}.")
        if not self.scenes:
            raise ValueError("scenes is empty; name at least one table.")
        for name in (*self.scenes, self.validation_scene):
            check_name(name)

    @property
    def training_scenes(self) -> tuple[str, ...]:
        return (*self.scenes, *random_tables(0, self.random_scenes))


def record(config: RecordConfig) -> dict[str, int]:
    """Write both splits, and other words for their sentences. Returns demonstrations attempted, recorded and frames.

    What an interrupted call recorded stays: the same call goes on from there, also towards more episodes. A complete
    recording is left as it is.

    Raises:
      FileExistsError: `out` holds something else than a recording.
      ValueError: `out` holds a recording with other settings, or another process is recording there.
      OSError: `out` cannot be written, or the disk is full; what was recorded so far stays.
    """
    out = pathlib.Path(config.out)
    plan = (
        ("training", config.training_scenes, config.episodes, config.seed, False),
        ("validation", (config.validation_scene,), config.validation_episodes, config.seed + 1, True),
    )
    splits.require_ours(out)
    counts: collections.Counter[str] = collections.Counter()
    # Both splits have all tables, so that they run the same compiled programs.
    names = tuple(dict.fromkeys((*config.training_scenes, config.validation_scene)))
    texts = {split: splits.own_sentences(held_out=held_out) for split, *_, held_out in plan}
    with claim(out):
        renderer = demonstrations.Renderer(names, config.image_size)
        for split, scenes, episodes, seed, held_out in plan:
            journal = splits.Journal(splits.directory(out, split), _settings(config, split), texts[split])
            splits.write_paraphrases(out, **texts)
            kinds = [names.index(name) for name in scenes]

            own = dataclasses.replace(config, picture_every=1) if held_out else config

            def play(
                numbers: list[int],
                bar: bars.Bar,
                own: RecordConfig = own,
                kinds: list[int] = kinds,
                seed: int = seed,
            ) -> splits.Chains:
                tables = demonstrations.Tables(own, renderer.scenes, kinds, seed, numbers)
                tables.watch = lambda steps: bar.say(f"{steps} steps simulated")
                return demonstrations.rendered(tables, renderer)

            splits.record(journal, out / split, episodes, config.image_size, play, pack=config.pack)
            counts.update(journal.counts())
    return dict(counts)


def _settings(config: RecordConfig, split: str) -> dict[str, Any]:
    """What has to be the same for a recording to be continued. How long it is may change, unless it is packed."""
    skipped = {"out", "tables", "episodes", "validation_episodes"}
    skipped |= {"validation_scene"} if split == "training" else {"scenes", "random_scenes"}
    if split == "validation" or config.picture_every == 1:  # recordings begun before it could be chosen go on
        skipped.add("picture_every")
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in skipped}
    if config.pack:
        values["episodes"] = config.episodes if split == "training" else config.validation_episodes
    return json.loads(json.dumps(values))
