"""Where numbers go while a run goes on."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from robovlms_jax import atomic, json_lines

logger = logging.getLogger(__name__)

WANDB = "wandb.json"
"""In a run's directory: project and id of the Weights & Biases run that it logs to."""


class MetricWriter(Protocol):
    """One destination of scalar metrics."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object per call, {"step": ..., name: value, ...}; what the report draws from.

    `start_step` > 0 (resuming) drops lines of later steps, which an interrupted run wrote after its last checkpoint.
    """

    def __init__(self, path: pathlib.Path, start_step: int = 0):
        earlier = []
        if start_step:
            rows = json_lines.read(path, lambda _, row: (row["step"], row), expected="a step", skip_damaged=True)
            earlier = [row for step, row in rows if step <= start_step]
        atomic.write_text(path, "".join(json.dumps(row) + "\n" for row in earlier))
        self._path = path

    def write(self, step: int, values: Mapping[str, float]) -> None:
        json_lines.append(self._path, {"step": step, **values})

    def close(self) -> None:
        pass  # the file is open only while a line is written


class TensorBoard:
    """TensorBoard event files. Written at once: tensorboardX's own writer hands events to a thread, and when that one
    dies of a full disk, waits for it forever."""

    def __init__(self, directory: pathlib.Path):
        from tensorboardX.event_file_writer import EventsWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def require_wandb(project: str) -> None:
    """Raise ImportError that says how to get wandb where the first process would log to a project and there is none."""
    if not project or jax.process_index() != 0:
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"train.wandb_project={project!r} needs the wandb package: pip install wandb ({error})."
        ) from error


class WandB:
    """Weights & Biases. The run's id is kept in `directory`, so that a resumed run goes on with the same curves,
    offline as well; with `fresh` a new one begins. WANDB_RUN_ID, where it is set, decides.

    Raises:
      ImportError: there is no wandb; says how to get it.
      ValueError: it could not start (no key, no network); says so.
    """

    def __init__(self, project: str, config: Mapping, directory: pathlib.Path, *, fresh: bool = False):
        require_wandb(project)
        import wandb

        path = directory / WANDB
        known = None if fresh else _read_wandb(path, project)
        identity = os.environ.get("WANDB_RUN_ID") or known or secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=project, config=dict(config), dir=str(directory), id=identity, resume="allow"
            )
        except Exception as error:  # of wandb's own making: no key, no network, no such project
            raise ValueError(
                f"train.wandb_project={project!r}: wandb could not start ({error}). Log in (wandb login), set "
                "WANDB_MODE=offline, or leave the project out."
            ) from error
        atomic.write_text(path, json.dumps({"project": project, "id": self._run.id}) + "\n")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _read_wandb(path: pathlib.Path, project: str) -> str | None:
    """The id of the run that logged here to the same project before."""
    try:
        known = json.loads(path.read_text())
        return str(known["id"]) if known["project"] == project else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        logger.warning("%s does not name a Weights & Biases run; a new one begins", path)
        return None


class Writers:
    """Several destinations as one."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = list(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def open_writers(wandb_project: str, config: Mapping[str, Any], output: pathlib.Path, start: int) -> Writers:
    """All that a run is logged to, from step `start` on; in processes but the first, nothing.

    config: the run's, as plain JSON values."""
    if jax.process_index() != 0:
        return Writers([])
    writers: list[MetricWriter] = [JsonLines(output / "metrics.jsonl", start), TensorBoard(output / "tensorboard")]
    if wandb_project:
        writers.append(WandB(wandb_project, config, output, fresh=start == 0))
    return Writers(writers)
