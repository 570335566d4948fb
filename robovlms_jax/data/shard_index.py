"""One pass over the shards of an RLDS directory: where every image lies, and every number and text.

An index directory holds a file per shard, `<shard>.npz`, that is complete or absent; so a killed run resumes, several
processes may build the same index, and a shard that changed is indexed again by itself. What a file holds:

    header                 JSON: version, the shard's size and time, damage, texts
    num_steps              int32[E]; offset, length int64[E] of each record's payload
    <image>:offset ...     int64[steps], <image>:length int32[steps], <image>:checksum uint32[steps]
    <numbers>              dtype[steps or E, *shape]
    <wide numbers>:row     int32[steps or E], rows of <wide numbers>:table, for vectors that mostly repeat (embeddings)
    <text>:row             int32[steps or E], rows of the header's texts

Depth images and tensors of varying size are not copied: `record` reads whole records.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import pathlib
import re
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
import tqdm

from robovlms_jax.data import atomic, features, records
from robovlms_jax.data import storage as storages

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the files below; an index of another version is built again."""
INLINE_SIZE = 64
"""Numbers per step up to which a field is copied as it is."""
TABLE_SIZE = 4096
"""Numbers per step up to which a vector is kept as a table of its distinct values."""
BESIDE_DATA = ".frame_index"


@dataclasses.dataclass(frozen=True)
class Split:
    """The files of one split as dataset_info.json lists them.

    files: names, in order.
    shard_lengths: episodes per file.
    """

    dataset: str
    version: str
    name: str
    file_format: str
    files: tuple[str, ...]
    shard_lengths: tuple[int, ...]


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


def read_splits(directory: storages.Directory) -> dict[str, Split]:
    """Name -> split of a dataset_info.json. Raises ValueError naming the file and what is wrong."""
    path = directory / "dataset_info.json"
    try:
        info = json.loads(path.read_text())
        name, file_format = info["name"], info.get("fileFormat") or "tfrecord"
        splits = {}
        for split in info["splits"]:
            lengths = tuple(int(length) for length in split.get("shardLengths", ()))
            template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
            files = tuple(
                template.format(
                    DATASET=name,
                    SPLIT=split["name"],
                    FILEFORMAT=file_format,
                    SHARD_X_OF_Y=f"{number:05d}-of-{len(lengths):05d}",
                    SHARD_INDEX=f"{number:05d}",
                    NUM_SHARDS=f"{len(lengths):05d}",
                )
                for number in range(len(lengths))
            )
            splits[split["name"]] = Split(name, info.get("version", ""), split["name"], file_format, files, lengths)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; copy the dataset's directory as a whole.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not what TFDS writes: {error!r}; copy it again.") from error
    for split in splits.values():
        if split.file_format not in ("tfrecord", "array_record"):
            raise ValueError(f"{path} says fileFormat {split.file_format!r}; tfrecord and array_record can be read.")
    return splits


def read_fields(directory: storages.Directory) -> dict[str, features.Field]:
    """Path -> field of features.json. Raises ValueError."""
    path = directory / "features.json"
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; copy the dataset's directory as a whole.") from error
    return features.read(text, str(path))


def place(directory: storages.Directory, split: Split, index_dir: str = "") -> pathlib.Path:
    """Where the index of a split belongs: in `index_dir`, beside the data, or, where that cannot be written, in the
    user's cache directory."""
    identity = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
    below = pathlib.Path(f"{split.dataset}-{identity}") / split.name
    if index_dir:
        return pathlib.Path(index_dir) / below
    if not directory.is_remote:
        beside = pathlib.Path(directory.path) / BESIDE_DATA / split.name
        with contextlib.suppress(OSError):
            beside.mkdir(parents=True, exist_ok=True)
            if os.access(beside, os.W_OK):
                return beside
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "robovlms_jax" / "index" / below


def build(
    directory: storages.Directory,
    split: Split,
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
    lost = sum(split.shard_lengths[number] for number in range(len(split.files)) if number not in opened)
    mismatch = []
    for number, index in sorted(opened.items()):
        found, expected, name = len(index.num_steps), split.shard_lengths[number], split.files[number]
        for damage in index.damage:
            problems.append(f"{directory / name}: at byte {damage.offset}: {damage.reason}")
            if "features.json" in damage.reason:
                mismatch.append(problems[-1])
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
        )
    if problems:
        logger.warning("%s: %d of %d episodes are left out:\n  %s", directory, lost, total, listed)
    return [opened[number] for number in sorted(opened)]


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


