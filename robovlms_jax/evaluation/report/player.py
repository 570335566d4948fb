"""Episodes to look through on a page: all cameras and all curves under one cursor.

Curves are drawn here and stand on the page without a script; the script moves the cursor and changes pictures.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from robovlms_jax import atomic
from robovlms_jax.control import robot as robots
from robovlms_jax.evaluation.report import page, tables

_WIDTH, _HEIGHT = 460, 84
_PICTURE = 260
"""Of a panel of curves; widest picture: in pixels."""

STYLE = """
.player { border-top: 1px solid var(--line); padding: 14px 0 6px; } .player:first-of-type { border-top: 0; }
.player header { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline; }
.player .outcome { font-size: 13px; font-weight: 600; } .player .cameras { display: flex; flex-wrap: wrap; gap: 10px; }
.player figure { margin: 8px 0 0; } .player img { display: block; width: 220px; max-width: 100%; border-radius: 6px; }
.player figcaption { color: var(--soft); font-size: 12px; }
.player .controls { display: flex; gap: 10px; align-items: center; margin: 10px 0 6px; }
.player .controls button { font: inherit; width: 76px; padding: 2px 0; border-radius: 8px; cursor: pointer;
  border: 1px solid var(--line); background: var(--back); color: var(--text); }
.player input { flex: 1; min-width: 0; accent-color: var(--blue); }
.player output { color: var(--soft); font-size: 13px; min-width: 96px; text-align: right;
  font-variant-numeric: tabular-nums; }
.player .curves { display: grid; gap: 10px 20px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.player .key { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 12px; color: var(--soft); }
.player .problem { color: var(--problem); } .player .fine { color: var(--fine); }
.player .key i { display: inline-block; width: 14px; height: 3px; margin-right: 5px;
  vertical-align: middle; }
.player svg { width: 100%; } .player polyline { fill: none; stroke-width: 1.6; vector-effect: non-scaling-stroke; }
.player .bound { stroke: var(--soft); stroke-dasharray: 3 4; vector-effect: non-scaling-stroke; }
.player .cursor { stroke: var(--look); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
"""

SCRIPT = """
for (const player of document.querySelectorAll(".player")) {
  const data = JSON.parse(player.querySelector("script").textContent);
  const slider = player.querySelector("input"), said = player.querySelector("output");
  const button = player.querySelector("button"), pictures = [...player.querySelectorAll("img")];
  const cursors = [...player.querySelectorAll(".cursor")];
  let timer = 0;
  const show = (step) => {
    let nearest = 0;
    data.at.forEach((at, i) => { if (at <= step) nearest = i; });
    pictures.forEach((picture) => {
      const frame = data.frames[picture.dataset.camera][nearest];
      if (frame) picture.src = frame;
    });
    cursors.forEach((line) => {
      const x = step / Math.max(data.steps - 1, 1) * data.width;
      line.setAttribute("x1", x); line.setAttribute("x2", x);
    });
    said.textContent = `step ${step} of ${data.steps - 1}`;
  };
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play"; };
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) >= data.steps - 1) slider.value = 0;
    button.textContent = "Pause";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show(Number(slider.value));
      if (Number(slider.value) >= data.steps - 1) stop();
    }, 1000 / data.rate);
  });
  show(0);
}
"""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves over the steps of an episode that share a scale.

    lines: name -> float[T]; NaN leaves a gap. low, high: bounds to draw, infinite: none.
    """

    title: str
    lines: Mapping[str, np.ndarray]
    low: float = -math.inf
    high: float = math.inf


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode. pictures: camera -> uint8[height, width, 3] or None where it cannot be read, one for each of `at`.

    at: int[n], the steps that the pictures were taken at. outcome: such as "solved"; good: whether that is good news.
    rate: steps per second when played. success: whether the task was solved, where that is known.
    """

    title: str
    pictures: Mapping[str, Sequence[np.ndarray | None]]
    at: Sequence[int]
    panels: Sequence[Panel] = ()
    outcome: str = ""
    good: bool = True
    rate: float = 20.0
    success: bool | None = None

    @property
    def steps(self) -> int:
        lengths = [len(values) for panel in self.panels for values in panel.lines.values()]
        return max([*lengths, *(step + 1 for step in self.at), 1])


def thinned(length: int, most: int) -> np.ndarray:
    """int[n]: up to `most` of `length` steps, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int)) if length else np.zeros(0, int)


