"""Windows per second that the host can read, by storage layout.   python -m benchmarks.dataloader

Prints JSON. Datasets are fabricated in a temporary directory from the bundled sample's frames, with the published
files' keys. CALVIN (frames of 200 and 84 pixels), each with one thread:

  upstream_npz     W + C frames per window, np.load and stacking of five keys, as RoboVLMs' dataset does it
  npz_k1           the same files through our pipeline, one window per segment
  packed_k1        packed by experiments/pack_calvin, one window per segment
  packed_k8        eight windows per segment
  packed_k8_all    the same with a thread per core

RLDS (one camera of 256 pixels, JPEG of quality 95, episodes of 40 steps), each with one thread:

  rlds_whole       a window reads, parses and decodes its whole episode, as a TFDS pipeline does
  rlds_k1          our frame index, one window per segment
  rlds_k8          eight windows per segment
  rlds_decode_k1   nothing but decoding as many JPEGs from memory as rlds_k1 must: its limit; rlds_decode_k8 likewise
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from benchmarks import machine
from robovlms_jax import cli, cores
from robovlms_jax.data import (
    base,
    calvin,
    cutting,
    features,
    frame_index,
    loading,
    packing,
    records,
    rlds,
    rlds_writer,
    samples,
)

UPSTREAM_KEYS = ("rgb_static", "rgb_gripper", "rel_actions", "robot_obs", "scene_obs")
RLDS_PIXELS, RLDS_STEPS = 256, 40
EPISODE_FRAMES = 64
"""CALVIN's annotated spans have at most this many frames."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare storage layouts by the windows per second that one core reads."""

    sample: pathlib.Path = pathlib.Path(__file__).resolve().parents[1] / "data" / "calvin_sample"
    """Frames to fabricate the dataset from."""
    frames: int = 320
    """Frames to fabricate, a multiple of 64."""
    window: int = 8
    chunk: int = 10
    batch_size: int = 32
    """Windows per batch."""
    seconds: float = 1.0
    """Per layout and round."""
    rounds: int = 5
    """The layouts take turns; the median round counts."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""


def main(args: Args) -> None:
    """Print the result as JSON."""
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        npz = fabricate(args.sample, root / "npz" / "training", args.frames)
        spans = np.array([(episode.start, episode.end) for episode in npz.episodes])
        packed = packing.pack(npz, root / "packed", frame_ids=npz.frames_within(spans))
        layouts = {
            "upstream_npz": lambda: read_as_upstream(npz, args),
            "npz_k1": lambda: read(npz, args, windows_per_segment=1, num_threads=1),
            "packed_k1": lambda: read(packed, args, windows_per_segment=1, num_threads=1),
            "packed_k8": lambda: read(packed, args, windows_per_segment=8, num_threads=1),
            "packed_k8_all": lambda: read(packed, args, windows_per_segment=8, num_threads=cores.usable()),
        }
        layouts |= rlds_layouts(args, root / "rlds", frames=npz)
        rates = compare(layouts, args.rounds)
        sizes = {
            "npz": sum(path.stat().st_size for path in npz.directory.glob("*.npz")) / args.frames,
            "packed": sum(shard["size"] for shard in packed.meta["shards"]) / args.frames,
        }
    machine.report(
        {
            "windows_per_second": rates,
            "times_upstream_npz": {
                name: rate / rates["upstream_npz"] for name, rate in rates.items() if not name.startswith("rlds")
            },
            "rlds_times_whole_episode": {k: rates[f"rlds_{k}"] / rates["rlds_whole"] for k in ("k1", "k8")},
            "rlds_share_of_decode_limit": {k: rates[f"rlds_{k}"] / rates[f"rlds_decode_{k}"] for k in ("k1", "k8")},
            "bytes_per_frame": sizes,
            "settings": {
                name: getattr(args, name) for name in ("frames", "window", "chunk", "batch_size", "seconds", "rounds")
            },
        },
        args.out,
    )


def compare(layouts: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median windows per second of each layout; they take turns, so that a change of load on the machine meets all."""
    measured: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in range(rounds):
        for name, run in layouts.items():
            measured[name].append(run())
    return {name: statistics.median(values) for name, values in measured.items()}


