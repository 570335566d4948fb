"""Policies that differ in one thing: each trained with several seeds, rolled out, and put into one table.

    python -m experiments.compare_policies                        # heads: success, latency, memory
    python -m experiments.compare_policies --preset chunks        # how many actions are predicted at a time
    python -m experiments.compare_policies --preset windows       # how many steps are looked back over
    python -m experiments.compare_policies --preset data          # a tenth, all, and five times the demonstrations
    python -m experiments.compare_policies --preset pretraining   # questions about pictures first, or not
    python -m experiments.compare_policies --preset embodiment    # before and after training among other robots
    python -m experiments.compare_policies --preset discrete      # actions as words: how many bins, and which ids

A variant is a preset with some fields set otherwise, and may begin where another variant ended. Each trial is an
ordinary run in OUT/trials: the same command goes on where it was stopped, and several processes share the work.
Structures are compared by `experiments.compare_structures`, single fields by `experiments.search`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import protocols
from robovlms_jax import cli, json_files, schema
from robovlms_jax.evaluation.report import tables
from robovlms_jax.runs import cost, load
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import require
from robovlms_jax.search import queue, report
from robovlms_jax.strategies import protocol, support


@dataclasses.dataclass(frozen=True)
@schema.checked("variant")
class Variant:
    """One row of the table."""

    name: str
    """In the table, and for `after`."""
    fixed: tuple[str, ...] = ()
    """Fields set otherwise, "policy.chunk=5"."""
    start: str = ""
    """The preset it begins with; empty: the comparison's."""
    after: str = ""
    """The variant whose policy it begins with, of the same seed; empty: parameters at random, or published weights."""
    demonstrations: int = 0
    """Of each task, drawn by the seed; 0: all there are."""
    compared: bool = True
    """False: only there for others to begin with; it is not rolled out."""

    def __post_init__(self):
        require(bool(self.name), "variant.name is empty; every variant has a name of its own.")
        require(self.demonstrations >= 0, f"variant.demonstrations={self.demonstrations} must be 0 (all) or more.")


@dataclasses.dataclass(frozen=True)
@schema.checked("compare")
class ComparePoliciesConfig:
    """What is compared."""

    variants: tuple[Variant, ...]
    """In the order in which they are trained."""
    experiment: str = "calvin_abcd"
    """Module of `experiments` whose preset is begun with."""
    start: str = "playtable_fixtures"
    """Its preset: model, data and rollouts."""
    fixed: tuple[str, ...] = ()
    """Fields of it set otherwise in every variant, "train.steps=2300"."""
    more: tuple[str, ...] = ()
    """Further ones, which count more than `fixed` and a variant's own."""
    seeds: int = 3
    """Of parameters, order of batches and draws of demonstrations."""
    out: str = "searches/compare"
    """Directory of trials and report."""
    report: bool = False
    """Only write the report of what is there."""

    def __post_init__(self):
        require(self.seeds >= 1, f"compare.seeds={self.seeds} must be at least 1.")
        names = [variant.name for variant in self.variants]
        require(bool(names), "compare.variants is empty; name at least one.")
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"compare.variants has {twice} more than once.")
        for place, variant in enumerate(self.variants):
            require(
                not variant.after or variant.after in names[:place],
                f"compare.variants: {variant.name!r} begins with {variant.after!r}, which is none of those before it: "
                f"{names[:place]}.",
            )
        require(any(variant.compared for variant in self.variants), "compare.variants has none that is compared.")


def _head(kind: str, **fields: Any) -> str:
    return "policy.head=" + json.dumps({"kind": kind, **fields}, separators=(",", ":"))


def _words(bins: int, *further: str, **fields: Any) -> tuple[str, ...]:
    head = _head("discrete", num_bins=bins, **fields)
    return ("policy.history=one_step", "policy.readout=token", head, *further)


WORDS_RATE = "optimizer.learning_rate=2e-3"
"""Of policies whose actions are words: at the 4e-4 of the heads that regress they learn how frequent each word is, and
nothing from pictures, for thousands of steps."""
BUDGET = (
    *("train.steps=600", "train.batch_size=32", "policy.chunk=5"),
    *("rollouts.trials=40", "rollouts.max_steps=80", "rollouts.films=0"),
)
"""An eighth of the default's steps, of half its windows, and half its chunk: a minute for a run on a CPU."""
_HEADS = (
    Variant("mlp", ("policy.history=one_step", _head("mlp", hidden_size=128, trunk=[256, 128]))),
    *(
        Variant(f"lstm, {n} layers", (_head("lstm", hidden_size=128, num_layers=n, trunk=[256, 128]),))
        for n in (2, 3, 4)
    ),
    *(
        Variant(kind, (_head(kind, hidden_size=128, num_layers=2, num_heads=4, trunk=[256, 128], dropout=0.0),))
        for kind in ("gpt", "attention")
    ),
    Variant("flow", (_head("flow", hidden_size=64, num_layers=2, num_heads=4, num_steps=5),)),
    Variant("discrete", _words(64, WORDS_RATE, decoding="parallel")),
)


