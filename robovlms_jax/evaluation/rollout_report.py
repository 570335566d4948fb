"""The report of closed-loop evaluations: rollouts.md to read, rollouts.json to compare, pictures, films of some trials.

Every table names the environment its numbers come from. matplotlib and Pillow are imported when something is drawn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robovlms_jax.evaluation import chains, rollout_metrics
from robovlms_jax.evaluation.rollout import Recording
from robovlms_jax.evaluation.rollout_metrics import Estimate, Rate, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_COLORS = ("#00798c", "#d1495b", "#edae49", "#66a182", "#8d99ae", "#5f4b8b")
_LABELS = ("scene", "phrasing")


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
) -> pathlib.Path:
    """Write rollouts.md, rollouts.json, upstream's result files and PNGs.

    Args:
      evaluations: one or more, e.g. one per execution mode, wording or scene; they become rows of the same tables.
      films: files that `write_film` made inside `directory`, shown in the report.
    Returns:
      Path of rollouts.md.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    table = rows(evaluations)
    if not table:
        raise ValueError("nothing to report: the evaluations have no results.")
    for name, figure in {"in_a_row.png": draw_in_a_row(table), "per_task.png": draw_per_task(table)}.items():
        figure.savefig(directory / name, dpi=130, bbox_inches="tight")

    sections = [
        f"# {title}",
        _chain_table(table),
        *_conditions(table),
        "In brackets: 95 % confidence intervals (Wilson for rates, bootstrap over trials for Avg. Len.).",
        "![share of trials with 1, 2, ... tasks solved in a row](in_a_row.png)",
    ]
    gaps = _gaps(table)
    if gaps:
        sections += ["## Generalisation gap", _gap_table(gaps), "Avg. Len. on seen minus on unseen conditions."]
    sections += ["## Per task", _task_table(table), "![success per task](per_task.png)"]
    if any(row.summary.partial for row in table):
        sections += ["## Partial scores", _partial_table(table)]
    if films:
        sections += ["## Rollouts", *(_film_link(film.relative_to(directory)) for film in films)]
    record = {
        "title": title,
        "rows": [{"setup": row.setup, "labels": row.labels, "summary": _summary_json(row.summary)} for row in table],
        "gaps": [dataclasses.asdict(gap) for gap in gaps],
    }
    _write_json(directory / "rollouts.json", record)
    for index, evaluation in enumerate(evaluations):
        name = "results_upstream.json" if len(evaluations) == 1 else f"results_upstream_{index}.json"
        _write_json(directory / name, chains.upstream_results(evaluation.results))
    path = directory / "rollouts.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def section(evaluation: chains.Evaluation, folder: str, *, strips: bool) -> str:
    """Markdown about one evaluation for another report, whose directory holds `folder` with `write_report`'s files.

    strips: whether `folder` also has strips.png (`draw_strips`).
    """
    table = rows([evaluation])
    parts = [
        _chain_table(table),
        *_conditions(table),
        _task_table(table),
        "In brackets: 95 % confidence intervals. Numbers of one environment say nothing about another.",
        f"![success per task]({folder}/per_task.png)",
    ]
    if strips:
        parts.append(f"![rollouts, one per row, time to the right]({folder}/strips.png)")
    parts.append(f"Films and details: [rollouts.md]({folder}/rollouts.md).")
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _chain_table(table: Sequence[Row]) -> str:
    length = max(len(row.summary.in_a_row) for row in table)
    head = ["environment", "policy", "execution", "scene", "phrasing", "trials"]
    head += [str(count) for count in range(1, length + 1)] + ["Avg. Len.", "steps per success", "restarts"]
    body = []
    for row in table:
        s = row.summary
        rates = [_rate(rate) for rate in s.in_a_row] + [""] * (length - len(s.in_a_row))
        body.append(
            [
                *row.key,
                str(s.trials),
                *rates,
                _estimate(s.average_length),
                _number(s.steps_per_success),
                str(s.restarts),
            ]
        )
    return _table(head, body)


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
        head = ["environment", "task", "success", "of", "steps per success"]
        body = [
            [row.key[0], name, _rate(rate), str(rate.attempts), _number(row.summary.steps_per_task.get(name, math.nan))]
            for name, rate in row.summary.per_task.items()
        ]
        return _table(head, body)
    head = ["task", *(" / ".join(part for part in row.key if part) for row in table)]
    body = []
    for name in names:
        rates = [row.summary.per_task.get(name) for row in table]
        body.append([name, *("" if rate is None else f"{rate.successes} of {rate.attempts}" for rate in rates)])
    return _table(head, body)


