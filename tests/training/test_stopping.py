"""Ctrl-C: the first saves, the second ends at once, and nobody sees a traceback."""

from __future__ import annotations

import logging
import signal

import jax
import numpy as np
import pytest

from experiments import gym, lerobot, navigation
from robovlms_jax import cli
from robovlms_jax.parallel import distributed
from robovlms_jax.runs import run
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import hooks, loop, stopping
from tests.processes import run_python
from tests.training import test_loop
from tests.training.test_checkpoints import write_steps


def test_ctrl_c_during_training_saves_as_sigterm_does(tmp_path, caplog):
    before = signal.getsignal(signal.SIGINT)
    with stopping.Interrupts() as interrupts:
        state, saved, _ = test_loop.fit(tmp_path, pressed=6)
    assert (state.step, saved, interrupts.asked) == (6, [(6, 6)], True)
    assert "Ctrl-C: the run is saved after this step and then ends; Ctrl-C once more ends it at once." in caplog.text
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped by Ctrl-C after step 6; saved" in caplog.text and "SIGTERM" not in caplog.text


def test_sigterm_is_called_by_its_name(tmp_path, caplog):
    test_loop.fit(tmp_path, terminated=6)
    assert "stopped by SIGTERM after step 6; saved" in caplog.text and "Ctrl-C" not in caplog.text


@pytest.mark.parametrize("kind", ["validation", "rollouts"])
def test_a_signal_does_not_wait_for_what_is_done_between_two_steps(tmp_path, caplog, kind):
    """Fails if minutes of rollouts go on after the signal, or steps since the last checkpoint are lost."""
    ended = []

    def numbers(state):
        if state.step == 4:
            signal.raise_signal(signal.SIGTERM)
        ended.append(state.step)
        return {"score": 1.0}

    asked = {"evaluate": numbers} if kind == "validation" else {"roll_out": numbers, "roll_out_every": 2}
    every = {"train.eval_every": 2 if kind == "validation" else 0}
    state, saved, lines = test_loop.fit(tmp_path, numbers=asked, **every)
    assert (state.step, saved, ended) == (4, [(4, 4)], [2])
    assert [step for step, values in lines if f"{kind}/score" in values] == [2]
    assert "stopped by SIGTERM after step 4; saved" in caplog.text and "of step 4 are left out" in caplog.text


def test_what_the_last_step_is_rolled_out_for_is_made_to_its_end():
    """Fails if a run whose steps are all made, which nothing resumes, loses its last rollouts."""
    step = loop.Step(8, None, None, log=True, save=True, last=True)
    with stopping.StopSignal() as stop:
        ending = hooks.Ending(stop, None)
        found = ending.unless_stopped(step, "rollouts", lambda state: signal.raise_signal(signal.SIGTERM) or {"x": 1.0})
    assert found == {"x": 1.0}


@pytest.mark.parametrize("how", ["swallowed", "replaced"])
def test_a_signal_counts_whatever_becomes_of_the_exception(how, caplog):
    """Fails if what is cut short swallows it, or fails while it ends, and the run goes on or dies unsaved."""

    def rollouts():
        try:
            signal.raise_signal(signal.SIGTERM)
        except stopping.CutShort:
            if how == "replaced":
                raise RuntimeError("the simulator is gone") from None
        return 3

    hook, step = stopping.StopSignal(), loop.Step(6, None, None, log=True, save=False, last=False)
    with hook:
        found = hook.unless_it_came(step, "rollouts", rollouts)
    assert step.stop and found == (3 if how == "swallowed" else None)
    assert ("failed on the way out: the simulator is gone" in caplog.text) == (how == "replaced")


def test_an_error_that_no_signal_has_caused_is_told():
    def rollouts():
        raise RuntimeError("of its own")

    step = loop.Step(7, None, None, log=True, save=False, last=False)
    with stopping.StopSignal() as hook, pytest.raises(RuntimeError, match="of its own"):
        hook.unless_it_came(step, "rollouts", rollouts)


