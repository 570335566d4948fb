"""Demonstrations recorded on PlayTable train a policy, and the policy rolls out in PlayTable."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import calvin_abcd, evaluate, evaluation_settings, scripted_presets
from robovlms_jax import cli
from robovlms_jax.control.execution import Execution
from robovlms_jax.data import calvin
from robovlms_jax.envs.calvin import initial_states, tasks
from robovlms_jax.playtable import recording
from robovlms_jax.runs import load, measured, run

RECORD = {
    "episodes": 2,
    "validation_episodes": 1,
    "tables": 2,
    "chain_length": 2,
    "image_size": (48, 32),
    "max_steps": 120,
    "start_spread": 0.2,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "calvin"}, "calvin_root"),
        ({"processes": 0}, "processes=0"),
        ({"chains": -1}, "chains=-1"),
        ({"tasks": ("fly",)}, "unknown"),
    ],
)
def test_impossible_evaluations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluation_settings.EvaluateConfig(checkpoint="x", **changes)


def test_impossible_recordings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown"):
        recording.RecordConfig(out="x", tasks=("fly",))
    with pytest.raises(ValueError, match=r"start_spread=1.0 must lie in"):
        recording.RecordConfig(out="x", start_spread=1.0)
    with pytest.raises(ValueError, match="unknown scene 'E'"):
        recording.RecordConfig(out="x", scenes=("E",))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        recording.record(recording.RecordConfig(out=str(tmp_path)))


@pytest.mark.slow
def test_recorded_demonstrations_train_a_policy_that_rolls_out(tmp_path):
    data = tmp_path / "playtable"
    config = recording.RecordConfig(out=str(data), tasks=scripted_presets.FIXTURE_TASKS, pack=True, **RECORD)
    counts = recording.record(config)
    assert counts["recorded"] >= 3
    train, validation = (calvin.open_dataset(data, split) for split in ("training", "validation"))
    assert {e.task for e in train.episodes + validation.episodes} <= set(scripted_presets.FIXTURE_TASKS)
    for dataset, held_out in ((train, False), (validation, True)):
        for episode in dataset.episodes:
            known = tasks.TASKS[episode.task]
            assert episode.instruction in (known.held_out if held_out else known.phrasings)
            frames = np.arange(episode.start, episode.end + 1)
            actions, robot = dataset.actions(frames), dataset.robot_obs(frames)
            assert np.abs(actions[:, :6]).max() <= 1
            assert set(np.unique(actions[:, 6])) <= {-1.0, 1.0}
            assert np.abs(np.diff(robot[:, :3], axis=0)).max() < 0.03  # nothing jumps between frames

    begin = train.robot_obs([train.episodes[0].start])[0, :3] - initial_states.INITIAL_ROBOT_OBS[:3]
    assert np.abs(begin).max() > 0.01 and (np.abs(begin) < 0.03 + np.array([0.2, 0.05, 0.05])).all()

    small = cli.override(
        calvin_abcd.PRESETS["sample"],
        **{"data.root": str(data), "train.output": str(tmp_path / "run"), "train.steps": 3, "evaluation.episodes": 0},
    )
    checkpoint = run.train("sample", small)
    rollout = evaluation_settings.EvaluateConfig(
        checkpoint=str(checkpoint), chains=3, max_steps=12, films=1, image_size=(48, 32), execution=Execution("first")
    )
    report = evaluate.evaluate(rollout)
    text = report.read_text()
    # Its numbers are not called CALVIN's; what the columns are called is explained by the benchmark's name.
    assert "playtable-D" in text and "CALVIN" not in text.replace("CALVIN's measure", "")
    lines = (report.parent / "results-000.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3
    assert [json.loads(line)["index"] for line in lines[1:]] == [0, 1, 2]
    assert list(report.parent.glob("film_*"))
    assert evaluate.evaluate(rollout) == report  # finished: nothing is run again
    assert (report.parent / "results-000.jsonl").read_text().splitlines() == lines


@pytest.mark.slow
def test_main_job_records_trains_rolls_out_and_keeps_the_best(tmp_path):
    small = cli.override(
        calvin_abcd.FIXTURES,
        **{
            "data.root": str(tmp_path / "data"), "train.output": str(tmp_path / "run"), "train.steps": 4,
            "train.batch_size": 8, "evaluation.episodes": 0, "demonstrations.episodes": 3,
            "demonstrations.validation_episodes": 1, "demonstrations.image_size": (48, 32),
            "demonstrations.random_scenes": 4, "demonstrations.chain_length": 2,
            "rollouts.trials": 4, "rollouts.tables": 2, "rollouts.max_steps": 12, "rollouts.image_size": (48, 32),
            "rollouts.films": 1, "rollouts.every": 2, "rollouts.select": "best",
        },
    )  # fmt: skip
    output = run.train("playtable_fixtures", small)
    text = (output / "report.md").read_text()
    assert text.startswith("# PlayTable: playtable_fixtures")
    assert "playtable-D" in text
    (rollouts,) = (output / "rollouts").glob("step_4-*/playtable-D-*")
    for picture in ("strips.png", "per_task.png", "film_0000.gif"):
        assert (rollouts / picture).exists()
    assert f"]({rollouts.relative_to(output)}/strips.png)" in text
    assert (output / "best" / "4").is_dir()  # all score 0: of equals the latest
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "rollouts/score" in row] == [2, 4]
    assert {name for row in rows for name in row} <= {"step", *measured.names(load.load_config(output))}