def _partial_table(table: Sequence[Row]) -> str:
    names = sorted({name for row in table for name in row.summary.partial})
    body = [
        [row.key[0], row.key[2], *(_number(row.summary.partial.get(name, math.nan), 3) for name in names)]
        for row in table
    ]
    return _table(["environment", "execution", *names], body)


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
    head = ["environment", "policy", "execution", "unseen is the", "seen", "unseen", "otherwise", "gap"]
    body = [
        [g.environments, g.policy, g.execution, g.kind, g.seen, g.unseen, g.elsewhere, _estimate(g.gap)] for g in gaps
    ]
    return _table(head, body)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _rate(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * rate.value:.1f} % ({100 * low:.0f}-{100 * high:.0f})"


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _number(value: float, digits: int = 1) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _film_link(path: pathlib.Path) -> str:
    name = path.stem.replace("_", " ")
    return f"[{name}]({path.as_posix()})" if path.suffix == ".mp4" else f"![{name}]({path.as_posix()})"


def _summary_json(summary: Summary) -> dict[str, Any]:
    def rate(value: Rate) -> dict[str, Any]:
        return {**dataclasses.asdict(value), "value": value.value, "interval": value.interval}

    return dataclasses.asdict(summary) | {
        "in_a_row": [rate(value) for value in summary.in_a_row],
        "attempts": rate(summary.attempts),
        "per_task": {task: rate(value) for task, value in summary.per_task.items()},
    }


