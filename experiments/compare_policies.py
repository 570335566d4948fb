"""Policies that differ in one thing: each trained with several seeds, rolled out, and put into one table.

    python -m experiments.compare_policies                        # heads: success, latency, memory
    python -m experiments.compare_policies --preset chunks        # how many actions are predicted at a time
    python -m experiments.compare_policies --preset execution     # a whole chunk, or its first action alone
    python -m experiments.compare_policies --preset windows       # how many steps are looked back over
    python -m experiments.compare_policies --preset structures    # where frames meet
    python -m experiments.compare_policies --preset data          # a tenth, all, and five times the demonstrations
    python -m experiments.compare_policies --preset pretraining   # questions about pictures first, or not
    python -m experiments.compare_policies --preset cotraining    # questions beside demonstrations: what is kept
    python -m experiments.compare_policies --preset stages        # the order of questions, robot and other robots
    python -m experiments.compare_policies --preset words         # each sentence as recorded, or varied
    python -m experiments.compare_policies --preset augmentations # pictures shifted, cropped, recoloured or covered
    python -m experiments.compare_policies --preset embodiment    # before and after training among other robots
    python -m experiments.compare_policies --preset robots        # another arm beside: heads of their own, or one
    python -m experiments.compare_policies --preset discrete      # actions as words: how many bins, and which ids
    python -m experiments.compare_policies --preset training      # two new tasks: which parameters learn them
    python -m experiments.compare_policies --preset recipes       # the same two: schedules, optimizers, averages

A variant is a preset with some fields set otherwise, and may begin where another variant ended, or ask that one's
policy once more. Each trial is an ordinary run in OUT/trials: the same command goes on where it was stopped, and
several processes share the work. What the comparisons are made of: comparison_settings.py.
Every structure is compared by `experiments.compare_structures`, single fields by `experiments.search`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import comparison_settings, protocols
from experiments.comparison_settings import ComparePoliciesConfig, Variant
from robovlms_jax import atomic, cli, json_files
from robovlms_jax.data import notices
from robovlms_jax.evaluation.config import RolloutConfig
from robovlms_jax.evaluation.report import offline, tables
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import require
from robovlms_jax.search import queue, report
from robovlms_jax.strategies import protocol, support

PRESETS = comparison_settings.PRESETS


def jobs(config: ComparePoliciesConfig) -> list[protocol.Job]:
    """Every variant with every seed; those of one seed follow each other, so that the table fills row by row."""
    from robovlms_jax.runs import run  # as in protocols.py

    places = {variant.name: place for place, variant in enumerate(config.variants)}
    starts = {variant.name: _start(config, variant) for variant in config.variants}
    for variant in config.variants:
        trials = starts[variant.name].rollouts.trials
        require(
            trials > 0 or not variant.compared,
            f"compare.variants: {variant.name!r} has no rollouts to be compared by; set rollouts.trials.",
        )
        begun = {"train.init_from": variant.after} if variant.after else {}
        try:
            run.require_consistent(cli.override(starts[variant.name], **begun))
        except (ValueError, OSError) as error:
            raise notices.about(f"compare.variants, {variant.name!r}", error) from None
    found = []
    for seed in range(config.seeds):
        for variant in config.variants:
            after = seed * len(places) + places[variant.after] if variant.after else None
            trained = None if variant.asked else _Trained(config, variant, starts[variant.name], seed)
            asked = starts[variant.name].rollouts
            judge = _Judged(variant.compared, seed == 0, asked, variant.asked, config.unseen)
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
            policy = protocols.rescaled(self.start.policy, protocols.policy_of(base))
            changes |= protocols.going_on(base) | {"policy": policy}
        if self.variant.demonstrations:
            available = protocols.demonstrations(self.start)
            drawn = support.draw(available, sorted(available), self.variant.demonstrations, self.seed)
            path = pathlib.Path(self.config.out) / "support" / f"{self.variant.demonstrations}_{self.seed}.json"
            changes["data.episode_list"] = support.write(path, drawn)
        return cli.override(self.start, **changes)


@dataclasses.dataclass(frozen=True)
class _Judged:
    """Run directory -> what was found.

    costed: whether the control step is measured, which seeds do not change. rollouts: the variant's; again: the run
      ended with others than these. unseen: whether wordings that training never uses are asked, too.
    """

    compared: bool
    costed: bool
    rollouts: RolloutConfig
    again: bool
    unseen: bool

    def __call__(self, run: pathlib.Path) -> protocol.Result:
        from robovlms_jax.runs import cost, load

        if not self.compared:
            return {"value": 0.0, "answers": _answers(run)}
        found = _asked(run, self.rollouts) if self.again else protocol.rollouts(run)
        error = json_files.read_object(run / "report.json", "a run's report").get("overall", {}).get("translation_m")
        found["error_mm"] = None if error is None else 1000 * error
        found["answers"] = _answers(run)
        if self.unseen:
            found["unseen"] = _asked(run, self.rollouts, held_out=True)["value"]
        measured = self.costed and not self.again
        return found | (cost.measure(load.load_batched_policy(run, 1), self.rollouts.image_size) if measured else {})


def _answers(run: pathlib.Path) -> float | None:
    """Share of the held-out questions about pictures that the finished run answers rightly, of all their sources; None
    where none are asked."""
    metrics = offline.read_metrics(run / "metrics.jsonl")
    shares = [values[-1] for name, (_, values) in metrics.items() if name.startswith("validation/accuracy_")]
    return float(np.mean(shares)) if shares else None


def _asked(run: pathlib.Path, rollouts: RolloutConfig, *, held_out: bool = False) -> dict[str, Any]:
    """Success in rollouts of a finished run's policy, in a folder beside it for these rollouts alone: several processes
    may ask one policy. held_out: in wordings that training never uses."""
    from experiments import evaluate, evaluation_settings

    start = evaluation_settings.of_checkpoint(["--checkpoint", str(run)])
    asked = {name: getattr(rollouts, name) for name in ("tasks", "scene", "max_steps", "execution", "image_size")}
    asked |= {"chains": rollouts.trials, "held_out": held_out}
    words = json.dumps({name: x.conditions() if name == "execution" else x for name, x in asked.items()})
    folder = run.parent / f"asked-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
    asked |= {"films": 0, "out": str(folder), "processes": min(rollouts.tables, rollouts.trials)}
    return protocol.success(evaluate.evaluate(dataclasses.replace(start, **asked)).parent)


def work(config: ComparePoliciesConfig) -> pathlib.Path:
    """Run what is missing and write the report; returns its path."""
    return write_report(config, protocols.trials(config, lambda: jobs(config)))


def write_report(config: ComparePoliciesConfig, trials: Sequence[queue.Trial]) -> pathlib.Path:
    """report.md, report.json, policies.json and pictures in the comparison's directory."""
    out = pathlib.Path(config.out)
    shown = {variant.name for variant in config.variants if variant.compared}
    compared = [trial for trial in trials if trial.setting["variant"] in shown]
    rows = rows_of(config, trials)
    start = _start(config, next(variant for variant in config.variants if variant.compared))
    sections = [
        f"# Policies compared: {config.experiment}, {config.start}",
        f"{start.train.steps} steps of {start.train.batch_size} windows each. Success: {start.rollouts.trials} trials "
        f"on table {start.rollouts.scene}, at most {start.rollouts.max_steps} control steps each. Open-loop error: of "
        "the next actions' positions, per step and axis, on held-out demonstrations. Unseen wordings: the same trials "
        "in words that training never uses. Answers: to held-out questions about pictures, and before: of the policy "
        "that was begun with. Means over seeds with intervals of 95 % (Student's t). Milliseconds, memory and "
        "parameters: of a control step of one robot, seed 0.",
    ]
    if rows:
        sections.append(_table(rows))
    tables.write_json(out / "policies.json", {"rows": rows})
    sections += ["## Which differences are noise", *report.ranking(out, compared, "success", "maximize")]
    path = out / "report.md"
    atomic.write_text(path, tables.join(sections))
    return path


