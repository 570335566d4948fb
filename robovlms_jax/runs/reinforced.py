"""What a run of reinforcement measures, and says at its end: the same trials before and after."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robovlms_jax import atomic, json_files
from robovlms_jax.evaluation import blind, rollout_metrics
from robovlms_jax.evaluation.report import tables
from robovlms_jax.evaluation.rollout import Trial, TrialResult
from robovlms_jax.playtable.scene import random_tables
from robovlms_jax.rl import rollouts, starts
from robovlms_jax.rl.config import UNSEEN, ReinforceConfig
from robovlms_jax.training import checkpoints

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

BEFORE, CURVE, REPORT = "before.json", "curve.png", "report.md"
"""In the output: successes of the checkpoint that a run began with; its curve; what a run writes last."""


def is_unreported(output: pathlib.Path) -> bool:
    """Whether the policy in `output` was written by a run that was killed before it wrote its report."""
    folder = output / checkpoints.FOLDER
    steps = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return not (output / REPORT).exists() and steps <= {"0"} and not (folder / "0" / "train").exists()


def measurements(config: ReinforceConfig) -> dict[str, list[Trial]]:
    """Name -> the trials that are played before and after. Each but the first changes one thing: the table, the words,
    where hand and blocks begin. The last are of other tasks."""
    seen, unseen, count = config.tables_to_learn_on, (config.unseen_scene,), config.trials
    found = {
        "trained": starts.resting(config.tasks, seen, count),
        "unseen_table": starts.resting(config.tasks, unseen, count),
        "unseen_phrasing": starts.resting(config.tasks, seen, count, held_out=True),
        "unseen_start": starts.draw(config.tasks, seen, count, 2**31, spread=config.start_spread),
    }
    if config.unseen_random_scenes:
        tables = random_tables(UNSEEN, config.unseen_random_scenes)
        found["unseen_random_tables"] = starts.resting(config.tasks, tables, count)
    if config.others:
        found["other_tasks"] = starts.resting(config.others, seen, count)
    return found


def measure(
    player: rollouts.Player, params: Any, questions: Mapping[str, Sequence[Trial]]
) -> dict[str, list[TrialResult]]:
    """Name -> results in the order of its trials; all are played as one, so that one program serves them."""
    begin = time.perf_counter()
    places = [(name, trial) for name, trials in questions.items() for trial in trials]
    asked = [dataclasses.replace(trial, index=index) for index, (_, trial) in enumerate(places)]
    found: dict[str, list[TrialResult]] = {name: [] for name in questions}
    for result in sorted(player.results(params, asked), key=lambda result: result.index):
        name, trial = places[result.index]
        found[name].append(dataclasses.replace(result, index=trial.index))
    took = time.perf_counter() - begin
    for name, results in found.items():
        log.info("%s: %d of %d succeed", name, sum(x.success == (True,) for x in results), len(results))
    log.info("measured in %d s", took)
    return found


def before(
    output: pathlib.Path, player: rollouts.Player, params: Any, questions: Mapping[str, Sequence[Trial]]
) -> dict[str, list[bool]]:
    """Name -> success of every trial before learning; measured once."""
    path = output / BEFORE
    known: dict[str, list[bool]] = json_files.read_object(path, "successes") if path.is_file() else {}
    if {name: len(x) for name, x in known.items()} != {name: len(x) for name, x in questions.items()}:
        results = measure(player, params, questions)
        known = {name: [result.success == (True,) for result in found] for name, found in results.items()}
        atomic.write_text(path, json.dumps(known) + "\n")
    return known


def compared(before: Sequence[bool], after: Sequence[TrialResult]) -> dict[str, Any]:
    """What the same trials of single tasks say about two policies, as JSON values. per_task and per_table: name ->
    successes before, after, and trials."""
    now = [result.success == (True,) for result in after]
    parts: dict[str, dict[str, list[tuple[bool, bool]]]] = {"per_task": {}, "per_table": {}}
    for result, pair in zip(after, zip(before, now, strict=True), strict=True):
        parts["per_task"].setdefault(result.tasks[0], []).append(pair)
        parts["per_table"].setdefault(str(result.labels["scene"]), []).append(pair)
    counted = {
        kind: {name: [*np.sum(pairs, axis=0).tolist(), len(pairs)] for name, pairs in sorted(each.items())}
        for kind, each in parts.items()
    }
    rates = {name: rollout_metrics.Rate(sum(x), len(x)) for name, x in (("before", before), ("after", now))}
    paired = blind.paired(list(zip(before, now, strict=True)))
    return {name: dataclasses.asdict(x) for name, x in {**rates, "paired": paired}.items()} | counted


def _row(name: str, found: Mapping[str, Any]) -> str:
    """Of the report's table."""
    cells = []
    for when in ("before", "after"):
        rate = rollout_metrics.Rate(**found[when])
        cells.append(f"{rate.value:.1%} ({rate.interval[0]:.1%} to {rate.interval[1]:.1%})")
    pair, count = found["paired"], found["before"]["attempts"]
    return f"| {name} | {count} | {cells[0]} | {cells[1]} | {pair['second']} / {pair['first']} | {pair['p']:.2g} |"


