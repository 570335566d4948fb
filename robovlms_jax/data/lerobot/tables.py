"""The data files of a LeRobotDataset: numbers of all rows, and images stored inside, read when they are asked for."""

from __future__ import annotations

import collections
import dataclasses
import io
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from robovlms_jax import json_files
from robovlms_jax.data import base
from robovlms_jax.data.lerobot import meta

KEYS = ("episode_index", "task_index")
OPTIONAL_KEYS = ("frame_index", "index", "timestamp")

NULL = -1
"""In place of a missing task_index or index; neither is ever negative."""

_CACHE_BYTES = 256 << 20
"""Of encoded images, per process."""
_SAMPLED_BYTES = 32 << 20
"""A row group of at most this size is read to see whether its images are as info.json says."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of all data files, in any order.

    paths: the files. file, row: int[n], where each row is.
    episode, frame, task: int64[n]. frame: where the files have no frame_index, None.
    index, timestamp: int64[n] and float64[n], or None where a file lacks them.
    numbers: field -> float32[n, width]. sizes: field -> int64[n], how many numbers the stored cell has; -1 = null.
    unkeyed: rows without episode_index or frame_index, which are left out.
    """

    paths: tuple[pathlib.Path, ...]
    file: np.ndarray
    row: np.ndarray
    episode: np.ndarray
    frame: np.ndarray | None
    task: np.ndarray
    index: np.ndarray | None
    timestamp: np.ndarray | None
    numbers: Mapping[str, np.ndarray]
    sizes: Mapping[str, np.ndarray]
    unkeyed: int = 0

    def take(self, rows: np.ndarray) -> Rows:
        """Some rows, in this order."""

        def pick(value: Any) -> Any:
            return value[rows] if isinstance(value, np.ndarray) else value

        fields = {field.name: pick(getattr(self, field.name)) for field in dataclasses.fields(self)}
        for name in ("numbers", "sizes"):
            fields[name] = {key: value[rows] for key, value in fields[name].items()}
        return Rows(**fields)


def read_rows(info: meta.Info, fields: Sequence[str]) -> Rows:
    """Numbers of all rows of all data files.

    Args:
      fields: numeric ones, beside the keys.
    Raises:
      ValueError: no file; a file that cannot be read or lacks a column, by name.
    """
    parquet = meta.library("pyarrow.parquet")
    folder = info.root / info.data_path.split("/")[0]
    paths = meta.parquet_files(folder)
    if not paths:
        raise ValueError(f"{folder} holds no parquet file; copy the dataset as a whole.")
    there = []
    for path in paths:
        try:
            there.append(set(parquet.read_schema(path).names))
        except Exception as error:  # pyarrow has an error hierarchy of its own
            remedy = json_files.pointer_hint(path) or " Copy it again, or remove it to leave its episodes out."
            raise ValueError(f"{path} cannot be read: {str(error).rstrip('.')}.{remedy}") from error
        missing = sorted({*KEYS, *fields} - there[-1])
        if missing:
            raise ValueError(
                f"{path} has no columns {missing}; it has {sorted(there[-1])}. info.json must name fields as tables "
                "do; which of them actions are made of is said in meta/robovlms.json (data/README.md)."
            )
    keys = [*KEYS, *(name for name in OPTIONAL_KEYS if all(name in names for names in there))]
    parts: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for number, path in enumerate(paths):
        table = meta.read_parquet(path, [*keys, *fields])
        parts["file"].append(np.full(len(table), number, np.int32))
        parts["row"].append(np.arange(len(table)))
        for name in keys:
            parts[name].append(_numbers(table[name], 1, f"{path}: {name}")[0][:, 0])
        for name in fields:
            values, sizes = _numbers(table[name], info.width(name), f"{path}: {name}")
            parts[f"numbers/{name}"].append(values.astype(np.float32))
            parts[f"sizes/{name}"].append(sizes)
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    keyed = np.isfinite(joined["episode_index"]) & np.isfinite(joined.get("frame_index", joined["episode_index"]))
    joined = {name: values[keyed] for name, values in joined.items()}

    def whole(name: str) -> np.ndarray | None:
        return np.nan_to_num(joined[name], nan=NULL).astype(np.int64) if name in joined else None

    return Rows(
        paths=tuple(paths),
        file=joined["file"],
        row=joined["row"],
        episode=joined["episode_index"].astype(np.int64),
        frame=whole("frame_index"),
        task=np.nan_to_num(joined["task_index"], nan=NULL).astype(np.int64),
        index=whole("index"),
        timestamp=joined.get("timestamp"),
        numbers={name: joined[f"numbers/{name}"] for name in fields},
        sizes={name: joined[f"sizes/{name}"] for name in fields},
        unkeyed=int((~keyed).sum()),
    )


