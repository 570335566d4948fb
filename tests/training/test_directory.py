"""Directories: one writer at a time, whatever became of the one before; kept programs."""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest

from robovlms_jax.training import directory
from tests.processes import run_python

HOLD = """
import pathlib, sys, time
from robovlms_jax.training import directory
with directory.claim(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(600)
"""


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    # Named while it lives; once killed, even by SIGKILL, nothing it left behind stands in the way.
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "mine\n"
        with (
            pytest.raises(ValueError, match=rf"written by process {first.pid} on .* since .*another directory"),
            directory.claim(tmp_path),
        ):
            pass
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    with directory.claim(tmp_path):
        assert (tmp_path / directory.OWNER).exists()
    assert not (tmp_path / directory.OWNER).exists()


@pytest.mark.parametrize("below", ["", "runs"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    taken = tmp_path / "taken"
    taken.write_text("")
    with (
        pytest.raises(ValueError, match=r"taken is a file; choose another directory"),
        directory.claim(taken / below),
    ):
        pass
    with pytest.raises(ValueError, match=r"taken is a file; choose another directory"):
        directory.require_writable(taken / below)


def test_a_read_only_directory_is_named(tmp_path, monkeypatch):
    # Tests may run as root, who may write anywhere but on a file system mounted read-only: that is played here.
    run = tmp_path / "runs" / "mine"
    directory.require_writable(run)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: path != tmp_path)
        with pytest.raises(OSError, match=rf"nothing can be written to {tmp_path} .*; choose another"):
            directory.require_writable(run)
    for fails in ("mkdir", "open"):  # the directory itself, or the lock in it
        with monkeypatch.context() as patch:
            error = OSError(errno.EROFS, "Read-only file system")
            patch.setattr(*((pathlib.Path, "mkdir") if fails == "mkdir" else (os, "open")), raiser(error))
            with pytest.raises(OSError, match=rf"written to {run} .*Read-only.*choose another"), directory.claim(run):
                pass
    assert list(run.iterdir()) == []


def raiser(error):
    def fails(*args, **kwargs):
        raise error

    return fails


def test_programs_are_kept_where_asked(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
        directory.keep_programs("auto")  # set by the user's environment: left alone
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
        directory.keep_programs(str(tmp_path / "programs"))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")
        directory.keep_programs("")
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        directory.keep_programs("auto")
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "home" / ".cache" / "robovlms_jax"))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


CACHED = """
import sys, jax
from robovlms_jax.training import directory
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
directory.keep_programs("auto")
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
print(float(jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((5, 5)))[0, 0]), bool(hits))
"""


def test_a_second_run_finds_the_programs_of_the_first_and_a_damaged_one_is_made_again(tmp_path):
    # By default, on a CPU too. Fails if nothing is kept, or if a file cut short ends the run.
    home = {"HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    first, second = (run_python("-c", CACHED, **home).split() for _ in range(2))
    assert (first[1], second[1]) == ("False", "True") and first[0] == second[0]
    programs = [path for path in (tmp_path / ".cache").rglob("*") if path.is_file()]
    assert programs
    for path in programs:
        os.truncate(path, path.stat().st_size // 2)
    assert run_python("-c", CACHED, **home).split()[0] == first[0]
