"""One pass over the shards of an RLDS directory: where every image lies, and every number and text.

An index directory holds a file per shard, `<shard>.npz`, that is complete or absent; so a killed run resumes, several
processes may build the same index, and a shard that changed is indexed again by itself. What a file holds:

    header                 JSON: version, the shard's size and time, damage, texts
    num_steps              int32[E]; offset, length int64[E] of each record's payload
    <image>:offset ...     int64[steps], <image>:length int32[steps], <image>:checksum uint32[steps]
    <numbers>              dtype[steps or E, *shape]
    <wide numbers>:row     int32[steps or E], rows of <wide numbers>:table, for vectors that mostly repeat (embeddings)
    <text>:row             int32[steps or E], rows of the header's texts; several strings per step are joined, see
                           `shard_columns.SEPARATOR`

Depth images and tensors of varying size are not copied: they are read with their whole record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
import tqdm

from robovlms_jax import atomic, json_files
from robovlms_jax.data import features, records, shard_columns, splits
from robovlms_jax.data import storage as storages
from robovlms_jax.data import workers as processes

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the files below; an index of another version is built again."""
BESIDE_DATA = ".frame_index"


class ShardIndex:
    """The index of one shard, opened. Arrays by name, as the module describes them."""

    def __init__(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]):
        self.header, self.arrays = header, arrays

    @property
    def num_steps(self) -> np.ndarray:
        """int32[E]."""
        return self.arrays["num_steps"]

    @property
    def damage(self) -> list[records.Damage]:
        """What could not be used."""
        return [records.Damage(*entry) for entry in self.header["damage"]]

    def numbers(self, path: str) -> np.ndarray:
        """dtype[steps or E, *shape] of a numeric field. Raises KeyError when it was not copied."""
        if path in self.arrays:
            return self.arrays[path]
        return self.arrays[f"{path}:table"][self.arrays[f"{path}:row"]]

    def texts(self, path: str) -> tuple[np.ndarray, list[bytes]]:
        """(row int32[steps or E], distinct texts) of a text field."""
        return self.arrays[f"{path}:row"], [text.encode("latin1") for text in self.header["texts"][path]]


def read_fields(directory: storages.Directory) -> dict[str, features.Field]:
    """Path -> field of features.json. Raises ValueError."""
    path = directory / "features.json"
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; copy the dataset's directory as a whole.") from error
    return features.read(text, str(path))


def place(directory: storages.Directory, split: splits.Split, index_dir: str = "") -> pathlib.Path:
    """Where the index of a split belongs: in `index_dir`, beside the data, or, where that cannot be written, in the
    user's cache directory. It is made, if it is not there.

    Raises OSError: no such place can be written; names them and what to set.
    """
    identity = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
    below = pathlib.Path(f"{split.dataset}-{identity}") / split.name
    if index_dir:
        candidates = [pathlib.Path(index_dir) / below]
    else:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        beside = [] if directory.is_remote else [pathlib.Path(directory.path) / BESIDE_DATA / split.name]
        candidates = [*beside, cache / "robovlms_jax" / "index" / below]
    tried = []
    for candidate in candidates:
        try:
            if not candidate.is_absolute() and str(candidate).startswith("~"):
                raise OSError("nobody knows this user's home directory")
            candidate.mkdir(parents=True, exist_ok=True)
            if os.access(candidate, os.W_OK | os.X_OK):
                return candidate
            tried.append(f"{candidate} (permission denied)")
        except OSError as error:
            tried.append(f"{candidate} ({error.strerror or error})")
    else_set = "" if index_dir else "set XDG_CACHE_HOME, or "
    raise OSError(
        f"the index of {directory}, split {split.name!r}, cannot be written to {' nor to '.join(tried)}. Please "
        f"{else_set}name a directory that can be written with --data.index_dir DIR."
    )


