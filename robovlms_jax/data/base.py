"""What a dataset of annotated episodes offers, whatever its storage format.

`calvin.py` and `packed.py` implement `Dataset`; `segments.py` and `samples.py` need nothing else of a format.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import difflib
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax.actions import frames
from robovlms_jax.control import robot as robots
from robovlms_jax.data import statistics
from robovlms_jax.inputs import proprio as states

CALVIN_SIZES = {"rel_actions": 7, "actions": 7, "robot_obs": 15, "scene_obs": 24}
"""Numbers of each of CALVIN's fields, in one frame."""
CALVIN_UNITS = (frames.TRANSLATION_M,) * 3 + (frames.ROTATION_RAD,) * 3
"""Metres and radians per unit of CALVIN's relative actions."""


class CorruptFrameError(ValueError):
    """A stored frame cannot be used: unreadable, truncated, of the wrong shape, or holding NaN. Names the place."""


class NotAnnotatedError(ValueError):
    """A split has no annotated episode: no annotations, none with a sentence, or no such split beside the others."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One annotated span of frames.

    start, end: ids of the first and last frame, both inclusive. Frame `end` is recorded but never learned from.
    instruction: what the robot was told, one sentence.
    task: the dataset's task id, such as "open_drawer".
    rewordings: other sentences that mean the same.
    """

    start: int
    end: int
    instruction: str
    task: str
    rewordings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive episodes that come from one dataset of a mixture.

    weight: relative rate at which training draws windows from it.
    """

    name: str
    num_episodes: int
    weight: float


class Dataset(abc.ABC):
    """Random access to frames by id, and the episodes that refer to them. Picklable; reads may come from many threads.

    name: where the data came from, for messages.
    episodes: in the order of the annotation file; spans may overlap.
    image_sizes: camera name -> (height, width); the cameras that are stored.
    robot: what actions, state and cameras are: the dimensions of `actions` and `proprio` by name, unit and kind.
    action_units: metres and radians that 1.0 means in each arm dimension of the actions (end-effector robots).
    statistics: of actions and state, by which they may be normalised; None where the format has none.
    may_lack_images: whether some frames have no image of some camera (`has_images`).
    names_tasks: whether an episode's `task` says what is done, so that all sentences of one task mean one thing. False:
      it is the dataset's name.
    groups: of the episodes, in order, when they are to be drawn at rates of their own; empty = all alike.
    """

    name: str
    episodes: tuple[Episode, ...]
    image_sizes: Mapping[str, tuple[int, int]]
    robot: robots.RobotSpec = robots.CALVIN
    action_units: tuple[float, ...] = CALVIN_UNITS
    statistics: statistics.Statistics | None = None
    may_lack_images: bool = False
    names_tasks: bool = True
    groups: tuple[Group, ...] = ()

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the stored cameras."""
        return tuple(self.image_sizes)

    @abc.abstractmethod
    def images(
        self, frame_ids: Sequence[int], cameras: Sequence[str], out: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Mapping[str, Sequence[np.ndarray]]:
        """Decode frames.

        Args:
          frame_ids: int[n].
          cameras: which cameras; the others are neither read nor decoded.
          out: camera -> n arrays uint8[height, width, 3], each C-contiguous, to decode into one by one: they need not
            lie in one array. None: new ones.
        Returns:
          `out`: camera -> uint8[n, height, width, 3], RGB.
        Raises:
          CorruptFrameError: a frame cannot be used.
          ValueError: a frame or a camera is not part of the dataset.
        """

    @abc.abstractmethod
    def array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        """float32[n, ...] of one numeric field. Raises as `images` does.

        The fields named below are finite. Readings of further sensors may not be: NaN stands for a missing value,
        infinity for a beam without echo.
        """

    def has_array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        """bool[n]: whether `array(name)` may be asked for each frame. False only in mixtures of unlike datasets."""
        return np.ones(len(frame_ids), bool)

    def has_images(self, frame_ids: Sequence[int], camera: str) -> np.ndarray:
        """bool[n]: whether each frame has an image of this camera; where not, `images` gives black."""
        return np.full(len(frame_ids), camera in self.cameras)

    @property
    def shows_all(self) -> bool:
        """Whether all frames have pictures: recordings may leave some out (`shown`)."""
        return True

    def shown(self, frame_ids: Sequence[int]) -> np.ndarray:
        """bool[n]: whether each frame has its pictures. The others have actions and state alone, and no window sees
        them."""
        return np.ones(len(frame_ids), bool)

    def actions(self, frame_ids: Sequence[int]) -> np.ndarray:
        """float32[n, A] in dataset units, as `robot` says (CALVIN: relative, 1 = 0.02 m, 0.05 rad; gripper 1 open, -1
        closed)."""
        return self.array("rel_actions", frame_ids)

    def robot_obs(self, frame_ids: Sequence[int]) -> np.ndarray:
        """float32[n, 15] (CALVIN: tcp xyz in m, tcp Euler xyz in rad, gripper width, 7 joints, last gripper action)."""
        return self.array("robot_obs", frame_ids)

    def proprio(self, frame_ids: Sequence[int]) -> np.ndarray:
        """float32[n, P], the robot's state as policies see it (see `inputs.proprio`)."""
        return states.from_robot_state(self.robot_obs(frame_ids), len(self.robot.state))

    def gripper_opening(self, frame_ids: Sequence[int]) -> np.ndarray | None:
        """float[n]: how far the fingers were measured apart, larger = wider, in the dataset's own unit; None where only
        commands are recorded. Raises CorruptFrameError."""
        try:
            return self.array("gripper_opening", frame_ids)[:, 0]
        except CorruptFrameError:
            raise
        except ValueError:  # no field of that name: CALVIN's is a column of the robot's state
            pass
        try:
            state = self.robot_obs(frame_ids)
        except CorruptFrameError:
            raise
        except ValueError:
            return None
        return state[:, 6] if state.shape[1] == states.ROBOT_OBS_DIM else None  # of seven numbers the last is a command

    def scene_obs(self, frame_ids: Sequence[int]) -> np.ndarray:
        """float32[n, 24] (CALVIN: slider, drawer, button, switch, two lights, xyz and Euler xyz of three blocks)."""
        return self.array("scene_obs", frame_ids)

    def allocate(self, num_frames: int, cameras: Sequence[str]) -> dict[str, np.ndarray]:
        """Uninitialised image arrays, as `images` wants them for `out`."""
        unknown = sorted(set(cameras) - set(self.cameras))
        if unknown:
            raise ValueError(f"{self.name} has no camera {unknown}; it has {list(self.cameras)}.")
        return {camera: np.empty((num_frames, *self.image_sizes[camera], 3), np.uint8) for camera in cameras}


def frames_within(frame_ids: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """int64[n], those of the sorted `frame_ids` that int[m, 2] inclusive spans cover."""
    inside = np.zeros(len(frame_ids) + 1, np.int64)
    np.add.at(inside, np.searchsorted(frame_ids, spans[:, 0]), 1)
    np.add.at(inside, np.searchsorted(frame_ids, spans[:, 1], side="right"), -1)
    return frame_ids[np.cumsum(inside[:-1]) > 0].astype(np.int64)


def rows_of(stored_ids: np.ndarray, frame_ids: Sequence[int], name: str) -> np.ndarray:
    """Positions of `frame_ids` in the sorted `stored_ids`. Raises ValueError naming a frame that is not there."""
    wanted = np.asarray(frame_ids)
    rows = np.searchsorted(stored_ids, wanted)
    missing = stored_ids[np.minimum(rows, len(stored_ids) - 1)] != wanted
    if missing.any():
        raise ValueError(
            f"{name} has no frame {wanted[missing][0]}; it stores {len(stored_ids)} frames between {stored_ids[0]} and "
            f"{stored_ids[-1]}."
        )
    return rows


def require_finite(values: np.ndarray, frame_ids: Sequence[int], field: str, name: str) -> np.ndarray:
    """`values` float[n, d] unchanged. Raises CorruptFrameError naming the first frame with NaN or infinity."""
    bad = ~np.isfinite(values).all(axis=-1)
    if bad.any():
        row = int(np.argmax(bad))
        raise CorruptFrameError(
            f"{name}: frame {frame_ids[row]} has {field} {values[row].tolist()}; every value must be finite."
        )
    return values


def select(
    episodes: Sequence[Episode], *, episode_list: str = "", exclude_tasks: Sequence[str] = ()
) -> tuple[Episode, ...]:
    """Keep the listed episodes and drop those of excluded tasks, in their given order.

    Args:
      episode_list: a file; empty keeps all. JSON `{task: [[start, end], ...]}` names episodes by task and span, text
        lines `index start end` by span alone (the index is ignored). Both are the forms RoboVLMs publishes for few-shot
        and partial-data training.
      exclude_tasks: task ids.
    Raises:
      ValueError: an entry or a task that no episode has, a file of another form, or nothing left.
    """
    if not episodes:
        raise ValueError("there are no annotated episodes to select from.")
    kept = list(episodes)
    if episode_list:
        listed = set(_read_list(pathlib.Path(episode_list)))
        matched = {key for episode in episodes for key in _keys(episode)} & listed
        unmatched = sorted(listed - matched, key=str)
        if unmatched:
            task, start, end = unmatched[0]
            what = f"frames {start} to {end}" if task is None else f"task {task!r} at frames {start} to {end}"
            raise ValueError(
                f"{episode_list} names an episode that no annotation matches: {what} (one of {len(unmatched)} such "
                f"entries out of {len(listed)}). Use the list made for this copy of the dataset, or remove the entries."
            )
        kept = [episode for episode in kept if not listed.isdisjoint(_keys(episode))]
    tasks = collections.Counter(episode.task for episode in episodes)
    for task in exclude_tasks:
        if task not in tasks:
            near = difflib.get_close_matches(task, tasks, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"tasks: {sorted(tasks)}."
            raise ValueError(f"exclude_tasks has {task!r}, which no episode has; {hint}")
    kept = [episode for episode in kept if episode.task not in set(exclude_tasks)]
    if not kept:
        raise ValueError(
            f"episode_list={episode_list!r} and exclude_tasks={tuple(exclude_tasks)} leave none of {len(episodes)} "
            "episodes."
        )
    return tuple(kept)


def whole_number(value: Any) -> int:
    """A frame or episode number as files store it: an integer, or a float that is one. Raises TypeError, ValueError."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{value!r:.80} is not a number")
    if not math.isfinite(value) or value != int(value) or value < 0:
        raise ValueError(f"{value!r} is not a whole number from 0 on")
    return int(value)


def _keys(episode: Episode) -> tuple[tuple[str | None, int, int], ...]:
    """The two ways a list may name an episode."""
    return (episode.task, episode.start, episode.end), (None, episode.start, episode.end)


def _read_list(path: pathlib.Path) -> Iterable[tuple[str | None, int, int]]:
    """(task or None, start, end) of every entry."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin files with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"episode_list: cannot read {path}: {error}") from error
    try:
        if text.lstrip().startswith("{"):
            spans = [(task, span) for task, listed in json.loads(text).items() for span in listed]
            return [(task, *(whole_number(frame) for frame in (start, end))) for task, (start, end) in spans]
        return [
            (None, int(start), int(end))
            for _, start, end in (line.split() for line in text.splitlines() if line.strip())
        ]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"episode_list: {path} is neither JSON {{task: [[start, end], ...]}} nor text lines 'index start end': "
            f"{error}"
        ) from error
