"""A Python process of its own: for what is fixed once JAX has started, and for what must not take the tests along."""

from __future__ import annotations

import os
import pathlib
import resource
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_python(*arguments: object, status: int = 0, **environment: str) -> str:
    """Run `python arguments` in the repository with more environment variables; its standard output.

    Raises AssertionError, with what it said on standard error, unless it ends with `status`."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout


def limit_files(size: int) -> None:
    """No file of this process may grow beyond `size` bytes: as a full disk, but for everyone who may run tests.
    -1: files may grow again."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
