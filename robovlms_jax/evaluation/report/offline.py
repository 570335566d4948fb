"""The report of a run: report.md to read, report.json to compare, and the pictures, all in the run's directory.

matplotlib is imported when a picture is drawn, and drawn to files only, so no display or backend is involved.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from robovlms_jax import json_lines
from robovlms_jax.evaluation import offline
from robovlms_jax.evaluation.report import tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = ("x", "y", "z", "roll", "pitch", "yaw")
# People read millimetres and degrees; everything else here is in metres and radians.
_READABLE = np.array([1000.0] * 3 + [180 / math.pi] * 3)
_UNITS = ("mm",) * 3 + ("°",) * 3


@dataclasses.dataclass(frozen=True)
class EpisodeCurves:
    """One episode for a picture.

    instruction: shown above the picture.
    predicted, recorded: float[T, 7] in dataset units: at every step, the action predicted for it and the recorded one.
    units: float[6], metres and radians per dataset unit.
    """

    instruction: str
    predicted: np.ndarray
    recorded: np.ndarray
    units: ArrayLike


def write_report(
    directory: str | pathlib.Path,
    *,
    title: str,
    facts: Mapping[str, Any],
    sums: offline.Sums | None,
    closing: str,
    sensitivity: offline.Sensitivity | None = None,
    episodes: Sequence[EpisodeCurves] = (),
    closed_loop: str = "",
) -> pathlib.Path:
    """Write report.md, report.json and PNGs.

    Args:
      directory: the run's; its metrics.jsonl holds the loss curves.
      facts: what the run was, in the order to print: preset, device, parameters, steps, seconds, ...
      sums: of the validation split; None: there is none, and the report says so.
      sensitivity: the language probe; None leaves it out.
      closing: Markdown of the last section, "The real thing".
      closed_loop: Markdown of the section "Closed loop"; empty leaves it out.
    Returns:
      Path of report.md.
    """
    directory = pathlib.Path(directory)
    curves = {name: curve for name, curve in read_metrics(directory / "metrics.jsonl").items() if "loss" in name}
    chunk = overall = None
    pictures = {}
    if sums is not None:
        chunk, overall = offline.summarize(sums), offline.summarize(offline.over_chunk(sums))
        pictures["errors.png"] = draw_errors(chunk)
    if curves:
        pictures["loss.png"] = draw_curves(curves)
    for index, episode in enumerate(episodes):
        pictures[f"actions_{index}.png"] = draw_actions(episode)
    for name, figure in pictures.items():
        figure.savefig(directory / name, dpi=tables.DPI)

    record = {
        "title": title,
        "facts": dict(facts),
        "losses": {name: {"first": values[0], "last": values[-1]} for name, (_, values) in curves.items()},
        "overall": None if overall is None else overall._asdict(),
        "chunk": None if chunk is None else chunk._asdict(),
        "language_sensitivity": None if sensitivity is None else sensitivity._asdict(),
    }
    tables.write_json(directory / "report.json", record)
    sections = [f"# {title}", tables.markdown(["run", ""], [[name, _fact(value)] for name, value in facts.items()])]
    if closed_loop:
        sections += ["## Closed loop", closed_loop]
    if curves:
        sections += ["## Loss", _loss_table(curves), "![loss over steps](loss.png)"]
    sections += ["## Predicted against recorded actions", *_comparison(overall)]
    if sensitivity is not None:
        sections += ["## Language sensitivity", _sensitivity_text(sensitivity)]
    if episodes:
        sections += ["## Episodes", *(f"![{e.instruction}](actions_{i}.png)" for i, e in enumerate(episodes))]
    sections += ["## The real thing", closing.strip("\n")]
    path = directory / "report.md"
    path.write_text(tables.join(sections), encoding="utf-8")
    return path


def _comparison(overall: offline.Summary | None) -> list[str]:
    if overall is None:
        return ["The validation split has no annotated episode: nothing was compared."]
    return [
        f"Validation split, {int(overall.count):,} actions.",
        _error_table(overall),
        _gripper_text(overall),
        "![error at every chunk position](errors.png)",
    ]


def read_metrics(path: str | pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """metrics.jsonl as name -> (steps int[n], values float[n]), in order of appearance; empty when there is no file.

    Of a step that was logged twice, the later line counts. Raises ValueError naming a damaged line.
    """
    points: dict[str, dict[int, float]] = {}
    rows = json_lines.read(
        pathlib.Path(path), lambda _, row: (row.pop("step"), row), expected="a JSON object with a step"
    )
    for step, values in rows:
        for name, value in values.items():
            points.setdefault(name, {})[step] = value
    return {name: (np.array(sorted(p)), np.array([p[step] for step in sorted(p)])) for name, p in points.items()}


def draw_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Metrics over steps. "train/loss" and "validation/loss" share a panel; long curves get a smoothed line."""
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, curve in curves.items():
        split, _, metric = name.rpartition("/")
        panels.setdefault(metric, {})[split or metric] = curve
    figure = tables.figure(4.2 * len(panels), 3.4, layout="constrained")
    for axes, (metric, splits) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for color, (split, (steps, values)) in zip(itertools.cycle(tables.COLORS), splits.items(), strict=False):
            if len(steps) > 20:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
                axes.plot(steps, _smooth(values), color=color, linewidth=2, label=split)
            else:
                axes.plot(steps, values, color=color, marker="o", markersize=4, linewidth=1.5, label=split)
        axes.set(title=metric.replace("_", " "), xlabel="step")
        axes.set_ylim(bottom=0)
        if len(splits) > 1:
            axes.legend(frameon=False)
        _tidy(axes)
    return figure


