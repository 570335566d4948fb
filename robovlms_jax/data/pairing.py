"""Whether numbers and pictures of a dataset belong together: does what is commanded show in the state and the pictures?

Nothing here trusts the metadata that paired them; a dataset whose rows are shifted against its videos reads without an
error and trains a policy that is always late.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
import tqdm
from numpy.typing import ArrayLike
from PIL import Image

from robovlms_jax.control import robot as robots
from robovlms_jax.data import base

LAGS = range(-5, 6)
"""Steps by which the state's change may come after the command (or, below 0, before it)."""
_THUMBNAIL = 32


@dataclasses.dataclass(frozen=True)
class FollowedDimension:
    """correlation: of a commanded motion with the state's change in the same step (of an absolute target with the state
    after it). gain: measured motion per commanded one, 1 = as commanded; NaN for targets and unknown units."""

    name: str
    correlation: float
    gain: float


@dataclasses.dataclass(frozen=True)
class Follow:
    """How the state follows the actions.

    lags: of each of `LAGS`, the mean correlation over translations (over all dimensions where there is none).
    """

    dimensions: tuple[FollowedDimension, ...]
    lags: tuple[float, ...]

    @property
    def best_lag(self) -> int | None:
        """Steps after the command at which the state changes most like it; None where nothing can be said."""
        if not np.isfinite(self.lags).any():
            return None
        return LAGS[int(np.nanargmax(self.lags))]


@dataclasses.dataclass(frozen=True)
class CameraCheck:
    """Of the pictures that were decoded.

    height, width: in pixels. read: pictures decoded; unreadable, missing: pictures that could not be, or do not exist.
    message: of the first unreadable one.
    brightness: mean, 0 to 255. flat: pictures of one colour (a black one, too).
    pairs: of neighbouring frames that were compared. frozen: of these, pixel for pixel the same although the arm moves.
    correlation: rank correlation of the change from frame to frame with the size of the action between them.
    cuts: frames before which the picture changes abruptly, as between two recordings.
    """

    name: str
    height: int
    width: int
    read: int
    unreadable: int
    missing: int
    message: str
    brightness: float
    flat: int
    pairs: int
    frozen: int
    correlation: float
    cuts: tuple[int, ...]


def correlation(left: ArrayLike, right: ArrayLike) -> float:
    """Pearson's, of the entries where both are finite; NaN where one of them never changes."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    both = np.isfinite(left) & np.isfinite(right)
    left, right = left[both], right[both]
    if len(left) < 3 or left.std() <= 1e-9 * np.abs(left).max() or right.std() <= 1e-9 * np.abs(right).max():
        return math.nan
    return float(np.corrcoef(left, right)[0, 1])


def rank_correlation(left: ArrayLike, right: ArrayLike) -> float:
    """Spearman's; equal values share their mean rank."""

    def ranks(values: ArrayLike) -> np.ndarray:
        _, place, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place.reshape(-1)]

    return correlation(ranks(left), ranks(right))


