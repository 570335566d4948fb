from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from robovlms_jax.envs import looks
from robovlms_jax.envs.calvin import initial_states, task_chains, tasks
from robovlms_jax.evaluation import chains, conditions

FIXTURES = ("open_drawer", "close_drawer", "turn_on_led", "turn_off_led")


def questions(count=40, names=(), scene="D"):
    asked = chains.single_tasks(names, count) if names else task_chains.official_chains()[:count]
    return conditions.Questions(asked, scene, -0.12)


@pytest.mark.parametrize("name", conditions.CONDITIONS)
def test_a_condition_changes_one_thing_and_draws_the_same_again(name):
    asked = questions()
    usual, changed, again = asked.trials(conditions.USUAL), asked.trials(name), asked.trials(name)
    assert [trial.index for trial in changed] == [trial.index for trial in usual]
    assert [trial.tasks for trial in changed] == [trial.tasks for trial in usual]
    same_words = [a.instructions == b.instructions for a, b in zip(usual, changed)]
    same_starts = [np.array_equal(a.start["scene_obs"], b.start["scene_obs"]) for a, b in zip(usual, changed)]
    speaks = name in ("unseen", "empty", "shuffled", "other_task")
    assert not any(same_words) if speaks else all(same_words)
    assert not any(same_starts) if name == "starts" else all(same_starts)
    assert all(("look" in trial.start) == (name in looks.KINDS) for trial in changed)
    for one, other in zip(changed, again):
        assert one.instructions == other.instructions and one.labels == other.labels
        np.testing.assert_array_equal(one.start["scene_obs"], other.start["scene_obs"])
        assert one.labels["condition"] == name


def test_exchanged_sentences_are_all_used_once_and_none_is_of_its_own_task():
    for asked in (questions(200), questions(10, FIXTURES)):
        usual, shuffled = asked.trials(conditions.USUAL), asked.trials("shuffled")
        said = collections.Counter(words for trial in usual for words in trial.instructions)
        assert said == collections.Counter(words for trial in shuffled for words in trial.instructions)
        for trial in shuffled:
            for task, words in zip(trial.tasks, trial.instructions):
                own = {tasks.instruction(task, variant=variant) for variant in range(12)}
                assert words not in own


def test_sentences_that_cannot_be_exchanged_are_refused_by_name():
    with pytest.raises(ValueError, match="condition shuffled: 6 of 6 sentences are of open_drawer"):
        questions(6, ("open_drawer",)).trials("shuffled")
    with pytest.raises(ValueError, match="condition other_task: only open_drawer is asked"):
        questions(6, ("open_drawer",)).trials("other_task")
    with pytest.raises(ValueError, match="unknown condition 'noise'"):
        questions(6).trials("noise")


def test_another_tasks_sentence_is_said_in_all_its_phrasings():
    said = collections.Counter(
        words
        for trial in questions(48, ("open_drawer", "close_drawer")).trials("other_task")
        for words in trial.instructions
    )
    assert set(said) == {words for name in ("open_drawer", "close_drawer") for words in tasks.TASKS[name].phrasings}


def test_another_tasks_sentence_could_be_obeyed_where_it_is_said():
    asked = questions(16, FIXTURES)
    for chain, trial in zip(asked.chains, asked.trials("other_task")):
        said = [n for n in FIXTURES if trial.instructions[0] in {tasks.instruction(n, variant=v) for v in range(12)}]
        assert len(said) == 1 and said[0] != chain.tasks[0]
        assert len(task_chains.successors(chain.condition, said[0])) == 1


@pytest.mark.parametrize("scene", "ABCD")
def test_blocks_are_placed_anew_where_training_has_them_and_apart(scene):
    layout, rng = initial_states.SCENES[scene], np.random.default_rng(0)
    spread = []
    for condition in task_chains.initial_conditions()[::8]:
        before = initial_states.initial_state(condition, scene)[1]
        robot_obs, after = initial_states.resampled(condition, scene, rng)
        np.testing.assert_array_equal(robot_obs, initial_states.INITIAL_ROBOT_OBS)
        np.testing.assert_array_equal(after[:6], before[:6])  # mechanisms as they were
        placed = []
        for color in tasks.BLOCKS:
            start = 6 + 6 * layout.block_order.index(color)
            (x, y), old = after[start : start + 2], before[start : start + 6]
            assert after[start + 2] == old[2]
            if condition[f"{color}_block"] == "table":
                assert layout.table_x_m[0] <= x <= layout.table_x_m[1]
                assert initial_states.TABLE_Y_M[0] <= y <= initial_states.TABLE_Y_M[1]
                placed.append((x, y))
                spread.append(x)
            else:
                assert abs(x - old[0]) <= 0.04 and y == old[1]
        for one, other in itertools.pairwise(placed):
            assert np.hypot(*np.subtract(one, other)) > 0.1
    assert np.ptp(spread) > 0.7 * np.ptp(layout.table_x_m)


def test_things_stand_clear_of_blocks_and_button_and_looks_are_drawn_again():
    for number in range(20):
        look = looks.draw("distractors", number, (-0.1, 0.35), -0.28)
        assert look == looks.draw("distractors", number, (-0.1, 0.35), -0.28)
        for thing in look.things:
            x, y, z = thing.center
            assert (x < -0.18 or x > 0.43) and abs(x + 0.28) > 0.08 and -0.13 <= y <= -0.02
            assert z - thing.half[2] == pytest.approx(0.44)
    assert looks.draw("camera", 0, (0, 1), 2) != looks.draw("camera", 1, (0, 1), 2)
    with pytest.raises(ValueError, match="unknown kind of look 'fog'"):
        looks.draw("fog", 0, (0, 1), 2)


def test_what_a_simulator_cannot_change_is_said():
    assert not any(conditions.offered("playtable").values())
    missing = {name: why for name, why in conditions.offered("calvin").items() if why}
    assert list(missing) == ["lighting"] and "fixed light" in missing["lighting"]


def test_nothing_said_is_an_empty_sentence_to_the_policy():
    heard = conditions.silenced(lambda text: text)
    assert heard(conditions.NOTHING_SAID) == ""
    assert heard("open the drawer") == "open the drawer"
