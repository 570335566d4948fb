"""What a LeRobotDataset says about itself: info.json, its tasks and its list of episodes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import math
import numbers
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from robovlms_jax import extras, json_files
from robovlms_jax.data import sentences, storage

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Info:
    """meta/info.json.

    features: field -> {"dtype", "shape", "names", ...}; shapes are checked.
    total_episodes, total_frames: None where they are not given.
    """

    path: pathlib.Path
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    data_path: str
    video_path: str
    splits: Any
    robot_type: str
    total_episodes: int | None
    total_frames: int | None

    @property
    def root(self) -> pathlib.Path:
        return self.path.parent.parent

    def width(self, field: str) -> int:
        """Numbers in one cell of a field."""
        return math.prod(self.features[field]["shape"])

    def file(self, template: Literal["data_path", "video_path"], chunk: int, file: int, key: str = "") -> str:
        """Path below the root. Raises ValueError where info.json's template has other places to fill."""
        text = getattr(self, template)
        try:
            return text.format(chunk_index=chunk, file_index=file, video_key=key)
        except (KeyError, IndexError, ValueError) as error:
            places = "chunk_index, file_index and video_key"
            raise ValueError(f"{self.path}: {template} is {text!r}, expected {places} in braces: {error}") from error


@dataclasses.dataclass(frozen=True)
class VideoSpan:
    """Where an episode lies in one camera's videos; begin and end in s, end None where it is not given."""

    chunk: int
    file: int
    begin: float
    end: float | None


@dataclasses.dataclass(frozen=True)
class EpisodeRow:
    """One row of meta/episodes; None where a column is missing.

    first, last: dataset_from_index and dataset_to_index. data: chunk and file index of its rows. tasks: as stored.
    videos: feature key -> span. fault: what of it cannot be used, "" where all can.
    """

    number: int
    length: int | None
    first: int | None
    last: int | None
    data: tuple[int, int] | None
    tasks: Any
    videos: Mapping[str, VideoSpan]
    fault: str = ""


class Notes:
    """What is to be said about one dataset. Training and validation open the same files: training says it."""

    def __init__(self, root: pathlib.Path, split: str):
        self._root, self._quiet = root, split != "training"

    def guess(self, message: str) -> None:
        """Something assumed or chosen."""
        logger.log(logging.DEBUG if self._quiet else logging.INFO, "%s: %s", self._root, message)

    def warn(self, message: str) -> None:
        """Something odd, or left out."""
        logger.log(logging.DEBUG if self._quiet else logging.WARNING, "%s: %s", self._root, message)


def library(name: str) -> Any:
    """Import pyarrow or PyAV. Raises ImportError naming the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"LeRobot datasets need {name}: {extras.install('lerobot')}") from error


def read_info(root: pathlib.Path) -> Info:
    """Raises ValueError naming the field."""
    storage.require_no_file(root)
    path = root / "meta" / "info.json"
    try:
        info = json_files.read(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}; data.root must be a LeRobotDataset's directory.") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} is no JSON object, found {type(info).__name__}.")
    version = str(info.get("codebase_version", ""))
    if not version.startswith("v3"):
        raise ValueError(
            f"{path} has codebase_version {version!r}; v3 can be read (LeRobot converts older ones to it)."
        )
    for key in ("features", "fps", "data_path"):
        if info.get(key) is None:
            raise ValueError(f"{path} lacks {key!r}; it has {sorted(info)}.")
    fps = info["fps"]
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"{path}: fps is {fps!r}, expected a number above 0.")
    features = info["features"]
    if not isinstance(features, dict):
        raise ValueError(f"{path}: features is {type(features).__name__}, expected an object field -> description.")
    for name, feature in features.items():
        shape = feature.get("shape") if isinstance(feature, dict) else None
        if not (isinstance(shape, list) and all(_is_count(size) for size in shape)):
            raise ValueError(f"{path}: feature {name!r} has shape {shape!r}, expected a list of sizes such as [7].")
    totals = {key: info.get(key) for key in ("total_episodes", "total_frames")}
    for key, value in totals.items():
        if value is not None and not _is_count(value):
            raise ValueError(f"{path}: {key} is {value!r}, expected a whole number.")
    return Info(
        path,
        float(fps),
        features,
        str(info["data_path"]),
        str(info.get("video_path") or ""),
        info.get("splits"),
        str(info.get("robot_type") or ""),
        **totals,
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_tasks(root: pathlib.Path) -> dict[int, tuple[str, ...]]:
    """task_index -> its sentences, () where it has none. From tasks.parquet, else tasks.jsonl. Raises ValueError."""
    found: dict[str, dict[int, tuple[str, ...]]] = {}
    for name, read in (("tasks.parquet", _parquet_tasks), ("tasks.jsonl", _json_tasks)):
        path = root / "meta" / name
        if not path.exists():
            continue
        tasks: dict[int, tuple[str, ...]] = {}
        for place, (number, cell) in enumerate(read(path)):
            if isinstance(number, bool) or not isinstance(number, numbers.Real) or number != int(number):
                raise ValueError(f"{path}: entry {place} has task_index {number!r}, expected a whole number.")
            try:
                listed = sentences.wordings(cell)
            except ValueError as error:
                raise ValueError(f"{path}: task_index {int(number)}: {error}") from error
            if tasks.setdefault(int(number), listed) != listed:
                raise ValueError(f"{path} has task_index {int(number)} twice: {tasks[int(number)]} and {listed}.")
        found[name] = tasks
    if not found:
        raise ValueError(f"{root}/meta has neither tasks.parquet nor tasks.jsonl; copy the dataset as a whole.")
    first, *others = found.values()
    for other in others:
        differing = [number for number in first if number in other and other[number] != first[number]]
        if differing:
            number = differing[0]
            raise ValueError(
                f"{root}/meta: tasks.parquet and tasks.jsonl differ: task_index {number} is {first[number]} and "
                f"{other[number]}. Remove the one that is out of date."
            )
    return first


def _parquet_tasks(path: pathlib.Path) -> Iterator[tuple[Any, Any]]:
    table = read_parquet(path)
    columns = table.column_names
    if "task_index" not in columns:
        raise ValueError(f"{path} has no column 'task_index'; it has {columns}.")
    # pandas writes the sentences as the table's index, under the index's name or, unnamed, under one of its own.
    pandas = (table.schema.metadata or {}).get(b"pandas", b"{}")
    index = [name for name in json.loads(pandas).get("index_columns", []) if isinstance(name, str)]
    others = [name for name in columns if name != "task_index"]
    names = [name for name in ("task", *index, "__index_level_0__") if name in others] or others
    if len(dict.fromkeys(names)) > 1:
        texts = [name for name in names if _holds_text(table.schema.field(name).type)]
        names = texts or names
    if not names:
        raise ValueError(f"{path} has no column with the sentences; it has {columns}.")
    if "task" not in names and len(set(names)) > 1:
        raise ValueError(f"{path} does not say which column has the sentences: {names}; call it 'task'.")
    yield from zip(table["task_index"].to_pylist(), table[names[0]].to_pylist(), strict=True)


def _holds_text(kind: Any) -> bool:
    text = str(kind)
    return "string" in text or "binary" in text


def _json_tasks(path: pathlib.Path) -> Iterator[tuple[Any, Any]]:
    """One object per line, or objects over several lines, one after another or in a list."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    decoder, place = json.JSONDecoder(), 0
    while text[place:].strip(" \t\r\n,"):
        place += len(text[place:]) - len(text[place:].lstrip(" \t\r\n,"))
        try:
            content, place = decoder.raw_decode(text, place)
        except ValueError as error:
            line = text.count("\n", 0, place) + 1
            raise ValueError(f"{path} cannot be read from line {line} on: {error}") from error
        for row in content if isinstance(content, list) else [content]:
            if not isinstance(row, dict) or "task_index" not in row or "task" not in row:
                raise ValueError(f"{path}: expected {{'task_index': 0, 'task': 'a sentence'}}, found {row!r:.80}.")
            yield row["task_index"], row["task"]


