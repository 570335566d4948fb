"""A LeRobotDataset as `data.base.Dataset`: opened, checked, and read by frame id."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

import google_crc32c
import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.data import base, statistics
from robovlms_jax.data.lerobot import meaning, meta, pairing, spans, splits, tables, video
from robovlms_jax.data.registry import entry as entries
from robovlms_jax.data.registry import expressions, ranges, robot_entry

Split = Literal["training", "validation"]


class LeRobotDataset(base.Dataset):
    """Episodes of one split. Frame ids as in `rlds`: an episode of L steps has L + 1.

    arrays: numeric fields, as `packing` stores them: rel_actions; robot_obs where the state is described (of an end
      effector, the seven numbers of `inputs.proprio`); gripper_opening where an end effector's state has one.
      `array` gives every other numeric feature of info.json, too, by its name; "observation." may be left out.
    robot: what the numbers of `actions` and `proprio` are.
    control_hz: steps per second.
    """

    names_tasks = False

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Split,
        image_size: tuple[int, int] | None = None,
        *,
        conventions: str | os.PathLike[str] = "",
        unlabelled_share: float = 0.0,
        unlabelled_instruction: str = "interact with the objects",
        max_left_out_share: float = 0.1,
        success_only: bool = True,
    ):
        self.root = pathlib.Path(root)
        self.name = str(self.root)
        notes = meta.Notes(self.root, split)
        info = meta.read_info(self.root)
        what = meaning.read(info, conventions, notes)
        self.robot, self.control_hz = what.robot, info.fps
        self.action_units = tuple(self.robot.action[column].measure[0] for column in self.robot.scaled)
        self._entry, self._cameras = what.entry, dict(what.cameras)
        tasks = meta.read_tasks(self.root)
        self._images = {c: key for c, key in self._cameras.items() if info.features[key]["dtype"] == "image"}
        listed = meta.read_episodes(info, [key for c, key in self._cameras.items() if c not in self._images])
        flag = self._entry.success if success_only else ""
        rows = tables.read_rows(info, [*self._entry.numeric_fields, *([flag] if flag else [])])
        rows, paired = pairing.pair(info, rows, listed, tasks, max_left_out_share, notes)
        usable = _successful(info, rows, paired, flag, notes) if success_only else paired
        chosen, counted = splits.choose(info, [episode.number for episode in usable], split, notes)
        steps = _standardize(self._entry, rows, paired, notes, self.name)
        sentences = _Sentences(tasks, unlabelled_share, unlabelled_instruction)
        self.episodes = _spans(steps, rows, chosen, sentences)
        if sentences.left_out:
            notes.guess(f"left out {sentences.left_out} of {sentences.total} episodes without instruction.")
        if not self.episodes:
            raise ValueError(
                f"{self.root} has no episode for {split}: {len(listed)} recorded, {len(chosen)} of this split, "
                f"{sentences.left_out} without instruction (data.unlabelled_share)."
            )
        self._actions, self._states = steps.actions, steps.states
        self._starts = steps.starts
        learned = steps.learned & np.isin(steps.number, list(counted))
        mask = statistics.mask_of(self.robot)
        self.statistics = statistics.compute(self._actions[learned], self._states[learned], len(counted), mask)
        self._as_described = isinstance(self._entry, robot_entry.RobotEntry)
        if not self._as_described:
            place = f"into {meaning.CONVENTIONS}, or a file passed as --data.conventions,"
            ranges.require_gripper(self._actions[steps.learned, 6], self._entry, self.name, place)
            if what.guessed_arm:
                ranges.require_steps(self._actions[steps.learned, :6], self.name, place)
        self._open_cameras(info, rows, paired, steps, image_size)
        self._columns, self._lines = tables.Columns(info, rows.paths), (rows.file[steps.rows], rows.row[steps.rows])
        opening = what.opening and float(np.ptp(self._states[steps.learned, 7])) > 0
        has_state = bool(self.robot.state) if self._as_described else self._entry.state_encoding.startswith("POS")
        self.arrays = (
            "rel_actions",
            *(("robot_obs",) if has_state else ()),
            *(("gripper_opening",) if opening else ()),
        )

    def _open_cameras(
        self,
        info: meta.Info,
        rows: tables.Rows,
        paired: Sequence[pairing.Paired],
        steps: _Steps,
        image_size: tuple[int, int] | None,
    ) -> None:
        """Where each frame id's image lies: `_places` holds file and row, or file and frame number of a video."""
        self._scale = image_size is not None
        self._table, self._video = tables.ImageTable(self.root, rows.paths), video.VideoReader()
        self.image_sizes, self._places, self._files = {}, {}, {}
        for camera, key in self._cameras.items():
            size = spans.image_size(info, key)
            self.image_sizes[camera] = image_size or size
            if camera in self._images:
                self._places[camera] = rows.file[steps.rows], rows.row[steps.rows]
                sample = self._table.sample(key, int(rows.file[steps.rows[0]]))
                found = size if sample is None else sample.shape[:2]
                if found != size:
                    raise ValueError(
                        f"{self.root}: images of {key} have {found[0]} x {found[1]} pixels, info.json says {size[0]} x "
                        f"{size[1]}."
                    )
                continue
            files = sorted({episode.videos[key][0] for episode in paired})
            at = {path: place for place, path in enumerate(files)}
            file, first = np.zeros((2, len(rows.episode)), np.int64)
            for episode in paired:
                path, begin = episode.videos[key]
                file[episode.first : episode.last] = at[path]
                first[episode.first : episode.last] = begin
            self._files[camera] = files
            self._places[camera] = file[steps.rows], (first + rows.frame)[steps.rows]

    def images(
        self, frame_ids: Sequence[int], cameras: Sequence[str], out: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Mapping[str, Sequence[np.ndarray]]:
        out = self.allocate(len(frame_ids), cameras) if out is None else out
        ids = self._checked(frame_ids)
        for camera in cameras:
            files, numbers = (values[ids] for values in self._places[camera])
            if camera in self._images:
                self._table.read(self._images[camera], files, numbers, out[camera], scale=self._scale)
                continue
            for file in np.unique(files).tolist():
                places = np.flatnonzero(files == file)
                path = self._files[camera][file]
                self._video.read(path, numbers[places].tolist(), out[camera], places.tolist(), scale=self._scale)
        return out

    def array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        ids = self._checked(frame_ids)
        if name not in self.arrays:
            key = self._columns.key(name)
            if key is None:
                raise ValueError(
                    f"{self.name} stores no {name!r}; it has {list(self.arrays)} and the features "
                    f"{self._columns.names()}."
                )
            return self._columns.take(key, self._lines[0][ids], self._lines[1][ids])
        if name == "rel_actions":
            values = self._actions[ids]
        else:
            values = self._pose(ids) if name == "robot_obs" else self._states[ids, 7:8]
        return base.require_finite(values, frame_ids, name, self.name)

    def frame(self, frame_id: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        """All of one frame, as `packing.pack` reads it. Raises CorruptFrameError."""
        images = {camera: values[0] for camera, values in self.images([frame_id], self.cameras).items()}
        return images, {name: self.array(name, [frame_id])[0] for name in self.arrays}

    def _pose(self, ids: np.ndarray) -> np.ndarray:
        """float32[n, P] as `inputs.proprio` defines it."""
        state = self._states[ids]
        if self._as_described:
            return state
        angles = state[:, 3:6] if self._entry.state_encoding == "POS_EULER" else expressions.euler(state[:, 3:7])
        first = self._starts[np.searchsorted(self._starts, ids, side="right") - 1]
        return np.concatenate([state[:, :3], angles, self._actions[np.maximum(ids - 1, first), 6:]], axis=1)

    def _checked(self, frame_ids: Sequence[int]) -> np.ndarray:
        ids = np.asarray(frame_ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self._actions)):
            raise ValueError(f"{self.name} has frames 0 to {len(self._actions) - 1}; asked for {ids.tolist()[:8]}.")
        return ids


def _successful(
    info: meta.Info, rows: tables.Rows, paired: Sequence[pairing.Paired], flag: str, notes: meta.Notes
) -> Sequence[pairing.Paired]:
    """The episodes with a row whose `flag` is true; all, with a remark, where none is described ("").

    Raises ValueError where no episode has one.
    """
    if not flag:
        if found := [name for name in meaning.SUCCESS if name in info.features]:
            notes.warn(
                "data.success_only is on, but nothing is described that tells failures: all episodes count as "
                f"successful, although there is a feature {found[0]!r}. To use it write "
                f'{{"success": "{found[0]}"}} into {meaning.CONVENTIONS}, or a file passed as --data.conventions '
                "(data/README.md)."
            )
        return paired
    kept = [episode for episode in paired if rows.numbers[flag][episode.first : episode.last].any()]
    if not kept:
        raise ValueError(
            f"{info.root}: {flag!r} is true in none of {len(paired)} episodes; was it never filled in? Take success "
            "out of the conventions, or pass --no-data.success_only."
        )
    if len(kept) < len(paired):
        notes.guess(f"left out {len(paired) - len(kept)} of {len(paired)} episodes marked as failed by {flag!r}.")
    return kept


@dataclasses.dataclass(frozen=True)
class _Steps:
    """All episodes' steps by frame id.

    actions: float32[n, A]. states: float32[n, 8 or 0], of a robot described number by number float32[n, P].
    rows: int64[n], row of `tables.Rows`. number: int64[n], episode.
    starts: int64[e], frame id at which each episode begins. learned: bool[n], finite and not the end of an episode.
    """

    actions: np.ndarray
    states: np.ndarray
    rows: np.ndarray
    number: np.ndarray
    starts: np.ndarray
    learned: np.ndarray


def _standardize(
    entry: entries.Entry, rows: tables.Rows, paired: Sequence[pairing.Paired], notes: meta.Notes, name: str
) -> _Steps:
    """Recorded numbers -> actions and states. Steps at an episode's end that are not finite are left out, as their
    action has no meaning; others stay, are said, and replaced in training. Raises ValueError where none is left."""
    actions, states, kept_rows, numbers = [], [], [], []
    empty = trimmed = 0
    for episode in paired:
        columns = {field: values[episode.first : episode.last] for field, values in rows.numbers.items()}
        action, state, kept = entry.standardize(columns)
        finite = np.isfinite(action).all(axis=1) & np.isfinite(state).all(axis=1)
        length = int(np.flatnonzero(finite)[-1]) + 1 if finite.any() else 0
        trimmed += len(kept) - length if length else 0
        if length == 0:
            empty += 1
            continue
        action, state, kept = action[:length], state[:length], kept[:length]
        # The frame after the last step: the next recorded one, or the last again.
        kept = np.append(kept, min(kept[-1] + 1, episode.last - episode.first - 1))
        last = robots.rest(entry.robot.action, action[-1])
        actions.append(np.concatenate([action, last[None]]).astype(np.float32))
        states.append(np.concatenate([state, state[-1:]]))
        kept_rows.append(episode.first + kept)
        numbers.append(np.full(len(kept), episode.number))
    if not actions:
        raise ValueError(f"{name}: no episode has a step whose action and state are finite numbers.")
    lengths = [len(part) for part in actions]
    starts = np.cumsum([0, *lengths[:-1]])
    whole = np.concatenate(actions), np.concatenate(states)
    learned = np.ones(len(whole[0]), bool)
    learned[starts + lengths - 1] = False
    finite = np.isfinite(whole[0]).all(axis=1) & np.isfinite(whole[1]).all(axis=1)
    number = np.concatenate(numbers)
    if empty:
        notes.warn(f"left out {empty} of {len(paired)} episodes that have no step to learn from.")
    if trimmed:
        notes.warn(f"left out {trimmed} steps at ends of episodes, whose actions or states are not finite.")
    if not finite.all():
        bad = np.unique(number[~finite])
        notes.warn(
            f"{int((~finite).sum())} steps in {len(bad)} episodes have NaN or infinite actions or states, episode "
            f"{bad[0]} first; they are left out of the statistics and replaced in training."
        )
    return _Steps(*whole, np.concatenate(kept_rows), number, starts, learned & finite)


class _Sentences:
    """What episodes are told; counts those that are told nothing."""

    def __init__(self, tasks: Mapping[int, tuple[str, ...]], share: float, replacement: str):
        self._tasks, self._share, self._replacement = tasks, share, replacement
        self.total = self.left_out = 0

    def first_of(self) -> dict[int, int]:
        """task_index -> the first one that is told the same."""
        firsts: dict[tuple[str, ...], int] = {}
        return {task: firsts.setdefault(sentences, task) for task, sentences in self._tasks.items()}

    def of(self, task: int, number: int) -> tuple[str, ...]:
        """The sentence and its rewordings; () for an episode that is to be left out."""
        self.total += 1
        if self._tasks[task]:
            return self._tasks[task]
        # Which unlabelled episodes stay follows from their number alone, as in `rlds`.
        if google_crc32c.value(f"unlabelled {number}".encode()) / 2**32 < self._share:
            return (self._replacement,)
        self.left_out += 1
        return ()


def _spans(steps: _Steps, rows: tables.Rows, chosen: set[int], instructions: _Sentences) -> tuple[base.Episode, ...]:
    """Where the task changes, another episode begins; its first frame is the end of the one before."""
    found = []
    first_of = instructions.first_of()
    for start, end in zip(steps.starts.tolist(), [*steps.starts[1:].tolist(), len(steps.rows)], strict=True):
        number = int(steps.number[start])
        if number not in chosen:
            continue
        task = rows.task[steps.rows[start : end - 1]]
        same = np.array([first_of[number] for number in task.tolist()])
        begins = np.flatnonzero(np.append(True, same[1:] != same[:-1]))
        for first, last in zip(begins.tolist(), [*begins[1:].tolist(), len(task)], strict=True):
            if sentences := instructions.of(int(task[first]), number):
                found.append(base.Episode(start + first, start + last, sentences[0], "lerobot", sentences[1:]))
    return tuple(found)


def open_dataset(
    root: str | os.PathLike[str],
    split: Split,
    *,
    image_size: tuple[int, int] | None = None,
    conventions: str | os.PathLike[str] = "",
    unlabelled_share: float = 0.0,
    unlabelled_instruction: str = "interact with the objects",
    max_left_out_share: float = 0.1,
    success_only: bool = True,
) -> LeRobotDataset:
    """Open a LeRobotDataset v3 and compare everything in it that is stored twice.

    Args:
      split: validation is info.json's split `val` (or `validation`, ...), else the last 5 % of the training episodes.
      image_size: (height, width) that all images are scaled to; None keeps those of the dataset.
      conventions: file that says what the numbers mean, in place of <root>/meta/robovlms.json.
      unlabelled_share: of the episodes without instruction that are kept; they are told `unlabelled_instruction`.
      max_left_out_share: of the episodes that may be left out because parts of them are missing or disagree.
      success_only: leave out episodes that failed, where the conventions name the feature that tells (`success`).
    Raises:
      ValueError: naming the file and what is wrong with it. ImportError naming the extra.
    """
    return LeRobotDataset(
        root,
        split,
        image_size,
        conventions=conventions,
        unlabelled_share=unlabelled_share,
        unlabelled_instruction=unlabelled_instruction,
        max_left_out_share=max_left_out_share,
        success_only=success_only,
    )
