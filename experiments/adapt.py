"""A new table, camera or arm: does a policy work where it was not taught, and what helps it to?

    python -m experiments.adapt                        # PlayTable: taught on tables A to C, asked on table D
    python -m experiments.adapt --preset quick         # two ways, one seed: minutes
    python -m experiments.adapt --start kosmos_lstm --fixed data.root=data/playtable \\
        --target data/task_D_D --recorded False        # PlayTable to the real CALVIN

The source's demonstrations are learned in every way; of the target there are many pictures without actions, or a few
demonstrations. Success is counted on the target, and the report says how far the two domains' pictures are apart for
each policy. Each trial is an ordinary run in OUT/trials: the same command goes on
where it was stopped, and several processes share the work.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from experiments import protocols
from experiments.few_shot import SMALL
from robovlms_jax import atomic, cli, schema
from robovlms_jax.data.config import DataConfig
from robovlms_jax.evaluation.report import tables
from robovlms_jax.inputs.config import AugmentConfig
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import require
from robovlms_jax.search import queue, report
from robovlms_jax.strategies import protocol, support

Way = Literal["source", "augmented", "aligned", "mixed", "tuned", "target"]
STRONG = AugmentConfig(crop_area=0.9, brightness=0.2, contrast=0.4, saturation=0.4, hue=0.2)


@dataclasses.dataclass(frozen=True)
@schema.checked("adapt")
class AdaptConfig:
    """Source, target, and the ways from one to the other."""

    experiment: str = "calvin_abcd"
    """Module of `experiments` whose preset is begun with."""
    start: str = "playtable_fixtures"
    """Its preset: model, the source's data, and rollouts on the target."""
    fixed: tuple[str, ...] = ()
    """Fields of it set otherwise, "train.batch_size=32"."""
    out: str = "searches/adapt"
    """Directory of trials and report."""
    target: str = "data/playtable_target"
    """The target's demonstrations, in the layout of the source's."""
    recorded: bool = True
    """Record them on PlayTable, if they are not there: as many as of the source, on the table of the preset's
    validation, other ones than those."""
    ways: tuple[Way, ...] = ("source", "augmented", "aligned", "mixed", "tuned")
    """source: its demonstrations alone. augmented: with crops and strong changes of colour. aligned: the target's
    pictures beside them, without actions, whose tokens' means and covariances are kept like the source's. mixed: half
    of every batch from a few demonstrations of the target. tuned: the same few, learned alone after those. target:
    the few alone."""
    demonstrations: int = 5
    """mixed, tuned, target: of each task on the target; 0: all there are."""
    seeds: int = 3
    """Of parameters, order of batches and the draw of those demonstrations."""
    steps: int = 1500
    """Optimizer steps."""
    tuning: int = 300
    """tuned: steps on the target's, after those of `source`."""
    align: float = 1.0
    """aligned: weight of the distance (data.further.align)."""
    report: bool = False
    """Only write the report of what is there."""

    def __post_init__(self):
        for field in ("seeds", "steps", "tuning"):
            require(getattr(self, field) >= 1, f"adapt.{field}={getattr(self, field)} must be at least 1.")
        require(bool(self.ways), "adapt.ways is empty; name at least one.")
        protocols.require_each_once("adapt", ways=self.ways)
        require("tuned" not in self.ways or "source" in self.ways, "adapt.ways: `tuned` begins with `source`; add it.")
        require(self.align > 0, f"adapt.align={self.align} must be positive; leave `aligned` out instead.")
        require(self.demonstrations >= 0, f"adapt.demonstrations={self.demonstrations} must be 0 (all) or more.")


THREE_TABLES = tuple(field for field in SMALL if not field.startswith(("data.root", "demonstrations.random_scenes")))
"""Tables A to C alone: among hundreds of random ones a policy has met the target's like already."""
PLAYTABLE = AdaptConfig(fixed=("data.root=data/playtable_abc", "demonstrations.random_scenes=0", *THREE_TABLES))
PRESETS = {
    "playtable": PLAYTABLE,
    "quick": dataclasses.replace(
        PLAYTABLE, out="searches/adapt_quick", ways=("source", "mixed"), seeds=1, steps=300, tuning=100
    ),
}


def jobs(config: AdaptConfig) -> list[protocol.Job]:
    """Every way with every seed."""
    start = protocols.preset(config.experiment, config.start, config.fixed, "adapt")
    protocols.demonstrations(start)
    target = _target(config, start)
    available = protocols.demonstrations(target)
    _require_cameras(start, target)
    judge = _Judged(protocol.rollouts if start.rollouts.trials else protocol.loss, start.data, target.data)
    found: list[protocol.Job] = []
    for seed in range(config.seeds):
        first = len(found)
        for way in sorted(config.ways, key=lambda way: way != "source"):  # others may begin with it
            few = ""
            if way in ("mixed", "tuned", "target"):
                drawn = support.draw(available, sorted(available), config.demonstrations, seed)
                few = support.write(pathlib.Path(config.out) / "support" / f"{seed}.json", drawn)
            trained = _Way(config, start, way, seed, few)
            found.append(protocol.Job({"way": way}, seed, trained, judge, first if way == "tuned" else None))
    return found


