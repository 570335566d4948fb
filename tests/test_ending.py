"""Ctrl-C ends every program with one line that says what is kept, and nobody sees a traceback."""

from __future__ import annotations

import ast
import logging
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from experiments import correct, record_playtable, reinforce, reward
from robovlms_jax import atomic, ending
from robovlms_jax.rl.config import ReinforceConfig
from robovlms_jax.runs import reinforcing
from tests.test_imports import ROOT
from tests.training.test_checkpoints import write_steps


@pytest.mark.parametrize(
    ("came", "said"),
    [(KeyboardInterrupt, "Ctrl-C"), (ending.Terminated, "a signal"), (ending.Terminated("SIGHUP"), "SIGHUP")],
)
@pytest.mark.parametrize(
    ("program", "room", "work", "kept"),
    [
        (correct, "correcting", "record", "takeovers that were recorded are kept, and the same command goes on"),
        (record_playtable, "recording", "record", "chains that were recorded are kept, and the same command goes on"),
        (reward, "rewarding", "learn", "nothing was written; the same command begins anew."),
        (reinforce, "reinforcing", "run", "nothing was written; the same command begins anew."),
    ],
)
def test_a_program_says_what_stopped_it_and_what_it_keeps(
    monkeypatch, capsys, tmp_path, program, room, work, kept, came, said
):
    def interrupted(*_, **__):
        raise came

    monkeypatch.setattr(getattr(program, room), work, interrupted)
    monkeypatch.setattr(sys, "argv", ["program", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(ending.os, "_exit", sys.exit)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"stopped by {said}; {kept}")


def test_a_run_of_reinforcement_says_from_where_it_goes_on(tmp_path):
    config = ReinforceConfig(out=str(tmp_path))
    assert reinforcing.words(config.out) == ending.ANEW
    atomic.write_text(tmp_path / reinforcing.SETTINGS, "{}")
    assert reinforcing.words(config.out).startswith("no iteration is saved; the same command with --resume")
    write_steps(tmp_path / reinforcing.LEARNING, 3, 10)
    assert reinforcing.words(config.out).startswith("iteration 10 is saved; the same command with --resume")


def test_ctrl_c_while_a_program_is_imported_ends_it_with_a_line():
    """Any program, before its own words are known: at the first module that it imports of this project."""
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells start what is behind & without
        "import experiments, robovlms_jax\n"
        "class Finder:\n"
        "    def find_spec(self, name, *how):\n"
        "        if name == 'robovlms_jax.cli':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import experiments.reward\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == f"stopped by Ctrl-C; {ending.WRITTEN}\n"
    other = subprocess.run(
        [sys.executable, "-c", "import experiments; 1 / 0"], cwd=ROOT, capture_output=True, text=True
    )
    assert "ZeroDivisionError" in other.stderr and "stopped" not in other.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["", "x" * 100_000], ids=["short", "long"])
def test_who_stops_reading_sees_no_traceback(words, unbuffered):
    """As with `--help | head -1`: nobody reads what is written at the end of a program, or in the middle of it."""
    code = f"from robovlms_jax import ending; ending.without_traceback(); print('one', '{words}')"
    assert read_by_nobody(code, unbuffered).stderr == ""


def read_by_nobody(code, unbuffered=""):
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    return done


def test_who_stops_reading_is_no_error_of_a_program():
    """Programs end with the words of an OSError, which a broken pipe is, and have more to do than to print."""
    code = """
from robovlms_jax import ending
ending.without_traceback()
try:
    ending.show("found")
    ending.show("more")
except OSError as error:
    raise SystemExit(f"error: {error}")
raise SystemExit("done")
"""
    done = read_by_nobody(code)
    assert (done.returncode, done.stderr) == (1, "done\n")


def test_programs_print_by_show():
    # Fails if one of them would take a reader that has gone for an error of its own.
    for path in (ROOT / "experiments").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print":
                assert "file" in {keyword.arg for keyword in call.keywords}, f"{path.name}, line {call.lineno}"


GONE = """
import fcntl, pathlib, signal, sys, termios, time
from robovlms_jax import ending
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests ignore it
ending.on_sigterm()
try:
    print("begun", flush=True)
    time.sleep(30)
except KeyboardInterrupt as error:
    time.sleep(0.2)
    print("stopped", flush=True)
    ending.say("nothing")
    pathlib.Path(sys.argv[1]).write_text(ending.stopped_by(error))
"""


def test_a_program_whose_terminal_goes_keeps_what_it_has(tmp_path):
    """A window is closed: what the program then writes there would be an OSError (EIO)."""
    window, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", GONE, str(tmp_path / "kept")],
        cwd=ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    assert b"begun" in os.read(window, 1000)
    os.close(window)
    assert process.wait(30) == 0
    assert (tmp_path / "kept").read_text() == "SIGHUP"


def test_a_reader_that_ends_by_the_same_signal_takes_nothing_with_it(tmp_path):
    """As `| tee` does, a moment later: what is then printed would be a BrokenPipeError."""
    code = GONE.replace("fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n", "")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "kept")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.05)
    process.stdout.close()
    assert process.wait(30) == 0
    assert (tmp_path / "kept").read_text() == "SIGHUP"


def test_what_a_terminal_or_a_file_still_takes_is_not_sent_away(capfd):
    ending.without_terminal()
    print("here", flush=True)
    assert capfd.readouterr().out == "here\n"
