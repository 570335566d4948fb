"""One trial: the experiment's own command in a process of its own, stopped and resumed as any run is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import filelock

from robovlms_jax import bars, ending
from robovlms_jax.search import queue, space
from robovlms_jax.search.config import SearchConfig
from robovlms_jax.training import directory

logger = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between looks at a running trial."""
GRACE = 600.0
"""Seconds that a trial has to save after it was asked to stop."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What may end a search."""

Look = Callable[[int, float], bool]
"""(step, the objective's value there) -> whether the trial shall go on."""


def command(config: SearchConfig, trial: queue.Trial, run: pathlib.Path) -> list[str]:
    """What is started: the experiment's module with the trial's flags. It is a program of its own, although a launcher
    such as srun may have started this process as one of several, which its variables say."""
    alone = {} if any(text.startswith("distributed.") for text in config.fixed) else {"distributed.coordinator": "none"}
    settings = alone | space.fixed(config.fixed) | trial.setting
    words = [sys.executable, "-m", f"experiments.{config.experiment}", "--preset", config.start]
    words += [*space.flags(settings), "--train.seed", str(trial.seed), "--train.output", str(run)]
    has = any(path.name.isdigit() for path in (run / "checkpoints").glob("*"))
    return [*words, "--train.resume"] if has else words


def run(config: SearchConfig, trial: queue.Trial, look: Look = lambda step, value: True) -> queue.Trial:
    """Start the trial or go on with it, until it ends. What became of it is written, and returned; it is still open
    when something else stopped the run.

    KeyboardInterrupt ends the run as a signal ends any: it saves, and the trial stays open. Ctrl-C while it does so
    ends it at once, with the checkpoints that it has; SIGTERM and SIGHUP change nothing more.
    """
    out = pathlib.Path(config.out)
    folder = queue.folder(out, trial.number)
    begin, pruned = time.monotonic(), False
    _wait_for_another(folder / "run")
    if _finished(folder / "run"):
        trial = _judged(trial, objective(folder / "run", config.objective), config.objective)
        queue.write(out, trial)
        return trial
    with (folder / "log.txt").open("ab") as log, bars.waiting(f"trial {trial.number}") as bar:
        process = None
        try:
            with _signals_afterwards():  # a run that has been started is known here
                # In a session of its own: Ctrl-C reaches this process alone, which asks the run to save.
                process = subprocess.Popen(
                    command(config, trial, folder / "run"), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            seen = -1
            while process.poll() is None:
                time.sleep(POLL)
                bar.say(_newest(folder / "run") or "starting")
                for step, value in objective(folder / "run", config.objective):
                    if step > seen and not pruned:
                        seen = step
                        pruned = not look(step, value)
                        if pruned:
                            process.send_signal(signal.SIGTERM)
        except BaseException:
            try:
                _stop(process)
            except KeyboardInterrupt:  # two signals at a time: the second before it could be handled there
                _stop(process)
            raise
    trial = dataclasses.replace(trial, seconds=trial.seconds + time.monotonic() - begin)
    values = objective(folder / "run", config.objective)
    if pruned:
        trial = dataclasses.replace(trial, status="pruned", value=values[-1][1])
    elif process.returncode == 0 and _finished(folder / "run"):
        trial = _judged(trial, values, config.objective)
    elif process.returncode != 0:
        killed = f"ended by {_signal(-process.returncode)}; " if process.returncode < 0 else ""
        trial = dataclasses.replace(
            trial, status="failed", reason=queue.reason(killed + _last_line(folder / "log.txt"))
        )
    queue.write(out, trial)
    return trial


def _wait_for_another(run: pathlib.Path) -> None:
    """Until nobody writes to the run's directory. Whoever worked on the trial may have been killed, and left the run
    that it had started at work: it goes on, and what it saves at its end is what comes next begins with."""
    lock, said = filelock.FileLock(run / directory.LOCK), False
    while run.is_dir():
        try:
            with lock.acquire(timeout=0):
                return
        except filelock.Timeout:
            if not said:
                logger.warning("%s is being written by a process that a search left behind; waiting for it", run)
            said = True
            time.sleep(POLL)
        except OSError:
            return  # the run says it better


def _newest(run: pathlib.Path) -> str:
    """The last step and loss that the run's metrics.jsonl has; "" where there is none yet."""
    losses = objective(run, "train/loss")
    return f"step {losses[-1][0]}, loss {losses[-1][1]:.4g}" if losses else ""


def objective(run: pathlib.Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of every line of the run's metrics.jsonl that has `name`; an unfinished or damaged one is left
    out."""
    found = []
    try:
        lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and all(isinstance(values.get(x), (int, float)) for x in ("step", name)):
            found.append((int(values["step"]), float(values[name])))
    return found


def _judged(trial: queue.Trial, values: list[tuple[int, float]], name: str) -> queue.Trial:
    if not values:
        reason = f"its metrics.jsonl never says {name!r}"
        return dataclasses.replace(trial, status="failed", reason=reason)
    value = values[-1][1]
    if not math.isfinite(value):
        return dataclasses.replace(trial, status="failed", reason=f"{name} is {value} at its end")
    return dataclasses.replace(trial, status="done", value=value)


def _finished(run: pathlib.Path) -> bool:
    return (run / "report.md").is_file()


def _stop(process: subprocess.Popen | None) -> None:
    """Ask the run to save, and wait until it has ended. None: it was not started."""
    if process is None:
        return
    with _signals_until_it_ends(process):
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            _kill(process)


@contextlib.contextmanager
def _signals_afterwards() -> Iterator[None]:
    """Signals that come within are handled at its end."""
    came: list[int] = []
    try:
        with _handling(dict.fromkeys(SIGNALS, lambda number, _: came.append(number))):
            yield
    finally:
        for number in came:
            signal.raise_signal(number)


@contextlib.contextmanager
def _signals_until_it_ends(process: subprocess.Popen) -> Iterator[None]:
    """A signal that raised an exception now would leave the run at work, without anybody who waits for it."""

    def at_once(*_: object) -> None:
        logger.warning("stopped at once by Ctrl-C; the trial's steps since its last checkpoint are lost.")
        _kill(process)

    def on_its_way(number: int, *_: object) -> None:
        ending.without_terminal()
        logger.warning("%s: the trial is being saved already; Ctrl-C ends it at once.", signal.Signals(number).name)

    with _handling(dict.fromkeys(SIGNALS, on_its_way) | {signal.SIGINT: at_once}):
        yield


@contextlib.contextmanager
def _handling(handlers: Mapping[signal.Signals, Callable[..., None]]) -> Iterator[None]:
    """These handlers in place of others; signals that this process ignores stay so."""
    before = {number: signal.getsignal(number) for number in handlers}
    main = threading.current_thread() is threading.main_thread()  # signals can only be handled there
    # None: of a library that is not Python's, which could not be given back.
    ours = [number for number, handler in before.items() if main and handler not in (signal.SIG_IGN, None)]
    try:
        for number in ours:
            signal.signal(number, handlers[number])
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _kill(process: subprocess.Popen) -> None:
    """With the processes that it has started. Checkpoints are whole or not there, whenever a run is killed."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # of a session of its own


def _last_line(path: pathlib.Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error:") or "Error" in line]
    return (said or lines or ["it said nothing"])[-1]


def _signal(number: int) -> str:
    """ "SIGKILL", which is what a machine without memory sends."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
