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


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_no_trial_at_work(tmp_path, monkeypatch, caplog, second):
    """SIGTERM once more changes nothing: what is being saved is saved. Ctrl-C ends the trial at once."""
    config = SearchConfig(out=str(tmp_path), space=("rate=1",))
    run = queue.folder(tmp_path, 0) / "run"
    run.parent.mkdir(parents=True)
    command = [sys.executable, "-c", SAVES, str(run)]
    monkeypatch.setattr(trials, "command", lambda *_: command)
    monkeypatch.setattr(trials, "POLL", 0.02)
    started = []
    begin = trials.subprocess.Popen
    monkeypatch.setattr(
        trials.subprocess, "Popen", lambda *how, **more: started.append(begin(*how, **more)) or started[0]
    )

    def signals():
        until((run / "checkpoints/1").exists)
        os.kill(os.getpid(), signal.SIGTERM)
        until((run / "asked").exists)
        os.kill(os.getpid(), second)
        until(lambda: "SIGTERM: the trial is being saved" in caplog.text or started[0].poll() is not None)
        (run / "go").touch()

    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
    ending.on_sigterm()
    sender = threading.Thread(target=signals, daemon=True)
    sender.start()
    try:
        with pytest.raises(ending.Terminated):
            trials.run(config, queue.Trial(0, {"rate": "1"}, 0))
        assert started[0].poll() == (0 if second == signal.SIGTERM else -signal.SIGKILL)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
        (run / "go").touch()
        sender.join()
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == ({"1", "2"} if second == signal.SIGTERM else {"1"})