def _chunk(length: int) -> Variant:
    return Variant(str(length), (f"policy.chunk={length}", f"rollouts.execution.horizon={min(length, 5)}"))


PRESETS = {
    "heads": ComparePoliciesConfig(_HEADS, fixed=BUDGET, out="searches/heads"),
    "chunks": ComparePoliciesConfig(tuple(map(_chunk, (1, 5, 10, 20))), fixed=BUDGET, out="searches/chunks"),
    "windows": ComparePoliciesConfig(
        tuple(Variant(str(length), (f"policy.window={length}",)) for length in (1, 4, 8)),
        fixed=(*BUDGET, "data.windows_per_segment=4"),  # windows that share frames: a fraction of the time
        out="searches/windows",
    ),
    "data": ComparePoliciesConfig(
        (Variant("0.1x", demonstrations=9), Variant("1x", demonstrations=88), Variant("5x", demonstrations=440)),
        fixed=(
            *BUDGET,
            *("data.root=data/playtable_4000", "demonstrations.episodes=4000", "demonstrations.random_scenes=3997"),
        ),
        out="searches/data",
    ),
    "pretraining": ComparePoliciesConfig(
        (
            Variant("questions", ("train.stages.0.steps=600",), start="vl", compared=False),
            Variant("none"),
            Variant("questions first", after="questions"),
        ),
        experiment="cotrain",
        start="robot",
        fixed=BUDGET,
        out="searches/pretraining",
    ),
    "embodiment": ComparePoliciesConfig(
        (
            Variant("before"),
            Variant("after", after="before", start="among"),
            Variant("longer on the robot alone", after="before"),
        ),
        experiment="cotrain",
        start="robot",
        fixed=BUDGET,
        out="searches/embodiment",
    ),
    "discrete": ComparePoliciesConfig(
        (
            *(Variant(f"{bins} bins", _words(bins)) for bins in (256, 64, 32)),
            Variant("64 bins, ids of no word", _words(64, vocab_end=512)),
            Variant("64 bins, in parallel", _words(64, decoding="parallel")),
            Variant("64 bins, rate 2e-3", _words(64, WORDS_RATE)),
            *(
                Variant(f"{bins} bins, in parallel, rate 2e-3", _words(bins, WORDS_RATE, decoding="parallel"))
                for bins in (256, 64, 32)
            ),
        ),
        fixed=BUDGET,
        out="searches/discrete",
    ),
}


def jobs(config: ComparePoliciesConfig) -> list[protocol.Job]:
    """Every variant with every seed; those of one seed follow each other, so that the table fills row by row."""
    places = {variant.name: place for place, variant in enumerate(config.variants)}
    starts = {variant.name: _start(config, variant) for variant in config.variants}
    for variant in config.variants:
        trials = starts[variant.name].rollouts.trials
        require(
            trials > 0 or not variant.compared,
            f"compare.variants: {variant.name!r} has no rollouts to be compared by; set rollouts.trials.",
        )
    found = []
    for seed in range(config.seeds):
        for variant in config.variants:
            after = seed * len(places) + places[variant.after] if variant.after else None
            trained = _Trained(config, variant, starts[variant.name], seed)
            judge = _Judged(variant.compared, seed == 0, starts[variant.name].rollouts.image_size)
            found.append(protocol.Job({"variant": variant.name}, seed, trained, judge, after, variant.compared))
    return found


def _start(config: ComparePoliciesConfig, variant: Variant) -> ExperimentConfig:
    fixed = (*config.fixed, *variant.fixed, *config.more)
    if not variant.compared:
        fixed = (*fixed, "rollouts.trials=0")
    return protocols.preset(config.experiment, variant.start or config.start, fixed, "compare")


