"""Write a packed split (see `packed.py`) from any source of frames: parallel, resumable, verified."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import simplejpeg
import tqdm
from PIL import Image

from robovlms_jax import atomic, json_files
from robovlms_jax.control import robot as robots
from robovlms_jax.data import base, disk, frame_index, packed, statistics
from robovlms_jax.data import workers as processes

logger = logging.getLogger(__name__)

FRAMES_PER_SHARD = 4096
"""About 100 MB of JPEG: few enough files to keep all open, small enough that a killed conversion loses little."""
QUALITY = 95
"""Of JPEG, unless another is asked for."""
MIN_PSNR_DB = 30.0
"""A decoded JPEG must come this near to its source. At quality 95 white noise, the worst case, has 35 dB; swapped
channels or a shifted image are far below."""

Codec = Literal["jpeg", "png"]
Encode = Callable[[np.ndarray, str], bytes]
"""(uint8[height, width, 3], what it shows, for errors) -> encoded bytes."""
ReadEncoded = Callable[[int], tuple[list[bytes], Mapping[str, np.ndarray]]]
"""`EncodedSource.encoded` of any source; picklable."""


class FrameSource(Protocol):
    """What `pack` reads from; `calvin.NpzDataset` is one, `WithSensors` makes one with more fields. Picklable. One that
    has frames without pictures says so by `shows_all`, False."""

    name: str
    episodes: tuple[base.Episode, ...]
    image_sizes: Mapping[str, tuple[int, int]]
    arrays: tuple[str, ...]
    robot: robots.RobotSpec
    action_units: tuple[float, ...]
    statistics: statistics.Statistics | None

    def frame(self, frame_id: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        """(camera -> uint8[height, width, 3], field -> float32[d]) of one frame. Raises CorruptFrameError."""


class EncodedSource(FrameSource, Protocol):
    """One whose pictures were encoded by `encode_image` already; packed as they are where codec and quality agree."""

    encoded_as: tuple[Codec, int]
    """Codec and quality."""

    def encoded(self, frame_id: int) -> tuple[list[bytes], Mapping[str, np.ndarray]]:
        """(the pictures in the order of `image_sizes`, field -> float32[d]) of one frame."""


class WithSensors:
    """A dataset as a `FrameSource` whose frames also have further fields of it, such as depth_static, by name."""

    def __init__(self, source: FrameSource, sensors: Sequence[str]):
        self.name, self.episodes, self.image_sizes = source.name, source.episodes, source.image_sizes
        self.robot, self.action_units, self.statistics = source.robot, source.action_units, source.statistics
        self.shows_all = shows_all(source)
        self._source, self.sensors = source, tuple(name for name in sensors if name not in source.arrays)
        self.arrays = (*source.arrays, *self.sensors)
        for name in self.sensors:
            source.array(name, [self.episodes[0].start])  # raises ValueError with the names that there are

    def frame(self, frame_id: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        images, arrays = self._source.frame(frame_id)
        return images, {**arrays, **{name: self._source.array(name, [frame_id])[0] for name in self.sensors}}


def shows_all(source: FrameSource) -> bool:
    """Whether all of its frames have pictures."""
    return getattr(source, "shows_all", True)


def pack(
    source: FrameSource,
    directory: str | os.PathLike[str],
    *,
    frame_ids: np.ndarray,
    codec: Codec = "jpeg",
    quality: int = QUALITY,
    workers: int = 1,
    skip_corrupt: bool = False,
    sidecars: Mapping[str, pathlib.Path] | None = None,
) -> packed.PackedDataset:
    """Write frames of `source` as a packed split and verify it.

    May be killed at any moment and run again: finished shards are kept. Every image is decoded and compared with its
    source as it is written; at the end every shard on disk is compared with the checksum of what was written, and the
    first and last frame of each shard are read back through `PackedDataset`. On a complete directory only these last
    two are done.

    Args:
      frame_ids: int[n], sorted and unique; what to store. Episodes they do not cover are left out.
      codec: "jpeg" (4:4:4) or "png" (lossless).
      quality: of JPEG, 1 to 100.
      workers: processes; 1 stays in this one.
      skip_corrupt: leave out frames that cannot be used, and with them their episodes, instead of refusing.
      sidecars: name -> file to copy into the directory.
    Raises:
      ValueError: the directory holds something else, or frames of `source` cannot be used (all are listed).
      OSError: the directory cannot be written or the disk is full.
      RuntimeError: verification failed.
    """
    directory = pathlib.Path(directory)
    frame_ids = np.asarray(frame_ids, np.int64)
    plan = _plan(source, frame_ids, codec, quality, skip_corrupt)
    read = functools.partial(_encode_frame, source, functools.partial(encode_image, codec, quality))
    if getattr(source, "encoded_as", None) == (codec, quality):
        read = source.encoded
    elif not shows_all(source):
        was = getattr(source, "encoded_as", None)
        keep = f"keep how they are: {was[0]} of quality {was[1]}." if was else "pack all of its parts alike before."
        raise ValueError(
            f"{source.name} has frames without pictures, which become black if they are encoded anew; {keep}"
        )
    with disk.explained(directory):
        if not _claim(directory, plan):
            shards = np.split(frame_ids, range(FRAMES_PER_SHARD, len(frame_ids), FRAMES_PER_SHARD))
            _write_shards(source, directory, shards, read, workers=workers, skip_corrupt=skip_corrupt)
            _merge(source, directory, plan, len(shards), sidecars or {})
        logger.info("verifying %s", directory)
        dataset = packed.PackedDataset(directory)
        verify(dataset, source)
        for leftover in [*directory.glob("shard_*.npz"), directory / packed.PARTIAL_META]:
            leftover.unlink(missing_ok=True)
    return dataset


def _plan(source: FrameSource, frame_ids: np.ndarray, codec: Codec, quality: int, skip_corrupt: bool) -> dict[str, Any]:
    """What a directory's meta.json says of its content; shards of another plan are of no use."""
    further = list(getattr(source, "sensors", ()))
    plan = {
        "version": packed.VERSIONS[not shows_all(source)],
        "codec": codec,
        "quality": quality if codec == "jpeg" else None,
        "image_sizes": {camera: list(size) for camera, size in source.image_sizes.items()},
        "arrays": list(source.arrays),
        "frames_sha256": hashlib.sha256(frame_ids.tobytes()).hexdigest(),
        "frames_per_shard": FRAMES_PER_SHARD,
        "skip_corrupt": skip_corrupt,
    }
    if further:
        plan["sensors"] = further
    if source.statistics is not None:  # a format that knows what its numbers mean; CALVIN's are understood
        plan |= {"action_units": list(source.action_units), "statistics": source.statistics.to_json()}
        plan["robot"] = source.robot.to_json()
    plan = json.loads(json.dumps(plan))  # as it is read again: lists, no tuples
    return plan


