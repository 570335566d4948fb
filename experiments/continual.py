"""Task after task: what a policy forgets while it learns new ones, and what keeps it from forgetting.

    python -m experiments.continual                    # PlayTable, four pairs of tasks, every method: hours
    python -m experiments.continual --preset quick     # two tasks, one seed: minutes
    python -m experiments.continual --base runs/oxe --start kosmos_lstm --fixed data.root=data/task_ABCD_D

The policy learns one group of tasks after the other, each from its demonstrations alone. After each one it is asked all
of them in rollouts on PlayTable, while it learns only those of the group; forward transfer, negative backward transfer
and their area are LIBERO's. Each step of each sequence is an ordinary run in OUT/trials: the same command goes on where
it was stopped, and several processes share the work.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments import protocols
from experiments.few_shot import METHODS as PARTS
from experiments.few_shot import SMALL
from robovlms_jax import atomic, cli, schema
from robovlms_jax.evaluation.report import offline, tables
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import require
from robovlms_jax.search import queue, report
from robovlms_jax.strategies import lifelong, protocol, support

Method = Literal["sequential", "replay", "ewc", "adapters"]


@dataclasses.dataclass(frozen=True)
@schema.checked("continual")
class ContinualConfig:
    """The tasks in their order, and the ways to learn them."""

    experiment: str = "calvin_abcd"
    """Module of `experiments` whose preset is begun with."""
    start: str = "playtable_fixtures"
    """Its preset: model, data and rollouts."""
    fixed: tuple[str, ...] = ()
    """Fields of it set otherwise, "train.batch_size=32"."""
    out: str = "searches/continual"
    """Directory of trials and report."""
    base: str = ""
    """Run, or checkpoint, to begin with. Empty: parameters at random, or published weights where the preset names
    them."""
    groups: tuple[str, ...] = (
        *("open_drawer+close_drawer", "move_slider_left+move_slider_right"),
        *("turn_on_lightbulb+turn_off_lightbulb", "turn_on_led+turn_off_led"),
    )
    """Tasks in the order in which they are learned; those joined by + together."""
    methods: tuple[Method, ...] = ("sequential", "replay", "ewc", "adapters")
    """sequential: nothing is done against forgetting. replay: half of every batch from what is kept of earlier groups.
    ewc: parameters are held by their Fisher information. adapters: the first group's policy stays, and each later one
    has adapters, action queries and a head of its own, which are chosen when its tasks are asked."""
    seeds: int = 3
    """Of parameters and order of batches."""
    first_steps: int = 900
    """Optimizer steps of the first group, which all methods share."""
    steps: int = 600
    """Of each later one."""
    looks: int = 3
    """Rollouts at equal distances while a group is learned, beside those before it."""
    memory: int = 2
    """replay: demonstrations kept of each earlier task."""
    ewc: float = 1e8
    """ewc: the weight of the term (optimizer.ewc). Which one is right depends on the scale of losses and on the
    optimizer; of 1e4, 1e6, 1e8 and 1e10 none kept and learned on PlayTable (docs/strategies.md)."""
    ewc_floor: float = 0.0
    """ewc: the least information that a parameter counts with, as a share of the mean (optimizer.ewc_floor)."""
    samples: int = 256
    """ewc: segments by which the Fisher information is measured."""
    rank: int = 32
    """adapters: their rank."""
    rate: float = 1e-3
    """adapters: learning rate."""
    report: bool = False
    """Only write the report of what is there."""

    def __post_init__(self):
        for field in ("seeds", "first_steps", "steps", "looks", "memory", "samples", "rank"):
            require(getattr(self, field) >= 1, f"continual.{field}={getattr(self, field)} must be at least 1.")
        require(len(self.groups) >= 2, f"continual.groups={self.groups}: forgetting needs two at least.")
        twice = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        require(not twice, f"continual.groups has {twice} more than once.")
        require(bool(self.methods), "continual.methods is empty; name at least one.")
        protocols.require_each_once("continual", methods=self.methods)
        for field in ("ewc", "rate"):
            require(getattr(self, field) > 0, f"continual.{field}={getattr(self, field)} must be positive.")
        require(self.ewc_floor >= 0, f"continual.ewc_floor={self.ewc_floor} must be 0 (none) or positive.")
        for field in ("first_steps", "steps"):
            require(
                getattr(self, field) % self.looks == 0,
                f"continual.{field}={getattr(self, field)} is no multiple of continual.looks={self.looks}.",
            )

    @property
    def tasks(self) -> list[str]:
        return [task for group in self.groups for task in group.split("+")]


PRESETS = {
    "playtable": ContinualConfig(fixed=SMALL),
    "quick": ContinualConfig(
        fixed=(*SMALL, "rollouts.trials=10", "rollouts.tables=10"),
        out="searches/continual_quick",
        groups=("open_drawer", "turn_on_led"),
        methods=("sequential", "replay"),
        seeds=1,
        first_steps=300,
        steps=200,
        looks=1,
    ),
}


def jobs(config: ContinualConfig) -> list[protocol.Job]:
    """For every seed the first group, and then every method with the groups after it."""
    start = protocols.preset(config.experiment, config.start, config.fixed, "continual")
    if config.base:
        start = protocols.begun_with(config.base, start, config.fixed, "continual")
        there = start.backbone.lora_rank
        require(
            "adapters" not in config.methods or there == 0,
            f"continual.base={config.base} has adapters (rank {there}) already; leave `adapters` out of "
            "continual.methods, or name a base without.",
        )
    require(
        start.rollouts.trials > 0,
        f"continual.start={config.start!r} has no rollouts; set --fixed rollouts.trials=40, in which tasks are asked.",
    )
    available = protocols.demonstrations(start, config.tasks)
    support.draw(available, config.tasks, 1, 0)  # names a task of which there is nothing
    found: list[protocol.Job] = []
    for seed in range(config.seeds):
        first = len(found)
        found.append(_job(config, start, available, "first", seed, 0, None))
        for method in config.methods:
            after = first
            for place in range(1, len(config.groups)):
                found.append(_job(config, start, available, method, seed, place, after))
                after = first if method == "adapters" else len(found) - 1
    return found


def _job(
    config: ContinualConfig,
    start: ExperimentConfig,
    available: support.Support,
    method: str,
    seed: int,
    place: int,
    after: int | None,
) -> protocol.Job:
    group = config.groups[place]
    step = _Step(config, start, available, method, seed, place)
    return protocol.Job({"method": method, "group": group}, seed, step.configure, step.judge, after)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One group of one sequence: what is trained, and what is found of it."""

    config: ContinualConfig
    start: ExperimentConfig
    available: support.Support
    method: str
    seed: int
    place: int

    @property
    def own(self) -> tuple[str, ...]:
        return tuple(self.config.groups[self.place].split("+"))

    def configure(self, base: pathlib.Path | None) -> ExperimentConfig:
        config = self.config
        steps = config.steps if self.place else config.first_steps
        changes: dict[str, Any] = {
            "data.episode_list": self._list("own", self.own, 0),
            "train.init_from": str(base or config.base),
            "train.steps": steps,
            "train.seed": self.seed,
            "optimizer.warmup_steps": min(self.start.optimizer.warmup_steps, steps // 10),
            "rollouts.tasks": self.own,
            "rollouts.every": steps // config.looks,
            "rollouts.select": "best",
        }
        if base is not None:  # what continual.base gives is in `start`
            changes |= protocols.going_on(base)
        if self.method == "replay":
            earlier = tuple(task for group in config.groups[: self.place] for task in group.split("+"))
            changes["data.further.lists"] = {"memory": self._list("memory", earlier, config.memory)}
            changes["train.sources"] = {"robot": 1.0, "memory": 1.0}
        if self.method == "ewc":
            changes |= {"optimizer.ewc": config.ewc, "optimizer.ewc_floor": config.ewc_floor}
        if self.method == "adapters":
            changes |= PARTS["lora"]
            changes |= {"backbone.lora_rank": config.rank, "backbone.lora_alpha": float(config.rank)}
            changes["optimizer.learning_rate"] = config.rate
        return cli.override(self.start, **changes)

    def _list(self, name: str, tasks: Sequence[str], count: int) -> str:
        """File of `count` demonstrations of each task; 0: all."""
        path = pathlib.Path(self.config.out) / "support" / f"{name}_{self.place}_{self.seed}.json"
        return support.write(path, support.draw(self.available, tasks, count, self.seed))

    def judge(self, run: pathlib.Path) -> protocol.Result:
        """ "row": success on each group afterwards; "curve": on this one while it was learned, from the first look
        after its beginning on; "begin": on each group before any was learned, of the first."""
        from robovlms_jax.runs import fisher, load  # as in protocols.py

        found: dict[str, Any] = {"row": self._asked(run)}
        found["curve"] = offline.read_metrics(run / "metrics.jsonl")["rollouts/score"][1].tolist()
        found["value"] = found["row"][self.place]
        if self.place == 0 and self.config.base:
            found["begin"] = self._asked(pathlib.Path(self.config.base), run.parent / "begin")
        held = "ewc" in self.config.methods and self.method in ("first", "ewc")
        if held and self.place + 1 < len(self.config.groups):
            earlier = load.load_config(run).train.init_from if self.place else ""
            fisher.measure(run, self.config.samples, earlier=pathlib.Path(earlier) if earlier else None)
        return found

    def _asked(self, checkpoint: pathlib.Path, output: pathlib.Path | None = None) -> list[float]:
        """Success on each group, all tasks alike often."""
        from experiments import evaluate, evaluation_settings

        rollouts, tasks = self.start.rollouts, tuple(self.config.tasks)
        written = evaluate.evaluate(
            evaluation_settings.EvaluateConfig(
                checkpoint=str(checkpoint),
                out=str(output or checkpoint / "all_tasks"),
                scene=rollouts.scene,
                tasks=tasks,
                chains=rollouts.trials * len(self.config.groups),
                max_steps=rollouts.max_steps,
                execution=rollouts.execution,
                processes=rollouts.tables,
                films=0,
                image_size=rollouts.image_size,
            )
        )
        rates = protocol.success(written.parent)["tasks"]
        return [float(np.mean([rates[task] for task in group.split("+")])) for group in self.config.groups]


def work(config: ContinualConfig) -> pathlib.Path:
    """Run what is missing and write the report; returns its path."""
    return write_report(config, protocols.trials(config, lambda: jobs(config)))


def sequences(
    config: ContinualConfig, trials: Sequence[queue.Trial]
) -> dict[tuple[str, int], tuple[list[list[float]], list[list[float]]]]:
    """(method, seed) -> curves and matrix of `lifelong.measures`, of the sequences that are done."""
    out = pathlib.Path(config.out)
    found = {}
    for method in config.methods:
        for seed in range(config.seeds):
            own = [x for x in trials if x.seed == seed and x.setting["method"] in ("first", method)]
            numbers = [trial.number for trial in own if trial.status == "done"]
            if len(numbers) < len(config.groups):
                continue
            results = [protocol.result(out, number) for number in numbers]
            rows = [list(result["row"]) for result in results]
            before = [list(results[0].get("begin", [0.0] * len(rows))), *rows]
            if method == "adapters":  # each begins with the first group's policy, and is asked its own tasks alone
                before[2:] = [rows[0]] * (len(rows) - 1)
                for place, row in enumerate(rows):
                    row[:place] = [rows[k][k] for k in range(place)]
            curves = [[before[k][k], *result["curve"]] for k, result in enumerate(results)]
            found[method, seed] = (curves, rows)
    return found


def write_report(config: ContinualConfig, trials: Sequence[queue.Trial]) -> pathlib.Path:
    """report.md, report.json and pictures in the protocol's directory."""
    out = pathlib.Path(config.out)
    found = sequences(config, trials)
    measured = {key: lifelong.measures(*value) for key, value in found.items()}
    sections = [
        f"# Task after task: {config.experiment}, {config.start}",
        f"Groups in order: {', then '.join(config.groups)}. {config.first_steps} steps for the first, {config.steps} "
        "for each other. Means over seeds with intervals of 95 % (Student's t). FWT: success while learning; NBT: what "
        "later tasks cost (lower is better); AUC: both (Liu et al. 2023, section 3.3). Without a base the first task's "
        "success before its first step counts as 0.",
    ]
    body = []
    for method in config.methods:
        values = np.array([measured[key] for key in measured if key[0] == method])
        if len(values):
            cells = [_interval(values[:, column]) for column in range(values.shape[1])]
            body.append([method, str(len(values)), *cells])
    if body:
        sections.append(tables.markdown(["method", "seeds", "FWT", "NBT", "AUC"], body))
        _draw(config, found).savefig(out / "continual.png", dpi=tables.DPI)
        sections.append("![success on every group (column) after every group (row), mean over seeds](continual.png)")
    ranked = [
        queue.Trial(number, {"method": method}, seed, "done", measures.area)
        for number, ((method, seed), measures) in enumerate(measured.items())
    ]
    failed = [trial for trial in trials if trial.status != "done"]
    sections += ["## Compared by AUC", *report.ranking(out, [*ranked, *failed], "AUC", "maximize")]
    record = {f"{method}, seed {seed}": {"curves": c, "after": m} for (method, seed), (c, m) in found.items()}
    tables.write_json(out / "continual.json", record)
    path = out / "report.md"
    atomic.write_text(path, tables.join(sections))
    return path


def _interval(values: np.ndarray) -> str:
    """ "0.61 ± 0.12"; the mean alone of one value."""
    half = report.half_width_of(values.tolist())
    return f"{values.mean():.2f}" + ("" if np.isnan(half) else f" ± {half:.2f}")


def _draw(config: ContinualConfig, found: Mapping[tuple[str, int], Any]) -> Any:
    """A matrix per method: success on each group after each one."""
    methods = [method for method in config.methods if any(key[0] == method for key in found)]
    figure = tables.figure(0.8 + 2.6 * len(methods), 3.2, layout="constrained")
    for axes, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        mean = np.mean([matrix for (name, _), (_, matrix) in found.items() if name == method], axis=0)
        axes.imshow(mean, vmin=0, vmax=1, cmap="viridis")
        for (row, column), value in np.ndenumerate(mean):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        places = range(len(mean))
        axes.set(title=method, xlabel="asked group", ylabel="learned up to group")
        axes.set_xticks(places, [place + 1 for place in places])
        axes.set_yticks(places, [place + 1 for place in places])
    return figure


if __name__ == "__main__":
    protocols.main(work, PRESETS, "playtable", __doc__)
