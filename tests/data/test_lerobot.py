"""LeRobotDataset v3: fabricated with pyarrow and PyAV, read back, packed."""

from __future__ import annotations

import json
import pathlib
import pickle

import numpy as np
import pytest

from experiments import convert_data
from robovlms_jax.data import base, calvin, lerobot, opening
from robovlms_jax.data.config import DataConfig
from robovlms_jax.data.lerobot import video

av = pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
FPS = 10
LENGTHS = (7, 6, 5)


def colour(frame: int, camera: str) -> np.ndarray:
    """One flat colour per frame, so that a frame is known however it was compressed."""
    return np.array([(37 * frame) % 200 + 20, (91 * frame) % 180 + 30, 60 if camera == "top" else 190], np.uint8)


def write_video(path: pathlib.Path, camera: str, length: int) -> None:
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.gop_size = 64, 48, 4
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in range(length):
            pixels = np.broadcast_to(colour(frame, camera), (48, 64, 3))
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write(root: pathlib.Path, **info_changes) -> pathlib.Path:
    import pyarrow.parquet as parquet

    total = sum(LENGTHS)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.05, 0.05, (total, 7)).astype(np.float32)
    actions[:, 6] = np.arange(total) % 2
    states = rng.normal(size=(total, 8)).astype(np.float32)
    first = np.cumsum([0, *LENGTHS])
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    shape = [48, 64, 3]
    video = {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]}
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "total_episodes": len(LENGTHS),
        "features": {
            "action": {"dtype": "float32", "shape": [7]},
            "observation.state": {"dtype": "float32", "shape": [8]},
            "observation.images.top": video,
            "observation.images.wrist": video,
        },
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        **info_changes,
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/robovlms.json").write_text(
        json.dumps({"state": ["observation.state"], "state_encoding": "POS_EULER", "control_hz": FPS})
    )
    parquet.write_table(
        pa.table({"task_index": [0, 1], "__index_level_0__": ["open the box", "close it"]}), root / "meta/tasks.parquet"
    )
    numbers = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    table = {
        "action": list(actions),
        "observation.state": list(states),
        "timestamp": np.concatenate([np.arange(n) / FPS for n in LENGTHS]).astype(np.float32),
        "episode_index": numbers,
        "task_index": numbers % 2,
    }
    half = int(first[2])  # two data files
    for number, part in enumerate((slice(0, half), slice(half, total))):
        cut = {key: values[part] for key, values in table.items()}
        parquet.write_table(pa.table(cut), root / f"data/chunk-000/file-{number:03d}.parquet")
    episodes: dict[str, list] = {
        "episode_index": list(range(len(LENGTHS))),
        "dataset_from_index": first[:-1].tolist(),
        "dataset_to_index": first[1:].tolist(),
    }
    for camera in ("top", "wrist"):
        key = f"observation.images.{camera}"
        episodes |= {f"videos/{key}/chunk_index": [0] * 3, f"videos/{key}/file_index": [0] * 3}
        episodes[f"videos/{key}/from_timestamp"] = (first[:-1] / FPS).tolist()
        write_video(root / f"videos/{key}/chunk-000/file-000.mp4", camera, total)
    parquet.write_table(pa.table(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    return root


def test_frames_numbers_and_sentences_belong_together(tmp_path):
    root = write(tmp_path)
    dataset = opening.open_split(DataConfig(dataset="lerobot", root=str(root)), "training")
    held_out = lerobot.open_dataset(root, "validation")
    assert [(e.start, e.end, e.instruction) for e in dataset.episodes] == [(0, 7, "open the box"), (8, 14, "close it")]
    assert [(e.start, e.end, e.instruction) for e in held_out.episodes] == [(15, 20, "open the box")]
    assert dataset.image_sizes == {"static": (48, 64), "wrist": (48, 64)} and dataset.action_units == (1.0,) * 6
    # Ids 8 ... 14 are recorded frames 7 ... 12 and, after the last, 12 again. Out of order, twice, and across episodes.
    ids = [13, 8, 14, 8, 6, 17]
    recorded = [12, 7, 12, 7, 6, 15]
    frames = pickle.loads(pickle.dumps(dataset)).images(ids, ["static", "wrist"])
    for place, frame in enumerate(recorded):
        for name, camera in (("static", "top"), ("wrist", "wrist")):
            assert np.abs(frames[name][place].mean(axis=(0, 1)) - colour(frame, camera)).max() < 12, (frame, camera)
    assert dataset.actions([8])[0, 6] in (-1, 1) and dataset.proprio([9]).shape == (1, 7)
    assert dataset.statistics.num_transitions == sum(LENGTHS)
    with pytest.raises(ValueError, match="asked for"):
        dataset.images([999], ["static"])


def test_video_between_frames_that_lie_far_apart_is_not_decoded(tmp_path, monkeypatch):
    # A batch asks for frames of many segments at once; a file holds many episodes.
    dataset = lerobot.open_dataset(write(tmp_path), "training")
    decoded, real = [], video.VideoReader.frames
    monkeypatch.setattr(video.VideoReader, "frames", lambda *args: (decoded.append(x[0]) or x for x in real(*args)))
    ids = [17, 0, 1]  # recorded 15, 0, 1, at 1.5, 0 and 0.1 s
    frames = dataset.images(ids, ["static"])["static"]
    for image, frame in zip(frames, (15, 0, 1), strict=True):
        assert np.abs(image.mean(axis=(0, 1)) - colour(frame, "top")).max() < 12
    assert len(decoded) == 3


def test_packed_it_reads_the_same(tmp_path):
    source = lerobot.open_dataset(write(tmp_path / "robot"), "training")
    convert_data.main(convert_data.Args("lerobot", tmp_path / "robot", tmp_path / "packed", workers=1))
    packed = calvin.open_dataset(tmp_path / "packed", "training")
    assert packed.episodes == source.episodes and packed.action_units == (1.0,) * 6
    ids = np.arange(15)
    np.testing.assert_array_equal(packed.actions(ids), source.actions(ids))
    np.testing.assert_array_equal(packed.proprio(ids), source.proprio(ids))
    np.testing.assert_array_equal(packed.statistics.action["q99"], source.statistics.action["q99"])
    for camera in ("static", "wrist"):
        difference = packed.images(ids, [camera])[camera].astype(int) - source.images(ids, [camera])[camera]
        assert np.abs(difference).mean() < 2


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"codebase_version 'v2\.1'; v3 can be read"):
        lerobot.open_dataset(write(tmp_path / "a", codebase_version="v2.1"), "training")
    with pytest.raises(ValueError, match="must be a LeRobotDataset's directory"):
        lerobot.open_dataset(tmp_path, "training")
    root = write(tmp_path / "b")
    (root / "meta/robovlms.json").write_text('{"arm": ["action[:5]"]}')
    with pytest.raises(ValueError, match=r"arm: \['action\[:5\]'\] give 5 numbers, expected 6"):
        lerobot.open_dataset(root, "training")
    (root / "meta/robovlms.json").unlink()
    dataset = lerobot.open_dataset(root, "training")
    video = next(root.glob("videos/*top/*/*.mp4"))
    video.write_bytes(video.read_bytes()[:300])
    with pytest.raises(base.CorruptFrameError, match=r"file-000\.mp4"):
        dataset.images([3], ["static"])
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(ImportError, match=r"pip install -e '\.\[lerobot\]'"):
        lerobot.open_dataset(root, "training")
