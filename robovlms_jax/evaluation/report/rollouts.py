"""The report of closed-loop evaluations: rollouts.md to read, rollouts.json to compare, pictures.

Every table names the environment its numbers come from. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robovlms_jax import atomic
from robovlms_jax.evaluation import chains, rollout_metrics
from robovlms_jax.evaluation.report import films as film_files
from robovlms_jax.evaluation.report import player, rerun_file, tables
from robovlms_jax.evaluation.rollout import Recording
from robovlms_jax.evaluation.rollout_metrics import Estimate, Rate, Summary
from robovlms_jax.schema import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS = ("scene", "phrasing")
_PICTURES = 40
"""Of each camera and rollout on the page."""
_STRIPS = (
    "The strips and films show the whole table, drawn for people. The policy's own static camera stands where CALVIN's "
    "does and cuts both lamps at the upper edge: rollouts.html has its pictures. The LED is on the left, green if on, "
    "the light bulb on the right, yellow if on."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the tables: trials that share environment, policy, execution mode, scene and phrasing."""

    setup: Mapping[str, Any]
    labels: Mapping[str, Any]
    results: tuple[Any, ...]
    summary: Summary

    @property
    def key(self) -> tuple[str, ...]:
        """Environment, policy, execution, scene, phrasing."""
        return (
            *(str(self.setup[name]) for name in ("env", "policy", "execution")),
            *(str(self.labels.get(name, "")) for name in _LABELS),
        )


def rows(evaluations: Sequence[chains.Evaluation]) -> list[Row]:
    """Split evaluations into the groups their trials' labels name."""
    found = []
    for evaluation in evaluations:

        def group(result: Any) -> str:
            return json.dumps(dict(result.labels), sort_keys=True)

        for _, members in itertools.groupby(sorted(evaluation.results, key=group), key=group):
            results = tuple(members)
            found.append(Row(evaluation.setup, results[0].labels, results, rollout_metrics.summarize(results)))
    return found


def write_report(
    directory: str | pathlib.Path,
    evaluations: Sequence[chains.Evaluation],
    *,
    title: str = "Closed loop",
    films: Sequence[pathlib.Path] = (),
    recordings: Sequence[Recording] = (),
    rrd: str | pathlib.Path = "",
) -> pathlib.Path:
    """Write rollouts.md, rollouts.json, upstream's result files, PNGs, and rollouts.html: all of it in one page.

    Args:
      evaluations: one or more, e.g. one per execution mode, wording or scene; they become rows of the same tables.
      films: files that `films.write_film` made inside `directory`, shown in the report.
      recordings: trials to look through on the page, failures first, in place of their films.
      rrd: a file for the Rerun viewer with every frame of the recordings; empty: none.
    Returns:
      Path of rollouts.md.
    """
    directory, table = pathlib.Path(directory), rows(evaluations)
    directory.mkdir(parents=True, exist_ok=True)
    require(len(table) > 0, "nothing to report: the evaluations have no results.")
    several = max(len(row.summary.in_a_row) for row in table) > 1
    for name, draw in {"per_task.png": draw_per_task, **({"in_a_row.png": draw_in_a_row} if several else {})}.items():
        draw(table).savefig(directory / name, dpi=tables.DPI, bbox_inches="tight")

    sections = [
        f"# {title}",
        _chain_table(table),
        _words(table),
        *_conditions(table),
        f"In brackets: 95 % confidence intervals ({'Wilson; Avg. Len.: bootstrap' if several else 'Wilson'}).",
        *["![share of trials with 1, 2, ... tasks solved in a row](in_a_row.png)"] * several,
    ]
    gaps = _gaps(table)
    if gaps:
        measure = "Avg. Len." if several else "Success"
        sections += ["## Generalisation gap", _gap_table(gaps), f"{measure} on seen minus on unseen conditions."]
    sections += ["## Per task", _task_table(table), "![success per task](per_task.png)"]
    if any(row.summary.partial for row in table):
        sections += ["## Partial scores", _partial_table(table)]
    if films:
        sections += ["## Rollouts", *(film_files.link(film.relative_to(directory)) for film in films)]
    record = {
        "title": title,
        "rows": [{"setup": row.setup, "labels": row.labels, "summary": _summary_json(row.summary)} for row in table],
        "gaps": [dataclasses.asdict(gap) for gap in gaps],
    }
    tables.write_json(directory / "rollouts.json", record)
    for index, evaluation in enumerate(evaluations):
        name = "results_upstream.json" if len(evaluations) == 1 else f"results_upstream_{index}.json"
        tables.write_json(directory / name, chains.upstream_results(evaluation.results))
    path, text = directory / "rollouts.md", tables.join(sections)
    atomic.write_text(path, text)
    text = text.split("## Rollouts\n")[0] if recordings else text  # recordings stand in place of their films
    shown = [_playable(recording, _PICTURES) for recording in recordings]
    player.write(directory / "rollouts.html", title, text, "Rollouts, failures first, as the policy sees them", shown)
    if rrd:
        rerun_file.write(rrd, title, [_playable(recording, len(recording.frames)) for recording in recordings])
    return path


