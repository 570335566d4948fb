"""Demonstrations recorded on PlayTable train a policy, and the policy rolls out in PlayTable."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import calvin_abcd, evaluate, record_playtable, run
from robovlms_jax import cli
from robovlms_jax.data import calvin
from robovlms_jax.envs import tasks
from robovlms_jax.evaluation.execution import Execution

RECORD = {
    "episodes": 2,
    "validation_episodes": 1,
    "tables": 2,
    "chain_length": 2,
    "image_size": (48, 32),
    "max_steps": 120,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "calvin"}, "calvin_root"),
        ({"env": "simpler"}, "simpler_statistics"),
        ({"processes": 0}, "processes=0"),
        ({"chains": -1}, "chains=-1"),
        ({"tasks": ("fly",)}, "unknown"),
    ],
)
def test_impossible_evaluations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate.EvaluateConfig(checkpoint="x", **changes)


def test_impossible_recordings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown"):
        record_playtable.RecordConfig(out="x", tasks=("fly",))
    with pytest.raises(ValueError, match=r"scenes \['E'\]"):
        record_playtable.RecordConfig(out="x", scenes=("E",))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        record_playtable.record(record_playtable.RecordConfig(out=str(tmp_path)))


def test_single_tasks_start_where_they_are_possible():
    names = ("open_drawer", "turn_off_led", "push_red_block_left")
    chains = evaluate.single_tasks(names, 7)
    assert [chain.tasks for chain in chains] == [(names[i % 3],) for i in range(7)]
    for chain in chains:
        assert len(tasks.successors(chain.condition, chain.tasks[0])) == 1
    assert all(chain.condition["drawer"] == "closed" for chain in chains[::3])
    assert len(evaluate.single_tasks(names, 0)) == 30
    with pytest.raises(ValueError, match="possible in no initial state"):
        evaluate.single_tasks(("place_in_drawer",), 1)


@pytest.mark.slow
def test_recorded_demonstrations_train_a_policy_that_rolls_out(tmp_path):
    data = tmp_path / "playtable"
    config = record_playtable.RecordConfig(out=str(data), tasks=record_playtable.FIXTURE_TASKS, pack=True, **RECORD)
    counts = record_playtable.record(config)
    assert counts["recorded"] >= 3
    train, validation = (calvin.open_dataset(data, split) for split in ("training", "validation"))
    assert {e.task for e in train.episodes + validation.episodes} <= set(record_playtable.FIXTURE_TASKS)
    for dataset, held_out in ((train, False), (validation, True)):
        for episode in dataset.episodes:
            known = tasks.TASKS[episode.task]
            assert episode.instruction in (known.held_out if held_out else known.phrasings)
            frames = np.arange(episode.start, episode.end + 1)
            actions, robot = dataset.actions(frames), dataset.robot_obs(frames)
            assert np.abs(actions[:, :6]).max() <= 1
            assert set(np.unique(actions[:, 6])) <= {-1.0, 1.0}
            assert np.abs(np.diff(robot[:, :3], axis=0)).max() < 0.03  # nothing jumps between frames

    small = cli.override(
        calvin_abcd.PRESETS["sample"],
        **{"data.root": str(data), "train.output": str(tmp_path / "run"), "train.steps": 3, "evaluation.episodes": 0},
    )
    checkpoint = run.train("sample", small)
    rollout = evaluate.EvaluateConfig(
        checkpoint=str(checkpoint), chains=3, max_steps=12, films=1, image_size=(48, 32), execution=Execution("first")
    )
    report = evaluate.evaluate(rollout)
    text = report.read_text()
    assert "playtable-D" in text and "CALVIN" not in text.replace("playtable", "")
    lines = (report.parent / "results-000.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3
    assert [json.loads(line)["index"] for line in lines[1:]] == [0, 1, 2]
    assert list(report.parent.glob("film_*"))
    assert evaluate.evaluate(rollout) == report  # finished: nothing is run again
    assert (report.parent / "results-000.jsonl").read_text().splitlines() == lines