def _write_json(path: pathlib.Path, record: Any) -> None:
    def plain(value: Any) -> Any:
        """NaN is no JSON: a number that does not exist is null."""
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    path.write_text(json.dumps(plain(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_in_a_row(table: Sequence[Row]) -> Figure:
    """Share of trials with at least 1, 2, ... tasks solved, one line per row of the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    for index, row in enumerate(table):
        counts = np.arange(1, len(row.summary.in_a_row) + 1) + 0.06 * (index - (len(table) - 1) / 2)
        axes.errorbar(
            counts,
            *_values_and_bars(row.summary.in_a_row),
            label=f"{_short(row, table)}: {row.summary.average_length.value:.2f}",
            color=_COLORS[index % len(_COLORS)],
            marker="o",
            capsize=2,
        )
    axes.set_xticks(range(1, max(len(row.summary.in_a_row) for row in table) + 1))
    axes.set(xlabel="tasks solved in a row", ylabel="share of trials", ylim=(0, 1.03), title=_title(table))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, title="Avg. Len.", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_per_task(table: Sequence[Row]) -> Figure:
    """Success of every attempted task, one dot per row of the table."""
    from matplotlib.figure import Figure

    names = sorted({task for row in table for task in row.summary.per_task}, reverse=True)
    figure = Figure(figsize=(7, 0.8 + 0.24 * len(names)))
    axes = figure.subplots()
    for index, row in enumerate(table):
        attempted = [name for name in names if name in row.summary.per_task]
        rates = [row.summary.per_task[name] for name in attempted]
        heights = [names.index(name) + 0.5 * ((index + 1) / (len(table) + 1) - 0.5) for name in attempted]
        values, bars = _values_and_bars(rates)
        color = _COLORS[index % len(_COLORS)]
        axes.errorbar(
            values, heights, xerr=bars, fmt="o", color=color, capsize=2, markersize=4, label=_short(row, table)
        )
        if len(table) == 1:
            for height, rate in zip(heights, rates):
                axes.text(1.04, height, f"{rate.successes}/{rate.attempts}", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.7, len(names) - 0.3), xlabel="success", title=_title(table))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
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


# ---------------------------------------------------------------------------------------------------------------------
# Films

_PANEL = 240
_MARGIN = 12
_ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "grip")


def write_film(recording: Recording, path: str | pathlib.Path, *, max_frames: int = 160, fps: int = 12) -> pathlib.Path:
    """A film of a trial: cameras, instruction, and the action as bars.

    Args:
      path: file without suffix; a GIF is written, or an MP4 where imageio-ffmpeg is installed.
      max_frames: longer films skip frames evenly.
    Returns:
      The file written.
    """
    if not recording.frames:
        raise ValueError(f"the recording of trial {recording.trial.index} has no frames.")
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    keep = np.unique(np.linspace(0, len(recording.frames) - 1, max_frames).round().astype(int))
    if importlib.util.find_spec("imageio_ffmpeg"):
        return _write_mp4(recording, keep, path.with_suffix(".mp4"), fps)
    return _write_gif(recording, keep, path.with_suffix(".gif"), fps)


def _write_gif(recording: Recording, keep: np.ndarray, path: pathlib.Path, fps: int) -> pathlib.Path:
    from PIL import Image

    # One palette for the whole film, so that colours do not flicker; from frames all over it, since lights come on
    # under way; and not by median cut, which loses small saturated things like blocks.
    samples = np.vstack([draw_frame(recording, int(index)) for index in keep[:: max(len(keep) // 6, 1)]])
    palette = Image.fromarray(samples).quantize(255, Image.Quantize.MAXCOVERAGE)
    first, *rest = (draw_frame(recording, int(i)).quantize(palette=palette, dither=Image.Dither.NONE) for i in keep)
    durations = [1000 // fps] * len(rest) + [1500]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)
    return path


def _write_mp4(recording: Recording, keep: np.ndarray, path: pathlib.Path, fps: int) -> pathlib.Path:
    import imageio_ffmpeg

    size = draw_frame(recording, 0).size
    with contextlib.closing(imageio_ffmpeg.write_frames(str(path), size, fps=fps, macro_block_size=2)) as writer:
        writer.send(None)
        for index in keep:
            writer.send(draw_frame(recording, int(index)).tobytes())
    return path


def draw_frame(recording: Recording, index: int) -> Image:
    """One frame of a film: cameras side by side, below them the instruction, progress and the action."""
    from PIL import Image, ImageDraw, ImageFont

    frame = recording.frames[index]
    cameras = list(frame.observation.images.values())
    width = _MARGIN + (_PANEL + _MARGIN) * max(len(cameras), 2)
    canvas = Image.new("RGB", (width, _PANEL + 2 * _MARGIN + 112), "white")
    draw = ImageDraw.Draw(canvas)
    for number, pixels in enumerate(cameras):
        image = Image.fromarray(np.asarray(pixels))
        scale = _PANEL / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        canvas.paste(image, (_MARGIN + number * (_PANEL + _MARGIN), _MARGIN))

    top = _PANEL + 2 * _MARGIN
    total = len(recording.trial.tasks)
    draw.text((_MARGIN, top), _fit(frame.instruction, width - 2 * _MARGIN, 17), "black", ImageFont.load_default(17))
    status, color = f"task {frame.task + 1} of {total}, step {frame.step}", "#555555"
    if index == len(recording.frames) - 1:
        success = recording.result.success[-1]
        status, color = f"{status}: {'solved' if success else 'failed'}", _COLORS[0] if success else _COLORS[1]
    small = ImageFont.load_default(12)
    draw.text((_MARGIN, top + 24), status, color, small)
    about = f"{recording.env}, trial {recording.trial.index}"
    draw.text((width - _MARGIN, top + 24), about, "#555555", small, anchor="ra")
    _draw_action(draw, frame.action, (_MARGIN, top + 46, width - _MARGIN, top + 94), small)
    return canvas


def draw_strips(recordings: Sequence[Recording], *, frames: int = 5) -> Image:
    """One row per rollout: the first camera from the first frame to the last, under its instruction and outcome."""
    from PIL import Image, ImageDraw, ImageFont

    panel, head = 168, 26
    width = _MARGIN + frames * (panel + 4)
    canvas = Image.new("RGB", (width + _MARGIN, len(recordings) * (panel + head + 6) + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    for row, recording in enumerate(recordings):
        top = 6 + row * (panel + head + 6)
        success = recording.result.success[-1]
        outcome = f"{'solved' if success else 'failed'} after {recording.result.steps[-1]} steps, {recording.env}"
        draw.text((_MARGIN, top), _fit(recording.frames[-1].instruction, width - 220, 15), "black", font)
        draw.text((width, top + 3), outcome, _COLORS[0] if success else _COLORS[1], small, anchor="ra")
        for column, index in enumerate(np.linspace(0, len(recording.frames) - 1, frames).round().astype(int)):
            pixels = next(iter(recording.frames[index].observation.images.values()))
            image = Image.fromarray(np.asarray(pixels)).resize((panel, panel), Image.Resampling.BICUBIC)
            canvas.paste(image, (_MARGIN + column * (panel + 4), top + head))
    return canvas


def _draw_action(draw: Any, action: np.ndarray, box: tuple[int, int, int, int], font: Any) -> None:
    """Seven bars around a zero line; full height is 1.0, beyond it they are cut."""
    left, top, right, bottom = box
    middle, step = (top + bottom) // 2, (right - left) / len(_ACTION_NAMES)
    draw.line((left, middle, right, middle), "#bbbbbb")
    for index, (name, value) in enumerate(zip(_ACTION_NAMES, np.clip(action, -1, 1))):
        centre = left + step * (index + 0.5)
        end = middle - value * (bottom - top) / 2
        color = _COLORS[1] if name == "grip" else _COLORS[0]
        draw.rectangle((centre - 10, min(middle, end), centre + 10, max(middle, end)), color)
        draw.text((centre, bottom + 2), name, "#555555", font, anchor="ma")


def _fit(text: str, width: int, size: int) -> str:
    """The text, cut with an ellipsis if it is longer than `width` pixels."""
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