@dataclasses.dataclass(frozen=True)
class _Trained:
    """Run directory that it begins with -> a trial's configuration."""

    config: ComparePoliciesConfig
    variant: Variant
    start: ExperimentConfig
    seed: int

    def __call__(self, base: pathlib.Path | None) -> ExperimentConfig:
        changes: dict[str, Any] = {
            "train.seed": self.seed,
            "optimizer.warmup_steps": min(self.start.optimizer.warmup_steps, self.start.train.steps // 10),
        }
        if base is not None:
            changes["train.init_from"] = str(base)
        if self.variant.demonstrations:
            available = protocols.demonstrations(self.start)
            drawn = support.draw(available, sorted(available), self.variant.demonstrations, self.seed)
            path = pathlib.Path(self.config.out) / "support" / f"{self.variant.demonstrations}_{self.seed}.json"
            changes["data.episode_list"] = support.write(path, drawn)
        return cli.override(self.start, **changes)


@dataclasses.dataclass(frozen=True)
class _Judged:
    """Run directory -> what was found. costed: whether the control step is measured, which seeds do not change."""

    compared: bool
    costed: bool
    sizes: tuple[int, int]

    def __call__(self, run: pathlib.Path) -> protocol.Result:
        if not self.compared:
            return {"value": 0.0}
        found = protocol.rollouts(run)
        error = json_files.read_object(run / "report.json", "a run's report").get("overall", {}).get("translation_m")
        found["error_mm"] = None if error is None else 1000 * error
        return found | (cost.measure(load.load_batched_policy(run, 1), self.sizes) if self.costed else {})


def work(config: ComparePoliciesConfig) -> pathlib.Path:
    """Run what is missing and write the report; returns its path."""
    listed = jobs(config)
    return write_report(config, listed, protocols.trials(config, listed))


def write_report(
    config: ComparePoliciesConfig, listed: Sequence[protocol.Job], trials: Sequence[queue.Trial]
) -> pathlib.Path:
    """report.md, report.json, policies.json and pictures in the comparison's directory."""
    out = pathlib.Path(config.out)
    compared = [trial for trial in trials if listed[trial.number].compared]
    rows = rows_of(config, compared)
    start = _start(config, next(variant for variant in config.variants if variant.compared))
    sections = [
        f"# Policies compared: {config.experiment}, {config.start}",
        f"{start.train.steps} steps of {start.train.batch_size} windows each. Success: {start.rollouts.trials} trials "
        f"on table {start.rollouts.scene}, at most {start.rollouts.max_steps} control steps each; mean over seeds with "
        "its interval of 95 % (Student's t). Open-loop error: of the next actions' positions, per step and axis, on "
        "held-out demonstrations. Milliseconds, memory and parameters: of a control step of one robot, seed 0.",
    ]
    if rows:
        sections.append(_table(rows))
    tables.write_json(out / "policies.json", {"rows": rows})
    sections += ["## Which differences are noise", *report.ranking(out, compared, "success", "maximize")]
    path = out / "report.md"
    path.write_text(tables.join(sections), encoding="utf-8")
    return path


def rows_of(config: ComparePoliciesConfig, trials: Sequence[queue.Trial]) -> list[dict[str, Any]]:
    """A record per compared variant: "success" of each seed that is done, "mean", "half_width" of its interval (None
    with one seed), "tasks", "error_mm", and what its control step costs."""
    found = []
    for variant in config.variants:
        done = [trial for trial in trials if trial.setting["variant"] == variant.name and trial.status == "done"]
        results = [protocol.result(pathlib.Path(config.out), trial.number) for trial in done]
        if not results:
            continue
        values = [float(result["value"]) for result in results]
        half = report.half_width_of(values)
        errors = [result["error_mm"] for result in results if result["error_mm"] is not None]
        names = results[0]["tasks"]
        costs = ("milliseconds", "parameters", "head_parameters", "step_bytes")
        found.append(
            {
                "variant": variant.name,
                "success": values,
                "mean": float(np.mean(values)),
                "half_width": None if math.isnan(half) else half,
                "trials": results[0]["trials"],
                "tasks": {name: float(np.mean([result["tasks"][name] for result in results])) for name in names},
                "error_mm": float(np.mean(errors)) if errors else None,
                **{name: results[0].get(name) for name in costs},
            }
        )
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for row in rows:
        success = f"{row['mean']:.2f}" + ("" if row["half_width"] is None else f" ± {row['half_width']:.2f}")
        cells = [row["variant"], str(len(row["success"])), success, _number(row["error_mm"], 1)]
        memory = None if row["step_bytes"] is None else row["step_bytes"] / 2**20
        cells += [_number(row["milliseconds"], 1), _number(memory, 1), _number(row["head_parameters"], 0)]
        body.append(cells)
    head = ["variant", "seeds", "success", "open-loop error, mm", "control step, ms", "its memory, MiB"]
    return tables.markdown([*head, "parameters of the head"], body)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


if __name__ == "__main__":
    protocols.main(work, PRESETS, "heads", __doc__)
