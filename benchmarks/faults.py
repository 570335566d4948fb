"""Does a run that is stopped again and again end as one that never was?   python -m benchmarks.faults --cases 20

A tiny training run is stopped `--cases` times at random points and resumed each time: SIGTERM; SIGKILL; SIGKILL while a
checkpoint is being written; SIGKILL, after which a file of the newest checkpoint loses its end, as after a loss of
power. Beside it, one run is never stopped. Every loss, every checkpoint that both write, and the end state (parameters,
optimizer, PRNG, step, data position) are compared bit by bit. Prints JSON, `--markdown FILE` writes the table; the exit
status is 1 if anything differs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks import machine
from experiments import calvin_abcd
from robovlms_jax import cli
from robovlms_jax.runs import logs, run
from robovlms_jax.training import checkpoints, seals

logger = logging.getLogger(__name__)

KINDS = ("SIGTERM", "SIGKILL", "SIGKILL while saving", "newest checkpoint truncated")

EVERY, KEPT = 2, 4
"""Steps between checkpoints; checkpoints kept by the run that is stopped. The other one keeps all."""

_STRIDE = 6  # a stop comes at most this many steps after the last one, and at least EVERY + 1
_LIMIT_S = 900  # longer than this, and a run counts as hanging

TINY = {
    "policy.window": 2,
    "policy.head.hidden_size": 16,
    "policy.head.trunk": (16,),
    "data.windows_per_segment": 2,
    "data.num_workers": 0,
    "data.num_threads": 1,
    "data.prefetch": 1,
    "train.batch_size": 2,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.checkpoint_every": EVERY,
}
"""The preset `sample`, smaller."""

# Each run is a process of its own, forked from one that has imported the library but started no device.
_PROCESSES = multiprocessing.get_context("forkserver")


@dataclasses.dataclass(frozen=True)
class Args:
    """Stop and resume."""

    cases: int = 20
    seed: int = 0
    """Draws kinds, steps, moments, and what is truncated."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""
    markdown: pathlib.Path | None = None
    """Write a table to this file."""

    def __post_init__(self):
        if self.cases < 1:
            raise ValueError(f"cases={self.cases} must be at least 1.")

    @property
    def steps(self) -> int:
        """Of the whole run: more than the stops can use up."""
        return self.cases * (_STRIDE + EVERY)


@dataclasses.dataclass(frozen=True)
class Case:
    """One stop, and how the run went on.

    stopped: last step it logged. unfinished: a checkpoint was being written. truncated: file, bytes left of bytes.
    expected, resumed: newest complete checkpoint on the disk, and the one it went on from. losses, compared: steps and
    checkpoints between this stop and the next (or the end) that were compared; identical: all of them, bit by bit.
    """

    kind: str
    stopped: int
    unfinished: bool
    truncated: str
    expected: int
    resumed: int = -1
    losses: int = 0
    compared: int = 0
    identical: bool = False

    @property
    def ok(self) -> bool:
        return self.resumed == self.expected and self.identical


def measure(args: Args, folder: pathlib.Path) -> dict[str, Any]:
    """All cases, in directories under `folder`."""
    _PROCESSES.set_forkserver_preload(["experiments.calvin_abcd", "transformers"])
    rng = np.random.default_rng(args.seed)
    whole, output = folder / "whole", folder / "stopped"
    kinds = rng.permutation(np.resize(KINDS, args.cases)).tolist()
    reference = start(whole, args.steps, keep=args.steps)
    wait_for(reference, whole, lambda: args.steps in steps_of(whole))
    kill(reference)
    done: list[Case] = []
    process = start(output, args.steps, keep=KEPT)
    for number, kind in enumerate(kinds):
        case = stop(process, output, kind, rng)
        if number:
            done[-1] = judge(done[-1], whole, output, until=case.stopped)
        done.append(truncate(case, output, rng) if kind == KINDS[3] else case)
        logger.info("%d: %s", number + 1, done[-1])
        process = start(output, args.steps, keep=KEPT, resume=True)
        # What it resumes from is written down before its first step.
        wait_for(process, output, lambda: resumed_from(output) is not None)
        done[-1] = dataclasses.replace(done[-1], resumed=resumed_from(output))
    wait_for(process, output, lambda: args.steps in steps_of(output))
    kill(process)
    done[-1] = judge(done[-1], whole, output, until=args.steps)
    end = same_checkpoint(whole, output, args.steps)
    return {
        "cases": [dataclasses.asdict(case) | {"ok": case.ok} for case in done],
        "identical_end": end,
        "ok": end and all(case.ok for case in done),
        "steps": args.steps,
        "checkpoint_every": EVERY,
    }


