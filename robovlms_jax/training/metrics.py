"""Where numbers go while a run goes on."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Protocol


class MetricWriter(Protocol):
    """One destination of scalar metrics."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object per call, {"step": ..., name: value, ...}; what the report draws from.

    `start_step` > 0 (resuming) drops lines of later steps, which an interrupted run wrote after its last checkpoint.
    """

    def __init__(self, path: pathlib.Path, start_step: int = 0):
        kept = []
        if start_step and path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= start_step:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    continue  # a line torn by a killed process
        new = path.with_suffix(".tmp")  # a full disk must not cost what is there
        new.write_text("".join(kept))
        new.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self._file.close()


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


class WandB:
    """Weights & Biases. Raises ImportError saying how to get it."""

    def __init__(self, project: str, config: Mapping, directory: pathlib.Path):
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"train.wandb_project={project!r} needs the wandb package: pip install wandb.") from error
        self._run = wandb.init(project=project, config=dict(config), dir=str(directory), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


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