def verify(dataset: packed.PackedDataset, source: FrameSource) -> None:
    """Compare every shard with its crc32, its first and last frame with `source`. Raises RuntimeError."""
    again = f"delete {dataset.directory} and pack again."
    for shard in dataset.meta["shards"]:
        crc = 0
        with open(dataset.directory / shard["file"], "rb") as file:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
        if crc != shard["crc32"]:
            raise RuntimeError(
                f"{dataset.directory / shard['file']} has crc32 {crc:#x}, expected {shard['crc32']:#x}; {again}"
            )
    for frame_id in sorted({frame_id for shard in dataset.meta["shards"] for frame_id in _ends(dataset, shard)}):
        images, arrays = source.frame(frame_id)
        decoded = dataset.images([frame_id], dataset.cameras)
        wrong = [
            camera for camera in images if not _faithful(decoded[camera][0], images[camera], dataset.meta["codec"])
        ]
        wrong += [name for name in arrays if not _same(dataset.array(name, [frame_id])[0], arrays[name])]
        if wrong:
            raise RuntimeError(
                f"{dataset.directory}: {wrong} of frame {frame_id} are not those of {source.name}; {again}"
            )


def _ends(dataset: packed.PackedDataset, shard: Mapping[str, Any]) -> list[int]:
    """The first and the last frame of a shard, and of those of its frames that have pictures, if any has."""
    if not shard["frames"] or dataset.shows_all:
        return shard["frames"]
    first, last = np.searchsorted(dataset.frame_ids, shard["frames"])
    ids = dataset.frame_ids[first : last + 1]
    seen = ids[dataset.shown(ids)].tolist()
    return [*shard["frames"], *seen[:1], *seen[-1:]]


