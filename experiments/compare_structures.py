"""The same demonstrations, the same budget, every structure: train each on PlayTable, roll it out, one table.

    python -m experiments.compare_structures                          # four of the paper's structures, small
    python -m experiments.compare_structures --full                   # every product x window x chunk x execution mode

A structure is history-readout-head, one of `policies.heads.base.products()`; everything else, the demonstrations too,
is the default preset's of `experiments.calvin_abcd`. Each cell of the grid keeps its results in a directory of its own:
the same command goes on where it was stopped, and a larger grid adds to a smaller one. The report is structures.md in
the output directory, beside structures.json and structures.png. Its numbers are PlayTable's, never CALVIN's.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import pathlib
import sys
import time
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax

from experiments import calvin_abcd
from robovlms_jax import atomic, cli, ending, json_files
from robovlms_jax.control.execution import Execution
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.evaluation import chains, rollout_metrics
from robovlms_jax.evaluation.config import EvaluationConfig, RolloutConfig
from robovlms_jax.evaluation.report import tables
from robovlms_jax.parallel import cpu
from robovlms_jax.playtable.config import DemonstrationConfig
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.runs import logs
from robovlms_jax.runs.config import ExperimentConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Mode = Literal["first", "chunk", "receding", "ensemble"]
PAPER = (
    "one_step-action_query-mlp",
    "one_step-token-discrete",
    "interleaved-action_query-mlp",
    "policy_head-action_query-lstm",
)
"""What the paper compares (Li et al. 2024, arXiv:2412.14058, section 4)."""

# Every head at the size of the backbone's twin; fields a head does not have are left out. One after the other, words
# are mostly copied from the action before them, and so small a twin looks at no picture for the first one.
_HEAD_SIZE = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "trunk": (256, 128), "dropout": 0.0}
_HEAD_SIZE |= {"num_bins": 64, "decoding": "parallel"}
# Head -> factor of learning_rate: at that of the heads that regress, words learn only how frequent each of them is.
_FASTER = {"discrete": 5.0}


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Which cells, on what data, with what budget."""

    out: str = "runs/structures"
    data: str = calvin_abcd.FIXTURES.data.root
    """Directory of the demonstrations, recorded if they are not there; the main job's default run has the same ones."""
    demonstrations: DemonstrationConfig = calvin_abcd.FIXTURES.demonstrations
    """What is recorded, and asked on the validation table. With episodes=0, `data` is any dataset in CALVIN's layout.
    """
    structures: tuple[str, ...] = PAPER
    """history-readout-head, or `all`."""
    windows: tuple[int, ...] = (8,)
    """Steps looked back over; a one_step structure has 1 and counts once."""
    chunks: tuple[int, ...] = (5,)
    """Actions predicted at a time."""
    executions: tuple[Mode, ...] = ("first", "receding", "chunk")
    """How much of a chunk is executed (receding: half of it). A chunk of 1 is only ever executed whole."""
    full: bool = False
    """The whole grid: all structures, windows 1, 4, 8, 16, chunks 1, 5, 10, every execution mode. Meant for a GPU."""
    list: bool = False
    """Only print the cells."""

    steps: int = calvin_abcd.FIXTURES.train.steps
    """Optimizer steps per cell."""
    batch_size: int = calvin_abcd.FIXTURES.train.batch_size
    """Windows per step."""
    learning_rate: float = calvin_abcd.FIXTURES.optimizer.learning_rate
    """Of heads that regress; five times as high where actions are words."""
    trials: int = 80
    """Rollouts per cell and execution mode, single tasks taking turns."""
    seed: int = 0

    def __post_init__(self):
        known = [_name(product) for product in heads.products()]
        unknown = [name for name in self.structures if name not in (*known, "all")]
        if unknown or not self.structures:
            raise ValueError(f"structures {unknown} are unknown; known: all, {', '.join(known)}.")
        for field in ("windows", "chunks"):
            if min(getattr(self, field), default=0) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must name at least one number, each at least 1.")
        if not self.executions or min(self.steps, self.batch_size, self.trials) < 1:
            raise ValueError("executions must name a mode; steps, batch_size and trials be positive.")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Demonstrated and asked for."""
        return self.demonstrations.tasks or tuple(tasks.TASKS)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One policy to train, and the ways to execute it."""

    structure: heads.Product
    window: int
    chunk: int
    executions: tuple[Execution, ...]

    @property
    def name(self) -> str:
        return f"{_name(self.structure)}-window{self.window}-chunk{self.chunk}"


def cells(config: CompareConfig) -> list[Cell]:
    """The grid without what would be there twice or means nothing."""
    windows, chunks, modes, names = config.windows, config.chunks, config.executions, config.structures
    if config.full:
        windows, chunks, modes, names = (1, 4, 8, 16), (1, 5, 10), typing.get_args(Mode), ("all",)
    found: dict[str, Cell] = {}
    for product in heads.products():
        for window in windows if _name(product) in names or "all" in names else ():
            for chunk in chunks:
                window = 1 if product.history == "one_step" else window
                cell = Cell(product, window, chunk, _executions(modes, chunk))
                found[cell.name] = cell
    return list(found.values())