def build(
    directory: storages.Directory,
    split: splits.Split,
    fields: Mapping[str, features.Field],
    target: pathlib.Path,
    *,
    workers: int = 1,
    max_damaged_share: float = 0.01,
) -> list[ShardIndex]:
    """Index the shards that have no valid index yet, and open all.

    Args:
      target: the index directory, from `place`.
      workers: processes; 1 stays in this one.
      max_damaged_share: of the split's episodes that may be missing or damaged; they are named in the log.
    Raises:
      ValueError: more is damaged, a shard holds more than dataset_info.json says, or its records do not hold what
        features.json says.
      OSError: the index cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    signature = features_signature(fields)
    opened: dict[int, ShardIndex] = {}
    pending: list[tuple[int, dict[str, Any]]] = []
    problems: list[str] = []
    for number, name in enumerate(split.files):
        try:
            stamp = {"file": name, **(directory / name).stamp(), "features": signature, "version": VERSION}
        except OSError as error:
            problems.append(f"{directory / name} is missing ({error}), {split.shard_lengths[number]} episodes")
            continue
        index = _open(target / f"{name}.npz", stamp)
        if index is None:
            pending.append((number, stamp))
        else:
            opened[number] = index
    if pending:
        for number, stamp in _scan(directory, split, fields, target, pending, workers):
            index = _open(target / f"{stamp['file']}.npz", stamp)
            if index is None:
                raise OSError(f"{target / stamp['file']}.npz was written and cannot be read again; check the disk.")
            opened[number] = index
    _require_enough(directory, split, opened, problems, max_damaged_share)
    return [opened[number] for number in sorted(opened)]


def _require_enough(
    directory: storages.Directory,
    split: splits.Split,
    opened: Mapping[int, ShardIndex],
    missing: Sequence[str],
    max_damaged_share: float,
) -> None:
    """Log what cannot be used, together with the shards `missing`. Raises ValueError where it is too much, or a shard
    holds more than dataset_info.json says."""
    problems = list(missing)
    lost = sum(split.shard_lengths[number] for number in range(len(split.files)) if number not in opened)
    mismatch = []
    for number, index in sorted(opened.items()):
        found, expected, name = len(index.num_steps), split.shard_lengths[number], split.files[number]
        listed, differ = _damage(f"{directory / name}", index.damage)
        problems += listed + differ
        mismatch += differ
        if found > expected:
            raise ValueError(
                f"{directory / name} holds {found} episodes, dataset_info.json says {expected}; the two belong to "
                "different versions: copy the directory again."
            )
        lost += expected - found
        if found < expected and not index.damage:
            problems.append(f"{directory / name} holds {found} episodes, dataset_info.json says {expected}")
    total = sum(split.shard_lengths)
    if total == 0:
        raise ValueError(f"{directory}: split {split.name!r} is empty, by dataset_info.json.")
    listed = "\n  ".join(problems[:20] + [f"... and {len(problems) - 20} more"] * (len(problems) > 20))
    if lost == total and mismatch:
        raise ValueError(
            f"{directory}: no record of split {split.name!r} holds what features.json says. Its features.json belongs "
            f"to another version; copy the directory again.\n  {listed}"
        )
    if lost > max_damaged_share * total:
        raise ValueError(
            f"{directory}: {lost} of {total} episodes of split {split.name!r} cannot be used, more than the allowed "
            f"share of {max_damaged_share:g} (data.max_corrupt_share):\n  {listed}\nCopy the files named again."
            + next((hint for name in split.files if (hint := json_files.pointer_hint(str(directory / name)))), "")
        )
    if problems:
        logger.warning("%s: %d of %d episodes are left out:\n  %s", directory, lost, total, listed)


def _damage(file: str, found: Sequence[records.Damage]) -> tuple[list[str], list[str]]:
    """(bytes that hold no record, records that do not hold what features.json says), a line each; alike ones once."""
    listed = []
    alike: dict[str, list[tuple[str, int]]] = {}
    for damage in found:
        record, _, reason = damage.reason.partition(": ")
        if "features.json" in damage.reason:
            alike.setdefault(reason, []).append((record, damage.offset))
        else:
            listed.append(f"{file}: at byte {damage.offset}: {damage.reason}")
    differ = [
        f"{file}: at byte {places[0][1]}: {places[0][0]}"
        + (f" and {len(places) - 1} more, to {places[-1][0]}" if len(places) > 1 else "")
        + f": {reason}"
        for reason, places in alike.items()
    ]
    return listed, differ


def features_signature(fields: Mapping[str, features.Field]) -> str:
    """A hash of all fields."""
    return hashlib.sha256(repr(sorted(map(dataclasses.astuple, fields.values()), key=repr)).encode()).hexdigest()[:16]


def storage_of(
    directory: storages.Directory, file_format: str, files: Sequence[str], record_lengths: Sequence[Sequence[int]]
) -> storages.Storage:
    """Access to the bytes that the offsets of indexes refer to, in the order of `files`."""
    paths = [str(directory / name) for name in files]
    if file_format == "array_record":
        starts = [np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))]) for lengths in record_lengths]
        return storages.ArrayRecords(paths, starts)
    return storages.RemoteFiles(paths) if directory.is_remote else storages.LocalFiles(paths)


def _open(path: pathlib.Path, stamp: Mapping[str, Any]) -> ShardIndex | None:
    """A finished index that belongs to the shard as it is now; None where there is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if header["shard"] != dict(stamp):
                return None
            arrays = {name: file[name] for name in header["checksums"]}
            for name, array in arrays.items():
                if google_crc32c.value(array.tobytes()) != header["checksums"][name]:
                    raise ValueError(f"{name} has a wrong checksum")
            return ShardIndex(header, arrays)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, SyntaxError) as error:
        logger.warning("%s is damaged and is built again: %s", path, error)
        return None
    except Exception as error:  # a damaged zip or npy header may surface as almost anything (struct.error, tokenize...)
        logger.warning("%s is damaged and is built again: %r", path, error)
        return None