def start(output: pathlib.Path, steps: int, *, keep: int, resume: bool = False) -> BaseProcess:
    """The main job as its command starts it; what it says goes to `output`.log, anew each time."""
    changes = {
        "train.output": str(output),
        "train.steps": steps,
        "train.keep_checkpoints": keep,
        "train.resume": resume,
        "train.compilation_cache": str(output.parent / "programs"),
    }
    log_of(output).write_text("")
    process = _PROCESSES.Process(target=_train, args=(log_of(output), {**TINY, **changes}))
    process.start()
    return process


def _train(log: pathlib.Path, changes: dict[str, Any]) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Programs are small, and compiling them takes far longer than running them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)
    run.run("sample", cli.override(calvin_abcd.PRESETS["sample"], **changes))


def stop(process: BaseProcess, output: pathlib.Path, kind: str, rng: np.random.Generator) -> Case:
    """Stop it a few random steps, and at a random moment, after where it began."""
    begin = resumed_from(output) or 0
    target = begin + int(rng.integers(EVERY + 1, _STRIDE + 1))
    needed = 2 if kind == KINDS[3] else 1
    wait_for(process, output, lambda: last_step(output) >= target and len(steps_of(output)) >= needed)
    if kind == "SIGTERM":
        process.terminate()
        process.join(_LIMIT_S)
        if process.exitcode != 0:  # None: it goes on
            kill(process)
            raise RuntimeError(f"status {process.exitcode} after SIGTERM: {log_of(output).read_text()[-2000:]}")
    else:
        if kind == "SIGKILL while saving":
            wait_for(process, output, lambda: bool(unfinished(output)), pause_s=0.001)
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, 0.5))
        kill(process)
    return Case(kind, last_step(output), bool(unfinished(output)), "", max(steps_of(output)))


def truncate(case: Case, output: pathlib.Path, rng: np.random.Generator) -> Case:
    """Cut a random file of the newest checkpoint short."""
    newest, before = sorted(steps_of(output), reverse=True)[:2]
    directory = output / checkpoints.FOLDER / str(newest)
    names = [seals.SEAL, *json.loads((directory / seals.SEAL).read_text())]
    path = directory / names[int(rng.integers(len(names)))]
    size = path.stat().st_size
    left = int(rng.integers(size))
    os.truncate(path, left)
    # Names of the data files are random.
    name = re.sub(r"[0-9a-f]{32}", "*", path.relative_to(directory).as_posix())
    return dataclasses.replace(case, truncated=f"{newest}/{name}: {left} of {size}", expected=before)