def _numbers(column: Any, width: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of numbers, or of lists of them at any depth.

    Returns:
      float64[n, width], NaN in cells of other sizes; int64[n]: the sizes, -1 where the cell or a number in it is null.
    Raises:
      ValueError: the cells hold something else.
    """
    arrow, compute = meta.library("pyarrow"), meta.library("pyarrow.compute")
    parts, sizes = [], []
    for array in column.chunks:
        size = np.ones(len(array), np.int64)
        null = np.zeros(len(array), bool)
        owner = np.arange(len(array))  # the row that each element belongs to
        while True:
            if isinstance(array, arrow.ExtensionArray):
                array = array.storage
            null[owner[np.asarray(array.is_null())]] = True
            if not (arrow.types.is_list(array.type) or _is_other_list(array.type)):
                break
            lengths = np.asarray(compute.fill_null(compute.list_value_length(array), 0), np.int64)
            owner = np.repeat(owner, lengths)
            array = array.flatten()
            size = np.bincount(owner, minlength=len(size))
        if not (arrow.types.is_integer(array.type) or arrow.types.is_floating(array.type) or _is_bool(array.type)):
            raise ValueError(f"{where} holds {array.type}, expected numbers.")
        values = array.cast(arrow.float64()).to_numpy(zero_copy_only=False)
        size[null] = -1
        fits = size == width
        out = np.full((len(size), width), np.nan)
        out[fits] = values[fits[owner]].reshape(-1, width)
        parts.append(out)
        sizes.append(size)
    return np.concatenate([np.zeros((0, width)), *parts]), np.concatenate([np.zeros(0, np.int64), *sizes])


def _is_other_list(kind: Any) -> bool:
    types = meta.library("pyarrow").types
    return types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_bool(kind: Any) -> bool:
    return meta.library("pyarrow").types.is_boolean(kind)


class Columns:
    """Numeric fields beside those of actions and state, of all rows; each is read when it is first asked for and kept.
    A copy in another process starts empty."""

    def __init__(self, info: meta.Info, paths: Sequence[pathlib.Path]):
        self._info, self._paths = info, tuple(paths)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._read: dict[str, list[np.ndarray]] = {}

    def __reduce__(self):
        return Columns, (self._info, self._paths)

    def key(self, name: str) -> str | None:
        """The feature that `name` means, as it stands or below `observation.`; None: no numeric one."""
        for key in (name, f"observation.{name}"):
            if self._info.features.get(key, {}).get("dtype") not in (None, "image", "video", "string"):
                return key
        return None

    def names(self) -> list[str]:
        """Every numeric feature."""
        return [key for key in self._info.features if self.key(key) == key]

    def take(self, key: str, files: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """float32[n, width] at files[i], rows[i]; NaN where a cell is empty. Raises ValueError naming the file."""
        with self._lock:
            if key not in self._read:
                width = self._info.width(key)
                tables = ((path, meta.read_parquet(path, [key])) for path in self._paths)
                cells = [_numbers(table[key], width, f"{path}: {key}")[0] for path, table in tables]
                self._read[key] = [values.astype(np.float32) for values in cells]
        parts = self._read[key]
        out = np.empty((len(files), self._info.width(key)), np.float32)
        for file in np.unique(files).tolist():
            out[files == file] = parts[file][rows[files == file]]
        return out


class ImageTable:
    """Encoded images inside the data files, by file and row. One row group is read at a time, kept as Arrow's memory,
    and the oldest are dropped; a copy in another process starts empty."""

    def __init__(self, root: pathlib.Path, paths: Sequence[pathlib.Path]):
        self._root, self._paths = root, tuple(paths)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._bounds: dict[int, np.ndarray] = {}
        self._groups: collections.OrderedDict[tuple[int, int, str], Any] = collections.OrderedDict()

    def __reduce__(self):
        return ImageTable, (self._root, self._paths)

    def sample(self, key: str, file: int) -> np.ndarray | None:
        """uint8[height, width, 3]: the first image of a file that can be decoded, of the first eight. None where it
        would cost much memory: all images of a row group may lie in one page, which is read as a whole.

        Raises CorruptFrameError.
        """
        parquet = meta.library("pyarrow.parquet")
        problem = base.CorruptFrameError(f"{self._paths[file]} has no rows.")
        with parquet.ParquetFile(self._paths[file], pre_buffer=False, buffer_size=1 << 16) as opened:
            if opened.num_row_groups and opened.metadata.row_group(0).total_byte_size > _SAMPLED_BYTES:
                return None
            for row, batch in zip(range(8), opened.iter_batches(1, columns=[key]), strict=False):
                try:
                    return self._decode(batch.column(0)[0].as_py(), f"{self._paths[file]}: row {row} of {key}")
                except base.CorruptFrameError as error:
                    problem = error
        raise problem

    def read(self, key: str, files: np.ndarray, rows: np.ndarray, out: Sequence[np.ndarray], *, scale: bool) -> None:
        """Decode into out[i] the image at files[i], rows[i]; other sizes are scaled where `scale`, else refused.

        Raises CorruptFrameError naming file and row.
        """
        for place in np.lexsort((rows, files)).tolist():  # each row group once
            file, row = int(files[place]), int(rows[place])
            cell = self._cell(key, file, row)
            where = f"{self._paths[file]}: row {row} of {key}"
            fit(self._decode(cell, where), out[place], where, scale=scale)

    def _cell(self, key: str, file: int, row: int) -> Any:
        parquet = meta.library("pyarrow.parquet")
        path = self._paths[file]
        with self._lock:
            try:
                if file not in self._bounds:
                    with parquet.ParquetFile(path) as opened:
                        sizes = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]
                    self._bounds[file] = np.cumsum([0, *sizes])
                bounds = self._bounds[file]
                group = int(np.searchsorted(bounds, row, side="right")) - 1
                if (file, group, key) not in self._groups:
                    with parquet.ParquetFile(path) as opened:
                        column = opened.read_row_group(group, columns=[key]).column(0)
                    self._groups[file, group, key] = column
                    while len(self._groups) > 1 and sum(c.nbytes for c in self._groups.values()) > _CACHE_BYTES:
                        self._groups.popitem(last=False)
                self._groups.move_to_end((file, group, key))
                column = self._groups[file, group, key]
            except Exception as error:
                raise base.CorruptFrameError(f"{path}: {key} cannot be read: {error}") from error
        return column[row - int(bounds[group])].as_py()

    def _decode(self, cell: Any, where: str) -> np.ndarray:
        """uint8[height, width, 3] of a cell: encoded bytes, the path of a file, or a struct of both."""
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if isinstance(data, str):
            data, path = None, data
        try:
            if data is None and path:
                data = self._file(str(path), where)
            if not isinstance(data, bytes):
                raise base.CorruptFrameError(f"{where} is no encoded image, found {type(data).__name__}.")
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image.convert("RGB"))
        except base.CorruptFrameError:
            raise
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise base.CorruptFrameError(f"{where}: the image cannot be decoded: {error}") from error

    def _file(self, path: str, where: str) -> bytes:
        """Of a file below the dataset's directory; nothing outside it is read."""
        root = self._root.resolve()
        place = (root / path).resolve()
        if not place.is_relative_to(root):
            raise base.CorruptFrameError(f"{where} names {path}, which lies outside {root}.")
        try:
            return place.read_bytes()
        except OSError as error:
            raise base.CorruptFrameError(f"{where} names {path}: {error}") from error


def fit(image: np.ndarray, out: np.ndarray, where: str, *, scale: bool) -> None:
    """Copy uint8[height, width, 3]. Another size is scaled where `scale`, else it raises CorruptFrameError."""
    if image.shape == out.shape:
        out[:] = image
    elif scale:
        out[:] = np.asarray(Image.fromarray(image).resize((out.shape[1], out.shape[0]), Image.Resampling.LANCZOS))
    else:
        raise base.CorruptFrameError(
            f"{where} has {image.shape[0]} x {image.shape[1]} pixels, info.json says {out.shape[0]} x {out.shape[1]}."
        )
