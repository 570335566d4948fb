"""Episodes as a LeRobotDataset v3, one data file and one video per camera for each: whole after every episode."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax import atomic
from robovlms_jax.control.robot import RobotSpec
from robovlms_jax.data.lerobot import meaning, meta

DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES, TASKS = "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"


@dataclasses.dataclass(frozen=True)
class Step:
    """What was seen and then done. images: camera -> uint8[height, width, 3]; state: float[P]; action: float[A]."""

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray


class Writer:
    """Appends episodes to a dataset, a new one or one that this class began; none is ever written over.

    Args:
      root: its folder.
      robot: names, units and rate of its numbers, which go to info.json and to the conventions that our reader knows.
    Raises:
      ValueError: a robot without a rate. ImportError naming the extra.
    """

    def __init__(self, root: pathlib.Path, robot: RobotSpec):
        self._parquet, self._arrow = meta.library("pyarrow.parquet"), meta.library("pyarrow")
        self._av = meta.library("av")
        if not robot.rate_hz > 0:
            raise ValueError(f"robot {robot.name!r} has rate_hz={robot.rate_hz}; a recording needs it.")
        self._root, self._robot = root, robot
        path = root / EPISODES
        self._episodes: list[dict[str, Any]] = self._parquet.read_table(path).to_pylist() if path.exists() else []

    @property
    def episodes(self) -> int:
        """How many the dataset holds."""
        return len(self._episodes)

    def add(self, steps: Sequence[Step], instruction: str, success: bool) -> int:
        """Writes an episode and returns its number. Raises ValueError for one without steps."""
        if not steps:
            raise ValueError("an episode has no step; nothing is recorded.")
        number, length = len(self._episodes), len(steps)
        start = self._episodes[-1]["dataset_to_index"] if self._episodes else 0
        tasks = list(dict.fromkeys([*(row["tasks"][0] for row in self._episodes), instruction]))
        rate = self._robot.rate_hz
        columns = {
            "action": self._rows([step.action for step in steps]),
            "observation.state": self._rows([step.state for step in steps]),
            "next.success": [False] * (length - 1) + [success],
            "timestamp": np.arange(length, dtype=np.float32) / np.float32(rate),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "index": np.arange(start, start + length),
            "task_index": np.full(length, tasks.index(instruction)),
        }
        self._save(DATA.format(chunk_index=0, file_index=number), columns)
        row = {
            "episode_index": number,
            "tasks": [instruction],
            "length": length,
            "dataset_from_index": start,
            "dataset_to_index": start + length,
            "data/chunk_index": 0,
            "data/file_index": number,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for camera in steps[0].images:
            key = f"observation.images.{camera}"
            self._film(key, number, [step.images[camera] for step in steps])
            row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": number}
            row |= {f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": length / rate}
        self._episodes.append(row)
        self._describe(steps[0], tasks)
        return number

    def _describe(self, first: Step, tasks: list[str]) -> None:
        self._save(EPISODES, {name: [row[name] for row in self._episodes] for name in self._episodes[0]})
        # LeRobot looks tasks up by the table's index, which pandas finds by this.
        kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
        described = [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
            for name, (kind, numpy) in kinds.items()
        ]
        index = {"index_columns": ["task"], "column_indexes": [], "columns": described, "pandas_version": "2.0.0"}
        known = {b"pandas": json.dumps(index).encode()}
        self._save(TASKS, {"task_index": np.arange(len(tasks)), "task": tasks}, known)
        frames, robot = self._episodes[-1]["dataset_to_index"], self._robot
        atomic.write_json(
            self._root / "meta/info.json",
            {
                "codebase_version": "v3.0",
                "robot_type": robot.name,
                "fps": round(robot.rate_hz) if float(robot.rate_hz).is_integer() else robot.rate_hz,
                "total_episodes": len(self._episodes),
                "total_frames": frames,
                "total_tasks": len(tasks),
                "chunks_size": 1000,
                "data_files_size_in_mb": 100,
                "video_files_size_in_mb": 200,
                "splits": {"train": f"0:{len(self._episodes)}"},
                "data_path": DATA,
                "video_path": VIDEO,
                "features": self._described(first),
            },
        )
        described = {part: value for part, value in robot.to_json().items() if part in ("name", "action", "state")}
        atomic.write_json(self._root / meaning.CONVENTIONS, {"robot": described, "success": "next.success"})

    def _described(self, first: Step) -> dict[str, Any]:
        robot = self._robot
        numbers = {"action": (first.action, robot.action), "observation.state": (first.state, robot.state)}
        features: dict[str, Any] = {
            name: {"dtype": "float32", "shape": [len(value)], "names": [dimension.name for dimension in dimensions]}
            for name, (value, dimensions) in numbers.items()
        }
        for camera, image in first.images.items():
            features[f"observation.images.{camera}"] = {
                "dtype": "video",
                "shape": list(_even(image).shape),
                "names": ["height", "width", "channels"],
            }
        one = {"shape": [1], "names": None}
        features["next.success"] = {"dtype": "bool", **one}
        features["timestamp"] = {"dtype": "float32", **one}
        for name in ("frame_index", "episode_index", "index", "task_index"):
            features[name] = {"dtype": "int64", **one}
        return features

    def _rows(self, values: Sequence[np.ndarray]) -> Any:
        rows = np.stack(values).astype(np.float32)
        return self._arrow.FixedSizeListArray.from_arrays(self._arrow.array(rows.reshape(-1)), rows.shape[1])

    def _save(self, name: str, columns: Mapping[str, Any], more: Mapping[bytes, bytes] | None = None) -> None:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = self._arrow.table(dict(columns))
        with atomic.replacing(path) as file:
            self._parquet.write_table(table.replace_schema_metadata(more) if more else table, file)

    def _film(self, key: str, number: int, images: Sequence[np.ndarray]) -> None:
        path = self._root / VIDEO.format(video_key=key, chunk_index=0, file_index=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._av.open(str(path), "w") as out:
            stream = out.add_stream("mpeg4", rate=round(self._robot.rate_hz))
            stream.height, stream.width = _even(images[0]).shape[:2]
            stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", 4, 8_000_000
            for image in images:
                out.mux(stream.encode(self._av.VideoFrame.from_ndarray(_even(image), format="rgb24")))
            out.mux(stream.encode())


def _even(image: np.ndarray) -> np.ndarray:
    """The format cannot have an odd number of rows or columns: the last one is repeated."""
    height, width = image.shape[:2]
    return np.ascontiguousarray(np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
