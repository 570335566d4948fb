"""Whoever waits sees that something goes on."""

from __future__ import annotations

import time

import pytest

from robovlms_jax import bars


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Bars that are alive every 20 ms; a function that returns what was shown, a line each."""
    monkeypatch.setattr(bars, "EVERY_S", (0.02, 0.02))
    monkeypatch.setattr(bars, "ALIVE_S", 0.02)
    return lambda: [line.strip() for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.strip()]


def test_a_bar_goes_on_while_nothing_is_counted_and_is_silent_once_it_is_closed(terminal):
    with bars.Bar(3, "trial", "compiling", desc="table D") as bar:
        time.sleep(0.3)
        shown = terminal()
        assert len(shown) >= 4 and all("0/3" in line and "compiling" in line for line in shown[1:])
        bar.update()
        time.sleep(0.1)
        assert "1/3" in (last := terminal()[-1]) and "compiling" not in last  # that is over
        bar.say("200 steps")
        bar.update()
        time.sleep(0.1)
        assert "200 steps" in terminal()[-1]
    terminal()
    time.sleep(0.1)
    assert terminal() == []


def test_what_cannot_be_counted_is_named_with_its_time_and_what_it_does(terminal):
    with bars.waiting("compiling for CPUs") as bar:
        bar.say("step 4")
        time.sleep(0.1)
    shown = terminal()
    assert shown[0] == "compiling for CPUs: 00:00" and shown[-1] == "compiling for CPUs: 00:00, step 4"


def test_a_file_gets_a_line_at_the_beginning_and_at_the_end(capsys):
    with bars.waiting("compiling"):
        time.sleep(0.05)
    assert len([line for line in capsys.readouterr().err.split("\r") if line.strip()]) <= 3


def test_an_error_ends_the_bar(terminal):
    with pytest.raises(KeyError), bars.waiting("compiling"):
        raise KeyError
    terminal()
    time.sleep(0.1)
    assert terminal() == []
