"""A small LeRobotDataset v3 of any robot, made up: to try a description, and the whole way, without a recording.

In every episode a disc lies somewhere in the pictures and each dimension goes smoothly to a place that follows from
where: what is to be learned is there, and nothing else is.
"""

from __future__ import annotations

import io
import json
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from robovlms_jax.control import robot as robots
from robovlms_jax.data.lerobot import meta
from robovlms_jax.data.lerobot.meaning import CONVENTIONS

TASKS = ("go to the red disc", "go to the blue disc")
COLOURS = ((220, 40, 40), (40, 60, 220))
SIZE = 64
"""Pixels of a camera's side where the robot does not say."""


def write(
    root: pathlib.Path, robot: robots.RobotSpec, *, episodes: int = 12, length: int = 20, seed: int = 0
) -> pathlib.Path:
    """Write a dataset to the new directory `root`, and `robot` beside it as its description; returns `root`.

    Raises FileExistsError; ImportError naming the extra.
    """
    pa, parquet = meta.library("pyarrow"), meta.library("pyarrow.parquet")
    (root / "meta").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    parts = [_episode(rng, robot, number, length) for number in range(episodes)]
    rows: dict[str, Any] = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    rows["index"] = range(episodes * length)

    def save(name: str, columns: dict[str, Any]) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table({key: list(values) for key, values in columns.items()}), path)

    save("data/chunk-000/file-000.parquet", rows)
    save("meta/tasks.parquet", {"task_index": range(len(TASKS)), "__index_level_0__": TASKS})
    starts = [number * length for number in range(episodes)]
    save(
        "meta/episodes/chunk-000/file-000.parquet",
        {
            "episode_index": range(episodes),
            "length": [length] * episodes,
            "tasks": [[TASKS[number % len(TASKS)]] for number in range(episodes)],
            "dataset_from_index": starts,
            "dataset_to_index": [start + length for start in starts],
            "data/chunk_index": [0] * episodes,
            "data/file_index": [0] * episodes,
        },
    )
    (root / "meta/info.json").write_text(json.dumps(_info(robot, episodes, length), indent=2))
    (root / CONVENTIONS).write_text(json.dumps({"robot": robot.to_json()}, indent=2))
    return root


def _info(robot: robots.RobotSpec, episodes: int, length: int) -> dict[str, Any]:
    features: dict[str, Any] = {
        f"observation.images.{camera.name}": {"dtype": "image", "shape": [*_size(camera), 3], "names": None}
        for camera in robot.cameras
    }
    for key, dimensions in (("action", robot.action), ("observation.state", robot.state)):
        if dimensions:
            names = [dimension.name for dimension in dimensions]
            features[key] = {"dtype": "float32", "shape": [len(names)], "names": names}
    return {
        "codebase_version": "v3.0",
        "robot_type": robot.name,
        "fps": robot.rate_hz or 10,
        "total_episodes": episodes,
        "total_frames": episodes * length,
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
    }


def _episode(rng: np.random.Generator, robot: robots.RobotSpec, number: int, length: int) -> dict[str, list]:
    task = number % len(TASKS)
    places = rng.uniform(0.2, 0.8, (len(TASKS), 2))  # of the discs, as shares of height and width
    progress = (1 - np.cos(np.pi * np.arange(length + 1) / length)) / 2
    goal = places[task]
    actions, states = (
        [_value(dimension, goal[column % 2], progress) for column, dimension in enumerate(dimensions)]
        for dimensions in (robot.action, robot.state)
    )
    rows: dict[str, list] = {
        "action": np.stack(actions, axis=1)[1:].tolist(),
        "timestamp": [t / (robot.rate_hz or 10) for t in range(length)],
        "frame_index": list(range(length)),
        "episode_index": [number] * length,
        "task_index": [task] * length,
    }
    if robot.state:
        rows["observation.state"] = np.stack(states, axis=1)[:-1].tolist()
    for camera in robot.cameras:
        picture = {"bytes": _picture(camera, places), "path": "0.png"}
        rows[f"observation.images.{camera.name}"] = [picture] * length
    return rows


def _value(dimension: robots.Dimension, goal: float, progress: np.ndarray) -> np.ndarray:
    """float[length + 1]: on its way to a share `goal` of its range; what is no place, as the change of one."""
    low = dimension.low if math.isfinite(dimension.low) else -1.0
    high = dimension.high if math.isfinite(dimension.high) else 1.0
    if dimension.kind == "binary":
        return np.where((progress > 0.5) == (dimension.open_at == "high"), high, low)
    way = progress * goal
    if dimension.kind in ("delta", "velocity"):
        return np.append(0.0, np.diff(way)) * (high - low) * np.sign(goal - 0.5)
    return low + (0.5 * (1 - progress) + way) * (high - low)


def _picture(camera: robots.Camera, places: np.ndarray) -> bytes:
    """The discs on gray, as PNG."""
    height, width = _size(camera)
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width, 3), 90, np.uint8)
    for place, colour in zip(places, COLOURS, strict=True):
        image[np.hypot(y - place[0] * height, x - place[1] * width) < 0.1 * min(height, width)] = colour
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _size(camera: robots.Camera) -> tuple[int, int]:
    return camera.height or SIZE, camera.width or SIZE