def compare(config: CompareConfig) -> pathlib.Path:
    """Train and roll out what is missing, then report on all that is there; returns the report's path.

    Raises:
      ValueError: the output directory has results of another budget or other data.
    """
    from robovlms_jax.runs import closed_loop  # takes longer than all that --help needs, as below

    importlib.import_module("experiments.evaluate")  # not after hours: what is missing is told now
    output = pathlib.Path(config.out)
    grid = cells(config)
    _require_same_budget(output, config)
    if config.demonstrations.episodes:
        closed_loop.ensure_demonstrations(config.demonstrations, config.data)
    for number, cell in enumerate(grid, start=1):
        logger.info("cell %d of %d: %s", number, len(grid), cell.name)
        directory = output / "cells" / cell.name
        trained = _train(cell, config, directory)
        for execution in cell.executions:
            if not (directory / _file(execution)).exists():
                row = trained if "failed" in trained else trained | _roll_out(config, directory, execution)
                row |= {"execution": execution.label}
                atomic.write_text(directory / _file(execution), json.dumps(row, indent=1) + "\n")
        jax.clear_caches()  # a grid's programs do not fit into memory together
        write_report(output)
    return write_report(output)


def write_report(output: pathlib.Path) -> pathlib.Path:
    """structures.md, .json and .png of all cells that are done."""
    budget = json.loads((output / "budget.json").read_text())
    rows = [json.loads(path.read_text()) for path in sorted((output / "cells").glob("*/cell-*.json"))]
    scene, device = budget["demonstrations"]["validation_scene"], jax.devices()[0].device_kind
    record = {"env": f"playtable-{scene}", "budget": budget, "device": device, "cells": rows}
    tables.write_json(output / "structures.json", record)
    if any("failed" not in row for row in rows):
        draw(rows).savefig(output / "structures.png", dpi=tables.DPI, bbox_inches="tight")
    path = output / "structures.md"
    atomic.write_text(path, _markdown(rows, budget))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# One cell


def _name(product: heads.Product) -> str:
    return "-".join(product)


