"""A directory has one writer, and programs that were compiled once are kept."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Iterator

import filelock
import jax

from robovlms_jax import atomic

LOCK, OWNER = ".lock", "writer.json"
PROGRAMS_BYTES = 8 * 2**30
"""Most that the ordinary cache of compiled programs may hold; those not used for longest make room."""


def require_writable(output: pathlib.Path) -> None:
    """Raise OSError where nothing could be written below `output`, ValueError where it is a file. Makes nothing, so it
    can be asked before the work begins that is to be kept there."""
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file; choose another directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unwritable(existing, "permission denied")


@contextlib.contextmanager
def claim(output: pathlib.Path) -> Iterator[None]:
    """Be the only one who writes to the directory of a run, or of a recording. The operating system frees it when the
    process ends, however it ends, so nothing is left to clean up. On several hosts the first process claims it for all.

    Raises:
      ValueError: another process writes there (names its host, process and time), or `output` is a file.
      OSError: it cannot be written; names it.
    """
    if jax.process_index() != 0:
        yield
        return
    require_writable(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(output, error) from error
    lock = filelock.FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(
            f"{output} is being written by {_owner(output)}. Wait for it, stop it, or choose another directory."
        ) from None
    except OSError as error:
        raise _unwritable(output, error) from error
    try:
        owner = {
            "host": platform.node(),
            "pid": os.getpid(),
            "since": datetime.datetime.now().isoformat("T", "seconds"),
        }
        atomic.write_text(output / OWNER, json.dumps(owner))
        yield
    finally:
        (output / OWNER).unlink(missing_ok=True)
        lock.release()


def _unwritable(output: pathlib.Path, why: object) -> OSError:
    return OSError(f"nothing can be written to {output} ({why}); choose another directory, or make it writable.")


def _owner(output: pathlib.Path) -> str:
    try:
        owner = json.loads((output / OWNER).read_text())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def keep_programs(choice: str) -> None:
    """Set up JAX's persistent compilation cache as `train.compilation_cache` says. What cannot be read there is
    compiled again, and what cannot be written is not kept, with JAX's warning."""
    if choice == "auto":
        if jax.config.jax_compilation_cache_dir:
            return
        choice = f"~/.cache/robovlms_jax/xla/{_processor()}"
        jax.config.update("jax_compilation_cache_max_size", PROGRAMS_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(choice).expanduser()) if choice else None)


def _processor() -> str:
    """A name for this type of processor. Homes are shared by different machines, and a program compiled for one CPU
    uses instructions that another may lack; JAX's own key tells accelerators apart, but not CPUs."""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
        return f"{platform.machine()}-{hashlib.sha256(repr(features).encode()).hexdigest()[:12]}"
    return platform.machine()