def draw_errors(chunk: offline.Summary) -> Figure:
    """Mean absolute error and gripper decisions at every chunk position; dashed: the trivial predictions to beat."""
    figure = tables.figure(12.6, 3.6, layout="constrained")
    ahead = np.arange(len(chunk.count))
    mae, still = chunk.mae * _READABLE, chunk.mae_still * _READABLE
    translation, rotation, gripper = figure.subplots(1, 3)
    baseline = {"color": tables.GRAY, "linestyle": "--", "linewidth": 1}
    for axes, first, title in ((translation, 0, "translation error (mm)"), (rotation, 3, "rotation error (°)")):
        for axis, color in zip(range(first, first + 3), (tables.BLUE, tables.YELLOW, tables.GREEN), strict=True):
            axes.plot(ahead, mae[:, axis], color=color, marker="o", markersize=4, label=AXES[axis])
            axes.plot(ahead, still[:, axis], color=color, linestyle="--", linewidth=1)
        axes.plot([], [], **baseline, label="no motion")
        axes.set(title=title, xlabel="steps ahead")
        axes.set_ylim(bottom=0)
    gripper.plot(ahead, chunk.gripper_accuracy, color=tables.RED, marker="o", markersize=4, label="accuracy")
    gripper.plot(ahead, chunk.gripper_f1, color=tables.BLUE, marker="s", markersize=4, label="F1 of closed")
    gripper.plot(ahead, chunk.gripper_majority, **baseline, label="always the commoner")
    gripper.set(title="gripper", xlabel="steps ahead", ylim=(0, 1.05))
    for axes in (translation, rotation, gripper):
        axes.legend(frameon=False, fontsize=8, ncols=2)
        _tidy(axes)
    return figure


def draw_actions(episode: EpisodeCurves) -> Figure:
    """Seven panels, predicted over recorded: three translations, three rotations, the gripper."""
    scale = np.asarray(episode.units) * _READABLE
    figure = tables.figure(10, 8.2, layout="constrained")
    grid = figure.add_gridspec(4, 2, height_ratios=(1, 1, 1, 0.5))
    steps = np.arange(len(episode.recorded))
    panels = [figure.add_subplot(grid[axis % 3, axis // 3]) for axis in range(len(AXES))]
    gripper = figure.add_subplot(grid[3, :])
    # The recorded line is thin and on top, so both show where they coincide.
    curves = ((episode.predicted, tables.RED, "predicted", 2.4), (episode.recorded, tables.BLACK, "recorded", 1.1))
    for actions, color, label, width in curves:
        for axis, axes in enumerate(panels):
            axes.plot(steps, actions[:, axis] * scale[axis], color=color, linewidth=width, label=label)
        gripper.step(steps, actions[:, -1], color=color, linewidth=width, where="mid")
    for axis, axes in enumerate(panels):
        axes.set_ylabel(f"{AXES[axis]} ({_UNITS[axis]})")
        axes.axhline(0, color=tables.GRAY, linewidth=0.6, zorder=0)
        axes.tick_params(labelbottom=axis % 3 == 2)
    for first in (0, 3):  # one scale per column, half a dataset unit or more, or a still axis would look lively
        side = panels[first : first + 3]
        limit = max(scale[first] / 2, *(abs(bound) for axes in side for bound in axes.get_ylim()))
        for axes in side:
            axes.set_ylim(-limit, limit)
    gripper.set(yticks=[-1, 1], yticklabels=["closed", "open"], ylim=(-1.4, 1.4), xlabel="control step")
    gripper.set_ylabel("gripper")
    for axes in (*panels, gripper):
        axes.set_xlim(0, max(len(steps) - 1, 1))
        _tidy(axes)
    figure.suptitle("\n".join(textwrap.wrap(f"“{episode.instruction}”", 90)), fontsize=13)
    figure.align_ylabels(panels)
    panels[0].set_title("translation per step", fontsize=10, loc="left")
    panels[3].set_title("rotation per step", fontsize=10, loc="left")
    panels[3].legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    return figure


def _tidy(axes: Axes) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)  # every x axis counts steps
    tables.tidy(axes)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the curve; shorter at its ends."""
    half = len(values) // 40 + 1
    total = np.concatenate([[0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _loss_table(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    rows = [[name, f"{v[0]:.4g} (step {s[0]})", f"{v[-1]:.4g} (step {s[-1]})"] for name, (s, v) in curves.items()]
    return tables.markdown(["", "first", "last"], rows)


def _error_table(overall: offline.Summary) -> str:
    columns = [x * _READABLE for x in (overall.mae, overall.mae_still, overall.rmse, overall.rmse_mean)]
    rows = [
        [f"{AXES[i]} ({_UNITS[i]})", *(tables.significant(column[i]) for column in columns)] for i in range(len(AXES))
    ]
    head = ["per step", "mean abs. error", "of no motion", "root mean square error", "of always the mean"]
    return tables.markdown(head, rows)


def _gripper_text(overall: offline.Summary) -> str:
    return (
        f"Gripper: {tables.percent(overall.gripper_accuracy)} right (always the commoner state: "
        f"{tables.percent(overall.gripper_majority)}), F1 of closed {tables.significant(overall.gripper_f1)}."
    )


def _sensitivity_text(sensitivity: offline.Sensitivity) -> str:
    millimetres, degrees = sensitivity.translation_m * _READABLE[0], sensitivity.rotation_rad * _READABLE[3]
    return (
        "The same frames under another instruction move the predicted actions by "
        f"{tables.significant(millimetres)} mm and {tables.significant(degrees)}° per axis and step. "
        f"That is {tables.significant(sensitivity.relative)} of the spread of all predictions "
        "(0: the instruction is ignored; 2: nothing else matters). "
        f"{tables.percent(sensitivity.gripper_flips)} of the gripper decisions flip."
    )


def _fact(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