def follow(
    actions: Sequence[np.ndarray],
    states: Sequence[np.ndarray],
    action_dimensions: Sequence[robots.Dimension],
    state_dimensions: Sequence[robots.Dimension],
) -> Follow:
    """Compare float[n, d] actions and float[n, s] states of episodes in the dimensions that both name alike.

    Left out are dimensions that are known to be given in the tool's own frame, which the state does not tell, and
    grippers that are commanded open or closed: there the state repeats the command.
    """
    columns = {dimension.name: i for i, dimension in enumerate(state_dimensions)}
    found, lagged = [], []
    for column, dimension in enumerate(action_dimensions):
        place = columns.get(dimension.name)
        if place is None or dimension.kind == "binary" or dimension.frame == "tcp":
            continue
        angular = dimension.quantity == "euler_xyz"
        by_lag = [
            _paired(
                actions,
                states,
                column,
                place,
                lag,
                angular=angular,
                absolute=dimension.kind in ("absolute", "continuous"),
            )
            for lag in LAGS
        ]
        commanded, measured = by_lag[LAGS.index(0)]
        gain = math.nan
        units = unit_scale(dimension.unit), unit_scale(state_dimensions[place].unit)
        if dimension.kind == "delta" and None not in units and commanded.std() > 0:
            slope = np.cov(commanded, measured)[0, 1] / commanded.var(ddof=1)
            gain = float(slope * units[1] / units[0])
        found.append(FollowedDimension(dimension.name, correlation(commanded, measured), gain))
        lagged.append((dimension.quantity, [correlation(*pair) for pair in by_lag]))
    chosen = [row for quantity, row in lagged if quantity == "position"] or [row for _, row in lagged]
    chosen = [row for row in chosen if np.isfinite(row).all()]
    lags = np.mean(chosen, axis=0) if chosen else np.full(len(LAGS), np.nan)
    return Follow(tuple(found), tuple(lags.tolist()))


