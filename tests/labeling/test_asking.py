"""Which pairs are asked about."""

from __future__ import annotations

import numpy as np
import pytest

from robovlms_jax.labeling import asking
from robovlms_jax.rl import preferences, progress
from tests.labeling.made_up import rollouts

HOW = {"steps": 5, "every": 5}


def test_pairs_are_of_one_task_and_two_rollouts_and_none_comes_twice():
    found = rollouts()
    pairs = asking.draw(found, found.segments(5, 2), 12, 0, **HOW)
    assert len({pair.key for pair in pairs}) == len(pairs) == 12
    for left, right in pairs:
        assert left.rollout != right.rollout and found.tasks[left.rollout] == found.tasks[right.rollout]
    assert {found.tasks[pair.left.rollout] for pair in pairs} == set(found.tasks)
    assert pairs == asking.draw(found, found.segments(5, 2), 12, 0, **HOW)  # a seed says which


def test_there_are_no_more_pairs_than_there_are():
    found = rollouts((5, 5), ("open_drawer",) * 2)
    assert len(asking.draw(found, found.segments(5, 5), 100, 0, **HOW)) == 1
    with pytest.raises(ValueError, match="no task has segments of 5 control steps from two rollouts"):
        asking.draw(rollouts((5, 5), ("open_drawer", "close_drawer")), found.segments(5, 5), 1, 0, **HOW)


def test_a_task_with_few_pairs_does_not_hold_up_the_others():
    found = rollouts((5, 5, 20, 20), ("open_drawer",) * 2 + ("turn_on_led",) * 2)
    pairs = asking.draw(found, found.segments(5, 5), 9, 0, **HOW)
    assert [found.tasks[pair.left.rollout] for pair in pairs].count("open_drawer") == 1 and len(pairs) == 9


def test_a_reward_has_those_asked_first_about_which_its_members_disagree(monkeypatch):
    found = rollouts()
    monkeypatch.setattr(progress, "frames", lambda found, parts, steps, every: np.array([x.start for x in parts]))
    monkeypatch.setattr(preferences, "disagreement", lambda reward, first, second: np.abs(first - second))
    chosen = asking.draw(found, found.segments(5, 1), 5, 0, object(), **HOW)
    apart = [abs(pair.left.start - pair.right.start) for pair in chosen]
    drawn = asking.draw(found, found.segments(5, 1), 5, 0, **HOW)
    assert apart == sorted(apart, reverse=True)
    assert sum(apart) > sum(abs(pair.left.start - pair.right.start) for pair in drawn)
