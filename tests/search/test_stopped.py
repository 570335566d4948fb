"""Signals while a search waits for its trial, which is saving: nobody is left at work."""

import os
import signal
import sys
import threading
import time

import pytest

from robovlms_jax import ending
from robovlms_jax.search import queue, trials
from robovlms_jax.search.config import SearchConfig

SAVES = """
import os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
def save(*_):
    (run / "asked").touch()
    while not (run / "go").exists():
        time.sleep(0.01)
    (run / "checkpoints/2").mkdir()
    os._exit(0)
signal.signal(signal.SIGTERM, save)
(run / "checkpoints/1").mkdir(parents=True)
time.sleep(60)
"""


def until(what):
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def handled():
    """As in a search: all signals raise."""
    before = {number: signal.getsignal(number) for number in trials.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    ending.on_sigterm()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path, monkeypatch, handled):
    """Directory of a trial that saves when it is asked to, as soon as there is a file "go" there."""
    run = queue.folder(tmp_path, 0) / "run"
    run.parent.mkdir(parents=True)
    monkeypatch.setattr(trials, "command", lambda *_: [sys.executable, "-c", SAVES, str(run)])
    monkeypatch.setattr(trials, "POLL", 0.02)
    yield run
    run.mkdir(exist_ok=True)
    (run / "go").touch()


@pytest.fixture
def started(monkeypatch):
    started = []
    begin = trials.subprocess.Popen
    monkeypatch.setattr(
        trials.subprocess, "Popen", lambda *how, **more: started.append(begin(*how, **more)) or started[0]
    )
    return started


def begin(tmp_path):
    with pytest.raises(KeyboardInterrupt) as stopped:
        trials.run(SearchConfig(out=str(tmp_path), space=("rate=1",)), queue.Trial(0, {"rate": "1"}, 0))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return stopped.value


@pytest.mark.parametrize("second", trials.SIGNALS)
def test_a_second_signal_leaves_no_trial_at_work(tmp_path, run, started, caplog, second):
    """SIGTERM once more, and SIGHUP, change nothing: what is being saved is saved. Ctrl-C ends the trial at once."""

    def signals():
        until((run / "checkpoints/1").exists)
        os.kill(os.getpid(), signal.SIGTERM)
        until((run / "asked").exists)
        os.kill(os.getpid(), second)
        until(lambda: f"{second.name}: the trial is being saved" in caplog.text or started[0].poll() is not None)
        (run / "go").touch()

    sender = threading.Thread(target=signals, daemon=True)
    sender.start()
    assert isinstance(begin(tmp_path), ending.Terminated)
    assert started[0].poll() == (-signal.SIGKILL if second == signal.SIGINT else 0)
    sender.join()
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == ({"1"} if second == signal.SIGINT else {"1", "2"})


def test_two_signals_at_a_time_leave_no_trial_at_work(tmp_path, run, started, monkeypatch):
    both, sleep = {signal.SIGINT, signal.SIGTERM}, time.sleep

    def sleep_until_then(seconds):
        sleep(seconds)
        if (run / "checkpoints/1").exists() and not (run / "go").exists():
            (run / "go").touch()
            signal.pthread_sigmask(signal.SIG_BLOCK, both)
            [signal.raise_signal(number) for number in both]  # to this thread, which blocks them
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)

    monkeypatch.setattr(trials.time, "sleep", sleep_until_then)
    begin(tmp_path)
    assert started[0].poll() == 0 and (run / "checkpoints/2").exists()


def test_a_signal_while_a_trial_is_started_leaves_none_at_work(tmp_path, run, started, monkeypatch):
    start = trials.subprocess.Popen

    def popen(*how, **more):
        process = start(*how, **more)
        until((run / "checkpoints/1").exists)
        (run / "go").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(trials.subprocess, "Popen", popen)
    assert isinstance(begin(tmp_path), ending.Terminated)
    assert started[0].poll() == 0 and (run / "checkpoints/2").exists()


def test_a_signal_that_is_ignored_stays_so(monkeypatch, handled):
    """As Ctrl-C is of what a shell starts behind &."""
    killed = []
    monkeypatch.setattr(trials, "_kill", killed.append)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with trials._signals_until_it_ends(None):
        signal.raise_signal(signal.SIGINT)
    assert not killed and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
