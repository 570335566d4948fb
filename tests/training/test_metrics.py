"""Metrics on disk: what was written can be read, and a disk that is full is an error, not a wait."""

from __future__ import annotations

import json
import pathlib
import struct
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from robovlms_jax import cli, schema
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import metrics
from tests.processes import limit_files, run_python


def read_events(directory: pathlib.Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of all scalars. A record: length uint64, its checksum, bytes, their checksum."""
    (path,) = directory.iterdir()
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_has_every_number_at_once(tmp_path):
    # Before `close`: a run that is killed keeps its curves.
    writer = metrics.TensorBoard(tmp_path / "events")
    writer.write(3, {"train/loss": 0.5, "train/steps_per_second": 2.0})
    writer.write(4, {"train/loss": 0.25})
    expected = [(3, "train/loss", 0.5), (3, "train/steps_per_second", 2.0), (4, "train/loss", 0.25)]
    assert read_events(tmp_path / "events") == expected
    writer.close()
    assert read_events(tmp_path / "events") == expected


FULL = """
import pathlib, sys
from robovlms_jax.training import metrics
from tests.processes import limit_files
output = pathlib.Path(sys.argv[1])
output.mkdir()
writers = [metrics.TensorBoard(output / "events"), metrics.JsonLines(output / "metrics.jsonl")]
limit_files(1000)
for writer in writers:
    try:
        for step in range(10_000):
            writer.write(step, {"loss": 1.0})
        print("went on as if nothing had happened")
    except OSError as error:
        print(error.strerror)
"""


def test_a_full_disk_is_an_error(tmp_path):
    # tensorboardX's own writer would hang here: its thread dies, its queue fills, and `write` waits for room in it.
    assert run_python("-c", FULL, tmp_path / "run").splitlines() == ["File too large"] * 2


def test_resuming_on_a_full_disk_loses_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))

    limit_files(20)
    try:
        with pytest.raises(OSError, match="File too large"):
            metrics.JsonLines(path, 3)
    finally:
        limit_files(-1)
    assert len(path.read_text().splitlines()) == 5
    metrics.JsonLines(path, 3).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


class Wandb(types.ModuleType):
    """As much of wandb as is used; remembers how runs were begun and what was logged."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged = [], []

    def init(self, **kwargs):
        self.begun.append(kwargs)
        log = lambda values, step: self.logged.append((kwargs["id"], step, values))  # noqa: E731
        return types.SimpleNamespace(id=kwargs["id"], log=log, finish=lambda: None)


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    return fake


def test_a_resumed_run_goes_on_with_its_curves_in_weights_and_biases(wandb, tmp_path):
    for step in (1, 2):
        writer = metrics.WandB("robot", {"lr": 1}, tmp_path)
        writer.write(step, {"loss": 1.0})
        writer.close()
    (first, second) = (kwargs["id"] for kwargs in wandb.begun)
    assert first == second and all(kwargs["resume"] == "allow" for kwargs in wandb.begun)
    assert wandb.logged == [(first, 1, {"loss": 1.0}), (first, 2, {"loss": 1.0})]
    metrics.WandB("robot", {}, tmp_path, fresh=True)  # a start from nothing in the same place
    metrics.WandB("another", {}, tmp_path)
    ids = [kwargs["id"] for kwargs in wandb.begun]
    assert len(set(ids)) == 3


def test_an_id_that_cannot_be_read_begins_anew_and_is_said(wandb, tmp_path, caplog, monkeypatch):
    (tmp_path / metrics.WANDB).write_text("{")
    metrics.WandB("robot", {}, tmp_path)
    assert "wandb.json does not name a Weights & Biases run; a new one begins" in caplog.text
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    metrics.WandB("robot", {}, tmp_path)
    assert wandb.begun[-1]["id"] == "chosen"


def test_wandb_that_cannot_start_is_told_with_the_field_and_a_way_out(wandb, tmp_path):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    wandb.init = init
    with pytest.raises(
        ValueError, match=r"train.wandb_project='robot': wandb could not start \(api_key.*WANDB_MODE=offli"
    ):
        metrics.WandB("robot", {}, tmp_path)


def test_a_run_from_nothing_and_one_that_goes_on_say_so_to_wandb(wandb, tmp_path):
    config = cli.override(ExperimentConfig(), **{"train.wandb_project": "robot"})
    for start in (0, 5, 0):
        metrics.open_writers(config.train.wandb_project, schema.to_dict(config), tmp_path, start).close()
    first, second, third = (kwargs["id"] for kwargs in wandb.begun)
    assert first == second != third
