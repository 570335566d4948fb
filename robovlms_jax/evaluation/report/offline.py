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

from robovlms_jax import atomic, json_lines
from robovlms_jax.control.robot import CALVIN, RobotSpec
from robovlms_jax.evaluation import offline
from robovlms_jax.evaluation.report import axes as axis_files
from robovlms_jax.evaluation.report import fonts, player, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

_MOTION = ("delta", "velocity")
_COLORS = (tables.BLUE, tables.YELLOW, tables.GREEN, tables.RED)
_PANELS_A_ROW = 4  # of curves; a run of many sources has some twenty metrics

_OPEN_LOOP = (
    "Open loop: at every recorded frame the policy predicts, and its prediction is compared with what the demonstrator "
    "did next; nothing that it predicts is executed, so mistakes do not add up. A small error here does not say that "
    "tasks succeed."
)
_GUESSES = (
    "Beside each error stands that of a guess which looks at nothing: {still}, or always the mean of the recorded "
    "actions. A policy that has learned something is below both; where the recording never moves they are 0, and no "
    "policy can be."
)
_OPEN_LOOP_EPISODES = (
    "The first action of every predicted chunk over the recorded one, frame by frame. The pictures are those of the "
    "recording all along: the robot goes where the demonstrator went."
)
_PHASES = (
    "Time in the training loop: step is computing (its share is called goodput in the log), data is waiting for "
    "batches, compile is making programs, checkpoint and evaluation are what their names say. A window is one training "
    "sample: the frames the policy looks back over, and the chunk of actions that it predicts."
)


@dataclasses.dataclass(frozen=True)
class EpisodeCurves:
    """One episode for a picture.

    instruction: shown above the picture.
    predicted, recorded: float[T, A] in dataset units: at every step, the action predicted for it and the recorded one.
    units: float[D], metres and radians per dataset unit.
    pictures: camera -> uint8[n, height, width, 3], what was seen at the steps `at` int[n].
    """

    instruction: str
    predicted: np.ndarray
    recorded: np.ndarray
    units: ArrayLike
    robot: RobotSpec = CALVIN
    pictures: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    at: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Compared:
    """What was found on the validation split.

    sums: of predicted and recorded actions; None: there is no split, and the report says so.
    sensitivity: the language probe; None leaves it out. episodes: to draw. robot: whose actions these are.
    augmented: pictures as training sees them (`films.draw_pairs`); None where it changes none.
    """

    sums: offline.Sums | None = None
    sensitivity: offline.Sensitivity | None = None
    episodes: Sequence[EpisodeCurves] = ()
    robot: RobotSpec = CALVIN
    augmented: Image | None = None


def write_report(
    directory: str | pathlib.Path,
    found: Compared,
    *,
    title: str,
    facts: Mapping[str, Any],
    closing: str,
    closed_loop: str = "",
) -> pathlib.Path:
    """Write report.md, report.json, PNGs, and report.html: all of it in one page, with the episodes to look through.

    Args:
      directory: the run's; its metrics.jsonl holds the loss curves.
      facts: what the run was, in the order to print: preset, device, parameters, steps, seconds, ...
      closing: Markdown of the last section, "The real thing".
      closed_loop: Markdown of the section "Closed loop"; empty leaves it out.
    Returns:
      Path of report.md.
    """
    directory = pathlib.Path(directory)
    curves = {name: curve for name, curve in read_metrics(directory / "metrics.jsonl").items() if "loss" in name}
    chunk = overall = None
    if found.sums is not None:
        chunk, overall = (offline.summarize(x, found.robot) for x in (found.sums, offline.over_chunk(found.sums)))
    _save_pictures(directory, curves, chunk, found)
    record = {
        "title": title,
        "facts": dict(facts),
        "losses": {name: {"first": values[0], "last": values[-1]} for name, (_, values) in curves.items()},
        "overall": None if overall is None else overall._asdict(),
        "chunk": None if chunk is None else chunk._asdict(),
        "language_sensitivity": None if found.sensitivity is None else found.sensitivity._asdict(),
    }
    tables.write_json(directory / "report.json", record)
    run = [tables.markdown(["run", ""], [[name, _fact(value)] for name, value in facts.items()])]
    run += [_PHASES] if "time in the training loop" in facts else []
    # The answer comes first: how often it succeeds, where that was tried.
    sections = [f"# {title}", *(["## Closed loop", closed_loop, "## The run"] if closed_loop else []), *run]
    if curves:
        sections += ["## Loss", _loss_table(curves), "![loss over steps](loss.png)"]
    sections += ["## Open loop: predicted against recorded actions", *_comparison(overall, found.robot)]
    if found.sensitivity is not None:
        sections += ["## Language sensitivity", _sensitivity_text(found.sensitivity, found.robot)]
    if found.episodes:
        sections += [
            "## Open loop along whole episodes",
            _OPEN_LOOP_EPISODES,
            *(f"![{e.instruction}](actions_{i}.png)" for i, e in enumerate(found.episodes)),
        ]
    if found.augmented is not None:
        found.augmented.save(directory / "augmented.png")
        sections += ["## Pictures in training", "![as stored, and as training sees them](augmented.png)"]
    sections += ["## The real thing", closing.strip("\n")]
    path = directory / "report.md"
    atomic.write_text(path, tables.join(sections))
    episodes = [_playable(episode) for episode in found.episodes if len(episode.at)]
    player.write(directory / "report.html", title, tables.join(sections), "Open loop, to look through", episodes)
    return path