def _scan(
    directory: storages.Directory,
    split: splits.Split,
    fields: Mapping[str, features.Field],
    target: pathlib.Path,
    pending: Sequence[tuple[int, dict[str, Any]]],
    workers: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Index shards here or in processes, with a progress bar over bytes. Yields what was passed in."""
    total = sum(stamp["size"] for _, stamp in pending)
    jobs = [(str(directory), stamp, dict(fields), split.file_format, str(target)) for _, stamp in pending]
    bar = tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=f"indexing {split.dataset} {split.name}")
    with bar:
        for position, _ in processes.completed(_index_shard, jobs, workers=workers, advance=bar.update):
            yield pending[position]


def _index_shard(
    directory: str,
    stamp: Mapping[str, Any],
    fields: Mapping[str, features.Field],
    file_format: str,
    target: str,
    advance: processes.Advance,
) -> None:
    """Read one shard from start to end and write its index. Raises OSError."""
    shard = storages.Directory(directory) / stamp["file"]
    columns = shard_columns.Columns(fields)
    damage: list[records.Damage] = []
    record_lengths: list[int] = []
    done = number = 0
    for item in _records(shard, stamp["size"], file_format, record_lengths):
        if isinstance(item, records.Damage):
            damage.append(item)
            position = item.offset + item.length
        else:
            try:
                columns.add(item)
            except (records.WireError, features.FieldError) as error:
                damage.append(records.Damage(item.offset, len(item.payload), f"record {number}: {error}"))
            number += 1
            position = item.offset + len(item.payload)
        position = min(position, stamp["size"])
        advance(position - done)
        done = position
    advance(stamp["size"] - done)
    arrays, texts = columns.finish()
    checksums = {name: google_crc32c.value(array.tobytes()) for name, array in arrays.items()}
    header = {
        "shard": dict(stamp),
        "damage": damage,
        "texts": texts,
        "record_lengths": record_lengths,
        "checksums": checksums,
    }
    with atomic.replacing(pathlib.Path(target) / f"{stamp['file']}.npz") as file:
        np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


def _records(
    shard: storages.Directory, size: int, file_format: str, record_lengths: list[int]
) -> Iterator[records.Record | records.Damage]:
    if file_format == "tfrecord":
        with shard.open() as file:
            yield from records.tfrecords(file, size)
        return
    try:
        reader = storages.open_array_record(shard.path)
    except (OSError, ImportError) as error:
        yield records.Damage(0, size, str(error))
        return
    position = 0
    for number in range(reader.num_records()):
        try:
            payload = storages.read_array_record(reader, number)
        except OSError as error:
            record_lengths.append(0)
            yield records.Damage(position, 0, str(error))
            continue
        record_lengths.append(len(payload))
        yield records.Record(position, payload)
        position += len(payload)
