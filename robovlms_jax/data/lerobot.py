"""LeRobotDataset v3: tables as parquet, cameras as MP4 (or as images inside the tables).

<root>/meta/info.json              features, fps, path templates
<root>/meta/tasks.parquet          (or tasks.jsonl) instruction of each task_index
<root>/meta/episodes/chunk-*/*     per episode: rows, and for each camera the file and the time it begins
<root>/data/chunk-*/file-*.parquet the numbers of many episodes
<root>/videos/<camera>/chunk-*/*   the frames of many episodes
<root>/meta/robovlms.json          ours, optional: what the numbers mean, fields of `registry.entry.Entry`

Without that file `action` must hold seven numbers: metres, radians, gripper (1 open, 0 closed). Needs the extra
`lerobot` (pyarrow, PyAV). Video is decoded from the key frame before, so random reads cost a multiple of JPEG's:
convert once with `python -m experiments.convert_data` for long trainings.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from robovlms_jax.data import base, rlds, statistics
from robovlms_jax.data.registry import expressions
from robovlms_jax.data.registry.entry import Entry

Split = Literal["training", "validation"]

CONVENTIONS = "meta/robovlms.json"
_SEEK_S = 1.0  # of video that is rather skipped than decoded
_OPEN_VIDEOS = 4
"""Kept open per thread; each holds a decoder with its reference frames."""


class LeRobotDataset(base.Dataset):
    """Episodes of one split. Frame ids as in `rlds`: an episode of L steps has L + 1.

    arrays: numeric fields, as `packing` stores them: rel_actions, and robot_obs (the seven numbers of `inputs.proprio`)
      where the state is a pose.
    """

    action_units = (1.0,) * 6

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Split,
        image_size: tuple[int, int] | None = None,
    ):
        self._source = (os.fspath(root), split, image_size)
        self.root = pathlib.Path(root)
        self.name = str(self.root)
        self._info = _read_info(self.root)
        self._entry = _entry(self.root, self._info["features"])
        self._cameras = {c: key.removeprefix("steps/observation/") for c, key in self._entry.cameras.items()}
        stored = {c: tuple(self._info["features"][key]["shape"]) for c, key in self._cameras.items()}
        stored = {c: (shape[1:] if shape[0] == 3 and shape[2] != 3 else shape[:2]) for c, shape in stored.items()}
        self.image_sizes = dict.fromkeys(stored, image_size) if image_size else stored
        table = _read_table(self.root, self._info, self._entry, self._cameras)
        episodes = _read_episodes(self.root, self._info, self._cameras)
        tasks = _read_tasks(self.root)
        keep = _split(self._info, [e.number for e in episodes], split)
        actions, states, rows, spans = [], [], [], []
        position = 0
        for episode in episodes:
            if episode.last <= episode.first:
                continue
            columns = {name: table[name][episode.first : episode.last] for name in self._entry.numeric_fields}
            action, state, kept = self._entry.standardize(columns)
            if len(kept) == 0:
                continue
            kept = np.append(kept, min(kept[-1] + 1, episode.last - episode.first - 1))
            actions.append(np.concatenate([action, np.append(np.zeros(6), action[-1, 6])[None]]).astype(np.float32))
            states.append(np.concatenate([state, state[-1:]]))
            rows.append(episode.first + kept)
            if episode.number in keep:
                number = int(table["task_index"][episode.first])
                if number not in tasks:
                    raise ValueError(
                        f"{self.root}/meta/tasks lists no task {number}, which episode {episode.number} has."
                    )
                spans.append(base.Episode(position, position + len(kept) - 1, tasks[number], "lerobot"))
            position += len(kept)
        if not spans:
            raise ValueError(f"{self.root} has no episode for {split}; info.json lists {len(episodes)} episodes.")
        self.episodes = tuple(spans)
        self._actions, self._states, self._rows = (np.concatenate(x) for x in (actions, states, rows))
        self._timestamps, self._episode_of = table["timestamp"], table["episode_index"]
        self._by_number = {episode.number: episode for episode in episodes}
        self._images = {c: table[key] for c, key in self._cameras.items() if key in table}
        starts = np.cumsum([0, *(len(x) for x in actions[:-1])])
        self._starts = starts
        learned = np.ones(len(self._actions), bool)
        learned[np.append(starts[1:], len(self._actions)) - 1] = False
        finite = np.isfinite(self._actions).all(axis=1) & np.isfinite(self._states).all(axis=1)
        self.statistics = statistics.compute(
            self._actions[learned & finite], self._states[learned & finite], len(actions)
        )
        self.arrays = ("rel_actions", "robot_obs") if self._entry.state_encoding.startswith("POS") else ("rel_actions",)
        self._videos = threading.local()

    def images(
        self, frame_ids: Sequence[int], cameras: Sequence[str], out: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Mapping[str, Sequence[np.ndarray]]:
        out = self.allocate(len(frame_ids), cameras) if out is None else out
        rows = self._rows[self._checked(frame_ids)]
        for camera in cameras:
            if camera in self._images:
                for place, row in enumerate(rows.tolist()):
                    _fit(_decode(self._images[camera][row], self.name, row), out[camera][place])
            else:
                self._decode_video(rows, camera, out[camera])
        return out

    def array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        if name not in self.arrays:
            raise ValueError(f"{self.name} stores no {name!r}; it has {list(self.arrays)}.")
        ids = self._checked(frame_ids)
        values = self._actions[ids] if name == "rel_actions" else self._pose(ids)
        return base.require_finite(values, frame_ids, name, self.name)

    def frame(self, frame_id: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        """All of one frame, as `packing.pack` reads it. Raises CorruptFrameError."""
        images = {camera: values[0] for camera, values in self.images([frame_id], self.cameras).items()}
        return images, {name: self.array(name, [frame_id])[0] for name in self.arrays}

    def _pose(self, ids: np.ndarray) -> np.ndarray:
        """float32[n, 7] as `inputs.proprio` defines it."""
        state = self._states[ids]
        angles = state[:, 3:6] if self._entry.state_encoding == "POS_EULER" else expressions.euler(state[:, 3:7])
        first = self._starts[np.searchsorted(self._starts, ids, side="right") - 1]
        return np.concatenate([state[:, :3], angles, self._actions[np.maximum(ids - 1, first), 6:]], axis=1)

    def _checked(self, frame_ids: Sequence[int]) -> np.ndarray:
        ids = np.asarray(frame_ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self._rows)):
            raise ValueError(f"{self.name} has frames 0 to {len(self._rows) - 1}; asked for {ids.tolist()[:8]}.")
        return ids

    def _decode_video(self, rows: np.ndarray, camera: str, out: Sequence[np.ndarray]) -> None:
        """Frames of one camera; near ones of one file are decoded in one pass from the key frame before the first."""
        wanted: dict[tuple[int, int], list[tuple[float, int]]] = collections.defaultdict(list)
        for place, row in enumerate(rows.tolist()):
            episode = self._by_number[int(self._episode_of[row])]
            chunk, file, begin = episode.videos[camera]
            wanted[chunk, file].append((begin + float(self._timestamps[row]), place))
        half = 0.5 / float(self._info["fps"])
        for (chunk, file), times in wanted.items():
            path = self.root / self._info["video_path"].format(
                video_key=self._cameras[camera], chunk_index=chunk, file_index=file
            )
            times.sort()
            apart = np.flatnonzero(np.diff([time for time, _ in times]) > _SEEK_S) + 1
            for first, last in zip([0, *apart.tolist()], [*apart.tolist(), len(times)], strict=True):
                remaining = times[first:last]
                for time, image in self._frames(path, remaining[0][0] - half):
                    while remaining and abs(time - remaining[0][0]) <= half:
                        _fit(image.to_ndarray(format="rgb24"), out[remaining[0][1]])
                        remaining.pop(0)
                    if not remaining or time > remaining[-1][0] + half:
                        break
                if remaining:
                    raise base.CorruptFrameError(f"{path} has no frame at {remaining[0][0]:.3f} s.")

    def _frames(self, path: pathlib.Path, start: float) -> Any:
        """(time in s, frame) from the key frame at or before `start` on. Raises CorruptFrameError."""
        av = _import("av")
        opened = self._videos.__dict__.setdefault("opened", collections.OrderedDict())
        try:
            if path not in opened:
                opened[path] = av.open(str(path))
                opened[path].streams.video[0].thread_type = "NONE"  # threads read batches already
                if len(opened) > _OPEN_VIDEOS:
                    opened.popitem(last=False)[1].close()
            opened.move_to_end(path)
            container = opened[path]
            stream = container.streams.video[0]
            container.seek(max(int(start / stream.time_base), 0), stream=stream)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time >= start:
                    yield float(frame.time), frame
        except (av.error.FFmpegError, OSError, IndexError) as error:
            opened.pop(path, None)
            raise base.CorruptFrameError(f"{path} cannot be decoded: {error}") from error

    def __reduce__(self):
        return LeRobotDataset, self._source, {"episodes": self.episodes}


@dataclasses.dataclass(frozen=True)
class _EpisodeFiles:
    """number: episode_index. first, last: its rows in the whole table. videos: camera -> chunk, file, begin in s."""

    number: int
    first: int
    last: int
    videos: Mapping[str, tuple[int, int, float]]


def open_dataset(
    root: str | os.PathLike[str],
    split: Split,
    *,
    image_size: tuple[int, int] | None = None,
) -> LeRobotDataset:
    """Open a LeRobotDataset v3. Validation is info.json's split `val`, else the last 5 % of the episodes.

    Raises ValueError naming the file and what is wrong with it, ImportError naming the extra.
    """
    return LeRobotDataset(root, split, image_size)


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"LeRobot datasets need {name}: pip install -e .[lerobot]") from error


def _read_info(root: pathlib.Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
        version = str(info.get("codebase_version", ""))
        if not version.startswith("v3"):
            raise ValueError(
                f"{path} has codebase_version {version!r}; v3 can be read (LeRobot converts older ones to it)."
            )
        for key in ("features", "fps", "data_path"):
            if key not in info:
                raise ValueError(f"{path} lacks {key!r}; it has {sorted(info)}.")
        return info
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}; data.root must be a LeRobotDataset's directory.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _entry(root: pathlib.Path, features: Mapping[str, Any]) -> Entry:
    """What the numbers mean. Raises ValueError."""
    cameras = [key for key, feature in features.items() if feature.get("dtype") in ("video", "image")]
    wrist = [key for key in cameras if any(word in key.lower() for word in ("wrist", "hand", "gripper"))]
    static = [key for key in cameras if key not in wrist]
    given: dict[str, Any] = {}
    path = root / CONVENTIONS
    if path.exists():
        try:
            given = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    guess = {"static": next(iter(static), ""), "wrist": next(iter(wrist), ""), "instruction": ""}
    try:
        entry = Entry("lerobot", **{**guess, **given})
    except TypeError as error:
        raise ValueError(f"{path}: {error}; it holds fields of a dataset's entry (data/README.md).") from error
    for name in entry.numeric_fields:
        if name not in features:
            raise ValueError(
                f"{root}/meta/info.json has no feature {name!r}, of which actions are made; {sorted(features)}."
            )
    problem = entry.widths({name: int(np.prod(features[name]["shape"])) for name in entry.numeric_fields})
    if problem:
        raise ValueError(f"{root}/meta/info.json: {problem}. Say what the numbers mean in {path} (data/README.md).")
    for key in entry.cameras.values():
        if key.removeprefix("steps/observation/") not in cameras:
            raise ValueError(f"{path} names a camera that info.json lacks: {key}; it has {cameras}.")
    if not entry.cameras:
        raise ValueError(f"{root}/meta/info.json describes no camera; its features are {sorted(features)}.")
    return entry


def _read_table(
    root: pathlib.Path, info: Mapping[str, Any], entry: Entry, cameras: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """All rows of all data files, in order: the fields needed, and images stored inside."""
    parquet = _import("pyarrow.parquet")
    stored = [key for key in cameras.values() if info["features"][key]["dtype"] == "image"]
    names = ["timestamp", "episode_index", "task_index", *entry.numeric_fields, *stored]
    parts: dict[str, list[Any]] = {name: [] for name in names}
    paths = sorted((root / "data").glob("chunk-*/file-*.parquet"))
    if not paths:
        raise ValueError(f"{root}/data holds no chunk-*/file-*.parquet; copy the dataset as a whole.")
    for path in paths:
        try:
            table = parquet.read_table(path, columns=names)
        except Exception as error:  # pyarrow has an error hierarchy of its own
            raise ValueError(f"{path} cannot be read: {error}") from error
        missing = set(names) - set(table.column_names)
        if missing:
            raise ValueError(f"{path} has no columns {sorted(missing)}; it has {table.column_names}.")
        for name in names:
            if name in stored:
                parts[name].append(np.array([cell["bytes"] for cell in table[name].to_pylist()], object))
            else:
                values = table[name].to_pylist()
                parts[name].append(np.array(values, np.float32 if name in entry.numeric_fields else None))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _read_episodes(root: pathlib.Path, info: Mapping[str, Any], cameras: Mapping[str, str]) -> list[_EpisodeFiles]:
    parquet = _import("pyarrow.parquet")
    found = []
    for path in sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet")):
        try:
            for row in parquet.read_table(path).to_pylist():
                videos = {
                    camera: (
                        int(row[f"videos/{key}/chunk_index"]),
                        int(row[f"videos/{key}/file_index"]),
                        float(row[f"videos/{key}/from_timestamp"]),
                    )
                    for camera, key in cameras.items()
                    if info["features"][key]["dtype"] == "video"
                }
                first, last = int(row["dataset_from_index"]), int(row["dataset_to_index"])
                found.append(_EpisodeFiles(int(row["episode_index"]), first, last, videos))
        except KeyError as error:
            raise ValueError(f"{path} has no column {error}; is it a LeRobotDataset v3?") from error
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{root}/meta/episodes lists no episode; copy the dataset as a whole.")
    return sorted(found, key=lambda episode: episode.number)


def _read_tasks(root: pathlib.Path) -> dict[int, str]:
    path = root / "meta" / "tasks.parquet"
    if path.exists():
        rows = _import("pyarrow.parquet").read_table(path).to_pylist()
        # pandas writes the sentences as an unnamed index.
        return {int(row["task_index"]): str(row.get("task", row.get("__index_level_0__"))) for row in rows}
    path = root / "meta" / "tasks.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return {int(row["task_index"]): str(row["task"]) for row in rows}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{root}/meta has neither tasks.parquet nor a readable tasks.jsonl: {error}") from error


def _split(info: Mapping[str, Any], numbers: Sequence[int], split: str) -> set[int]:
    """Numbers of the episodes that belong to a split."""
    listed = info.get("splits", {})
    if "val" in listed:
        first, _, last = str(listed["val" if split == "validation" else "train"]).partition(":")
        return set(range(int(first), int(last)))
    border = min(round(len(numbers) * (1 - rlds.HELD_OUT_SHARE)), len(numbers) - 1) if len(numbers) > 1 else 1
    if len(numbers) == 1:
        return set(numbers)
    return set(numbers[border:] if split == "validation" else numbers[:border])


def _decode(data: bytes, name: str, row: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise base.CorruptFrameError(f"{name}: the image in row {row} cannot be decoded: {error}") from error


def _fit(image: np.ndarray, out: np.ndarray) -> None:
    """Copy, scaled where sizes differ."""
    if image.shape == out.shape:
        out[:] = image
    else:
        out[:] = np.asarray(Image.fromarray(image).resize((out.shape[1], out.shape[0]), Image.Resampling.LANCZOS))
