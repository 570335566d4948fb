"""Bytes of large files by (file number, offset, length), wherever the files are. Reads may come from any thread.

Local files are read with `pread`; paths with a URL scheme ("gs://bucket/...") by ranged requests through fsspec;
records of ArrayRecord files through their own reader, in an address space where a file's records follow each other.
"""

from __future__ import annotations

import abc
import collections
import os
import pathlib
import re
import threading
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from robovlms_jax import extras

MAX_OPEN = 256
"""Files kept open per process; Open X-Embodiment has thousands of shards, and common limits are 1024 descriptors."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether `path` has a URL scheme, such as gs:// or memory://."""
    return re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(path)) is not None


class Storage(abc.ABC):
    """Random access to numbered files. Picklable; handles are not part of what is pickled."""

    files: tuple[str, ...]

    @abc.abstractmethod
    def read(self, file: int, offset: int, length: int) -> bytes:
        """Bytes of one file; fewer than `length` where the file ends. Raises OSError."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release handles; the next read takes new ones."""


class _Handle:
    """A file descriptor that closes when nobody holds it any more, so a reader never loses it under its feet."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close: Any = os.close):  # `os` may be gone at exit
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class _Recent:
    """The values made for the keys used last, at most `size` of them; thread-safe, empty after pickling."""

    def __init__(self, size: int):
        self._size, self._lock = size, threading.Lock()
        self._values: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def get(self, key: Any, make: Any) -> Any:
        """The value of `key`, made by `make()` where there is none."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        with self._lock:
            self._values.clear()

    def __reduce__(self):
        return _Recent, (self._size,)


class LocalFiles(Storage):
    """Files of this machine."""

    def __init__(self, files: Sequence[str | os.PathLike[str]]):
        self.files = tuple(os.fspath(file) for file in files)
        self._handles = _Recent(MAX_OPEN)

    def read(self, file: int, offset: int, length: int) -> bytes:
        handle = self._handles.get(file, lambda: _Handle(self.files[file]))
        return os.pread(handle.descriptor, length, offset)

    def close(self) -> None:
        self._handles.clear()


class RemoteFiles(Storage):
    """Files behind URLs. Each read is one ranged request."""

    def __init__(self, files: Sequence[str]):
        self.files = tuple(files)

    def close(self) -> None:
        pass  # nothing is kept open between requests

    def read(self, file: int, offset: int, length: int) -> bytes:
        fs, path = filesystem(self.files[file])
        try:
            return fs.cat_file(path, start=offset, end=offset + length)
        except OSError:
            raise
        except Exception as error:  # HTTP clients and cloud libraries have exceptions of their own
            raise OSError(f"{type(error).__name__}: {error}") from error


class ArrayRecords(Storage):
    """Records of ArrayRecord files. Offset o of a file lies in the record r with starts[r] <= o < starts[r + 1].

    Args:
      starts: per file int64[records + 1], running sum of the records' lengths.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]], starts: Sequence[np.ndarray]):
        self.files = tuple(os.fspath(file) for file in files)
        self._starts = list(starts)
        self._readers = threading.local()  # a reader must not be used by two threads at a time
        self._records = _Recent(16)

    def read(self, file: int, offset: int, length: int) -> bytes:
        number = int(np.searchsorted(self._starts[file], offset, side="right")) - 1
        begin = offset - int(self._starts[file][number])
        record = self._records.get((file, number), lambda: self._record(file, number))
        return record[begin : begin + length]

    def close(self) -> None:
        self._records.clear()
        self._readers = threading.local()

    def _record(self, file: int, number: int) -> bytes:
        readers = self._readers.__dict__.setdefault("open", collections.OrderedDict())
        if file not in readers:
            readers[file] = open_array_record(self.files[file])
            if len(readers) > MAX_OPEN // 8:  # per thread
                readers.popitem(last=False)
        return read_array_record(readers[file], number)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _readers=threading.local())


def open_array_record(path: str) -> Any:
    """A reader of an ArrayRecord file. Raises OSError."""
    from array_record.python import array_record_module

    try:
        # Without read-ahead: frames are asked for at random.
        return array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
    except Exception as error:
        raise OSError(f"{path} is no readable ArrayRecord file: {error}") from error


def read_array_record(reader: Any, number: int) -> bytes:
    """One record. Raises OSError."""
    try:
        (record,) = reader.read([number])
    except Exception as error:
        raise OSError(f"record {number} cannot be read: {error}") from error
    return record


def require_no_file(root: str | os.PathLike[str]) -> None:
    """Raise ValueError where `root`, which should be a dataset's directory, is a file."""
    if not is_url(root) and os.path.isfile(root):
        raise ValueError(f"data.root={os.fspath(root)!r} is a file; pass the dataset's directory (data/README.md).")


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path within it). Raises ValueError naming the package that a scheme needs."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{url} cannot be opened: {error}. Paths with a URL scheme need fsspec and the package of the scheme: "
            f"{extras.install('remote')}"
        ) from error


class Directory:
    """A directory, local or behind a URL: the few operations that reading a dataset needs."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path).rstrip("/") or "/"
        self.is_remote = is_url(self.path)

    def __truediv__(self, name: str) -> Directory:
        return Directory(f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def exists(self) -> bool:
        if not self.is_remote:
            return os.path.exists(self.path)
        fs, path = filesystem(self.path)
        return fs.exists(path)

    def names(self) -> list[str]:
        """Names of what is inside, sorted; empty when it is no directory. Raises OSError."""
        if not self.is_remote:
            return sorted(os.listdir(self.path)) if os.path.isdir(self.path) else []
        fs, path = filesystem(self.path)
        if not fs.exists(path):
            return []
        return sorted({entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False)})

    def read_text(self) -> str:
        """UTF-8, without the byte order mark some editors put first. Raises OSError, or ValueError: it is no text."""
        if not self.is_remote:
            return pathlib.Path(self.path).read_text(encoding="utf-8-sig")
        fs, path = filesystem(self.path)
        return fs.cat_file(path).decode("utf-8-sig")

    def open(self) -> IO[bytes]:
        """Open for sequential reading."""
        if not self.is_remote:
            return open(self.path, "rb")
        fs, path = filesystem(self.path)
        return fs.open(path, "rb", block_size=1 << 24)

    def stamp(self) -> dict[str, Any]:
        """Size, and what changes when the content does. Raises OSError."""
        if not self.is_remote:
            stat = os.stat(self.path)
            return {"size": stat.st_size, "changed": str(stat.st_mtime_ns)}
        fs, path = filesystem(self.path)
        info = fs.info(path)
        marks = [str(info[key]) for key in ("etag", "ETag", "md5Hash", "mtime", "updated", "created") if key in info]
        return {"size": int(info["size"]), "changed": " ".join(marks)}