def judge(case: Case, whole: pathlib.Path, output: pathlib.Path, *, until: int) -> Case:
    """Compare what the resumed run did up to step `until`."""
    expected, found = losses_of(whole), losses_of(output)
    made = range(case.resumed + 1, until + 1)
    kept = set(steps_of(output)) & set(steps_of(whole)) & set(made)
    saved = [step for step in kept if is_whole(output / checkpoints.FOLDER / str(step))]
    return dataclasses.replace(
        case,
        losses=len(made),
        compared=len(saved),
        identical=all(step in found and found[step] == expected[step] for step in made)
        and all(same_checkpoint(whole, output, step) for step in saved),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a run directory says


def log_of(output: pathlib.Path) -> pathlib.Path:
    return output.with_suffix(".log")


def steps_of(output: pathlib.Path) -> list[int]:
    """Steps whose checkpoints have their final name."""
    folder = output / checkpoints.FOLDER
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def is_whole(directory: pathlib.Path) -> bool:
    """Not so where the process was killed while it deleted an old checkpoint."""
    return (directory / seals.SEAL).is_file() and seals.damage(directory) is None


def unfinished(output: pathlib.Path) -> list[pathlib.Path]:
    return list((output / checkpoints.FOLDER).glob("*.orbax-checkpoint-tmp*"))


def losses_of(output: pathlib.Path) -> dict[int, float]:
    """Step -> loss. A line that is being written is left out; so is the end of a file that is being replaced."""
    losses = {}
    try:
        lines = (output / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return losses
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if "train/loss" in values:
            losses[values["step"]] = values["train/loss"]
    return losses


def last_step(output: pathlib.Path) -> int:
    """The last step that the process now running, or the last one that ran, has logged; 0: none yet."""
    return max(map(int, re.findall(r" step (\d+)/", log_of(output).read_text())), default=0)


def resumed_from(output: pathlib.Path) -> int | None:
    found = re.search(r"resumed after step (\d+)", log_of(output).read_text())
    return int(found[1]) if found else None


def same_checkpoint(one: pathlib.Path, other: pathlib.Path, step: int) -> bool:
    """Parameters, optimizer state, PRNG and data position of a step, bit by bit."""
    a, b = (output / checkpoints.FOLDER / str(step) for output in (one, other))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        for item in ("params", "train"):
            first, second = (
                {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
                for tree in (reader.restore(a / item), reader.restore(b / item))
            )
            if first.keys() != second.keys() or any(first[k].tobytes() != second[k].tobytes() for k in first):
                return False
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(a / "data") == reader.restore(b / "data")


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def wait_for(
    process: BaseProcess, output: pathlib.Path, condition: Callable[[], bool], *, pause_s: float = 0.02
) -> None:
    """Raises RuntimeError, and ends the process, when it ends or hangs before `condition` holds."""
    deadline = time.monotonic() + _LIMIT_S
    while not condition():
        if process.exitcode is not None:
            raise RuntimeError(f"ended with status {process.exitcode}: {log_of(output).read_text()[-2000:]}")
        if time.monotonic() > deadline:
            kill(process)
            raise RuntimeError(f"nothing for {_LIMIT_S} s; see {log_of(output)}.")
        time.sleep(pause_s)


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def markdown(result: dict[str, Any], command: str) -> str:
    """The table, and what it says in a sentence."""
    lines = [
        "# Stopped and resumed",
        "",
        f"Made by `{command}`: a run of {result['steps']} steps with a checkpoint every {result['checkpoint_every']} "
        "is stopped, damaged and resumed, again and again, beside one that is never stopped. Losses and checkpoints: "
        "how many were compared between this stop and the next. The end states (parameters, optimizer, PRNG, step, "
        f"data position) are {'identical' if result['identical_end'] else 'DIFFERENT'} bit by bit.",
        "",
        "| case | stopped by | after step | was writing | truncated file | newest complete | resumed from | losses "
        "| checkpoints | identical |",
        "|---" * 10 + "|",
    ]
    for number, case in enumerate(result["cases"]):
        lines.append(
            f"| {number + 1} | {case['kind']} | {case['stopped']} | {'yes' if case['unfinished'] else ''} | "
            f"{case['truncated']} | {case['expected']} | {case['resumed']} | {case['losses']} | {case['compared']} | "
            f"{'yes' if case['identical'] else '**no**'} |"
        )
    return "\n".join(lines) + "\n"


def main(args: Args, argv: Sequence[str]) -> None:
    """Print the result as JSON; status 1 if anything differs."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, pathlib.Path(folder))
    result |= {"seconds": time.perf_counter() - begin, "settings": {"cases": args.cases, "seed": args.seed}}
    machine.report(result, args.out)
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(result, " ".join(["python -m benchmarks.faults", *argv])))
    if not result["ok"]:
        sys.exit(1)


if __name__ == "__main__":
    logs.to_stderr()
    main(cli.read(Args), sys.argv[1:])
