"""Drives of a policy, and what the report says of them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import reaction
from robovlms_jax.control.interface import ActionChunk
from robovlms_jax.driving import scenarios, world
from robovlms_jax.driving.config import DrivesConfig, RecordingConfig
from robovlms_jax.runs import driving

FEW = DrivesConfig(trials=8, max_steps=50, rooms=4, films=1, horizon=5)


class StraightOn:
    """Full speed ahead, whatever it sees and is told."""

    robot = world.ROBOT

    def reset(self, slots, instructions):
        assert all(instructions)

    def act(self, observations, slots):
        assert all(list(x.images)[-1] == "front" for x in observations)
        return [ActionChunk(np.tile(np.float32([[0.5, 0.0, 0.0]]), (8, 1)))] * len(slots)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return root, driving.evaluate(StraightOn(), FEW, root / "drives", "step_1-abc")


def test_every_scenario_is_asked_in_both_wordings_bare_and_through_the_layer(run):
    _, found = run
    assert [(x.layer, x.phrasing) for x in found] == [
        (layer, words)
        for layer in ("bare", "safety layer, stops", "safety layer, slows down")
        for words in ("training", "held out")
    ]
    for drives in found:
        assert sorted(result.tasks[0] for result in drives.results) == sorted(scenarios.SCENARIOS)


def test_a_policy_that_drives_into_boxes_collides_bare_and_never_behind_the_safety_layer(run):
    _, found = run
    for drives in found:
        success, free = drives.rates()
        assert success.attempts == 8 and success.successes == 0
        assert (free.successes < 8) == (drives.layer == "bare")
    stopped = sum(result.partial["stopped by safety"] for result in found[2].results)
    assert stopped >= 4


def test_rooms_of_drives_are_none_of_a_recordings():
    seeds = {trial.start["seed"] for trial in driving.trials(DrivesConfig(trials=4000), held_out=False)}
    config = RecordingConfig()
    lowest, highest = min(seeds), max(seeds)
    assert lowest > 10**7 + config.validation_episodes and highest < 10**8


def test_a_second_evaluation_reads_the_first_ones_results(run):
    root, found = run

    class Silent(StraightOn):
        def act(self, observations, slots):
            raise AssertionError("driven again")

    again = driving.evaluate(Silent(), FEW, root / "drives", "step_1-abc")
    assert [x.rates() for x in again] == [x.rates() for x in found]


def test_the_section_has_a_table_for_each_and_a_film(run):
    root, found = run
    films = driving.film(StraightOn(), FEW, root / "drives/films")
    text = driving.section(found, films, root)
    assert text.count("| 2box_vert_left |") == 6 and "0.0 % (0.0 to 32.4)" in text
    assert "drives/films/0_1box_vert_left" in text and "drives/films/strips.png" in text
    assert all(path.exists() for path in films)


def test_reactions_of_both_schemes_are_what_their_definitions_say():
    rng = np.random.default_rng(0)
    waited = reaction.window_and_chunk(np.full(3, 0.5), 10, 0.4, 100_000, rng)
    assert abs(waited.mean() - (4.5 / 2 + 0.5)) < 0.02 and waited.min() >= 0.5 and waited.max() <= 5.0
    quick = reaction.event_triggered(np.full(3, 0.03), 0.02, 100_000, rng)
    assert abs(quick.mean() - 0.045) < 0.001 and quick.max() <= 0.06