def _playable(episode: EpisodeCurves) -> player.Episode:
    scale, panels = np.asarray(episode.units), []
    for place, axis in enumerate(axis_files.axes_of(episode.robot)):
        factor = scale[place] * axis.factor
        pair = {"recorded": episode.recorded, "predicted": episode.predicted}
        panels.append(player.Panel(axis.label, {name: x[:, axis.column] * factor for name, x in pair.items()}))
    for column in episode.robot.binary:
        name = episode.robot.action[column].name
        lines = {"recorded": episode.recorded[:, column], "predicted": episode.predicted[:, column]}
        panels.append(player.Panel(f"{name} (1 open, -1 closed)", lines))
    return player.Episode(episode.instruction, episode.pictures, episode.at, panels)


def _save_pictures(
    directory: pathlib.Path, curves: Mapping[str, Any], chunk: offline.Summary | None, found: Compared
) -> None:
    pictures = {}
    if chunk is not None:
        pictures["errors.png"] = draw_errors(chunk, found.robot)
    if curves:
        pictures["loss.png"] = draw_curves(curves)
    for index, episode in enumerate(found.episodes):
        pictures[f"actions_{index}.png"] = draw_actions(episode)
    for name, figure in pictures.items():
        figure.savefig(directory / name, dpi=tables.DPI)


def _comparison(overall: offline.Summary | None, robot: RobotSpec) -> list[str]:
    if overall is None:
        return ["The validation split has no annotated episode: nothing was compared."]
    return [
        f"{_OPEN_LOOP} Validation split, {int(overall.count):,} actions.",
        *(_error_table(overall, robot) if robot.scaled else []),
        *([_gripper_text(overall)] if robot.binary else []),
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
    """Metrics over steps, four panels a row. "train/loss" and "validation/loss" share a panel; long curves get a
    smoothed line."""
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, curve in curves.items():
        split, _, metric = name.rpartition("/")
        panels.setdefault(metric, {})[split or metric] = curve
    columns = min(len(panels), _PANELS_A_ROW)
    rows = -(-len(panels) // columns)
    figure = tables.figure(4.2 * columns, 3.7 * rows, layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in every[len(panels) :]:
        unused.remove()
    for axes, (metric, splits) in zip(every[: len(panels)], panels.items(), strict=True):
        for color, (split, (steps, values)) in zip(itertools.cycle(tables.COLORS), splits.items(), strict=False):
            if len(steps) > 20:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=1, label=f"{split}, as logged")
                axes.plot(steps, _smooth(values), color=color, linewidth=2, label=f"{split}, smoothed")
            else:
                line = "-" if len(steps) > 1 else ""
                axes.plot(
                    steps, values, color=color, marker="o", markersize=4, linewidth=1.5, linestyle=line, label=split
                )
        axes.set(title=metric.replace("_", " "), xlabel="step")
        _from_zero(axes)
        # below the panel, where no curve can be
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))
        _tidy(axes)
    return figure


