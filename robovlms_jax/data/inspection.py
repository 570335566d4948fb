"""What a dataset holds, measured on a sample: ranges, pictures, sentences, whether rows and pictures belong together.

`inspect` reads; everything it returns are numbers. `findings.py` says what they mean, `experiments/inspect_data.py`
shows them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from robovlms_jax.actions import statistics
from robovlms_jax.control import robot as robots
from robovlms_jax.data import base, pairing, sampling
from robovlms_jax.data import sentences as texts

BINS = 40
_PICTURES = 24
"""Of each camera and episode that is shown."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much is read. frames: rows of numbers. pictures: of each camera. shown: episodes whose pictures are kept."""

    frames: int = 5000
    pictures: int = 300
    shown: int = 4

    def __post_init__(self):
        for field, least in (("frames", 2), ("pictures", 0), ("shown", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}={getattr(self, field)} must be at least {least}.")


@dataclasses.dataclass(frozen=True)
class Column:
    """One dimension of the sample.

    summary: key of `actions.statistics.summarize` -> value; all NaN where no value could be read.
    counts: int[BINS], a histogram from the smallest to the largest value.
    at_min, at_max: shares of the values that equal the smallest and the largest one.
    outside: share outside of what the robot's description allows.
    distinct: how many different values.
    """

    dimension: robots.Dimension
    summary: Mapping[str, float]
    counts: np.ndarray
    at_min: float
    at_max: float
    outside: float
    distinct: int


@dataclasses.dataclass(frozen=True)
class Gripper:
    """The last action dimension, 1 open and -1 closed.

    open_share: of the commands. binary_share: of the commands that are exactly -1 or 1.
    transitions: mean changes between open and closed per episode. never: share of episodes without any.
    correlation: of command and recorded opening; NaN where no opening is recorded or one of them never changes.
    opened, closed: mean recorded opening while the command is open, and closed.
    """

    open_share: float
    binary_share: float
    transitions: float
    never: float
    correlation: float
    opened: float
    closed: float


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Sentences of a split.

    counts: (sentence, episodes), most frequent first.
    blank: episodes without any. odd: sentences that look like a program's values rather than English.
    twins: groups of sentences that differ in case, spaces or punctuation only.
    rewordings: episodes that have other wordings, too.
    """

    counts: tuple[tuple[str, int], ...]
    blank: int
    odd: tuple[str, ...]
    twins: tuple[tuple[str, ...], ...]
    rewordings: int

    @property
    def longest(self) -> str:
        return max((sentence for sentence, _ in self.counts), key=lambda s: (len(s), s), default="")


@dataclasses.dataclass(frozen=True)
class Split:
    """lengths: int[episodes], steps that are learned from."""

    lengths: np.ndarray
    instructions: Instructions

    @property
    def num_steps(self) -> int:
        return int(self.lengths.sum())


@dataclasses.dataclass(frozen=True)
class Shown:
    """An episode for people to look through.

    first: id of its first frame. steps: int[n], those that pictures are kept of, of those that have some: the first and
      the last among them.
    pictures: camera -> uint8[height, width, 3] of each of `steps`, or None where it cannot be read.
    actions, states: float64[T, d] of all its steps, NaN where a frame cannot be read; None where there are none.
    """

    instruction: str
    first: int
    steps: np.ndarray
    pictures: Mapping[str, tuple[np.ndarray | None, ...]]
    actions: np.ndarray | None
    states: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """All about one dataset. Numbers and pictures are those of the training split.

    robot, described: what the reader says about the robot, or what every `base.Dataset` promises. Its numbers may be
      those in the files; `actions` and `states` are those that the reader gives.
    num_sampled, num_runs: frames and episodes whose numbers were read. num_still: of these, steps whose arm does not
      move at all; NaN where actions are absolute.
    unreadable: field -> (frames, first message).
    shown_share: of all frames that are learned from, those that were recorded with pictures.
    """

    name: str
    robot: robots.RobotSpec
    described: bool
    splits: Mapping[str, Split]
    num_sampled: int
    num_runs: int
    actions: tuple[Column, ...]
    states: tuple[Column, ...]
    gripper: Gripper | None
    lint: tuple[statistics.Finding, ...]
    still_share: float
    follow: pairing.Follow
    cameras: tuple[pairing.CameraCheck, ...]
    same_pictures: tuple[tuple[str, str], ...]
    unreadable: Mapping[str, tuple[int, str]]
    shown: tuple[Shown, ...]
    shown_share: float = 1.0


def inspect(splits: Mapping[str, base.Dataset], budget: Budget = Budget()) -> Inspection:
    """Measure a dataset.

    Args:
      splits: "training" and, where there is one, "validation".
    Raises:
      ValueError: the training split has no episode with a step, or none of the frames tried has an action.
    """
    dataset = splits["training"]
    spec, described = describe(dataset)
    runs = sampling.choose(dataset.episodes, budget.frames)
    if not runs:
        raise ValueError(f"{dataset.name} has {len(dataset.episodes)} episodes, none with a step to learn from.")
    unreadable: dict[str, tuple[int, str]] = {}
    actions = sampling.read_numbers(dataset.actions, runs, "actions", unreadable)
    if actions is None:
        raise ValueError(
            f"{dataset.name}: none of {len(runs)} episodes has a readable action: {unreadable['actions'][1]}"
        )
    action_dimensions = spec.action
    seven = _describes(action_dimensions)
    states, state_dimensions = _states(dataset, spec, runs, unreadable)
    openings = sampling.read_numbers(_opening_reader(dataset), runs, "gripper opening", {})
    stacked = np.concatenate(actions)
    finite = stacked[np.isfinite(stacked).all(axis=1)]
    scale = np.maximum(finite.std(axis=0), 1e-9) if len(finite) else np.ones(stacked.shape[1])
    pairs = sampling.choose_pairs(dataset.episodes, budget.pictures, None if dataset.shows_all else dataset.shown)
    cameras, same = pairing.check_cameras(dataset, pairs, action_dimensions, scale)
    return Inspection(
        dataset.name,
        spec,
        described,
        {split: Split(_lengths(part), sentences(part.episodes)) for split, part in splits.items()},
        num_sampled=len(stacked),
        num_runs=len(runs),
        actions=columns(stacked, action_dimensions),
        states=columns(np.concatenate(states), state_dimensions) if states else (),
        gripper=gripper(actions, openings) if seven else None,
        lint=_lint(dataset, finite, openings, np.isfinite(stacked).all(axis=1)) if seven else (),
        still_share=_still(finite, action_dimensions),
        follow=pairing.follow(actions, states or [], action_dimensions, state_dimensions),
        cameras=cameras,
        same_pictures=same,
        unreadable=unreadable,
        shown=_shown(dataset, spec, budget.shown),
        shown_share=1.0 if dataset.shows_all else _shown_share(dataset),
    )


def describe(dataset: base.Dataset) -> tuple[robots.RobotSpec, bool]:
    """(robot, whether the reader describes it). Without a description: what `base.Dataset` promises of all."""
    if dataset.robot is not base.Dataset.robot:
        return dataset.robot, True
    cameras = tuple(robots.Camera(name, *size) for name, size in dataset.image_sizes.items())
    if tuple(dataset.action_units) == base.CALVIN_UNITS:
        return dataclasses.replace(robots.CALVIN, cameras=cameras), True
    rate = float(getattr(dataset, "control_hz", 0.0))
    return robots.RobotSpec("not described", rate, cameras, _seven(dataset.action_units), _seven()), False


def _seven(units: Sequence[float] | None = None) -> tuple[robots.Dimension, ...]:
    """What every dataset's actions are, metres and radians per unit given; without `units` what its `proprio` is."""
    quantities = ["position"] * 3 + ["euler_xyz"] * 3
    arm = []
    for index, quantity in enumerate(quantities):
        symbol = "m" if quantity == "position" else "rad"
        unit = symbol if units is None or units[index] == 1 else f"{units[index]:g} {symbol}"
        arm.append(
            robots.Dimension(
                robots.CALVIN.action_names[index], unit, "absolute" if units is None else "delta", quantity
            )
        )
    return (*arm, robots.GRIPPER)


def _describes(dimensions: Sequence[robots.Dimension]) -> bool:
    """Whether a robot's description is one of the seven numbers that a reader gives (`base.Dataset`) rather than of
    those in the files, whose grippers come first, run from 0 to 1 or in per cent, or are missing."""
    grippers = [(i, d.low, d.high) for i, d in enumerate(dimensions) if d.quantity == "gripper"]
    return len(dimensions) == len(robots.CALVIN.action) and grippers == [(len(dimensions) - 1, -1.0, 1.0)]


def _states(
    dataset: base.Dataset,
    spec: robots.RobotSpec,
    runs: Sequence[np.ndarray],
    unreadable: dict[str, tuple[int, str]],
) -> tuple[list[np.ndarray] | None, tuple[robots.Dimension, ...]]:
    """The state as policies see it, else what is recorded."""
    readers = {name: functools.partial(dataset.array, name) for name in ("state", "robot_obs")}
    for name, read in {"proprio": dataset.proprio, **readers}.items():
        if width := sampling.width_of(read, runs):
            values = sampling.read_numbers(read, runs, "state", unreadable)
            if name == "proprio" and width == len(_seven()):
                return values, spec.state if _describes(spec.state) else _seven()
            return values, spec.state if len(spec.state) == width else _numbered("state", width)
    return None, ()


def _opening_reader(dataset: base.Dataset) -> Callable[[np.ndarray], np.ndarray]:
    """Measured opening of the gripper, float[n, 1]; raises ValueError where only commands are recorded."""

    def read(ids: np.ndarray) -> np.ndarray:
        opening = dataset.gripper_opening(ids)
        if opening is None:
            raise ValueError(f"{dataset.name} records commands of the gripper only.")
        return np.asarray(opening)[:, None]

    return read


def _numbered(part: str, width: int) -> tuple[robots.Dimension, ...]:
    return tuple(robots.Dimension(f"{part}[{column}]") for column in range(width))


def columns(values: np.ndarray, dimensions: Sequence[robots.Dimension]) -> tuple[Column, ...]:
    """Of float[n, d]; NaNs are left out."""
    found = []
    for dimension, column in zip(dimensions, np.asarray(values, np.float64).T, strict=True):
        column = column[np.isfinite(column)]
        if len(column) == 0:
            nothing = dict.fromkeys(("mean", "std", "min", "max", "q01", "q99"), math.nan)
            found.append(Column(dimension, nothing, np.zeros(BINS, int), 0.0, 0.0, 0.0, 0))
            continue
        summary = {key: float(value[0]) for key, value in statistics.summarize(column[:, None]).items()}
        slack = 1e-6 * max(abs(summary["min"]), abs(summary["max"]), 1.0)
        found.append(
            Column(
                dimension,
                summary,
                np.histogram(column, BINS)[0],
                at_min=float((column <= summary["min"] + slack).mean()),
                at_max=float((column >= summary["max"] - slack).mean()),
                outside=float(((column < dimension.low - slack) | (column > dimension.high + slack)).mean()),
                distinct=len(np.unique(column)),
            )
        )
    return tuple(found)


def gripper(actions: Sequence[np.ndarray], openings: Sequence[np.ndarray] | None) -> Gripper:
    """Of the last column of float[n, d] actions of each episode, and the openings float[n, 1] recorded with them."""
    commands = [values[np.isfinite(values[:, -1]), -1] for values in actions]
    changes = np.array([np.count_nonzero(np.diff(values > 0)) for values in commands if len(values)])
    flat = np.concatenate([values[:, -1] for values in actions])
    known = flat[np.isfinite(flat)]
    correlation = opened = closed = math.nan
    if openings is not None:
        widths = np.concatenate(openings)[:, 0]
        both = np.isfinite(flat) & np.isfinite(widths)
        is_open = flat[both] > 0
        if is_open.any() and not is_open.all():
            opened, closed = float(widths[both][is_open].mean()), float(widths[both][~is_open].mean())
            correlation = pairing.correlation(is_open, widths[both])
    return Gripper(
        open_share=float((known > 0).mean()),
        binary_share=float(np.isin(known, (-1.0, 1.0)).mean()),
        transitions=float(changes.mean()),
        never=float((changes == 0).mean()),
        correlation=correlation,
        opened=opened,
        closed=closed,
    )


def _lint(
    dataset: base.Dataset, finite: np.ndarray, openings: Sequence[np.ndarray] | None, kept: np.ndarray
) -> tuple[statistics.Finding, ...]:
    """What a training run's own check would say (`actions.statistics.lint`); it knows seven numbers only."""
    if len(finite) == 0:
        return ()
    whole = dataset.statistics
    widths = None if openings is None else np.concatenate(openings)[kept, 0]
    known = np.ones(len(finite), bool) if widths is None else np.isfinite(widths)
    return tuple(
        statistics.lint(
            statistics.summarize(finite) if whole is None else whole.action,
            commands=finite[known, 6],
            widths=None if widths is None else widths[known],
        )
    )


def _still(finite: np.ndarray, dimensions: Sequence[robots.Dimension]) -> float:
    arm = [i for i, d in enumerate(dimensions) if d.quantity != "gripper" and d.kind in ("delta", "velocity")]
    return float((np.abs(finite[:, arm]) < 1e-6).all(axis=1).mean()) if arm and len(finite) else math.nan


def _lengths(dataset: base.Dataset) -> np.ndarray:
    return np.array([episode.end - episode.start for episode in dataset.episodes], np.int64)


def sentences(episodes: Sequence[base.Episode]) -> Instructions:
    """What the episodes' instructions look like."""
    counts = collections.Counter(episode.instruction for episode in episodes)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    alike = collections.defaultdict(list)
    for sentence in counts:
        alike[re.sub(r"[^\w]+", " ", sentence.casefold()).strip()].append(sentence)
    return Instructions(
        tuple(ordered),
        blank=sum(count for sentence, count in ordered if not sentence.strip()),
        odd=tuple(sorted(filter(texts.is_program_value, counts))),
        twins=tuple(tuple(sorted(group)) for key, group in sorted(alike.items()) if key and len(group) > 1),
        rewordings=sum(bool(episode.rewordings) for episode in episodes),
    )


def _shown_share(dataset: base.Dataset) -> float:
    every = np.concatenate([np.arange(episode.start, episode.end) for episode in dataset.episodes])
    return float(dataset.shown(every).mean())


def _shown(dataset: base.Dataset, spec: robots.RobotSpec, count: int) -> tuple[Shown, ...]:
    usable = [episode for episode in dataset.episodes if episode.end > episode.start]
    places = np.unique(np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(int)) if count else []
    shown = []
    for episode in (usable[place] for place in places):
        ids = np.arange(episode.start, episode.end)
        seen = np.flatnonzero(dataset.shown(ids))
        steps = seen[np.unique(np.linspace(0, len(seen) - 1, min(len(seen), _PICTURES)).round().astype(int))]
        pictures = {
            camera: tuple(pairing.picture(dataset, int(frame), camera)[0] for frame in ids[steps])
            for camera in dataset.cameras
        }
        numbers = (sampling.read_numbers(dataset.actions, [ids], "actions", {}), _states(dataset, spec, [ids], {})[0])
        actions, states = (None if found is None else found[0] for found in numbers)
        shown.append(Shown(episode.instruction, episode.start, steps, pictures, actions, states))
    return tuple(shown)
