"""The page of `inspect_data`: one HTML file that opens from disk, pictures and drawings inside it, light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.data import findings, inspection, pairing
from robovlms_jax.evaluation.report import page, player

if TYPE_CHECKING:
    from experiments.inspect_data import Result

_SENTENCES = 12
_LABELS = {"problem": ("problem", "problems"), "look": ("worth a look", "worth a look"), "fine": ("fine", "fine")}

_STYLE = """
.chips { display: flex; flex-wrap: wrap; gap: 8px; margin: 14px 0 0; }
.chip { border-radius: 99px; padding: 3px 12px; font-weight: 600; font-size: 14px; border: 1.5px solid; }
.problem { color: var(--problem); border-color: var(--problem); }
.look { color: var(--look); border-color: var(--look); }
.fine { color: var(--fine); border-color: var(--fine); }
ul.findings { list-style: none; margin: 0; padding: 0; display: grid; gap: 8px; }
ul.findings li { border-left: 4px solid; padding: 2px 0 2px 12px; overflow-wrap: anywhere; white-space: pre-line; }
ul.findings span { color: var(--text); } ul.findings b { margin-right: 6px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 12px 20px; margin: 0; }
dt { color: var(--soft); font-size: 13px; } dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.bar { fill: var(--blue); } .band { fill: var(--band); }
.axis { stroke: var(--line); } .mark { stroke: var(--look); stroke-width: 1.5; }
.bound { stroke: var(--text); stroke-dasharray: 2 2; }
ol.sentences { list-style: none; margin: 0; padding: 0; display: grid; gap: 6px; }
ol.sentences li { position: relative; padding: 3px 8px; border-radius: 6px; overflow: hidden; overflow-wrap: anywhere; }
ol.sentences i { position: absolute; inset: 0 auto 0 0; background: var(--band); border-radius: 6px; }
ol.sentences span { position: relative; } ol.sentences b { float: right; position: relative; margin-left: 12px; }
"""


def facts(found: inspection.Inspection) -> dict[str, str]:
    """What the dataset is, in a few words each."""
    rate = found.robot.rate_hz
    listed = {"robot": found.robot.name, "rate": f"{rate:g} Hz" if rate else "unknown"}
    for camera in found.cameras:
        listed[f"{camera.name} camera"] = f"{camera.width} x {camera.height} px"
    for name, split in found.splits.items():
        duration = f", {_duration(split.num_steps / rate)}" if rate else ""
        listed[name] = (
            f"{findings.counted(len(split.lengths), 'episode')}, {findings.counted(split.num_steps, 'step')}{duration}"
        )
        shortest, median, longest = (float(f(split.lengths)) for f in (np.min, np.median, np.max))
        listed[f"{name} lengths"] = f"{shortest:g} to {longest:g} steps, median {median:g}"
    words = found.splits["training"].instructions
    listed["instructions"] = f"{len(words.counts):,} distinct; longest {len(words.longest)} characters"
    listed["action, state"] = f"{len(found.actions)} and {len(found.states)} numbers"
    return listed


def render(title: str, results: Sequence[Result], missing: Sequence[str] = ()) -> str:
    """The whole page, of one dataset or of several under each other. missing: a sentence for each that is not there."""
    absent = "".join(f'<li class="problem"><b>not found</b><span>{_text(message)}</span></li>' for message in missing)
    body = f'<section><ul class="findings">{absent}</ul></section>' if missing else ""
    body += "".join(_dataset(result) for result in results)
    return page.document(f"{title}: dataset", body, style=_STYLE + player.STYLE, script=player.SCRIPT)


def _dataset(result: Result) -> str:
    found = result.inspection
    counts = {level: sum(f.level == level for f in result.findings) for level in findings.LEVELS}
    chips = "".join(
        f'<span class="chip {level if count else "fine"}">{count} {_LABELS[level][count != 1]}</span>'
        for level, count in counts.items()
    )
    sections = [
        ("What to know first", _findings(result.findings)),
        ("Episodes", _shown(result)),
        (
            "The dataset",
            "<dl>"
            + "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts(found).items())
            + "</dl>",
        ),
        ("Episode lengths", "".join(_lengths(name, split) for name, split in found.splits.items())),
        ("Instructions", "".join(_instructions(name, split.instructions) for name, split in found.splits.items())),
        ("Actions", _ranges(found.actions) + _gripper(found.gripper)),
        ("State", _ranges(found.states) if found.states else "<p>None can be read.</p>"),
        ("The robot as the files describe it", _robot(found)),
        ("Do rows and pictures belong together?", _pairing(found)),
        ("What the reader said", _notes(result.notes)),
    ]
    drawn = "".join(f"<section><h2>{heading}</h2>{content}</section>\n" for heading, content in sections if content)
    sample = (
        f"Numbers: {findings.counted(found.num_sampled, 'step')} of "
        f"{findings.counted(found.num_runs, 'training episode')}. Pictures: "
        f"{max((camera.read for camera in found.cameras), default=0):,} per camera, neighbouring frames from the "
        "start, the middle and the end of episodes."
    )
    return (
        f'<header style="margin-top:24px"><h1>{_text(result.source.name)}</h1>'
        f'<p class="soft">{_text(result.source.kind)}<br>{_text(found.name)}</p>'
        f'<div class="chips">{chips}</div></header>\n'
        f'{drawn}<p class="soft">{sample}</p>'
    )


def _findings(listed: Sequence[findings.Finding]) -> str:
    items = "".join(
        f'<li class="{f.level}"><b>{_text(f.topic)}</b><span>{_text(f.message)}</span></li>' for f in listed
    )
    return f'<ul class="findings">{items}</ul>'


def _shown(result: Result) -> str:
    note = '<p class="soft">Bounds of the robot are dashed. Pictures are a few of each episode, numbers all.</p>'
    found = episodes(result)
    return player.render(found) + note if found else ""


def episodes(result: Result) -> list[player.Episode]:
    """Those that can be looked through."""
    found = result.inspection
    dimensions = {
        part: tuple(column.dimension for column in columns)
        for part, columns in (("action", found.actions), ("state", found.states))
    }
    made = []
    for shown in found.shown:
        panels = []
        for part, values in (("action", shown.actions), ("state", shown.states)):
            if values is not None and values.shape[1] == len(dimensions[part]):
                panels += player.panels_of(values, dimensions[part], part)
        missing = sum(picture is None for taken in shown.pictures.values() for picture in taken)
        title = f"{shown.instruction or '(blank)'} (frame {shown.first} on)"
        outcome = f"{findings.counted(missing, 'picture')} cannot be read" if missing else ""
        rate = found.robot.rate_hz or 20.0
        made.append(player.Episode(title, shown.pictures, shown.steps, panels, outcome, not missing, rate))
    return made


def _lengths(name: str, split: inspection.Split) -> str:
    lengths = split.lengths
    low, high = int(lengths.min()), int(lengths.max())
    bins = min(inspection.BINS, high - low + 1)
    counts, _ = np.histogram(lengths, bins, (low - 0.5, high + 0.5))
    median = float(np.median(lengths))
    mark = (median - low + 0.5) / (high - low + 1)
    text = f"{name}: min {low}, median {median:g}, max {high} steps; {findings.counted(len(lengths), 'episode')}"
    if low == high:
        return f"<h3>{_text(text)}</h3>"
    return f"<h3>{_text(text)}</h3>{_histogram(counts, 1000, 110, mark=mark, ends=(str(low), str(high)))}"


def _histogram(
    counts: np.ndarray,
    width: int,
    height: int,
    *,
    mark: float = math.nan,
    band: tuple[float, float] | None = None,
    ends: tuple[str, str] | None = None,
    bounds: Sequence[float] = (),
) -> str:
    """Bars whose height grows with the root of the count, so that rare values show. mark, band, bounds: places from 0
    to 1."""
    foot = 16 if ends else 0
    top, step = math.sqrt(max(int(counts.max()), 1)), width / len(counts)
    parts = []
    if band:
        left, right = band[0] * width, max(band[1] * width, band[0] * width + 2)
        parts.append(f'<rect class="band" x="{left:.1f}" y="0" width="{right - left:.1f}" height="{height}"/>')
    for index, count in enumerate(counts.tolist()):
        if count:
            tall = max(math.sqrt(count) / top * (height - 2), 1.5)
            parts.append(
                f'<rect class="bar" x="{index * step:.1f}" y="{height - tall:.1f}" width="{max(step - 1, 1):.1f}" '
                f'height="{tall:.1f}"/>'
            )
    if 0 <= mark <= 1:
        parts.append(f'<line class="mark" x1="{mark * width:.1f}" x2="{mark * width:.1f}" y1="0" y2="{height}"/>')
    for bound in bounds:
        at = min(max(bound * width, 1), width - 1)
        parts.append(f'<line class="bound" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height}"/>')
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{height - 0.5}" y2="{height - 0.5}"/>')
    if ends:
        parts.append(f'<text x="0" y="{height + 13}">{ends[0]}</text>')
        parts.append(f'<text x="{width}" y="{height + 13}" text-anchor="end">{ends[1]}</text>')
    size = f'viewBox="0 0 {width} {height + foot}" width="{width}" height="{height + foot}"'
    return f'<svg {size} role="img">{"".join(parts)}</svg>'


def _instructions(name: str, words: inspection.Instructions) -> str:
    most = max((count for _, count in words.counts), default=1)
    items = "".join(
        f'<li><i style="width:{100 * count / most:.0f}%"></i><b>{count:,}</b>'
        f"<span>{_text(sentence) or '(blank)'}</span></li>"
        for sentence, count in words.counts[:_SENTENCES]
    )
    rest = f", the {_SENTENCES} most frequent" if len(words.counts) > _SENTENCES else ""
    more = f"; {findings.counted(words.rewordings, 'episode')} with other wordings, too" if words.rewordings else ""
    text = f"{name}: {len(words.counts):,} distinct, {findings.counted(words.blank, 'episode')} without any{more}{rest}"
    longest = ""
    if len(words.counts) > _SENTENCES:
        longest = f'<p class="soft">Longest: {_text(words.longest)}</p>'
    return f'<h3>{text}</h3><ol class="sentences">{items}</ol>{longest}'


def _ranges(columns: Sequence[inspection.Column]) -> str:
    head = ["", "unit", "what", "values", "min", "q01", "mean", "q99", "max", "at min / max", "allowed"]
    rows = []
    for column in columns:
        dimension, values = column.dimension, column.summary
        numbers = [_number(values[key]) for key in ("min", "q01", "mean", "q99", "max")]
        ends = f"{column.at_min:.0%} / {column.at_max:.0%}"
        named = [_text(dimension.name), _text(dimension.unit or "unknown"), _what(dimension), _spark(column)]
        rows.append([*named, *numbers, ends, _text(_allowed(dimension))])
    note = (
        '<p class="soft">Bars: how often (square root); band: from q01 to q99, '
        "between which 98 of 100 values lie; line: 0; dashed: the ends of what is allowed, where they are near.</p>"
    )
    return _table(head, rows, left=(1, 2, 3)) + note


def _spark(column: inspection.Column) -> str:
    """The histogram of one dimension, from its smallest to its largest value, and as far as what is allowed where that
    leaves the values a tenth of the width at least."""
    low, high = column.summary["min"], column.summary["max"]
    if not high > low:
        return ""
    counts, step = column.counts, (high - low) / len(column.counts)
    limits = [x for x in (column.dimension.low, column.dimension.high) if math.isfinite(x)]
    wide = max([high, *limits]) - min([low, *limits])
    if limits and wide <= 10 * (high - low):
        more = [max(math.ceil(x / step - 1e-6), 0) for x in (low - min(limits), max(limits) - high)]
        counts, low, high = np.pad(counts, more), low - more[0] * step, high + more[1] * step
    place = [(x - low) / (high - low) for x in (column.summary["q01"], column.summary["q99"], *limits)]
    bounds = [x for x in place[2:] if 0 <= x <= 1]
    return _histogram(counts, 150, 30, mark=(0 - low) / (high - low), band=(place[0], place[1]), bounds=bounds)


def _allowed(dimension: robots.Dimension) -> str:
    if math.isinf(dimension.low) and math.isinf(dimension.high):
        return "any"
    return f"{dimension.low:g} to {dimension.high:g}"


def _robot(found: inspection.Inspection) -> str:
    """Its numbers, where they are others than those that the reader gives; "" where they are the same."""
    given = {"action": found.actions, "state": found.states}
    described = {"action": found.robot.action, "state": found.robot.state}
    parts = []
    for part, dimensions in described.items():
        if dimensions and dimensions != tuple(column.dimension for column in given[part]):
            rows = [
                [_text(d.name), _text(d.unit or "unknown"), _what(d), _text(_allowed(d)), d.open_at or ""]
                for d in dimensions
            ]
            head = ["", "unit", "what", "allowed", "open at"]
            parts.append(f"<h3>{part}</h3>{_table(head, rows, left=(1, 2, 3))}")
    return "".join(parts)


def _what(dimension: robots.Dimension) -> str:
    quantity = dimension.quantity.replace("_", " ")
    return _text(", ".join(filter(None, (dimension.kind, quantity, dimension.frame))))


def _gripper(grip: inspection.Gripper | None) -> str:
    if grip is None:
        return ""
    measured = "no opening was recorded, or it never changes"
    if math.isfinite(grip.correlation):
        measured = (
            f"measured opening {_number(grip.opened)} while open, {_number(grip.closed)} while closed, correlation "
            f"with the command {grip.correlation:+.2f}"
        )
    return (
        f"<p><b>Gripper</b>: open in {grip.open_share:.0%} of the steps, {grip.transitions:.1f} changes per episode, "
        f"none in {grip.never:.0%} of the episodes; {grip.binary_share:.0%} of the commands are exactly -1 or 1; "
        f"{measured}.</p>"
    )


def _pairing(found: inspection.Inspection) -> str:
    follow = found.follow
    parts = ["<h3>Does the state follow the commands?</h3>"]
    if follow.dimensions:
        rows = [
            [_text(d.name), _meter(d.correlation), _signed(d.correlation), _number(d.gain)] for d in follow.dimensions
        ]
        head = ["", "", "correlation", "measured / commanded motion"]
        parts.append(_table(head, rows, left=(1,)))
    else:
        parts.append("<p>Action and state have no dimension of one name.</p>")
    if follow.best_lag is not None:
        rows = [
            [f"{lag:+d}", _meter(value), _signed(value)] for lag, value in zip(pairing.LAGS, follow.lags, strict=True)
        ]
        parts.append("<h3>How many steps after its command does the state change?</h3>")
        parts.append(_table(["steps", "", "correlation"], rows, left=(1,)))
    parts.append("<h3>Do pictures change where the arm moves?</h3>")
    head = [
        "",
        "size",
        "decoded",
        "unreadable",
        "missing",
        "brightness",
        "one colour",
        "frozen pairs",
        "cuts",
        "correlation",
    ]
    rows = []
    for c in found.cameras:
        cells = [f"{c.width} x {c.height}", c.read, c.unreadable, c.missing, _number(c.brightness), c.flat]
        cells += [f"{c.frozen} of {c.pairs}", len(c.cuts), _number(c.correlation)]
        rows.append([_text(c.name), *map(str, cells)])
    parts.append(_table(head, rows))
    parts.append(
        '<p class="soft">Frozen: pixel for pixel the same although the arm is told to move. Cuts: abrupt changes in an '
        "episode. Correlation: ranks of the picture's change and of the action's size.</p>"
    )
    return "".join(parts)


def _meter(value: float) -> str:
    """A bar from the middle: to the right for a positive correlation."""
    if math.isnan(value):
        return ""
    left, width = 60 + min(value, 0) * 60, abs(value) * 60
    return (
        '<svg viewBox="0 0 120 14" width="120" height="14" role="img">'
        '<line class="axis" x1="60" x2="60" y1="0" y2="14"/>'
        f'<rect class="bar" x="{left:.1f}" y="3" width="{width:.1f}" height="8"/></svg>'
    )


def _notes(notes: Sequence[tuple[str, str]]) -> str:
    if not notes:
        return "<p>Nothing: it guessed nothing and left nothing out.</p>"
    return f"<pre>{_text(chr(10).join(text for _, text in notes))}</pre>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """left: columns besides the first that are aligned to the left. Cells are HTML."""

    def row(cells: Sequence[str], tag: str) -> str:
        marks = (' class="left"' if index in left else "" for index in range(len(cells)))
        return (
            "<tr>" + "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in zip(marks, cells, strict=True)) + "</tr>"
        )

    return f'<div class="scroll"><table>{row(head, "th")}{"".join(row(cells, "td") for cells in rows)}</table></div>'


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _signed(value: float) -> str:
    return "does not move" if math.isnan(value) else f"{value:+.2f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _text(value: str) -> str:
    return html.escape(value)