def _paired(
    actions: Sequence[np.ndarray],
    states: Sequence[np.ndarray],
    column: int,
    place: int,
    lag: int,
    *,
    angular: bool,
    absolute: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """(commanded, measured `lag` steps later) float[m], finite, over all episodes."""
    commanded, measured = [np.zeros(0)], [np.zeros(0)]
    for action, state in zip(actions, states, strict=True):
        target, values = action[:-1, column], state[:, place]
        change = values[1:] if absolute else np.diff(values)
        if angular and not absolute:
            change = (change + np.pi) % (2 * np.pi) - np.pi
        commanded.append(target[max(-lag, 0) : len(target) - max(lag, 0)])
        measured.append(change[max(lag, 0) : max(len(change) - max(-lag, 0), 0)])
        shortest = min(len(commanded[-1]), len(measured[-1]))
        commanded[-1], measured[-1] = commanded[-1][:shortest], measured[-1][:shortest]
    left, right = np.concatenate(commanded), np.concatenate(measured)
    both = np.isfinite(left) & np.isfinite(right)
    return left[both], right[both]


def unit_scale(unit: str) -> float | None:
    """Metres, radians or seconds per `unit` ("0.02 m" -> 0.02, "deg" -> pi / 180); None where it is unknown."""
    match = re.fullmatch(r"(?:([\d.e+-]+)\s+)?(m|mm|cm|rad|deg)", unit.strip())
    if not match:
        return None
    base_scale = {"m": 1.0, "mm": 1e-3, "cm": 1e-2, "rad": 1.0, "deg": math.pi / 180}[match[2]]
    return float(match[1] or 1) * base_scale


def picture(dataset: base.Dataset, frame: int, camera: str) -> tuple[np.ndarray | None, str]:
    """(uint8[height, width, 3], "") of one frame, or (None, why not); the reason is "" where none was recorded."""
    try:
        if not dataset.has_images([frame], camera)[0]:
            return None, ""
        return np.asarray(dataset.images([frame], [camera])[camera][0]), ""
    except base.CorruptFrameError as error:
        return None, str(error)


def check_cameras(
    dataset: base.Dataset,
    pairs: Sequence[np.ndarray],
    action_dimensions: Sequence[robots.Dimension],
    scale: np.ndarray,
) -> tuple[tuple[CameraCheck, ...], tuple[tuple[str, str], ...]]:
    """Decode int[2] frames that follow each other and compare them with each other and with the actions between them.

    Args:
      scale: float[d] spread of each action dimension.
    Returns:
      A check per camera, and the pairs of cameras that always show the same picture.
    """
    tallies = {camera: _Tally() for camera in dataset.cameras}
    alike = dict.fromkeys(itertools.combinations(dataset.cameras, 2), 0)
    compared = 0
    for ids in tqdm.tqdm(pairs, desc="comparing pictures", unit="pair", delay=1):
        size = _motion(dataset, ids, action_dimensions, scale)
        first = {
            camera: tally.add(*_pair(dataset, ids, camera), int(ids[1]), size) for camera, tally in tallies.items()
        }
        compared += 1
        for left, right in alike:
            both = first[left], first[right]
            alike[left, right] += all(image is not None for image in both) and np.array_equal(*both)
    checks = tuple(tally.check(camera, dataset.image_sizes[camera]) for camera, tally in tallies.items())
    return checks, tuple(pair for pair, count in alike.items() if compared and count == compared)


def _pair(
    dataset: base.Dataset, ids: np.ndarray, camera: str
) -> tuple[tuple[np.ndarray | None, str], tuple[np.ndarray | None, str]]:
    """Both frames in one read, which decodes a video's frames in one pass; one by one where that fails."""
    try:
        if dataset.has_images(ids, camera).all():
            first, second = dataset.images(ids, [camera])[camera]
            return (np.asarray(first), ""), (np.asarray(second), "")
    except base.CorruptFrameError:
        pass
    return picture(dataset, int(ids[0]), camera), picture(dataset, int(ids[1]), camera)


def _motion(dataset: base.Dataset, ids: np.ndarray, dimensions: Sequence[robots.Dimension], scale: np.ndarray) -> float:
    """Size of the arm's motion commanded between two frames of an episode; NaN where it cannot be read."""
    try:
        actions = np.asarray(dataset.actions(np.arange(ids[0], ids[1] + 1)), np.float64)
    except base.CorruptFrameError:
        return math.nan
    is_arm = np.array([dimension.quantity != "gripper" for dimension in dimensions])
    is_target = np.array([dimension.kind == "absolute" for dimension in dimensions])
    step = np.where(is_target, actions[-1] - actions[0], actions[:-1].sum(axis=0)) / scale
    return float(np.linalg.norm(step[is_arm]))


class _Tally:
    """What `CameraCheck` is made of, while pictures come in."""

    def __init__(self):
        self.read = self.unreadable = self.missing = self.flat = self.frozen = 0
        self.message, self.brightness = "", 0.0
        self.changes: list[tuple[int, float, float]] = []  # frame, change of the picture, size of the action

    def add(
        self, first: tuple[np.ndarray | None, str], second: tuple[np.ndarray | None, str], frame: int, size: float
    ) -> np.ndarray | None:
        """Count two neighbouring pictures, `frame` the second one's id; returns the first picture."""
        for image, message in (first, second):
            if image is None:
                self.missing += not message
                self.unreadable += bool(message)
                self.message = self.message or message
            else:
                self.read += 1
                self.brightness += float(image.mean())
                self.flat += float(image.reshape(-1, 3).std(axis=0).max()) < 1.0
        if first[0] is not None and second[0] is not None:
            small = [_thumbnail(image) for image, _ in (first, second)]
            self.changes.append((frame, float(np.abs(small[0] - small[1]).mean()), size))
            self.frozen += bool(size > 1e-6 and np.array_equal(first[0], second[0]))
        return first[0]

    def check(self, name: str, size: tuple[int, int]) -> CameraCheck:
        frames, changes, sizes = np.array(self.changes).reshape(-1, 3).T
        usual = float(np.median(changes)) if len(changes) else 0.0
        cuts = frames[changes > max(6 * usual, 25.0)].astype(int)
        known = np.isfinite(sizes)
        return CameraCheck(
            name,
            *size,
            read=self.read,
            unreadable=self.unreadable,
            missing=self.missing,
            message=self.message,
            brightness=self.brightness / self.read if self.read else math.nan,
            flat=self.flat,
            pairs=len(self.changes),
            frozen=self.frozen,
            correlation=rank_correlation(changes[known], sizes[known]),
            cuts=tuple(cuts.tolist()),
        )


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """float32[32, 32], grey, 0 to 255: camera noise averages out."""
    grey = Image.fromarray(image).convert("L").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(grey, np.float32)