def panels_of(values: np.ndarray, dimensions: Sequence[robots.Dimension], what: str, most: int = 4) -> list[Panel]:
    """Dimensions of one quantity and unit share a panel, `most` at a time.

    values: float[T, len(dimensions)]. what: "action" or "state", before the quantity in a panel's title.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for column, dimension in enumerate(dimensions):
        groups.setdefault((dimension.quantity, dimension.unit), []).append(column)
    made = []
    for (quantity, unit), columns in groups.items():
        for some in (columns[i : i + most] for i in range(0, len(columns), most)):
            title = f"{what}: {quantity.replace('_', ' ')}{f' ({unit})' if unit else ''}"
            bounds = {(dimensions[column].low, dimensions[column].high) for column in some}
            low, high = bounds.pop() if len(bounds) == 1 else (-math.inf, math.inf)
            made.append(Panel(title, {dimensions[c].name: values[:, c] for c in some}, low, high))
    return made


def write(path: pathlib.Path, title: str, text: str, heading: str, episodes: Sequence[Episode]) -> None:
    """A page with a report's Markdown, whose pictures lie beside `path`, and episodes to look through below it."""
    body = page.from_markdown(text, path.parent)
    if episodes:
        body += f"<section><h2>{html.escape(heading)}</h2>{render(episodes)}</section>"
    atomic.write_text(path, page.document(title, body, style=STYLE, script=SCRIPT))


def render(episodes: Sequence[Episode]) -> str:
    """HTML of all episodes, what did not go well first; a page needs STYLE and SCRIPT beside it."""
    return "".join(_episode(episode) for episode in sorted(episodes, key=lambda episode: episode.good))


def _episode(episode: Episode) -> str:
    frames = {
        name: [None if picture is None else page.data_uri(picture, _PICTURE) for picture in taken]
        for name, taken in episode.pictures.items()
    }
    data = {"at": [int(step) for step in episode.at], "steps": episode.steps, "frames": frames}
    data |= {"width": _WIDTH, "rate": episode.rate}
    figures = "".join(
        f'<figure><img alt="{html.escape(name)} camera" data-camera="{html.escape(name)}" '
        f'src="{next(filter(None, taken), "")}"><figcaption>{html.escape(name)}</figcaption></figure>'
        for name, taken in frames.items()
    )
    color = "fine" if episode.good else "problem"
    outcome = f'<span class="outcome {color}">{html.escape(episode.outcome)}</span>' if episode.outcome else ""
    title = html.escape(episode.title or "(blank)")
    # "</" would end the script element wherever it stands.
    text = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    return (
        f'<div class="player"><header><b>{title}</b>{outcome}</header><div class="cameras">{figures}</div>'
        '<div class="controls"><button type="button">Play</button>'
        f'<input type="range" min="0" max="{episode.steps - 1}" value="0" aria-label="step of: {title}">'
        f'<output>step 0 of {episode.steps - 1}</output></div><div class="curves">'
        f"{''.join(_panel(panel, episode.steps) for panel in episode.panels)}</div>"
        f'<script type="application/json">{text}</script></div>'
    )


def _panel(panel: Panel, steps: int) -> str:
    stacked = np.concatenate([np.asarray(values, float) for values in panel.lines.values()])
    finite = stacked[np.isfinite(stacked)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    room = max((high - low) * 0.06, 1e-6)
    low, high = low - room, high + room

    def place(value: float) -> float:
        return _HEIGHT * (high - value) / (high - low)

    parts, key = [], []
    for bound in (panel.low, panel.high):
        if low <= bound <= high:
            parts.append(f'<line class="bound" x1="0" x2="{_WIDTH}" y1="{place(bound):.1f}" y2="{place(bound):.1f}"/>')
    for index, (name, values) in enumerate(panel.lines.items()):
        color = tables.COLORS[index % len(tables.COLORS)]
        key.append(f'<span><i style="background:{color}"></i>{html.escape(name)}</span>')
        for run in _runs(np.asarray(values, float)):
            points = " ".join(f"{i / max(steps - 1, 1) * _WIDTH:.1f},{place(value):.1f}" for i, value in run)
            parts.append(f'<polyline stroke="{color}" points="{points}"/>')
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="0" y2="{_HEIGHT}"/>')
    ends = f"{tables.significant(low + room)} to {tables.significant(high - room)}"
    return (
        f'<div><div class="key"><b>{html.escape(panel.title)}</b><span>{ends}</span>{"".join(key)}</div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" height="{_HEIGHT}" role="img" '
        f'aria-label="{html.escape(panel.title)}">{"".join(parts)}</svg></div>'
    )


def _runs(values: np.ndarray) -> list[list[tuple[int, float]]]:
    """(step, value) of every stretch without a gap."""
    runs: list[list[tuple[int, float]]] = [[]]
    for step, value in enumerate(values.tolist()):
        if math.isfinite(value):
            runs[-1].append((step, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
