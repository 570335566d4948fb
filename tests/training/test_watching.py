"""A run that hangs ends and says where; a process that is slower than the others is named."""

from __future__ import annotations

import logging
import threading
import time

import jax
import numpy as np
import pytest

from robovlms_jax.parallel import distributed
from robovlms_jax.training import goodput, loop, watching


def made(number: int) -> loop.Step:
    return loop.Step(number, None, None, log=True, save=False, last=False)


def watched(phase: str, *, steps: int, seconds: float, limit_s: float = 0.2) -> list[int]:
    """Statuses with which a process ends that makes `steps` steps and then stays in `phase`."""
    spent, ended, over = goodput.Goodput(), [], threading.Event()

    def end(status: int) -> None:
        ended.append(status)
        over.set()

    with spent, watching.Watchdog(limit_s, spent, end) as dog:
        for number in range(steps):
            dog.after(made(number + 1), {})
        with spent.spent_on(phase):
            over.wait(seconds)
    return ended


@pytest.mark.parametrize("phase", ["data", "checkpoint", "step"])
def test_a_run_that_makes_no_more_steps_ends_and_says_what_it_waits_for(phase, caplog, capfd):
    with caplog.at_level(logging.ERROR):
        assert watched(phase, steps=4, seconds=20) == [distributed.AGAIN]
    assert f"no step since step 4, for 0 s (train.hang_timeout_s); it is in phase '{phase}'" in caplog.text
    assert "in watched" in capfd.readouterr().err  # the stack of the thread that hangs


def test_evaluation_compilation_and_steps_that_end_are_no_hang():
    assert watched("evaluation", steps=4, seconds=0.6) == []
    assert watched("step", steps=0, seconds=0.6) == []
    assert watched("data", steps=4, seconds=0.6, limit_s=0) == []
    spent, ended = goodput.Goodput(), []
    with spent, watching.Watchdog(0.3, spent, ended.append) as dog:
        for number in range(12):
            dog.after(made(number + 1), {})
            time.sleep(0.05)
    assert ended == []


def test_a_process_that_was_stopped_itself_did_not_hang(monkeypatch):
    # The clock jumps by an hour between two looks.
    shown = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(watching.time, "monotonic", lambda: next(shown))
    assert watched("data", steps=4, seconds=0.07, limit_s=0.2) == []


def test_only_a_process_that_stays_slow_is_named_and_by_itself(monkeypatch, caplog):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    times = [np.array([1.0, 1.0, slow, 1.1]) * 1e-3 for slow in (1.6, 1.6, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5)]
    monkeypatch.setattr(distributed, "of_all", lambda _: times.pop(0))
    hook, said = watching.Stragglers(lambda: 0.0), []
    for number in range(8):
        hook.after(made(number + 1), {})
        said.append(len(caplog.records))
    assert said == [0, 0, 0, 0, 0, 1, 1, 1]
    assert "process 2 on " in caplog.text and "take 1.50 ms for what the median process's take 1.00 ms" in caplog.text


def test_of_two_processes_the_slower_one_is_named(monkeypatch, caplog):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed, "of_all", lambda _: np.array([1.0, 1.4]) * 1e-3)
    hook = watching.Stragglers(lambda: 0.0)
    for number in range(watching.SUSTAINED):
        hook.after(made(number + 1), {})
    assert "process 1 on " in caplog.text


def test_the_probe_times_every_device_of_the_process(monkeypatch):
    monkeypatch.setattr(watching, "_SIZE", 64)
    timed = []
    monkeypatch.setattr(watching, "_seconds", lambda device, of=watching._seconds: timed.append(device) or of(device))
    assert 0 < watching.device_probe() < 5
    assert timed == jax.local_devices()