def _same(stored: np.ndarray, values: np.ndarray) -> bool:
    """Equal; NaN, which stands for a missing value in readings of sensors, equals itself."""
    return np.array_equal(stored, np.asarray(values, np.float32), equal_nan=True)


def _claim(directory: pathlib.Path, plan: Mapping[str, Any]) -> bool:
    """Make `directory` ours and clear what a killed run left half-written. Returns whether it is complete already."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (packed.META, packed.PARTIAL_META):
        if (directory / name).exists():
            found = json.loads((directory / name).read_text())
            differing = json_files.differences(found, plan, plan)
            if differing:
                raise ValueError(
                    f"{directory} was packed with other settings ({differing}). Choose another directory or delete it."
                )
            for leftover in directory.rglob("*.tmp"):
                leftover.unlink()
            return name == packed.META
    others = sorted(path.name for path in directory.iterdir())
    if others:
        raise ValueError(
            f"{directory} holds something else ({', '.join(others[:5])}); choose another or an empty directory."
        )
    atomic.write_json(directory / packed.PARTIAL_META, plan)
    return False


def _write_shards(
    source: FrameSource,
    directory: pathlib.Path,
    shards: Sequence[np.ndarray],
    read: ReadEncoded,
    *,
    workers: int,
    skip_corrupt: bool,
) -> None:
    """Write the shards that are not finished, here or in processes. Raises ValueError that lists unusable frames."""
    pending = [(number, ids) for number, ids in enumerate(shards) if not _part(directory, number).exists()]
    total, remaining = sum(map(len, shards)), sum(len(ids) for _, ids in pending)
    _require_space(directory, read, [ids for _, ids in pending], 8 if shows_all(source) else 400)
    write = functools.partial(_write_shard, tuple(source.arrays), directory, read, skip_corrupt)
    problems: list[str] = []
    with tqdm.tqdm(total=total, initial=total - remaining, unit="frame", desc=str(directory)) as bar:
        for _, found in processes.completed(write, pending, workers=workers, advance=bar.update):
            problems += found
    if problems:
        listed = "\n  ".join(problems[:20] + ["..."] * (len(problems) > 20))
        message = f"{source.name}: {len(problems)} frames cannot be used:\n  {listed}\n"
        if not skip_corrupt:
            raise ValueError(
                f"{message}Fetch these files again and repeat the command (finished shards are kept), or pass "
                "--skip_corrupt to leave out the episodes that use them."
            )
        logger.warning("%sThey are left out.", message)


def _encode_frame(source: FrameSource, encode: Encode, frame_id: int) -> tuple[list[bytes], Mapping[str, np.ndarray]]:
    images, arrays = source.frame(frame_id)
    return [encode(images[camera], f"{camera} image of frame {frame_id}") for camera in source.image_sizes], arrays


def _write_shard(
    arrays: Sequence[str],
    directory: pathlib.Path,
    read: ReadEncoded,
    skip_corrupt: bool,
    number: int,
    frame_ids: np.ndarray,
    advance: processes.Advance,
) -> list[str]:
    """Write one shard, then its part of the index, whose presence marks the shard as finished.

    Returns a message for each frame that cannot be used. Unless these are skipped, a shard that has any is not kept.
    """
    problems: list[str] = []
    columns: dict[str, list[Any]] = {name: [] for name in ("frame_id", "offset", "length", *arrays)}
    position = crc = 0
    with atomic.replacing(_shard(directory, number)) as file:
        for frame_id in frame_ids.tolist():
            advance(1)
            try:
                encoded, values = read(frame_id)
            except base.CorruptFrameError as error:
                problems.append(str(error))
                continue
            lengths = [len(data) for data in encoded]
            row = {
                "frame_id": frame_id,
                "offset": position + np.cumsum([0, *lengths[:-1]]),
                "length": lengths,
                **values,
            }
            for name, value in row.items():
                columns[name].append(value)
            frame = b"".join(encoded)
            file.write(frame)
            position, crc = position + len(frame), zlib.crc32(frame, crc)
    if problems and not skip_corrupt:
        _shard(directory, number).unlink()
        return problems
    with atomic.replacing(_part(directory, number)) as file:
        np.savez(file, size=position, crc32=crc, **columns)
    return problems


def _merge(
    source: FrameSource,
    directory: pathlib.Path,
    plan: Mapping[str, Any],
    num_shards: int,
    sidecars: Mapping[str, pathlib.Path],
) -> None:
    """Join the parts of the index, write annotations and copies, and last the file that marks completeness."""
    parts = [dict(np.load(_part(directory, number))) for number in range(num_shards)]
    dtypes = {"frame_id": np.int64, "offset": np.int64, "length": np.int32, **dict.fromkeys(source.arrays, np.float32)}
    kept = [part for part in parts if len(part["frame_id"])]  # a part without frames does not know its columns' widths
    if not kept:
        raise ValueError(f"{source.name}: no frame can be used.")
    index = {name: np.concatenate([part[name] for part in kept]).astype(dtype) for name, dtype in dtypes.items()}
    index["file_id"] = np.repeat(np.arange(num_shards, dtype=np.int32), [len(part["frame_id"]) for part in parts])
    (directory / "index").mkdir(exist_ok=True)
    for name, array in index.items():
        with atomic.replacing(directory / "index" / f"{name}.npy") as file:
            np.save(file, array)
    covered = [episode for episode in source.episodes if _covers(index["frame_id"], episode)]
    if len(covered) < len(source.episodes):
        logger.warning(
            "left out %d of %d episodes, whose frames are not stored",
            len(source.episodes) - len(covered),
            len(source.episodes),
        )
    atomic.write_json(directory / "annotations.json", [dataclasses.asdict(episode) for episode in covered])
    for name, path in sidecars.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, directory / name)
    shards = [
        {
            "file": _shard(directory, number).name,
            "size": int(part["size"]),
            "crc32": int(part["crc32"]),
            "frames": part["frame_id"][[0, -1]].tolist() if len(part["frame_id"]) else [],
        }
        for number, part in enumerate(parts)
    ]
    atomic.write_json(directory / packed.META, {**plan, "num_frames": len(index["frame_id"]), "shards": shards})


def _covers(frame_ids: np.ndarray, episode: base.Episode) -> bool:
    first, last = np.searchsorted(frame_ids, (episode.start, episode.end + 1))
    return last - first == episode.end - episode.start + 1


def encode_image(codec: Codec, quality: int, image: np.ndarray, what: str) -> bytes:
    """JPEG or PNG of uint8[height, width, 3], decoded once to make sure. Raises RuntimeError."""
    if codec == "jpeg":
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality, colorsubsampling="444")
    else:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "png", compress_level=1)  # decodes as fast as level 6 and is 5 % larger
        data = stream.getvalue()
    decoded = np.empty_like(image, order="C")
    frame_index.decode_image(data, decoded)
    if not _faithful(decoded, image, codec):
        raise RuntimeError(f"{what} does not survive {codec} at quality {quality}; raise it or use --codec png.")
    return data


def _faithful(decoded: np.ndarray, image: np.ndarray, codec: Codec) -> bool:
    """Whether `decoded` is what `codec` may make of `image`: the same pixels, or JPEG's usual loss."""
    if codec == "png":
        return np.array_equal(decoded, image)
    error = np.subtract(decoded, image, dtype=np.float32).ravel()
    return bool(np.dot(error, error) <= error.size * 255**2 / 10 ** (MIN_PSNR_DB / 10))


def _require_space(directory: pathlib.Path, read: ReadEncoded, shards: Sequence[np.ndarray], count: int) -> None:
    """Refuse before the long work when the disk clearly cannot hold it, judging by the size of `count` frames."""
    if not shards:
        return
    ids, sizes = np.concatenate(shards), []
    for frame_id in ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)].tolist():
        with contextlib.suppress(base.CorruptFrameError):  # reported when its shard is written
            sizes.append(sum(map(len, read(frame_id)[0])))
    disk.require(directory, len(ids) * float(np.mean(sizes or [0])))


def _shard(directory: pathlib.Path, number: int) -> pathlib.Path:
    return directory / f"shard_{number:05d}.bin"


def _part(directory: pathlib.Path, number: int) -> pathlib.Path:
    return directory / f"shard_{number:05d}.npz"
