"""New tasks from few demonstrations: how many are needed, and which parameters should learn them.

    python -m experiments.few_shot                     # PlayTable: a policy of six tasks learns two more; minutes
    python -m experiments.few_shot --preset quick      # the same with one number of demonstrations, two draws
    python -m experiments.few_shot --start kosmos_lstm --fixed data.root=data/task_ABCD_D \\
        --base runs/oxe --support 10_shot_task_data.json --demonstrations 10

Of every task n demonstrations are drawn (the support), several times; the policy learns from them alone and is asked
the tasks in rollouts, or, where the preset has none, by its loss on the validation split (the query). Intervals are
over draws. All trials make the same number of steps, whatever n is. Each trial is an ordinary run in OUT/trials: the
same command goes on where it was stopped, and several processes share the work.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments import protocols
from robovlms_jax import atomic, cli, schema
from robovlms_jax.evaluation.report import tables
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import require
from robovlms_jax.search import queue, report
from robovlms_jax.strategies import protocol, support

Method = Literal["full", "lora", "head", "scratch"]
METHODS: Mapping[str, Mapping[str, Any]] = {
    "full": {"train.trainable": (".*",)},
    "lora": {"train.trainable": ("lora_", "^head/", "^readout/")},
    "head": {"train.trainable": ("^head/", "^readout/")},
    "scratch": {"train.trainable": (".*",)},
}
"""Which parameters learn."""


@dataclasses.dataclass(frozen=True)
@schema.checked("few_shot")
class FewShotConfig:
    """What is learned from how little, and how."""

    experiment: str = "calvin_abcd"
    """Module of `experiments` whose preset is begun with."""
    start: str = "playtable_fixtures"
    """Its preset: model, data and rollouts."""
    fixed: tuple[str, ...] = ()
    """Fields of it set otherwise, "train.batch_size=32"."""
    out: str = "searches/few_shot"
    """Directory of trials and report."""
    base: str = ""
    """Run, or checkpoint, to begin with. Empty: one is trained first, on all other tasks of the data."""
    base_steps: int = 1500
    """Optimizer steps of that one."""
    tasks: tuple[str, ...] = ("turn_on_lightbulb", "turn_off_lightbulb")
    """What is new. Empty: all tasks of the data, which needs a `base`."""
    demonstrations: tuple[int, ...] = (1, 5, 25)
    """Of each task; 0: all there are."""
    methods: tuple[Method, ...] = ("full", "lora", "head")
    """full: all parameters. lora: adapters beside the backbone's, head and action queries. head: head and action
    queries. scratch: all, without the base."""
    draws: int = 3
    """Of the demonstrations, each with a seed of its own."""
    steps: int = 300
    """Optimizer steps from the demonstrations, as many whatever n is."""
    rank: int = 32
    """Of the adapters."""
    rates: dict[str, float] = dataclasses.field(default_factory=lambda: {"lora": 1e-3, "head": 1e-3})
    """Method -> learning rate; the preset's where it is not named."""
    support: str = ""
    """File of the episodes to draw from, in either form of data.episode_list, such as RoboVLMs' list of ten per task.
    Empty: all."""
    statistics: Literal["base", "own"] = "base"
    """Scales of actions and state: those of the base, or measured anew from the few demonstrations. All else that gives
    a base's parameters a meaning comes from its run."""
    report: bool = False
    """Only write the report of what is there."""

    def __post_init__(self):
        require(self.draws >= 1, f"few_shot.draws={self.draws} must be at least 1.")
        for field in ("steps", "base_steps", "rank"):
            require(getattr(self, field) >= 1, f"few_shot.{field}={getattr(self, field)} must be at least 1.")
        wrong = [n for n in self.demonstrations if n < 0]
        require(not wrong and self.demonstrations, f"few_shot.demonstrations={self.demonstrations}: 0 (all) or more.")
        require(bool(self.methods), "few_shot.methods is empty; name at least one.")
        protocols.require_each_once(
            "few_shot", methods=self.methods, tasks=self.tasks, demonstrations=self.demonstrations
        )
        unknown = sorted(set(self.rates) - set(METHODS))
        require(not unknown, f"few_shot.rates names {unknown}; methods are {list(METHODS)}.")
        require(
            bool(self.tasks or self.base),
            "few_shot.tasks is empty, so all tasks are new, and few_shot.base is, too: no task is left to train one "
            "on. Name one of them.",
        )


SMALL = (
    *("data.root=data/playtable_small", "demonstrations.episodes=400", "demonstrations.random_scenes=397"),
    *("train.batch_size=32", "rollouts.films=0", "evaluation.batches=2", "evaluation.episodes=0"),
)
"""A recording of 50 demonstrations per task, and smaller batches: minutes instead of an hour on a CPU."""
BASE = "base"
"""In place of a method: the run that others begin with."""
PRESETS = {
    "playtable": FewShotConfig(fixed=SMALL),
    "quick": FewShotConfig(fixed=SMALL, out="searches/few_shot_quick", demonstrations=(5,), draws=2, steps=150),
}


