"""Files that appear under their names complete or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def becoming(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name beside `path` for those who open files themselves; on success it becomes `path`, on failure it is gone."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_free(path: pathlib.Path) -> None:
    """Raises FileExistsError where `path` is something else than an empty folder; for those whose folder takes long to
    be made, before they begin."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already and not an empty folder; choose another.")


@contextlib.contextmanager
def becoming_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside `path` to be filled; on success it becomes `path`, on failure it is gone.

    Raises FileExistsError where `path` is something else than an empty folder.
    """
    require_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: pathlib.Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a file for writing that replaces `path` on success and leaves nothing behind on failure.

    durable: after a loss of power, too, `path` has the old content or the new; takes some milliseconds.
    """
    with becoming(path) as temporary, open(temporary, "wb") as file:
        yield file
        if durable:
            file.flush()
            os.fsync(file.fileno())


def write_text(path: pathlib.Path, text: str, *, durable: bool = False) -> None:
    """Write `text` in UTF-8."""
    with replacing(path, durable=durable) as file:
        file.write(text.encode())


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write `value` as JSON."""
    write_text(path, json.dumps(value, indent=1))


def settle(directory: pathlib.Path) -> None:
    """The directory's entries of new files are safe from a power failure, too, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