def rows_of(config: ComparePoliciesConfig, trials: Sequence[queue.Trial]) -> list[dict[str, Any]]:
    """A record per compared variant: "success" of each seed that is done, "mean", "half_width" of its interval (None
    with one seed), "tasks"; "unseen" (success in wordings that training never uses), "errors_mm", "answers_before" (of
    the variant that it begins with) and "answers" of each seed, where there are any; and what its control step costs.
    """
    found = []
    ended: dict[str, list[protocol.Result]] = {"": []}
    for variant in config.variants:
        done = [trial for trial in trials if trial.setting["variant"] == variant.name and trial.status == "done"]
        results = [protocol.result(pathlib.Path(config.out), trial.number) for trial in done]
        ended[variant.name] = results
        if not (results and variant.compared):
            continue
        values = [float(result["value"]) for result in results]
        half = report.half_width_of(values)
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
                "unseen": _known(results, "unseen"),
                "errors_mm": _known(results, "error_mm"),
                "answers_before": _known(ended[variant.after], "answers"),
                "answers": _known(results, "answers"),
                **{name: results[0].get(name) for name in costs},
            }
        )
    return found


def _known(results: Sequence[protocol.Result], name: str) -> list[float]:
    return [float(result[name]) for result in results if result.get(name) is not None]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns that no row has anything for are left out."""
    mib = 2**20
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "seeds": lambda row: str(len(row["success"])),
        "success": lambda row: report.interval(row["success"], 2),
        "unseen wordings": lambda row: report.interval(row["unseen"], 2),
        "open-loop error, mm": lambda row: report.interval(row["errors_mm"], 1),
        "answers right before": lambda row: report.interval(row["answers_before"], 2),
        "answers right": lambda row: report.interval(row["answers"], 2),
        "control step, ms": lambda row: _number(row["milliseconds"], 1),
        "its memory, MiB": lambda row: _number(row["step_bytes"] and row["step_bytes"] / mib, 1),
        "parameters of the head": lambda row: _number(row["head_parameters"], 0),
    }
    shown = {name: cell for name, cell in columns.items() if any(cell(row) for row in rows)}
    body = [[row["variant"], *(cell(row) for cell in shown.values())] for row in rows]
    return tables.markdown(["variant", *shown], body)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


if __name__ == "__main__":
    protocols.main(work, PRESETS, "heads", __doc__)