def test_nothing_is_begun_between_two_steps_after_the_signal(tmp_path):
    hook, step = stopping.StopSignal(), loop.Step(6, None, None, log=True, save=False, last=False)
    with hook:
        signal.raise_signal(signal.SIGTERM)
        assert hook.unless_it_came(step, "rollouts", lambda: 3) is None and step.stop


def test_of_several_processes_none_leaves_the_others_waiting(monkeypatch):
    hook, step = stopping.StopSignal(), loop.Step(6, None, None, log=True, save=False, last=False)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with hook:
        assert hook.unless_it_came(step, "rollouts", lambda: signal.raise_signal(signal.SIGTERM) or 3) == 3
    monkeypatch.undo()
    assert not step.stop
    hook.after(step, {})
    assert step.stop  # at the next step


def test_a_terminal_that_goes_stops_a_run_unless_it_was_started_to_outlive_it(caplog):
    for before, stopped in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):  # nohup ignores it
        ours = signal.signal(signal.SIGHUP, before)
        step = loop.Step(6, None, None, log=True, save=False, last=False)
        with stopping.StopSignal() as hook:
            signal.raise_signal(signal.SIGHUP)
            hook.after(step, {})
            hook.finish(6, step.stop)
        # It comes twice, and what the loop has left is still being written then.
        assert step.stop == stopped and signal.signal(signal.SIGHUP, ours) == signal.SIG_IGN
    assert "stopped by SIGHUP after step 6; saved" in caplog.text


def test_a_run_whose_terminal_stays_gives_its_handlers_back():
    ours = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with stopping.StopSignal():
        assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL
    assert signal.signal(signal.SIGHUP, ours) == signal.SIG_DFL


def test_a_signal_that_comes_while_the_other_processes_are_asked_is_not_lost(monkeypatch):
    # Most of a step may be spent waiting for the others there; a scheduler sends its signal once.
    def asked(value):
        if not told:
            told.append(True)
            signal.raise_signal(signal.SIGTERM)
        return np.array([value, 0])

    told = []
    monkeypatch.setattr(distributed, "of_all", asked)
    first, second = (loop.Step(number, None, None, log=True, save=False, last=False) for number in (1, 2))
    with stopping.StopSignal() as hook:
        hook.after(first, {})
        hook.after(second, {})
    assert (first.stop, second.stop) == (False, True)


def test_ctrl_c_before_or_after_training_interrupts():
    with stopping.Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert interrupts.asked


TWICE = """
import signal, time
from robovlms_jax.training import stopping
signal.signal(signal.SIGTERM, lambda *_: print("is being saved", flush=True))
with stopping.Interrupts():
    signal.raise_signal(signal.SIGINT)
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        print("cleaned up")
"""


def test_a_second_ctrl_c_ends_the_process_at_once():
    assert run_python("-c", TWICE, status=130) == "is being saved\n"


@pytest.mark.parametrize("steps", [(), (3, 5)])
def test_the_program_ends_with_one_line_and_status_130(tmp_path, monkeypatch, capsys, steps):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if steps:
        write_steps(tmp_path, *steps)
    monkeypatch.setattr(run, "_run", interrupted)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    with pytest.raises(SystemExit) as caught:
        run.run("sample", cli.override(ExperimentConfig(), **{"train.output": str(tmp_path)}))
    assert caught.value.code == 130
    left = (
        f"{tmp_path / 'checkpoints' / '5'} is saved, go on with --train.resume."
        if steps
        else "no step is saved; the same command"
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert f"stopped by Ctrl-C; {left}" in line


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("program", "what"), [(lerobot, "show"), (gym, "try_out"), (navigation, "drive")])
def test_what_follows_a_run_begins_only_if_no_signal_ended_it(program, what, finished, tmp_path, monkeypatch):
    # A scheduler that sends SIGTERM kills half a minute later; trials of a policy of one step took minutes.
    began = []
    monkeypatch.setattr(run, "run", lambda *_, **__: finished)
    monkeypatch.setattr(program, what, lambda *_: began.append(what))
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    recording = () if program is lerobot else ("--recording.episodes", "0")
    program.main(["--train.output", str(tmp_path / "run"), "--data.root", str(tmp_path), *recording])
    assert began == ([what] if finished else [])