def _from_zero(axes: Axes) -> None:
    """From 0 to a twentieth above the highest value; matplotlib leaves a twentieth of the values' range."""
    highest = axes.dataLim.y1
    axes.set_ylim(0, 1.05 * highest if highest > 0 else None)


def draw_errors(chunk: offline.Summary, robot: RobotSpec = CALVIN) -> Figure:
    """Mean absolute error and gripper decisions at every chunk position; dashed: the trivial predictions to beat."""
    axes, ahead = axis_files.axes_of(robot), np.arange(len(chunk.count))
    groups = axis_files.groups_of(axes)
    count = len(groups) + bool(robot.binary)
    figure = tables.figure(4.2 * count, 4.0, layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    baseline = {"color": tables.GRAY, "linestyle": "--", "linewidth": 1}
    for panel, places in zip(panels, groups, strict=False):
        for place, color in zip(places, itertools.cycle(_COLORS), strict=False):
            axis = axes[place]
            error, still = (x[:, place] * axis.factor for x in (chunk.mae, chunk.mae_still))
            panel.plot(ahead, error, color=color, marker="o", markersize=4, label=axis.name)
            if robot.action[axis.column].kind in _MOTION:  # of places, no motion is no prediction
                panel.plot(ahead, still, color=color, linestyle="--", linewidth=1)
        if any(robot.action[axes[place].column].kind in _MOTION for place in places):
            panel.plot([], [], **baseline, label="dashed: no motion")
        unit = axes[places[0]].unit
        panel.set(title=f"{axes[places[0]].title} error{f' ({unit})' if unit else ''}", xlabel="steps ahead")
        _from_zero(panel)
    if robot.binary:
        gripper = panels[-1]
        gripper.plot(ahead, chunk.gripper_accuracy, color=tables.RED, marker="o", markersize=4, label="right")
        gripper.plot(ahead, chunk.gripper_f1, color=tables.BLUE, marker="s", markersize=4, label="F1 of closed")
        gripper.plot(ahead, chunk.gripper_majority, **baseline, label="dashed: commoner state")
        gripper.set(title="gripper: share of right decisions", xlabel="steps ahead", ylim=(0, 1.05))
    for panel in panels:  # below the panel, where no curve can be
        panel.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))
        _tidy(panel)
    return figure


def draw_actions(episode: EpisodeCurves) -> Figure:
    """A panel per dimension, predicted over recorded: a column per kind of number, below them the binary grippers."""
    robot, axes = episode.robot, axis_files.axes_of(episode.robot)
    columns = axis_files.groups_of(axes)
    rows = max((len(places) for places in columns), default=0)
    figure = tables.figure(5 * max(len(columns), 1), 1.4 + 2.05 * rows + 0.65 * len(robot.binary), layout="constrained")
    heights = (*(1,) * rows, *(0.5,) * len(robot.binary))
    grid = figure.add_gridspec(len(heights), max(len(columns), 1), height_ratios=heights)
    panels = {
        place: figure.add_subplot(grid[row, column])
        for column, places in enumerate(columns)
        for row, place in enumerate(places)
    }
    grippers = [figure.add_subplot(grid[rows + i, :]) for i in range(len(robot.binary))]
    # The recorded line is thin and on top, so both show where they coincide.
    curves = ((episode.predicted, tables.RED, "predicted", 2.4), (episode.recorded, tables.BLACK, "recorded", 1.1))
    scale = np.asarray(episode.units) * [axis.factor for axis in axes]
    steps = np.arange(len(episode.recorded))
    for actions, color, label, width in curves:
        for place, panel in panels.items():
            values = actions[:, axes[place].column] * scale[place]
            panel.plot(steps, values, color=color, linewidth=width, label=label)
        for column, panel in zip(robot.binary, grippers, strict=True):
            panel.step(steps, actions[:, column], color=color, linewidth=width, where="mid", label=label)
    _finish(episode, panels, grippers, columns, scale)
    for panel in (*panels.values(), *grippers):
        panel.set_xlim(0, max(len(steps) - 1, 1))
        _tidy(panel)
    sentence, font = fonts.with_font(episode.instruction, 13)
    title = figure.suptitle("\n".join(textwrap.wrap(f"open loop: “{sentence}”", 90)), fontsize=13)
    if sentence == episode.instruction and fonts.korean_in(sentence):
        title.set_font(pathlib.Path(font.path))
        title.set_fontsize(13)
    figure.align_ylabels(list(panels.values()))
    # Below all panels: above one of them, its row would stand lower in every column.
    lines = (list(panels.values()) or grippers)[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, ncols=2, loc="outside lower right")
    return figure


