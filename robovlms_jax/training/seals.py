"""The seal of a checkpoint: which files a step directory has, how long each is, and a checksum of what is in it.

    seal.json   {file: {"bytes": size, "crc32c": eight hexadecimal digits}}

Sizes are compared whenever a checkpoint is looked for, which is cheap and notices what was cut off or is missing;
checksums by whoever reads a part, which notices what a disk or a copy has altered. Seals of earlier versions hold sizes
alone ({file: size}), and before those there were none: what such a seal does not say is not checked.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import google_crc32c

from robovlms_jax import atomic

SEAL = "seal.json"
ITEMS = ("params", "train", "data", "serving")
"""Parts of a step directory."""

_BLOCK = 1 << 24  # bytes read at a time
_THREADS = 4


class DamagedError(ValueError):
    """A file of a checkpoint does not hold what was written to it."""


class Identity(NamedTuple):
    """Which policy a checkpoint is, wherever it lies. step: of its training. fingerprint: of its parameters,
    configuration and the backbone's small files."""

    step: int
    fingerprint: str

    @property
    def label(self) -> str:
        """As directories and reports name it."""
        return f"step_{self.step}-{self.fingerprint}"


def seal(directory: pathlib.Path) -> None:
    """Bring every file of a step to the disk, then note their sizes and checksums: with a seal, a step survives a loss
    of power."""
    files = _files(directory, ITEMS)
    for path in files:
        _sync(path)
    entries = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "crc32c": checksum}
        for path, checksum in zip(files, _checksums(files), strict=True)
    }
    atomic.write_text(directory / SEAL, json.dumps(entries), durable=True)
    _sync(directory)


def damage(directory: pathlib.Path) -> str | None:
    """What is missing or cut off in a step directory, by its seal; None: nothing, or it is from before there were
    seals."""
    try:
        entries = _read(directory)
    except ValueError as error:
        return str(error)
    if not entries and not (directory / "params").is_dir():
        return f"{directory / 'params'} is missing"
    for name, entry in entries.items():
        path, size = directory / name, _size(entry)
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{path} {'is missing' if found is None else f'has {found} bytes of {size}'}"
    return None


def verify(directory: pathlib.Path, *items: str) -> None:
    """Read the files of some of a step's `ITEMS` and compare them with their checksums.

    Raises DamagedError that names the file; nothing where the seal holds no checksums.
    """
    entries = {
        directory / name: entry["crc32c"]
        for name, entry in _read(directory).items()
        if isinstance(entry, dict) and name.split("/")[0] in items
    }
    gone = [path for path in entries if not path.is_file()]
    if gone:
        raise DamagedError(f"{gone[0]} is missing. {_REMEDY}")
    for path, found in zip(entries, _checksums(entries), strict=True):
        if found != entries[path]:
            raise DamagedError(
                f"{path} is damaged: its checksum is {found}, and {entries[path]} was written (crc32c). {_REMEDY}"
            )


_REMEDY = (
    "Copy the checkpoint again from where it is whole, or move this step's directory away to go on from an earlier one."
)


def identity(directory: pathlib.Path) -> Identity:
    """Which policy a step directory holds. Costs nothing where a seal holds checksums, else reading its parameters.

    Copies of a checkpoint are the same, under any path; the same parameters saved twice are not.
    """
    known = {name: entry["crc32c"] for name, entry in _read(directory).items() if isinstance(entry, dict)}
    if not known:
        files = _files(directory, ("params", "serving"))
        names = [path.relative_to(directory).as_posix() for path in files]
        known = dict(zip(names, _checksums(files), strict=True))
    identifying = sorted(
        (name, checksum) for name, checksum in known.items() if name.split("/")[0] in ("params", "serving")
    )
    return Identity(_step(directory), hashlib.sha256(json.dumps(identifying).encode()).hexdigest()[:12])


def _step(directory: pathlib.Path) -> int:
    if directory.name.isdigit():
        return int(directory.name)
    try:  # a checkpoint that was copied under another name
        return int(json.loads((directory / "data" / "metadata").read_text())["next_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _read(directory: pathlib.Path) -> dict[str, Any]:
    """File -> entry. Raises ValueError where the seal itself is damaged."""
    path = directory / SEAL
    try:
        entries = json.loads(path.read_text())
        {_size(entry) for entry in entries.values()}
    except FileNotFoundError:
        return {}
    except ValueError:
        raise DamagedError(f"{path} is cut off") from None
    except (AttributeError, KeyError, TypeError):
        raise DamagedError(f"{path} is no seal: it should hold the size and checksum of every file") from None
    return entries


def _size(entry: Any) -> int:
    return entry["bytes"] if isinstance(entry, dict) else int(entry)


def _files(directory: pathlib.Path, items: Iterable[str]) -> list[pathlib.Path]:
    return [path for item in items for path in sorted((directory / item).rglob("*")) if path.is_file()]


def _checksums(paths: Iterable[pathlib.Path]) -> list[str]:
    """crc32c of each file, as eight hexadecimal digits; several files at a time."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_checksum, paths))


def _checksum(path: pathlib.Path) -> str:
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            checksum = google_crc32c.extend(checksum, block)
    return f"{checksum:08x}"


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