def record(storage: storages.Storage, indexes: Sequence[ShardIndex], file: int, number: int) -> bytes:
    """The payload of one record. Raises OSError."""
    arrays = indexes[file].arrays
    return storage.read(file, int(arrays["offset"][number]), int(arrays["length"][number]))


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
    split: Split,
    fields: Mapping[str, features.Field],
    target: pathlib.Path,
    pending: Sequence[tuple[int, dict[str, Any]]],
    workers: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Index shards here or in processes, with a progress bar over bytes. Yields what was passed in."""
    total = sum(stamp["size"] for _, stamp in pending)
    jobs = [(str(directory), stamp, dict(fields), split.file_format, str(target)) for _, stamp in pending]
    bar = tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=f"indexing {split.dataset} {split.name}")
    with bar, contextlib.ExitStack() as stack:
        if workers == 1 or len(jobs) < 2:
            for (number, stamp), job in zip(pending, jobs, strict=True):
                _index_shard(*job, bar.update)
                yield number, stamp
            return
        context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may deadlock
        counter = context.Value("q", 0)
        pool = concurrent.futures.ProcessPoolExecutor(
            min(workers, len(jobs)), mp_context=context, initializer=_start_worker, initargs=(counter,)
        )
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting = {pool.submit(_work, *job): pair for job, pair in zip(jobs, pending, strict=True)}
        while waiting:
            finished, _ = concurrent.futures.wait(waiting, timeout=0.5, return_when="FIRST_COMPLETED")
            bar.update(counter.value - bar.n)
            for future in finished:
                future.result()
                yield waiting.pop(future)


_worker: dict[str, Any] = {}


def _start_worker(counter: Any) -> None:
    _worker.update(counter=counter)

    def exit_with_parent():  # a killed parent cannot stop its workers, and they would wait for work forever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _work(*job: Any) -> None:
    def advance(count: int) -> None:
        with _worker["counter"].get_lock():
            _worker["counter"].value += count

    _index_shard(*job, advance)


def _index_shard(
    directory: str,
    stamp: Mapping[str, Any],
    fields: Mapping[str, features.Field],
    file_format: str,
    target: str,
    advance: Callable[[int], Any],
) -> None:
    """Read one shard from start to end and write its index. Raises OSError."""
    shard = storages.Directory(directory) / stamp["file"]
    columns = _Columns(fields)
    damage: list[records.Damage] = []
    record_lengths: list[int] = []
    done = 0
    for item in _records(shard, stamp["size"], file_format, record_lengths):
        if isinstance(item, records.Damage):
            damage.append(item)
            position = item.offset + item.length
        else:
            try:
                columns.add(item)
            except (records.WireError, features.FieldError) as error:
                damage.append(records.Damage(item.offset, len(item.payload), str(error)))
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


class _Columns:
    """What an index collects, record by record; a record that fails leaves nothing behind."""

    def __init__(self, fields: Mapping[str, features.Field]):
        self._fields = {path: field for path, field in fields.items() if _kept(field)}
        self._parts: dict[str, list[np.ndarray]] = {"num_steps": [], "offset": [], "length": []}
        self._texts: dict[str, dict[bytes, int]] = {}
        self._tables: dict[str, dict[bytes, int]] = {}
        for path, field in self._fields.items():
            if field.kind == "image":
                self._parts |= {f"{path}:offset": [], f"{path}:length": [], f"{path}:checksum": []}
            elif field.kind == "text":
                self._texts[path] = {}
                self._parts[f"{path}:row"] = []
            elif field.size > INLINE_SIZE:
                self._tables[path] = {}
                self._parts[f"{path}:row"] = []
            else:
                self._parts[path] = []

    def add(self, item: records.Record) -> None:
        """Take a record in. Raises WireError or FieldError."""
        payload = item.payload
        found = records.features_of(payload)
        num_steps = features.count_steps(payload, found)
        new: dict[str, np.ndarray] = {
            "num_steps": np.array([num_steps], np.int32),
            "offset": np.array([item.offset], np.int64),
            "length": np.array([len(payload)], np.int64),
        }
        for path, field in self._fields.items():
            count = num_steps if field.per_step else 1
            if field.kind == "image":
                features.strings(payload, found, field, count)
                starts, lengths = records.spans_of(payload, found[path])
                new[f"{path}:offset"] = item.offset + np.array(starts, np.int64)
                new[f"{path}:length"] = np.array(lengths, np.int32)
                new[f"{path}:checksum"] = np.array(
                    [
                        google_crc32c.value(payload[start : start + length])
                        for start, length in zip(starts, lengths, strict=True)
                    ],
                    np.uint32,
                )
            elif field.kind == "text":
                new[f"{path}:row"] = _rows(self._texts[path], features.strings(payload, found, field, count))
            else:
                values = features.numbers(payload, found, field, count)
                if path in self._tables:
                    new[f"{path}:row"] = _rows(self._tables[path], [row.tobytes() for row in values])
                else:
                    new[path] = values
        for name, values in new.items():
            self._parts[name].append(values)

    def finish(self) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        """(arrays by name, distinct texts by path)."""
        empty: dict[str, np.ndarray] = {"num_steps": np.zeros(0, np.int32)}
        for name in self._parts:
            path, _, part = name.rpartition(":")
            field = self._fields.get(name)
            if field is not None and field.is_numeric:
                empty[name] = np.zeros((0, *field.shape), field.dtype)
            else:
                kinds = {"checksum": np.uint32, "row": np.int32, "length": np.int32 if path else np.int64}
                empty.setdefault(name, np.zeros(0, kinds.get(part, np.int64)))
        arrays = {name: np.concatenate(parts) if parts else empty[name] for name, parts in self._parts.items()}
        for path, table in self._tables.items():
            field = self._fields[path]
            arrays[f"{path}:table"] = np.frombuffer(b"".join(table), field.dtype).reshape(-1, *field.shape)
        # Latin-1 keeps any bytes; what is no UTF-8 is the reader's concern.
        return arrays, {path: [text.decode("latin1") for text in table] for path, table in self._texts.items()}


def _kept(field: features.Field) -> bool:
    """Whether the index holds a field: depth images and what varies in size stay in the records."""
    if field.kind in ("image", "text"):
        return True
    if not field.is_numeric:
        return False
    return 0 <= field.size <= (TABLE_SIZE if len(field.shape) == 1 else INLINE_SIZE)


def _rows(table: dict[bytes, int], values: Sequence[bytes]) -> np.ndarray:
    return np.array([table.setdefault(value, len(table)) for value in values], np.int32)


def shard_pattern(name: str) -> bool:
    """Whether a file name looks like a TFDS shard."""
    return re.search(r"-\d{5}-of-\d{5}$", name) is not None
