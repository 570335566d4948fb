"""Small LeRobotDatasets v3 whose pictures and actions say of which episode and frame they are; ways to spoil them."""

from __future__ import annotations

import fractions
import io
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

FRONT = "observation.images.front"
SIZE = (32, 48)
FPS = 10


def colour(episode: int, frame: int, camera: int = 0) -> np.ndarray:
    return np.array([20 + 30 * (episode % 8), 20 + 16 * (frame % 14), 40 + 30 * camera], np.uint8)


def picture(episode: int, frame: int, camera: int = 0) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(colour(episode, frame, camera), (*SIZE, 3)))


def encode(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def write(
    root: pathlib.Path,
    lengths: Sequence[int] = (5, 6, 4, 5),
    *,
    cameras: Sequence[str] = (FRONT,),
    video: bool = False,
    names: Any = None,
    width: int = 7,
    tasks: Sequence[Any] = ("open it", "close it"),
    files: Sequence[Sequence[int]] | None = None,
) -> pathlib.Path:
    """files: the episodes of each data file. Episode e has task e % len(tasks)."""
    (root / "meta").mkdir(parents=True)
    files = files or [range(len(lengths))]
    image = {"dtype": "video" if video else "image", "shape": [*SIZE, 3], "names": ["height", "width", "channels"]}
    features: dict[str, Any] = dict.fromkeys(cameras, image)
    features["action"] = {"dtype": "float32", "shape": [width], "names": names}
    features["observation.state"] = {"dtype": "float32", "shape": [8], "names": None}
    info = {
        "codebase_version": "v3.0",
        "robot_type": "toy",
        "fps": FPS,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    write_json(root / "meta/info.json", info)
    save(root / "meta/tasks.parquet", {"task_index": range(len(tasks)), "__index_level_0__": tasks})
    starts = np.cumsum([0, *lengths]).tolist()
    for number, episodes in enumerate(files):
        rows = _rows([(e, t) for e in episodes for t in range(lengths[e])], lengths, width, len(tasks))
        for place, camera in enumerate([] if video else cameras):
            keys = zip(rows["episode_index"], rows["frame_index"], strict=True)
            rows[camera] = [{"bytes": encode(picture(e, t, place)), "path": f"{t}.png"} for e, t in keys]
        save(data_file(root, number), rows)
    listed = {
        "episode_index": range(len(lengths)),
        "length": lengths,
        "tasks": [[tasks[e % len(tasks)]] for e in range(len(lengths))],
        "dataset_from_index": starts[:-1],
        "dataset_to_index": starts[1:],
        "data/chunk_index": [0] * len(lengths),
        "data/file_index": [next(i for i, f in enumerate(files) if e in f) for e in range(len(lengths))],
    }
    for place, camera in enumerate(cameras if video else []):
        write_video(root, [(e, t) for e, n in enumerate(lengths) for t in range(n)], camera=camera, place=place)
        listed |= dict.fromkeys([f"videos/{camera}/{part}_index" for part in ("chunk", "file")], [0] * len(lengths))
        listed[f"videos/{camera}/from_timestamp"] = [s / FPS for s in starts[:-1]]
        listed[f"videos/{camera}/to_timestamp"] = [s / FPS for s in starts[1:]]
    save(episodes_file(root), listed)
    return root


def _rows(keys: Sequence[tuple[int, int]], lengths: Sequence[int], width: int, num_tasks: int) -> dict[str, list]:
    return {
        "action": [action(e, t, lengths[e], width) for e, t in keys],
        "observation.state": [[e, t, 0, 0, 0, 0, 0, float(t < lengths[e] // 2)] for e, t in keys],
        "timestamp": [t / FPS for _, t in keys],
        "frame_index": [t for _, t in keys],
        "episode_index": [e for e, _ in keys],
        "index": [sum(lengths[:e]) + t for e, t in keys],
        "task_index": [e % num_tasks for e, _ in keys],
    }


def action(episode: int, frame: int, length: int, width: int = 7) -> list[float]:
    """The episode and the frame in the first two numbers; the gripper, last, opens for the first half."""
    return [episode / 100, frame / 200, *[0.001 * frame] * (width - 3), float(frame < length // 2)]


def write_video(
    root: pathlib.Path,
    frames: Sequence[tuple[int, int]],
    *,
    camera: str = FRONT,
    place: int = 0,
    file: int = 0,
    rate: float | fractions.Fraction = FPS,
    size: tuple[int, int] = SIZE,
    milliseconds: Sequence[int] = (),
) -> pathlib.Path:
    """milliseconds: when each frame comes; evenly by `rate` where it is empty."""
    path = root / f"videos/{camera}/chunk-000/file-{file:03d}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size, stream.bit_rate = *size, "yuv420p", 4, 4_000_000
        if milliseconds:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for number, (episode, frame) in enumerate(frames):
            image = np.ascontiguousarray(np.broadcast_to(colour(episode, frame, place), (*size, 3)))
            shown = av.VideoFrame.from_ndarray(image, format="rgb24")
            if milliseconds:
                shown.pts, shown.time_base = milliseconds[number], fractions.Fraction(1, 1000)
            out.mux(stream.encode(shown))
        out.mux(stream.encode())
    return path


def data_file(root: pathlib.Path, number: int = 0) -> pathlib.Path:
    return root / f"data/chunk-000/file-{number:03d}.parquet"


def episodes_file(root: pathlib.Path) -> pathlib.Path:
    return root / "meta/episodes/chunk-000/file-000.parquet"


def save(path: pathlib.Path, columns: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {k: v if isinstance(v, pa.Array) else list(v) for k, v in columns.items()}
    parquet.write_table(pa.table(table), path)


def edit(path: pathlib.Path, change: Callable[[dict[str, list]], Any]) -> None:
    """Rewrite a parquet file; `change` works on its columns in place, or returns others."""
    columns = parquet.read_table(path).to_pydict()
    save(path, change(columns) or columns)


def choose(path: pathlib.Path, rows: Sequence[int]) -> None:
    """Keep some rows of a parquet file, in this order."""
    edit(path, lambda columns: {name: [values[row] for row in rows] for name, values in columns.items()})


def edit_info(root: pathlib.Path, **changes: Any) -> pathlib.Path:
    write_json(root / "meta/info.json", {**json.loads((root / "meta/info.json").read_text()), **changes})
    return root


def write_json(path: pathlib.Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def seen(dataset) -> list[tuple[int, int, str]]:
    """(episode, frame, sentence) of all learned frames; fails where picture and action are not of the same."""
    found = []
    for span in dataset.episodes:
        for frame_id in range(span.start, span.end):
            numbers = dataset.actions([frame_id])[0]
            episode, frame = round(float(numbers[0]) * 100), round(float(numbers[1]) * 200)
            for place, camera in enumerate(dataset.cameras):
                shown = dataset.images([frame_id], [camera])[camera][0].mean(axis=(0, 1))
                assert np.abs(shown - colour(episode, frame, place)).max() < 8, (episode, frame, camera)
            found.append((episode, frame, span.instruction))
    return found
