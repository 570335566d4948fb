"""Decisions per second of a policy on PlayTable: the host's loop against one program.   python -m benchmarks.rollouts

All play the same trials with the same policy, in turns, so that load from elsewhere meets each: a policy's look at its
two pictures, the chunk it decides on, and the control steps that are executed of it. `host` is `evaluation.rollout`
with `BatchedVLAPolicy` and `PlayTables`, in a process of its own (`benchmarks/host_loop.py`); `before` is the same of
an earlier revision, for which git must know its history; `device` is `rl.rollouts.Player`, one `lax.scan`; `apart` is
several of these, each in a process on a core of its own with its part of the tables (`benchmarks/device_loop.py`).
Nobody succeeds in `max_steps`, so all tables stay busy, and only whole trials are counted. Prints JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import host_loop, machine
from robovlms_jax import cli, cores
from robovlms_jax.control.execution import Execution
from robovlms_jax.evaluation import chains, rollout
from robovlms_jax.parallel import cpu
from robovlms_jax.rl import rollouts
from robovlms_jax.runs import build, load

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Args:
    """Time rollouts of a policy."""

    tables: tuple[int, ...] = (16,)
    """Side by side; each number is measured by itself."""
    checkpoint: pathlib.Path = ROOT / "robovlms_jax" / "demo" / "twin"
    """A run on PlayTable; left out: the demonstration's."""
    before: str = ""
    """An earlier revision whose host's loop is measured, too; fields of the checkpoint that it does not know are left
    out. a103477 is the last before there were rollouts on the device."""
    image_size: tuple[int, int] = (96, 64)
    """Pixels of the static and the wrist picture."""
    horizon: int = 5
    """Actions executed per decision."""
    max_steps: int = 40
    """Control steps of every trial."""
    devices: int = 1
    """CPU devices that the tables of `device` are split over, each a program of its own; useful up to a core each."""
    processes: int = 0
    """Measure `apart`, too: so many processes of `device`, each on a core of its own; 0: not."""
    repeats: int = 3
    """Measurements of each, in turns; the fastest counts, all are kept."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""

    def __post_init__(self):
        numbers = (*self.tables, *self.image_size, self.horizon, self.max_steps, self.devices, self.repeats)
        if not self.tables or min(numbers) < 1:
            raise ValueError("tables, image_size, horizon, max_steps, devices and repeats must be positive.")
        if self.processes < 0 or (self.processes and any(count % self.processes for count in self.tables)):
            raise ValueError(f"processes={self.processes} must be 0 or divide tables={self.tables}.")
        if self.processes and not hasattr(os, "sched_setaffinity"):
            raise ValueError("processes: this system keeps no process on a core of its own; pass 0.")
        if self.processes and self.processes > cores.usable():
            raise ValueError(
                f"processes={self.processes} are to have a core each, and this one may use "
                f"{cores.usable()}; pass fewer."
            )


class Turn(NamedTuple):
    """All trials played once: decisions, seconds of the clock and of processors."""

    decisions: int
    seconds: float
    computing: float


def main(args: Args) -> None:
    """Print the result as JSON."""
    cpu.keep_freed_memory()
    if args.devices > 1:
        jax.config.update("jax_num_cpu_devices", args.devices)
    model, params, encode = load.open_model(args.checkpoint)
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as checkouts:
        trees = {"before": checkouts.enter_context(_checkout(args.before))} if args.before else {}
        for count in args.tables:
            with contextlib.ExitStack() as processes:
                ways = {
                    name: processes.enter_context(_host(tree, count, args))
                    for name, tree in (trees | {"host": ROOT}).items()
                }
                ways["device"] = device(model, params, encode, count, args)
                if args.processes:
                    ways["apart"] = processes.enter_context(_apart(count, args))
                found[str(count)] = _measured(ways, args.repeats)
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name != "out"}
    settings["checkpoint"] = os.path.relpath(args.checkpoint, ROOT)
    machine.report({"tables": found, "settings": settings, "parameters": build.count(params)}, args.out)


@contextlib.contextmanager
def _checkout(revision: str) -> Iterator[pathlib.Path]:
    """A folder with this repository as it was. Raises ValueError for a revision that its history has not."""
    with tempfile.TemporaryDirectory() as folder:
        archive = pathlib.Path(folder) / "archive.tar"
        command = ["git", "-C", str(ROOT), "archive", f"--output={archive}", revision]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise ValueError(f"before={revision!r} cannot be had from {ROOT} by git archive: {done.stderr.strip()}")
        with tarfile.open(archive) as tar:
            tar.extractall(pathlib.Path(folder) / "tree", filter="data")
        yield pathlib.Path(folder) / "tree"


@contextlib.contextmanager
def _host(tree: pathlib.Path, count: int, args: Args) -> Iterator[Callable[[], Turn]]:
    """What plays all trials in the host's loop of the revision in folder `tree`."""
    settings = {
        "checkpoint": str(args.checkpoint.resolve()),
        "tables": count,
        "image_size": args.image_size,
        "horizon": args.horizon,
        "max_steps": args.max_steps,
    }
    # -P: this folder's modules are not to be found by their bare names
    with _asked([[sys.executable, "-P", host_loop.__file__, json.dumps(settings)]], tree) as play:
        yield play


