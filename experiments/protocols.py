"""What few_shot, continual and adapt have in common: an experiment's preset to begin with, and how a protocol ends."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robovlms_jax import cli, programs, schema
from robovlms_jax.data import opening
from robovlms_jax.parallel import cpu
from robovlms_jax.runs import closed_loop, logs, run
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.search import queue, space
from robovlms_jax.strategies import protocol, support
from robovlms_jax.training import stopping

logger = logging.getLogger(__name__)


def preset(experiment: str, start: str, fixed: Sequence[str], owner: str) -> ExperimentConfig:
    """The preset `start` of a module of `experiments`, with "FIELD=VALUE" texts applied.

    owner: whose settings these are, for messages. Raises ValueError that names the setting.
    """
    try:
        presets = importlib.import_module(f"experiments.{experiment}").PRESETS
    except (ImportError, AttributeError) as error:
        known = {program.module: program for words in programs.present().values() for program in words.values()}
        known = [module for module, program in known.items() if program.settings == "PRESETS"]
        raise ValueError(
            f"{owner}.experiment={experiment!r} is no experiment with presets ({error})"
            f"{schema.nearest(experiment, known)} There are: {', '.join(known)}."
        ) from None
    if start not in presets:
        hint = schema.nearest(start, presets)
        raise ValueError(f"{owner}.start={start!r} is no preset of {experiment}{hint} {sorted(presets)}")
    return cli.read(presets[start], argv=space.flags(space.fixed(fixed)))


def demonstrations(config: ExperimentConfig) -> dict[str, list[tuple[int, int]]]:
    """Task -> the demonstrations of the training split; recorded before, where the preset records them."""
    if config.demonstrations.episodes:
        closed_loop.ensure_demonstrations(config.demonstrations, config.data.root)
    return support.by_task(opening.open_split(config.data, "training").episodes)


def settings_of(config: Any, *aside: str) -> dict[str, Any]:
    """What results depend on, as JSON values: all fields but where they lie."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "report", *aside)}


def trials(config: Any, jobs: Callable[[], Sequence[protocol.Job]]) -> list[queue.Trial]:
    """Run the jobs that `config.out` has no result of; those that there are then.

    With `config.report` none is run, and `jobs`, for which demonstrations may have to be recorded, is not asked.
    Raises ValueError where there is nothing to report of.
    """
    out = pathlib.Path(config.out)
    return queue.finished(out) if config.report else protocol.work(out, jobs(), settings_of(config))


def main(work: Callable[[Any], pathlib.Path], presets: Mapping[str, Any], default: str, description: str) -> None:
    """The command line of a protocol."""
    logs.to_stderr(libraries=logging.ERROR)
    cpu.keep_freed_memory()
    try:
        path = work(cli.parse(presets, default, description=description)[1])
    except KeyboardInterrupt:
        logger.warning("stopped; the same command goes on where it was")
        sys.exit(stopping.STATUS)
    except run.ERRORS as error:
        sys.exit(f"error: {error}")
    print(f"report: {path}")