def _playable(recording: Recording, most: int) -> player.Episode:
    """Filmed frames are the episode's steps; `most` of each camera's pictures are kept."""
    kept = player.thinned(len(recording.frames), most)
    cameras = recording.frames[0].observation.images
    pictures = {name: [recording.frames[i].observation.images.get(name) for i in kept] for name in cameras}
    actions = np.stack([frame.action for frame in recording.frames])
    solved = bool(recording.result.success[-1])
    tasks = dict.fromkeys(frame.instruction for frame in recording.frames)
    outcome = f"{'solved' if solved else 'failed'} after {recording.result.steps[-1]} steps"
    title = f"{', then '.join(tasks)} (trial {recording.trial.index}; every {recording.every} control steps)"
    panels = player.panels_of(actions, recording.robot.action, "action")
    states = [frame.observation.proprio for frame in recording.frames]
    if all(state is not None and np.shape(state) == (len(recording.robot.state),) for state in states):
        panels += player.panels_of(np.stack(states), recording.robot.state, "state")
    rate = (recording.robot.rate_hz or 30.0) / recording.every
    return player.Episode(title, pictures, kept, panels, outcome, solved, rate, success=solved)


def section(evaluation: chains.Evaluation, folder: str, *, strips: bool) -> str:
    """Markdown about one evaluation for another report, whose directory holds `folder` with `write_report`'s files.

    strips: whether `folder` also has strips.png (`films.draw_strips`).
    """
    table = rows([evaluation])
    parts = [_headline(row) for row in table]
    if strips:
        parts.append(f"![rollouts, one per row, failures first, time to the right]({folder}/strips.png)")
        if str(evaluation.setup["env"]).startswith("playtable"):
            parts.append(_STRIPS)
    page = f"[rollouts.html]({folder}/rollouts.html)"
    parts += [
        f"Look through them step by step, failures first: {page}. As text: [rollouts.md]({folder}/rollouts.md).",
        _task_table(table),
        "In brackets: 95 % confidence intervals. Numbers of one environment say nothing about another.",
        f"![success per task]({folder}/per_task.png)",
        tables.upright(_chain_table(table)) if len(table) == 1 else _chain_table(table),
        _words(table),
        *_conditions(table),
    ]
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _chain_table(table: Sequence[Row]) -> str:
    length = max(len(row.summary.in_a_row) for row in table)
    head = ["environment", "policy", "execution", "scene", "phrasing", "trials"]
    # Of trials of one task the average length is the success again.
    head += [f"{count} in a row" for count in range(1, length + 1)] + ["Avg. Len."] if length > 1 else ["success"]
    head += ["steps per success", "restarts"]
    body = []
    for row in table:
        s = row.summary
        rates = [tables.rate(rate) for rate in s.in_a_row] + [""] * (length - len(s.in_a_row))
        body.append(
            [
                *row.key,
                str(s.trials),
                *rates,
                *([tables.estimate(s.average_length)] if length > 1 else []),
                tables.decimals(s.steps_per_success),
                str(s.restarts),
            ]
        )
    return tables.markdown(head, body, text_columns=5)


