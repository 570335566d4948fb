"""Which trials a person is shown, and when a recording may be gone on with."""

from __future__ import annotations

import dataclasses

import pytest

from experiments import calvin_abcd, teach
from robovlms_jax.demo import twin
from robovlms_jax.training import checkpoints

TRAINED = calvin_abcd.PRESETS["playtable_fixtures"]


def test_trials_are_those_of_the_checkpoints_run_unless_others_are_named():
    config = teach.resolved(teach.TeachConfig(count=12), TRAINED)
    assert (config.tasks, config.max_steps) == (TRAINED.rollouts.tasks, TRAINED.rollouts.max_steps)
    every = teach.exercises(config)
    assert [exercise.number for exercise in every] == list(range(12))
    assert [exercise.task for exercise in every[:8]] == list(config.tasks)
    assert {exercise.table for exercise in every} <= set(TRAINED.demonstrations.scenes)
    named = teach.resolved(teach.TeachConfig(tasks=("open_drawer",), scenes=("D",), max_steps=9), TRAINED)
    assert {(exercise.task, exercise.table) for exercise in teach.exercises(named)} == {("open_drawer", "D")}
    nobody = dataclasses.replace(
        TRAINED,
        rollouts=dataclasses.replace(TRAINED.rollouts, tasks=()),
        demonstrations=dataclasses.replace(TRAINED.demonstrations, tasks=()),
    )
    with pytest.raises(ValueError, match="name the tasks to try"):
        teach.resolved(teach.TeachConfig(), nobody)


def test_more_trials_go_on_with_a_recording_and_other_ones_do_not():
    directory = checkpoints.locate(twin.DIRECTORY)
    config = teach.TeachConfig(tasks=("open_drawer",), scenes=("A",), max_steps=60)
    known = teach.settings(config, TRAINED, directory)
    assert teach.settings(dataclasses.replace(config, count=99, port=0), TRAINED, directory) == known
    assert teach.settings(dataclasses.replace(config, seed=1), TRAINED, directory) != known


def test_settings_that_cannot_be_are_refused():
    for values, why in (
        ({"count": 0}, "count=0"),
        ({"max_steps": -1}, "max_steps=-1"),
        ({"scenes": ("E",)}, "E"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ValueError, match=why):
            teach.TeachConfig(**values)