def _answers(settings: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """Whose they are, and which of them measure."""
    said = f"Answers: {settings['labels'] or 'of a simulated person'}."
    if "pairs_held_out" not in last:
        return f"{said} All of them teach: how many would be given that do not is not known."
    about = "whose rollouts may have taught in others" if settings["labels"] else "about rollouts from other starts"
    after = [
        f"{{preferred_{part}:.1%}} of those that {what} (loss {{loss_{part}:.3f}}, margin {{margin_{part}:.2f}})"
        for part, what in (("taught", "teach"), ("held_out", "are held out"))
    ]
    given = " and ".join(after).format(**last)
    return (
        f"{said} {last['pairs_taught']} teach, {last['pairs_held_out']} are held out, {about}. After the last "
        f"iteration the policy gives {given}; chance gives half, at a loss of 0.693."
    )


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of an iteration in which no trial ended nobody knows what share succeeds."""
    return {**row, "success": None} if row.get("trials") == 0 and "success" in row else dict(row)


def _curve(curve: Sequence[Mapping[str, Any]]) -> list[str]:
    """Some twenty iterations as a table, of what was measured in them."""
    shown: dict[str, tuple[str, Callable[[Any], str]]] = {
        "step": ("iteration", str),
        "env_steps": ("control steps", str),
        "seconds": ("seconds", "{:.0f}".format),
        "success": ("success", "{:.1%}".format),
        "preferred": ("answers given", "{:.1%}".format),
        "preferred_taught": ("given after it", "{:.1%}".format),
        "preferred_held_out": ("of those held out", "{:.1%}".format),
        "loss_taught": ("loss", "{:.3f}".format),
        "loss_held_out": ("loss, held out", "{:.3f}".format),
        "margin_taught": ("margin", "{:.2f}".format),
        "margin_held_out": ("margin, held out", "{:.2f}".format),
        "from_reference": ("divergence", "{:.3g}".format),
    }
    shown = {name: how for name, how in shown.items() if name in curve[0]}
    about = (
        "Success while learning, with chance in the actions"
        if "success" in shown
        else "Answers that the policy gives by which rollout has become more probable"
    )
    about += ": during the updates, and after them" if "preferred_taught" in shown else ""
    return [
        f"{about} (metrics.jsonl has all of it):",
        "",
        f"| {' | '.join(title for title, _ in shown.values())} |",
        "|" + "---|" * len(shown),
        *(
            f"| {' | '.join('-' if x[name] is None else how(x[name]) for name, (_, how) in shown.items())} |"
            for x in curve[:: max(len(curve) // 20, 1)]
        ),
    ]


def _draw(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """What was measured in every iteration over control steps and over seconds of learning; of answers, which cost no
    further steps, over seconds alone."""
    names, over = {"success": "with chance in the actions"}, {"env_steps": "control steps"}
    if "success" not in curve[0]:
        names, over = {"preferred": "that teach, in the updates"}, {}
        if "preferred_taught" in curve[0]:
            names = {"preferred_taught": "that teach", "preferred_held_out": "that are held out"}
    over |= {"seconds": "seconds of learning"}
    figure = tables.figure(4.2 * len(over), 3.2, layout="constrained")
    for axes, (place, label) in zip(figure.subplots(1, len(over), squeeze=False)[0], over.items(), strict=True):
        for (name, words), color in zip(names.items(), tables.COLORS, strict=False):
            found = [row for row in curve if row[name] is not None]
            points = [[row[place] for row in found], [100 * row[name] for row in found]]
            axes.plot(*points, color=color, marker="o", markersize=3, label=words)
        axes.set(xlabel=label, ylabel="success, %" if "success" in names else "answers given, %", ylim=(0, 100))
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)  # millions of control steps are long
        axes.legend(frameon=False, fontsize=8)
        tables.tidy(axes)
    return figure


def report(
    checkpoint: str,
    settings: Mapping[str, Any],
    output: pathlib.Path,
    before: Mapping[str, list[bool]],
    after: Mapping[str, list[TrialResult]],
    trained: int,
) -> pathlib.Path:
    """report.md, curve.png and results.json of a run in `output`.

    Args:
      settings: the run's, JSON values.
      before, after: name of a measurement -> successes, results of the same trials.
      trained: number of parameters that learned.
    """
    results = {name: compared(before[name], found) for name, found in after.items()}
    curve = [_told(json.loads(line)) for line in (output / "metrics.jsonl").read_text().splitlines()]
    record = {"settings": settings, "results": results, "curve": curve}
    atomic.write_text(output / "results.json", json.dumps(record, indent=2) + "\n")
    last, direct = curve[-1], settings["update"]["method"] == "dpo"
    when = "at the answered actions, mean over its updates" if direct else "before its updates"
    text = [
        f"# PlayTable: {settings['update']['method']} from {checkpoint}",
        "",
        f"{last['step']} iterations, {last['env_steps']} control steps, {last['seconds']:.0f} s of learning; trained: "
        f"{trained:,} parameters ({', '.join(settings['trainable'])}). "
        f"Divergence from the first policy in the last iteration, {when}: {last['from_reference']:.3g}.",
        "",
        *((_answers(settings, last), "") if direct else ()),
        *((f"Rewards: {settings['reward']}, learned from preferences.", "") if settings["reward"] else ()),
        "Success with 95 % Wilson intervals, without chance in the actions; the same trials before and after. Gained "
        "and lost: trials that only one of both did, with the p of an exact two-sided McNemar test.",
        "",
        "| measured | trials | before | after | gained / lost | p |",
        "|---|---|---|---|---|---|",
        *(_row(name, found) for name, found in results.items()),
        "",
        *_curve(curve),
        "",
        f"![{CURVE}]({CURVE})",
    ]
    _draw(curve).savefig(output / CURVE, dpi=tables.DPI)
    path = output / REPORT
    atomic.write_text(path, "\n".join(text) + "\n")
    return path