def _headline(row: Row) -> str:
    """The answer in one sentence: how often it succeeds, how sure that is, where, and among how many trials."""
    kind = ", ".join(text.format(x) for text, x in zip(("scene {}", "{} wordings"), row.key[3:], strict=True) if x)
    s, where = row.summary, f"on {row.key[0]}" + (f" ({kind})" if kind else "")
    if len(s.in_a_row) == 1:
        rate = s.in_a_row[0]
        return f"**{tables.rate(rate)} solved** {where}: {rate.successes} of {rate.attempts} trials."
    return f"**{tables.estimate(s.average_length)} of {len(s.in_a_row)} tasks in a row** {where}, {s.trials} trials."


def _words(table: Sequence[Row]) -> str:
    """What the columns of `_chain_table` mean."""
    length = max(len(row.summary.in_a_row) for row in table)
    measure = (
        f"1 ... {length} in a row: share of trials whose first 1 ... {length} tasks were all solved; Avg. Len.: how "
        "many tasks in a row were solved on average, CALVIN's measure."
        if length > 1
        else "Success: share of trials whose task was solved."
    )
    return (
        f"{measure} Execution: how much of each predicted chunk of actions is carried out before the policy is asked "
        "again (first: one action, receding 5: five). Phrasing: asked in wordings of the training data, or in held-out "
        "ones. Steps per success: control steps that solved tasks took. Restarts: how often a simulator broke down and "
        "its trial was begun again."
    )


def _conditions(table: Sequence[Row]) -> list[str]:
    """A sentence per simulator and per protocol that numbers of the table come from, where they are known."""
    said = []
    for row in table:
        simulator = ", ".join(f"{name} {value}" for name, value in row.setup.get("simulator", {}).items())
        if simulator:
            said.append(f"Simulator of {row.setup['env']}: {simulator}.")
        if "protocol" in row.labels:
            said.append(f"Protocol: {row.labels['protocol']}.")
    return list(dict.fromkeys(said))


def _task_table(table: Sequence[Row]) -> str:
    names = sorted({task for row in table for task in row.summary.per_task})
    if len(table) == 1:
        (row,) = table
        head = [f"task on {row.key[0]}", "success", "of", "steps per success"]
        body = []
        for name, rate in row.summary.per_task.items():
            steps = tables.decimals(row.summary.steps_per_task.get(name, math.nan))
            body.append([name, tables.rate(rate), str(rate.attempts), steps])
        return tables.markdown(head, body)
    head = ["task", *(" / ".join(part for part in row.key if part) for row in table)]
    body = []
    for name in names:
        rates = [row.summary.per_task.get(name) for row in table]
        body.append([name, *("" if rate is None else f"{rate.successes} of {rate.attempts}" for rate in rates)])
    return tables.markdown(head, body)


def _partial_table(table: Sequence[Row]) -> str:
    names = sorted({name for row in table for name in row.summary.partial})
    body = [
        [row.key[0], row.key[2], *(tables.decimals(row.summary.partial.get(name, math.nan), 3) for name in names)]
        for row in table
    ]
    return tables.markdown(["environment", "execution", *names], body, text_columns=2)


@dataclasses.dataclass(frozen=True)
class Gap:
    """Average length on seen minus unseen conditions of one kind, everything else equal."""

    kind: str
    """"scene" or "phrasing"."""
    environments: str
    policy: str
    execution: str
    elsewhere: str
    """The other kind's value, shared by both sides."""
    seen: str
    unseen: str
    gap: Estimate


def _gaps(table: Sequence[Row]) -> list[Gap]:
    """Where rows differ only in whether the scene, or the wording, was seen in training; such rows are pooled."""
    found = []
    for kind, other in (("scene", "phrasing"), ("phrasing", "scene")):
        groups: dict[tuple, dict[bool, list[Row]]] = {}
        for row in table:
            side = row.labels.get("scene_seen") if kind == "scene" else _WORDING_SEEN.get(row.labels.get("phrasing"))
            if side is not None:
                setup = json.dumps({**row.setup, "env": ""}, sort_keys=True)
                groups.setdefault((setup, row.labels.get(other)), {}).setdefault(side, []).append(row)
        for (_, elsewhere), sides in groups.items():
            if len(sides) == 2:
                pools = {side: [result for row in members for result in row.results] for side, members in sides.items()}
                names = {
                    side: ", ".join(sorted({str(row.labels[kind]) for row in members}))
                    for side, members in sides.items()
                }
                members = [*sides[True], *sides[False]]
                environments = ", ".join(sorted({row.key[0] for row in members}))
                gap = rollout_metrics.generalisation_gap(pools[True], pools[False])
                _, policy, execution, *_ = members[0].key
                found.append(Gap(kind, environments, policy, execution, str(elsewhere), names[True], names[False], gap))
    return found