def rlds_layouts(args: Args, directory: pathlib.Path, frames: calvin.NpzDataset) -> dict[str, Callable[[], float]]:
    """What to time of an RLDS dataset fabricated from the static frames of `frames`."""
    fields = (
        features.Field("steps/is_first", "tensor", "bool"),
        features.Field("steps/action", "tensor", "float32", (7,)),
        features.Field("steps/language_instruction", "text", "string"),
        features.Field("steps/observation/image", "image", "uint8", (RLDS_PIXELS, RLDS_PIXELS, 3)),
    )
    rng = np.random.default_rng(0)
    pictures = [
        packing.encode_image("jpeg", 95, np.asarray(Image.fromarray(x).resize((RLDS_PIXELS, RLDS_PIXELS))), "a frame")
        for x in frames.images(frames.frame_ids[:RLDS_STEPS], ["static"])["static"]
    ]

    def episode() -> dict[str, rlds_writer.Values]:
        return {
            "steps/is_first": np.arange(RLDS_STEPS) == 0,
            "steps/action": rng.uniform(-1, 1, (RLDS_STEPS, 7)).astype(np.float32),
            "steps/language_instruction": [b"do it"] * RLDS_STEPS,
            "steps/observation/image": pictures,
        }

    path = rlds_writer.write(directory, "fabricated", fields, {"train": [episode() for _ in range(20)]})
    dataset = rlds.open_dataset(path, {}, "training", name="fabricated")
    shard = next(path.glob("*train*"))
    with shard.open("rb") as file:
        places = [(item.offset, len(item.payload)) for item in records.tfrecords(file, shard.stat().st_size)]
    known = {field.path: field for field in fields}

    def whole_episodes() -> float:
        begin, count = time.perf_counter(), 0
        with shard.open("rb") as file:
            while time.perf_counter() - begin < args.seconds:
                offset, length = places[rng.integers(len(places))]
                images = features.decode(os.pread(file.fileno(), length, offset), known)["steps/observation/image"]
                start = rng.integers(RLDS_STEPS - args.window + 1)
                images[start : start + args.window].copy()
                count += 1
        return count / (time.perf_counter() - begin)

    def decoding(windows_per_segment: int) -> float:
        """Windows/s of decoding alone, with as many frames per window as the pipeline needs."""
        source = make_source(dataset, args, windows_per_segment, ("static",))
        segments = [source.segments[index] for index in range(len(source))]
        needed = sum(segment.num_frames for segment in segments) / source.num_windows
        out = np.empty((RLDS_PIXELS, RLDS_PIXELS, 3), np.uint8)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < args.seconds:
            frame_index.decode_image(pictures[count % len(pictures)], out)
            count += 1
        return count / needed / (time.perf_counter() - begin)

    return {
        "rlds_whole": whole_episodes,
        "rlds_k1": lambda: read(dataset, args, windows_per_segment=1, num_threads=1, cameras=("static",)),
        "rlds_k8": lambda: read(dataset, args, windows_per_segment=8, num_threads=1, cameras=("static",)),
        "rlds_decode_k1": lambda: decoding(1),
        "rlds_decode_k8": lambda: decoding(8),
    }


def make_source(
    dataset: base.Dataset, args: Args, windows_per_segment: int, cameras: tuple[str, ...]
) -> samples.SegmentSource:
    return samples.SegmentSource(
        dataset,
        cutting.Cut(window=args.window, chunk=args.chunk, windows_per_segment=windows_per_segment),
        cameras=cameras,
        encode_text=lambda text: (np.zeros(16, np.int32), np.ones(16, bool)),
    )


def read(
    dataset: base.Dataset,
    args: Args,
    *,
    windows_per_segment: int,
    num_threads: int,
    cameras: tuple[str, ...] = ("static", "wrist"),
) -> float:
    """Windows per second of the training pipeline; slots without a window do not count."""
    source = make_source(dataset, args, windows_per_segment, cameras)
    segments = max(args.batch_size // windows_per_segment, 1)
    batches = loading.train_batches(source, segments_per_batch=segments, seed=0, num_threads=num_threads, prefetch=4)
    try:
        return loading.measure(batches, segments, args.seconds) * source.num_windows / len(source)
    finally:
        batches.close()


def read_as_upstream(dataset: calvin.NpzDataset, args: Args) -> float:
    """Windows per second when every window loads its W + C files."""
    rng = np.random.default_rng(0)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < args.seconds:
        episode = dataset.episodes[rng.integers(len(dataset.episodes))]
        start = rng.integers(episode.start, episode.end - args.window + 1)
        ids = np.minimum(start + np.arange(args.window + args.chunk), episode.end)
        frames = [np.load(dataset.path(frame_id)) for frame_id in ids]
        for key in UPSTREAM_KEYS:
            np.stack([frame[key] for frame in frames])
        for frame in frames:
            frame.close()
        count += 1
    return count / (time.perf_counter() - begin)


def fabricate(sample: pathlib.Path, directory: pathlib.Path, num_frames: int) -> calvin.NpzDataset:
    """Write frames of the sample as CALVIN publishes them, depth and tactile images made up."""
    directory.mkdir(parents=True)
    frames = calvin.open_dataset(sample, "training")
    rng = np.random.default_rng(0)
    stored = np.concatenate([np.arange(episode.start, episode.end + 1) for episode in frames.episodes])
    for frame_id in range(num_frames):
        source = [stored[frame_id % len(stored)]]
        images = frames.images(source, ("static", "wrist"))
        static, wrist = images["static"][0], images["wrist"][0]
        np.savez_compressed(
            directory / f"episode_{frame_id:07d}.npz",
            rgb_static=static,
            rgb_gripper=wrist,
            rgb_tactile=np.repeat(rng.integers(100, 104, (160, 120, 1), np.uint8), 6, axis=-1),
            depth_static=(3.5 + static.mean(axis=-1) / 255).astype(np.float32),
            depth_gripper=(0.5 + wrist.mean(axis=-1) / 255).astype(np.float32),
            depth_tactile=np.zeros((160, 120, 2), np.float32),
            actions=frames.array("actions", source)[0].astype(np.float64),
            rel_actions=frames.actions(source)[0].astype(np.float64),
            robot_obs=frames.robot_obs(source)[0].astype(np.float64),
            scene_obs=frames.scene_obs(source)[0].astype(np.float64),
        )
    spans = [(start, start + EPISODE_FRAMES - 1) for start in range(0, num_frames, EPISODE_FRAMES)]
    language = {"ann": ["do it"] * len(spans), "task": ["task"] * len(spans)}
    np.save(directory / "auto_lang_ann.npy", {"language": language, "info": {"indx": spans}})
    return calvin.NpzDataset(directory)


if __name__ == "__main__":
    main(cli.read(Args))
