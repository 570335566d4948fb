"""Trials as directories that several processes, on several machines, take one by one from a shared file system.

<out>/trials/0007/trial.json    what it is, and how it ended
                  claim.json    who works on it, touched every few seconds
                  run/          the run's own directory
                  log.txt       what it said
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from robovlms_jax import atomic, json_files, schema
from robovlms_jax.search.space import Setting
from robovlms_jax.training import directory

BEAT = 10.0
"""Seconds between signs of life of whoever works on a trial."""
SILENCE = 120.0
"""Seconds after which a worker that gave none is taken for dead, and its trial goes on elsewhere."""

_CLAIM = "claim.json"
_REASON = 600
"""Characters of what a failed trial said that its record and the report keep."""

Status = Literal["open", "done", "failed", "pruned"]


@dataclasses.dataclass
class Trial:
    """One run of a search.

    number: of its directory. setting, seed: what it is run with. status: open: not ended yet. value: the objective's
    last value. reason: why it failed. seconds: it took, over all its starts.
    """

    number: int
    setting: Setting
    seed: int
    status: Status = "open"
    value: float | None = None
    reason: str = ""
    seconds: float = 0.0


def reason(text: str) -> str:
    """What a failed trial said, as its record keeps it."""
    return textwrap.shorten(text, _REASON, placeholder=" ...")


def folder(out: pathlib.Path, number: int) -> pathlib.Path:
    """Directory of a trial."""
    return out / "trials" / f"{number:04d}"


def require_out(out: str) -> None:
    """Raise ValueError, OSError before anything is done: results could not be kept below `out`, or would lie all over
    the current folder."""
    if not out.strip():
        raise ValueError("--out is empty; name a folder for trials, queue and report.")
    directory.require_writable(pathlib.Path(out))


def agree(out: pathlib.Path, name: str, settings: Mapping[str, Any]) -> None:
    """Keep `settings` in the file `name` of `out`, or compare them with those that are there: all processes, and all
    later calls, must have the same. Raises ValueError that names what differs."""
    path = out / name
    out.mkdir(parents=True, exist_ok=True)
    ours = json.loads(json.dumps(settings))
    if not path.exists():
        atomic.write_text(path, json.dumps(ours, indent=2) + "\n")
        return
    difference = json_files.differences(json_files.read_object(path, "a search's settings"), ours)
    if difference:
        raise ValueError(f"{out} holds results of other settings: {difference}. Choose another --out.")


def write(out: pathlib.Path, trial: Trial) -> None:
    """Its trial.json, whole or not at all."""
    path = folder(out, trial.number) / "trial.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(dataclasses.asdict(trial), indent=2) + "\n")


def read(out: pathlib.Path) -> list[Trial]:
    """All trials, by number. Raises ValueError naming a damaged file."""
    return [read_one(path) for path in sorted((out / "trials").glob("[0-9]*/trial.json"))]


def read_one(path: pathlib.Path) -> Trial:
    """A trial.json. Raises ValueError naming it where it says nothing that a trial could be."""
    try:
        trial = Trial(**json_files.read_object(path, "a trial"))
        if trial.status not in get_args(Status):
            raise ValueError(f"status {trial.status!r}")
        if trial.status == "done" and not schema.fits(trial.value, float):
            raise ValueError(f"done with value {trial.value!r}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a trial ({error}); delete its directory to run it again.") from None
    return trial


def finished(out: pathlib.Path) -> list[Trial]:
    """As `read`, for a report of what is there. Raises ValueError where nothing is."""
    trials = read(out)
    if not trials:
        raise ValueError(
            f"{out} has no trials to report of. Name the directory that they were run in with --out, or leave "
            "--report out to run them."
        )
    return trials


@contextlib.contextmanager
def claimed(out: pathlib.Path, number: int) -> Iterator[bool]:
    """Whether the trial is ours for the time of the block; False: somebody else works on it."""
    path = folder(out, number) / _CLAIM
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _take(path):
        yield False
        return
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        stop.set()
        beat.join()
        path.unlink(missing_ok=True)


def left_behind(out: pathlib.Path, numbers: Iterable[int], *, until_free: bool = False) -> bool:
    """Wait for the next sign of life of whoever works on the trials `numbers`, which others had a moment ago; whether
    one of them is nobody's any more: it has ended, its worker was stopped, or was silent for too long. So the last
    process that could go on with a trial does not leave before it is known that somebody is at it.

    until_free: wait for that, however many signs there are.
    """
    seen = {number: _touched(out, number) for number in numbers}
    while seen:
        for number, before in list(seen.items()):
            now = _touched(out, number)
            if now is None or _is_dead(folder(out, number) / _CLAIM):
                return True
            if now != before and not until_free:
                del seen[number]
        time.sleep(min(1.0, BEAT / 4))
    return False


def _touched(out: pathlib.Path, number: int) -> int | None:
    """Time of the last sign of life, in nanoseconds; None: nobody works on the trial."""
    try:
        return (folder(out, number) / _CLAIM).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _take(path: pathlib.Path) -> bool:
    pid = os.getpid()
    who = {"host": socket.gethostname(), "namespace": _namespace(), "pid": pid, "started": _started(pid)}
    for _ in range(2):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if not _is_dead(path):
                return False
            # Only one of those who see a dead claim renames it; the others find it gone and lose the race to create.
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_suffix(f".dead.{os.getpid()}"))
                path.with_suffix(f".dead.{os.getpid()}").unlink()
            continue
        with os.fdopen(descriptor, "w") as file:
            json.dump(who, file)
        return True
    return False


def _is_dead(path: pathlib.Path) -> bool:
    try:
        silent = time.time() - path.stat().st_mtime
        who = json.loads(path.read_text())
        # Containers may share a host's name and not its process numbers.
        here = who["host"] == socket.gethostname() and who.get("namespace", _namespace()) == _namespace()
        if here and os.path.isdir("/proc"):
            started = _started(who["pid"])  # of another process with its number, such as after a restart of the machine
            return not started or started != who.get("started", started)
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        pass  # being written, or its writer died of a full disk
    return silent > SILENCE


def _namespace() -> str:
    """Within which process numbers mean what they mean here; "" where a system does not say."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine began, in ticks since the machine did; "" where there is none, or it has ended and
    only waits for its parent to notice."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _beat(path: pathlib.Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            path.touch()