@contextlib.contextmanager
def _apart(count: int, args: Args) -> Iterator[Callable[[], Turn]]:
    """What plays all trials in `args.processes` processes of `device`."""
    given = {**dataclasses.asdict(args), "checkpoint": str(args.checkpoint.resolve()), "out": None, "devices": 1}
    parts = [
        {"core": core, "tables": count // args.processes, "args": given | {"tables": [count], "processes": 0}}
        for core in range(args.processes)
    ]
    commands = [[sys.executable, "-m", "benchmarks.device_loop", json.dumps(part)] for part in parts]
    with _asked(commands, ROOT) as play:
        yield play


@contextlib.contextmanager
def _asked(commands: Sequence[Sequence[str]], tree: pathlib.Path) -> Iterator[Callable[[], Turn]]:
    """What has programs of the revision in folder `tree` play, all at once."""
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]  # the tree's modules before all others
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with contextlib.ExitStack() as running:
        started = [
            running.enter_context(subprocess.Popen(command, cwd=tree, env=known, **pipes)) for command in commands
        ]

        def play() -> Turn:
            begin = time.perf_counter()
            for process in started:
                process.stdin.write("play\n")
            said = [process.stdout.readline() for process in started]
            if not all(said):
                raise RuntimeError(f"a program of {tree} ended; what it said stands above.")
            seconds, told = time.perf_counter() - begin, [json.loads(answer) for answer in said]
            return Turn(sum(x["decisions"] for x in told), seconds, sum(x["computing"] for x in told))

        yield play
        for process in started:
            process.stdin.close()


def device(model: Any, params: Any, encode: Any, count: int, args: Args, part: int = 0) -> Callable[[], Turn]:
    """What plays `count` trials in one program; those behind `part` times as many."""
    trials = chains.chain_trials(chains.single_tasks(("lift_red_block_table",), (part + 1) * count))[part * count :]
    sizes = dict(zip(("static", "wrist"), args.image_size, strict=True))
    execution, criterion = Execution("receding", horizon=args.horizon), rollout.SuccessCriterion(args.max_steps)
    player = rollouts.Player(model, encode, count, sizes, execution, criterion, jax.devices()[: args.devices])

    def play() -> Turn:
        begin, computing = time.perf_counter(), time.process_time()
        decisions = sum(-(-result.steps[0] // args.horizon) for result in player.results(params, trials))
        return Turn(decisions, time.perf_counter() - begin, time.process_time() - computing)

    return play


def _measured(ways: dict[str, Callable[[], Turn]], repeats: int) -> dict[str, Any]:
    """Name -> decisions per second of the fastest turn, by the clock and by processor time, and of each turn; and how
    many times each host's loop `device` and `apart` are, by the fastest and by the median turns."""
    first: dict[str, float] = {}
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, play in ways.items():
            done = play()
            if turn:
                turns[name].append(done)
            else:
                first[name] = done.seconds  # most of it compiling
    rates = {name: [x.decisions / x.seconds for x in done] for name, done in turns.items()}
    found: dict[str, Any] = {
        name: {
            "first_seconds": first[name],
            "decisions_per_s": max(rates[name]),
            "decisions_per_processor_s": max(x.decisions / x.computing for x in done),
            "all": rates[name],
        }
        for name, done in turns.items()
    }
    for how, of in (("fastest", max), ("median", statistics.median)):
        best = {name: of(each) for name, each in rates.items()}
        for own, title in (("device", f"times_{how}"), ("apart", f"apart_times_{how}")):
            if own in best:
                found[title] = {name: best[own] / best[name] for name in ("before", "host") if name in best}
    return found


if __name__ == "__main__":
    main(cli.read(Args))