def _executions(modes: Sequence[Mode], chunk: int) -> tuple[Execution, ...]:
    made = {"receding": Execution("receding", max(chunk // 2, 1))}
    if chunk == 1:  # all modes are the same
        return (Execution("first"),)
    return tuple(made.get(mode, Execution(mode)) for mode in modes)


def _file(execution: Execution) -> str:
    return f"cell-{execution.label.replace(' ', '_')}.json"


def experiment(cell: Cell, config: CompareConfig, directory: pathlib.Path) -> ExperimentConfig:
    """What is trained in a cell: the default preset but for the structure, the window and the chunk."""
    from robovlms_jax.training import checkpoints

    default = calvin_abcd.FIXTURES
    kind = heads.config_of(cell.structure.head)
    fields = {field.name for field in dataclasses.fields(kind)}
    head = kind(**{name: value for name, value in _HEAD_SIZE.items() if name in fields})
    structure = cell.structure._asdict() | {"head": head}
    return dataclasses.replace(
        default,
        policy=dataclasses.replace(default.policy, **structure, window=cell.window, chunk=cell.chunk),
        data=dataclasses.replace(default.data, root=config.data),
        optimizer=dataclasses.replace(
            default.optimizer,
            learning_rate=config.learning_rate * _FASTER.get(cell.structure.head, 1.0),
            warmup_steps=min(100, config.steps // 10),
        ),
        train=dataclasses.replace(
            default.train,
            output=str(directory / "run"),
            resume=checkpoints.begun(directory / "run"),
            steps=config.steps,
            batch_size=config.batch_size,
            checkpoint_every=500,
            keep_checkpoints=1,
            seed=config.seed,
        ),
        evaluation=EvaluationConfig(batches=10, episodes=0),
        demonstrations=DemonstrationConfig(),  # they are there
        rollouts=RolloutConfig(),  # done afterwards, in several modes
    )


def _train(cell: Cell, config: CompareConfig, directory: pathlib.Path) -> dict[str, Any]:
    """What is known of the trained policy before it is rolled out; trains it unless that has been done."""
    from robovlms_jax.runs import run
    from robovlms_jax.training import guards

    path = directory / "trained.json"
    if path.exists():
        return json.loads(path.read_text())
    directory.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    known: dict[str, Any] = cell.structure._asdict() | {"window": cell.window, "chunk": cell.chunk}
    try:
        done = run.train(cell.name, experiment(cell, config, directory))
    except guards.DivergedError as error:
        known["failed"] = str(error)
    else:
        if not (done / "report.json").exists():
            raise ending.Terminated  # the run is saved
        report = json.loads((done / "report.json").read_text())
        known["parameters"] = report["facts"]["parameters"]
        known["seconds"] = time.perf_counter() - begin
        known["validation"] = {name: value for name, value in report["overall"].items() if name != "count"}
    atomic.write_text(path, json.dumps(known, indent=1) + "\n")
    return known


def _roll_out(config: CompareConfig, directory: pathlib.Path, execution: Execution) -> dict[str, Any]:
    from experiments import evaluate, evaluation_settings

    output = directory / "rollouts" / execution.label.replace(" ", "_")
    report = evaluate.evaluate(
        evaluation_settings.EvaluateConfig(
            checkpoint=str(directory / "run"),
            out=str(output),
            env="playtable",
            scene=config.demonstrations.validation_scene,
            tasks=config.tasks,
            chains=config.trials,
            max_steps=config.demonstrations.max_steps,
            execution=execution,
            processes=min(config.trials, 20),
            films=0,
            image_size=config.demonstrations.image_size,
        )
    )
    summary = rollout_metrics.summarize(chains.load(report.parent).results)
    rate = summary.attempts
    return {
        "successes": rate.successes,
        "trials": rate.attempts,
        "success": rate.value,
        "interval": rate.interval,
        "per_task": {name: [task.successes, task.attempts] for name, task in summary.per_task.items()},
    }


def _require_same_budget(output: pathlib.Path, config: CompareConfig) -> None:
    """Cells can only stand in one table if all but the structure is the same."""
    grid = {"out", "structures", "windows", "chunks", "executions", "full", "list"}
    budget = {name: value for name, value in dataclasses.asdict(config).items() if name not in grid}
    budget = json.loads(json.dumps(budget))
    path = output / "budget.json"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, json.dumps(budget, indent=1) + "\n")
        return
    theirs = json.loads(path.read_text())
    changes = json_files.differences(theirs, budget, budget)
    if changes:
        raise ValueError(f"{output} has cells of another budget ({changes}); choose another --out.")


# ---------------------------------------------------------------------------------------------------------------------
# The report


def _markdown(rows: Sequence[Mapping[str, Any]], budget: Mapping[str, Any]) -> str:
    shown = budget["demonstrations"]
    scenes = f"tables {', '.join(shown['scenes'])} and {shown['random_scenes']} random ones"
    recorded = f"{shown['episodes']} recorded chains of PlayTable on {scenes}"
    data = recorded if shown["episodes"] else budget["data"]
    names = shown["tasks"] or tasks.TASKS
    device = jax.devices()[0].device_kind
    about = (
        f"Trained on {data} ({len(names)} tasks), {budget['steps']} steps of {budget['batch_size']} windows each, on "
        f"{device}; {budget['trials']} single tasks on table {shown['validation_scene']}, at "
        f"most {shown['max_steps']} steps each. Error: mean absolute translation error per step and axis on held-out "
        "demonstrations. One seed: the interval (95 %) is that of the rollouts, not of training again. These are not "
        "CALVIN's numbers."
    )
    head = ["history", "readout", "head", "window", "chunk", "execution"]
    head += ["success (95 % interval)", "error, mm", "training s"]
    body = []
    for row in sorted(rows, key=lambda row: (-row.get("success", -1), row["history"], row["window"], row["chunk"])):
        cells = [str(row[name]) for name in head[:6]]
        if "failed" in row:
            body.append([*cells, "diverged", "", ""])
            continue
        low, high = row["interval"]
        success = f"{row['successes']}/{row['trials']} = {row['success']:.0%} ({low:.0%} to {high:.0%})"
        error = row["validation"]["translation_m"]
        body.append([*cells, success, "" if error is None else f"{1000 * error:.1f}", f"{row['seconds']:.0f}"])
    picture = "![success per cell](structures.png)"
    table = tables.markdown(head, body, text_columns=3)
    return tables.join(["# Structures compared on PlayTable", about, table, picture])


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Success of every cell with its interval."""
    shown = sorted((row for row in rows if "failed" not in row), key=lambda row: row["success"])
    figure = tables.figure(8, 1.2 + 0.28 * len(shown))
    axes = figure.subplots()
    for height, row in enumerate(shown):
        low, high = row["interval"]
        value = row["success"]
        axes.errorbar(value, height, xerr=[[max(value - low, 0)], [max(high - value, 0)]], fmt="o", color=tables.BLUE)
    labels = [
        f"{row['history']}, {row['readout']}, {row['head']}, W={row['window']}, C={row['chunk']}, {row['execution']}"
        for row in shown
    ]
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.set(
        xlim=(-0.02, 1.02), xlabel="success, single tasks, 95 % interval", title="PlayTable, a table not trained on"
    )
    tables.tidy(axes)
    return figure


def main() -> None:
    config = cli.read(CompareConfig, description=__doc__)
    if config.list:
        for cell in cells(config):
            ending.show(" ".join([cell.name, *(f"[{execution.label}]" for execution in cell.executions)]))
        return
    logs.to_stderr(libraries=logging.ERROR)
    cpu.keep_freed_memory()
    try:
        path = compare(config)
    except KeyboardInterrupt:
        ending.stop("finished cells are kept, and the same command goes on.")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    logger.info("%s\nreport: %s", path.read_text(), path)


if __name__ == "__main__":
    main()
