"""A run of reinforcement from the first line to its report, with the bundled twin: stopped, gone on with, the same."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import reinforce
from robovlms_jax.demo import twin
from robovlms_jax.rl.config import ReinforceConfig, UpdateConfig
from robovlms_jax.runs import load, reinforcing


def config(out, **changes):
    small = {"tables": 4, "decisions": 4, "trials": 2, "pool": 8, "max_steps": 20, "iterations": 3}
    update = UpdateConfig(minibatches=2, divergence_stop=0.0)
    return ReinforceConfig(
        checkpoint=str(twin.DIRECTORY), out=str(out), tasks=("turn_on_led",), update=update, **{**small, **changes}
    )


def curve(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("seconds", "time")} for row in rows]


@pytest.mark.slow
def test_a_run_that_was_stopped_by_a_signal_ends_as_one_that_was_not_to_the_bit(tmp_path, monkeypatch):
    reinforcing.run(config(tmp_path / "whole"))
    say = reinforcing._Say.after

    def interrupted(self, step, metrics):
        say(self, step, metrics)
        if step.number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as once:
        once.setattr(reinforcing._Say, "after", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reinforcing.run(config(tmp_path / "stopped"))
    assert not (tmp_path / "stopped" / "checkpoints").exists()
    assert 1 <= len(curve(tmp_path / "stopped")) < 3
    reinforcing.run(config(tmp_path / "stopped", resume=True))
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    policies = [flatten_dict(load.open_model(tmp_path / name)[1], sep="/") for name in ("whole", "stopped")]
    began = flatten_dict(load.open_model(twin.DIRECTORY)[1], sep="/")
    assert policies[0].keys() == policies[1].keys()
    for path, x in policies[0].items():
        np.testing.assert_array_equal(x, policies[1][path], err_msg=path)
    assert any((np.asarray(x) != np.asarray(began[path])).any() for path, x in policies[0].items())
    results = [json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("whole", "stopped")]
    assert results[0] == results[1]


@pytest.mark.slow
def test_the_presets_of_many_tables_run_at_a_reduced_size(tmp_path):
    """`playtable_full` as it is for a GPU but for its numbers; the twin stands for that run's policy."""
    less = {"tables": 2, "decisions": 2, "trials": 2, "iterations": 1, "max_steps": 10, "unseen_random_scenes": 2}
    full = reinforce.PRESETS["playtable_full"]
    small = dataclasses.replace(
        full,
        **{"checkpoint": str(twin.DIRECTORY), "out": str(tmp_path / "full"), "pool": 8, "random_scenes": 2, **less},
        update=dataclasses.replace(full.update, minibatches=2),
    )
    text = reinforcing.run(small).read_text()
    assert "unseen_random_tables" in text and curve(tmp_path / "full")[0]["updates"] >= 1