def _require_cameras(start: ExperimentConfig, target: ExperimentConfig) -> None:
    """What both domains' pictures are compared by, before the first run and not after it."""
    from robovlms_jax.data import opening  # as in protocols.py

    here, there = (opening.open_split(config.data, "training").image_sizes for config in (start, target))
    lacking = [camera for camera in start.policy.cameras if camera in here and camera not in there]
    require(not lacking, f"adapt.target={target.data.root} has no camera {lacking}, only {sorted(there)}.")


def _target(config: AdaptConfig, start: ExperimentConfig) -> ExperimentConfig:
    """The preset with the target's demonstrations in place of the source's."""
    changes: dict[str, Any] = {"data.root": config.target}
    if config.recorded:
        scene = start.demonstrations.validation_scene
        require(
            start.demonstrations.episodes > 0,
            "adapt.recorded: the preset records no demonstrations; name the target's in adapt.target, with "
            "--recorded False.",
        )
        changes |= {
            "demonstrations.scenes": (scene,),
            "demonstrations.random_scenes": 0,
            "demonstrations.validation_episodes": 1,
            "demonstrations.seed": start.demonstrations.seed + 1000,
        }
    else:
        changes["demonstrations.episodes"] = 0
    return cli.override(start, **changes)


@dataclasses.dataclass(frozen=True)
class _Judged:
    """Run directory -> what `judge` finds, and "apart", how far source and target are apart for the policy."""

    judge: Callable[[pathlib.Path], protocol.Result]
    source: DataConfig
    target: DataConfig

    def __call__(self, run: pathlib.Path) -> protocol.Result:
        from robovlms_jax.runs import domains

        return {**self.judge(run), "apart": domains.pictures_apart(run, self.source, self.target)}


@dataclasses.dataclass(frozen=True)
class _Way:
    """Run directory that it begins with -> a trial's configuration."""

    config: AdaptConfig
    start: ExperimentConfig
    way: str
    seed: int
    few: str

    def __call__(self, base: pathlib.Path | None) -> ExperimentConfig:
        config, steps = self.config, self.config.tuning if self.way == "tuned" else self.config.steps
        changes: dict[str, Any] = {
            "train.steps": steps,
            "train.seed": self.seed,
            "optimizer.warmup_steps": min(self.start.optimizer.warmup_steps, steps // 10),
        }
        beside = {"train.sources": {"robot": 1.0, "target": 1.0}, "data.further.roots": {"target": config.target}}
        if self.way == "augmented":
            changes["data.augment"] = STRONG
        if self.way == "aligned":
            changes |= beside
            changes |= {"data.further.align": {"target": config.align}, "data.further.unlabelled": ("target",)}
        if self.way == "mixed":
            changes |= beside | {"data.further.lists": {"target": self.few}}
        if self.way in ("tuned", "target"):
            target = _target(config, self.start)
            changes |= {"data.root": config.target, "data.episode_list": self.few}
            changes["demonstrations"] = target.demonstrations
        if base is not None:
            changes |= protocols.going_on(base)
        return cli.override(self.start, **changes)


def work(config: AdaptConfig) -> pathlib.Path:
    """Run what is missing and write the report; returns its path."""
    return write_report(config, protocols.trials(config, lambda: jobs(config)))


def write_report(config: AdaptConfig, trials: Sequence[queue.Trial]) -> pathlib.Path:
    """report.md, report.json and the picture in the protocol's directory."""
    out = pathlib.Path(config.out)
    start = protocols.preset(config.experiment, config.start, config.fixed, "adapt")
    objective, direction = ("success", "maximize") if start.rollouts.trials else ("validation/loss", "minimize")
    where = f"table {start.rollouts.scene}" if start.rollouts.trials else "the validation split"
    sections = [
        f"# Another domain: {config.experiment}, {config.start}",
        f"{config.steps} steps on {start.data.root}; {objective} on {where}. Of the target ({config.target}): pictures "
        f"without actions where aligned, {config.demonstrations or 'all'} demonstrations per task where mixed, tuned "
        "or alone.",
        *report.ranking(out, trials, objective, direction),
        *_distances(out, trials),
    ]
    path = out / "report.md"
    atomic.write_text(path, tables.join(sections))
    return path


def _distances(out: pathlib.Path, trials: Sequence[queue.Trial]) -> list[str]:
    """A section on how far the domains' pictures are apart, of the trials that know it."""
    done = [(trial.setting["way"], protocol.result(out, trial.number)) for trial in trials if trial.status == "done"]
    found: dict[str, list[Mapping[str, float]]] = {}
    for way, result in done:
        if "apart" in result:
            found.setdefault(way, []).append(result["apart"])
    if not found:
        return []
    names = {"means": "means", "covariances": "covariances", "means_within": "means, within the source"}
    body = [[way, *(report.interval([x[name] for x in some], 3) for name in names)] for way, some in found.items()]
    return [
        "## How far the pictures of source and target are apart",
        tables.markdown(["way", *names.values()], body),
        "Of the tokens that a policy makes of pictures, over seeds: the squared distance of their means over the sum "
        "of the source's variances, and that of their covariances over the squared norm of the source's. Within the "
        "source: between every second of its frames and the others.",
    ]


if __name__ == "__main__":
    protocols.main(work, PRESETS, "playtable", __doc__)