def jobs(config: FewShotConfig) -> list[protocol.Job]:
    """The base's run, where it is not there, and every method with every number of demonstrations and every draw."""
    start = preset = protocols.preset(config.experiment, config.start, config.fixed, "few_shot")
    if config.base:
        start = protocols.begun_with(config.base, start, config.fixed, "few_shot")
        there = start.backbone.lora_rank
        require(
            "lora" not in config.methods or there in (0, config.rank),
            f"few_shot.rank={config.rank}: few_shot.base={config.base} has adapters of rank {there}, which go on "
            f"learning. Pass --rank {there}, or leave `lora` out of few_shot.methods.",
        )
    listed = {"data.episode_list": config.support} if config.support else {}
    available = protocols.demonstrations(
        cli.override(start, **listed), config.tasks
    )  # refuses spans that the data do not have
    tasks = config.tasks or tuple(sorted(available))
    judge = protocol.rollouts if start.rollouts.trials else protocol.loss
    found, first = [], None
    if not config.base:
        first = 0
        others = cli.override(
            start,
            **{
                "data.exclude_tasks": tasks,
                "train.steps": config.base_steps,
                **({"rollouts.tasks": tasks} if start.rollouts.trials else {}),
            },
        )
        found.append(protocol.Job({"method": BASE}, 0, lambda _: others, judge, compared=False))
    for count in config.demonstrations:
        for method in config.methods:
            for draw in range(config.draws):
                chosen = support.draw(available, tasks, count, draw)
                path = pathlib.Path(config.out) / "support" / f"{count or 'all'}_{draw}.json"
                learned = _Learned(config, start, preset, tasks, method, draw, support.write(path, chosen))
                setting = {"method": method, "demonstrations": str(count or "all")}
                after = None if method == "scratch" else first
                found.append(protocol.Job(setting, draw, learned, judge, after))
    return found


@dataclasses.dataclass(frozen=True)
class _Learned:
    """Run directory of the base -> a trial's configuration. preset: whose scales trials of their own have."""

    config: FewShotConfig
    start: ExperimentConfig
    preset: ExperimentConfig
    tasks: tuple[str, ...]
    method: str
    draw: int
    episodes: str

    def __call__(self, base: pathlib.Path | None) -> ExperimentConfig:
        config, begun = self.config, "" if self.method == "scratch" else str(base or self.config.base)
        changes = {
            "data.episode_list": self.episodes,
            "train.init_from": begun,
            "train.steps": config.steps,
            "train.seed": self.draw,
            "optimizer.warmup_steps": min(self.start.optimizer.warmup_steps, config.steps // 10),
            **METHODS[self.method],
        }
        if self.start.rollouts.trials:
            changes["rollouts.tasks"] = self.tasks
        if self.method in config.rates:
            changes["optimizer.learning_rate"] = config.rates[self.method]
        if base is not None and begun and config.statistics == "base":
            changes |= protocols.going_on(base)
        elif not begun or config.statistics == "own":
            changes["policy"] = protocols.rescaled(self.start.policy, self.preset.policy)
            changes["data.compat_second_norm"] = self.preset.data.compat_second_norm
        if self.method == "lora":
            changes["backbone.lora_rank"] = config.rank
            if not self.start.backbone.lora_rank:  # those of a base keep their scale
                changes["backbone.lora_alpha"] = float(config.rank)
        return cli.override(self.start, **changes)


def work(config: FewShotConfig) -> pathlib.Path:
    """Run what is missing and write the report; returns its path."""
    return write_report(config, protocols.trials(config, lambda: jobs(config)))


def write_report(config: FewShotConfig, trials: Sequence[queue.Trial]) -> pathlib.Path:
    """report.md, report.json and pictures in the protocol's directory."""
    out = pathlib.Path(config.out)
    compared = [trial for trial in trials if trial.setting["method"] != BASE]
    start = protocols.preset(config.experiment, config.start, config.fixed, "few_shot")
    objective, direction = ("success", "maximize") if start.rollouts.trials else ("validation/loss", "minimize")
    sections = [
        f"# Few demonstrations: {config.experiment}, {config.start}",
        f"New tasks: {', '.join(config.tasks) or 'all of the data'}. {config.steps} steps from the demonstrations of a "
        f"draw, {config.draws} draws. Scales of actions and state: {config.statistics}. Compared by {objective}.",
    ]
    for trial in trials:
        if trial.setting["method"] == BASE and trial.status == "done":
            sections.append(f"Before any demonstration, the base: {objective} {trial.value:.3f}.")
    sections += report.ranking(out, compared, objective, direction)
    if any(trial.status == "done" for trial in compared):
        _draw(compared, objective).savefig(out / "few_shot.png", dpi=tables.DPI)
        sections.append("![by number of demonstrations](few_shot.png)")
    path = out / "report.md"
    atomic.write_text(path, tables.join(sections))
    return path


def _draw(trials: Sequence[queue.Trial], objective: str) -> Any:
    """The objective over demonstrations per task, a line per method, with intervals over draws."""
    figure = tables.figure(6, 4, layout="constrained")
    axes = figure.subplots()
    counts = list(dict.fromkeys(trial.setting["demonstrations"] for trial in trials))
    ranked = {(x.setting["method"], x.setting["demonstrations"]): x for x in report.rank(trials, "maximize")}
    for method, color in zip(dict.fromkeys(trial.setting["method"] for trial in trials), tables.COLORS):
        places = [place for place, count in enumerate(counts) if (method, count) in ranked]
        shown = [ranked[method, counts[place]] for place in places]
        widths = [0.0 if x.half_width != x.half_width else x.half_width for x in shown]  # NaN: one draw
        axes.errorbar(places, [x.mean for x in shown], yerr=widths, fmt="o-", capsize=3, color=color, label=method)
    axes.set_xticks(range(len(counts)), counts)
    axes.set(xlabel="demonstrations per task", ylabel=objective)
    axes.legend()
    tables.tidy(axes)
    return figure


if __name__ == "__main__":
    protocols.main(work, PRESETS, "playtable", __doc__)