def _finish(
    episode: EpisodeCurves,
    panels: Mapping[int, Axes],
    grippers: Sequence[Axes],
    columns: Sequence[Sequence[int]],
    scale: np.ndarray,
) -> None:
    """Labels, and one scale per column of motions: half a dataset unit or more, or a still axis would look lively."""
    robot, axes = episode.robot, axis_files.axes_of(episode.robot)
    for places in columns:
        kind, side = robot.action[axes[places[0]].column].kind, [panels[place] for place in places]
        for place, panel in zip(places, side, strict=True):
            panel.set_ylabel(axes[place].label)
            panel.tick_params(labelbottom=place == places[-1])
        side[0].set_title(f"{axes[places[0]].title}{' per step' if kind == 'delta' else ''}", fontsize=10, loc="left")
        if kind == "delta":
            limit = max(scale[places[0]] / 2, *(abs(bound) for panel in side for bound in panel.get_ylim()))
            for panel in side:
                panel.axhline(0, color=tables.GRAY, linewidth=0.6, zorder=0)
                panel.set_ylim(-limit, limit)
    for column, panel in zip(robot.binary, grippers, strict=True):
        panel.set(yticks=[-1, 1], yticklabels=["closed", "open"], ylim=(-1.4, 1.4), xlabel="control step")
        panel.set_ylabel(robot.action[column].name)


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


def _error_table(overall: offline.Summary, robot: RobotSpec) -> list[str]:
    axes = axis_files.axes_of(robot)
    factors = np.array([axis.factor for axis in axes])
    columns = [x * factors for x in (overall.mae, overall.mae_still, overall.rmse, overall.rmse_mean)]
    rows = [[axis.label, *(tables.significant(column[i]) for column in columns)] for i, axis in enumerate(axes)]
    places = all(robot.action[axis.column].kind in ("absolute", "continuous") for axis in axes)
    still = "always 0" if places else "no motion"
    head = ["per step", "mean abs. error", f"that of {still}", "root mean square error", "that of always the mean"]
    return [tables.markdown(head, rows), _GUESSES.format(still=still)]


def _gripper_text(overall: offline.Summary) -> str:
    return (
        f"Gripper: {tables.percent(overall.gripper_accuracy)} right (always the commoner state: "
        f"{tables.percent(overall.gripper_majority)}), F1 of closed {tables.significant(overall.gripper_f1)} "
        "(1: every frame with a closed hand is found, and no other)."
    )


def _sensitivity_text(sensitivity: offline.Sensitivity, robot: RobotSpec) -> str:
    moves = [
        f"{tables.significant(value * factor)}{space}{unit}"
        for value, factor, space, unit in (
            (sensitivity.translation_m, 1000.0, " ", "mm"),
            (sensitivity.rotation_rad, 180 / math.pi, "", "°"),
        )
        if not math.isnan(value)
    ]
    how = f"move the predicted actions by {' and '.join(moves)} per axis and step" if moves else "change them"
    flips = f" {tables.percent(sensitivity.gripper_flips)} of the gripper decisions flip." if robot.binary else ""
    return (
        f"The same frames under another instruction {how}. That is {tables.significant(sensitivity.relative)} of the "
        f"spread of all predictions (0: the instruction is ignored; 2: nothing else matters).{flips}"
    )


def _fact(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