def parquet_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """At any depth, in order; hidden ones are other programs' (macOS writes `._name` beside each copied file)."""
    return sorted(path for path in folder.rglob("*.parquet") if not path.name.startswith("."))


def read_parquet(path: pathlib.Path, columns: Sequence[str] | None = None) -> Any:
    """A table. Raises ValueError naming the file."""
    parquet = library("pyarrow.parquet")
    try:
        return parquet.read_table(path, columns=columns, partitioning=None)
    except Exception as error:  # pyarrow has an error hierarchy of its own
        raise ValueError(f"{path} cannot be read: {error}{json_files.pointer_hint(path)}") from error


def read_episodes(info: Info, videos: Sequence[str]) -> list[EpisodeRow]:
    """All rows of meta/episodes by number, as often as they are listed.

    Args:
      videos: feature keys of the cameras that are needed and stored as video.
    Raises ValueError naming file and column.
    """
    parquet = library("pyarrow.parquet")
    spans = [f"videos/{key}/{part}" for key in videos for part in ("chunk_index", "file_index", "from_timestamp")]
    required = ["episode_index", *spans]
    optional = ["length", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index", "tasks"]
    optional += [f"videos/{key}/to_timestamp" for key in videos]
    found = []
    for path in parquet_files(info.root / "meta" / "episodes"):
        try:
            there = parquet.read_schema(path).names
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {error}{json_files.pointer_hint(path)}") from error
        missing = [name for name in required if name not in there]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}; is it a LeRobotDataset v3? It has {there[:12]}.")
        table = read_parquet(path, [name for name in (*required, *optional) if name in there])
        for place, row in enumerate(table.to_pylist()):
            row = {name: None if value != value else value for name, value in row.items()}  # NaN: pandas' null
            if row["episode_index"] is None:
                raise ValueError(f"{path}: row {place} has no episode_index.")
            try:
                found.append(_episode_row(row, videos))
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{path}: episode {row['episode_index']!r} cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{info.root}/meta/episodes lists no episode; copy the dataset as a whole.")
    return sorted(found, key=lambda episode: episode.number)


def _episode_row(row: Mapping[str, Any], videos: Sequence[str]) -> EpisodeRow:
    fault = next((f"{name} is null" for name, value in row.items() if value is None and name != "tasks"), "")

    def number(name: str) -> int | None:
        return None if row.get(name) is None else int(row[name])

    spans = {}
    for key in videos:
        chunk, file = number(f"videos/{key}/chunk_index"), number(f"videos/{key}/file_index")
        begin, end = row[f"videos/{key}/from_timestamp"], row.get(f"videos/{key}/to_timestamp")
        if chunk is None or file is None or begin is None:
            continue
        if not 0 <= begin < math.inf:
            fault = fault or f"videos/{key}/from_timestamp is {begin}"
            continue
        spans[key] = VideoSpan(chunk, file, float(begin), None if end is None else float(end))
    chunk, file = number("data/chunk_index"), number("data/file_index")
    return EpisodeRow(
        int(row["episode_index"]),
        number("length"),
        number("dataset_from_index"),
        number("dataset_to_index"),
        None if chunk is None or file is None else (chunk, file),
        row.get("tasks"),
        spans,
        fault,
    )