_WORDING_SEEN = {"training": True, "held out": False}


def _gap_table(gaps: Sequence[Gap]) -> str:
    head = ["environment", "policy", "execution", "shifted factor", "seen", "unseen", "held fixed", "gap"]
    body = [
        [g.environments, g.policy, g.execution, g.kind, g.seen, g.unseen, g.elsewhere, tables.estimate(g.gap)]
        for g in gaps
    ]
    return tables.markdown(head, body, text_columns=7)


def _summary_json(summary: Summary) -> dict[str, Any]:
    return dataclasses.asdict(summary) | {
        "in_a_row": [tables.rate_record(rate) for rate in summary.in_a_row],
        "attempts": tables.rate_record(summary.attempts),
        "per_task": {task: tables.rate_record(rate) for task, rate in summary.per_task.items()},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_in_a_row(table: Sequence[Row]) -> Figure:
    """Share of trials with at least 1, 2, ... tasks solved, one line per row of the table."""
    figure = tables.figure(7, 3.6)
    axes = figure.subplots()
    for index, row in enumerate(table):
        counts = np.arange(1, len(row.summary.in_a_row) + 1) + 0.06 * (index - (len(table) - 1) / 2)
        axes.errorbar(
            counts,
            *_values_and_bars(row.summary.in_a_row),
            label=f"{_short(row, table)}: {row.summary.average_length.value:.2f}",
            color=tables.COLORS[index % len(tables.COLORS)],
            marker="o",
            capsize=2,
        )
    axes.set_xticks(range(1, max(len(row.summary.in_a_row) for row in table) + 1))
    axes.set(xlabel="tasks solved in a row", ylabel="share of trials", ylim=(0, 1.03), title=_title(table))
    tables.tidy(axes)
    axes.legend(
        frameon=False,
        fontsize=8,
        title="tasks in a row, on average (Avg. Len.)",
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )
    return figure


def draw_per_task(table: Sequence[Row]) -> Figure:
    """Success of every attempted task, one dot per row of the table."""
    names = sorted({task for row in table for task in row.summary.per_task}, reverse=True)
    figure = tables.figure(7, 0.8 + 0.24 * len(names))
    axes = figure.subplots()
    for index, row in enumerate(table):
        attempted = [name for name in names if name in row.summary.per_task]
        rates = [row.summary.per_task[name] for name in attempted]
        heights = [names.index(name) + 0.5 * ((index + 1) / (len(table) + 1) - 0.5) for name in attempted]
        values, bars = _values_and_bars(rates)
        color = tables.COLORS[index % len(tables.COLORS)]
        axes.errorbar(
            values, heights, xerr=bars, fmt="o", color=color, capsize=2, markersize=4, label=_short(row, table)
        )
        if len(table) == 1:
            for height, rate in zip(heights, rates):
                axes.text(1.04, height, f"{rate.successes}/{rate.attempts}", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.7, len(names) - 0.3), xlabel="success", title=_title(table))
    tables.tidy(axes)
    if len(table) > 1:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _values_and_bars(rates: Sequence[Rate]) -> tuple[list[float], np.ndarray]:
    """Values and the lengths of their error bars, float[2, n]."""
    values = [rate.value for rate in rates]
    ends = np.array([rate.interval for rate in rates]).T
    return values, np.abs(ends - values)


def _title(table: Sequence[Row]) -> str:
    return ", ".join(sorted({row.key[0] for row in table}))


def _short(row: Row, table: Sequence[Row]) -> str:
    """What tells this row from the others."""
    parts = [part for index, part in enumerate(row.key) if part and len({other.key[index] for other in table}) > 1]
    return ", ".join(parts) or row.key[1]
