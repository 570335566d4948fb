"""Who acts, what a person's keys do to the hand, and which trials are kept."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from robovlms_jax.control.execution import Execution
from robovlms_jax.envs.calvin.initial_states import INITIAL_ROBOT_OBS
from robovlms_jax.teaching import lesson as lessons
from robovlms_jax.teaching.lesson import Exercise, Kept, Lesson
from tests.demo.fakes import Down, FakeWorld

UP, DOWN = np.array([0, 0, 0.5, 0]), np.array([0, 0, -0.5, 0])


class Shelf:
    """What was kept. full: whether there is no room."""

    def __init__(self):
        self.trials, self.full = [], False

    def keep(self, exercise, steps):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.trials.append((exercise.number, list(steps)))
        return Kept(len(self.trials), sum(bool(steps) for _, steps in self.trials), 0)


def make(count=2, max_steps=60):
    world, policy, shelf = FakeWorld(), Down(), Shelf()
    rows = [
        Exercise(n, "A", "turn_on_led", "turn on the green light", INITIAL_ROBOT_OBS, np.zeros(24))
        for n in range(count)
    ]
    how = {"execution": Execution("receding", horizon=2), "max_steps": max_steps, "begun": Kept(0, 0, 0)}
    return Lesson(world, policy, rows, shelf.keep, **how), world, policy, shelf


def play(lesson, ticks):
    for _ in range(ticks):
        facts = lesson.tick().facts
    return facts


def test_nothing_moves_until_somebody_acts_and_a_held_key_takes_over_from_the_policy():
    lesson, world, policy, _ = make()
    assert play(lesson, 5)["phase"] == "paused" and not world.steps
    lesson.begin()
    assert play(lesson, 3)["phase"] == "policy" and world.steps[-1][2] == -0.5
    lesson.drive(UP)
    facts = play(lesson, 4)
    assert facts["phase"] == "person" and (facts["steps"], facts["by_person"]) == (7, 4)
    np.testing.assert_allclose(world.steps[-1], [0, 0, 0.5, 0, 0, 0, -1])  # the fingers stay as the policy left them
    asked = policy.asked
    lesson.begin()
    assert play(lesson, 1)["phase"] == "policy" and policy.asked == asked + 1  # what it planned before is forgotten
    assert policy.told == ["turn on the green light"] * 3
    lesson.drive(np.zeros(4))  # a key that is let go does not take over
    assert play(lesson, 1)["phase"] == "policy"


def test_time_stands_still_while_nothing_is_held_and_what_is_not_said_again_is_forgotten():
    lesson, world, _, _ = make()
    lesson.take()
    assert play(lesson, 5)["steps"] == 0
    lesson.drive(UP)
    steps = play(lesson, 60)["steps"]
    assert steps == lessons.FORGOTTEN_TICKS + lessons.SETTLE_STEPS
    assert not any(world.steps[-1][:6])
    lesson.grip(False)
    assert play(lesson, 60)["steps"] == steps + lessons.SETTLE_STEPS and world.steps[-1][6] == -1
    assert play(lesson, 1)["opens"] is False


def test_the_hand_is_not_sent_ever_further_into_what_does_not_move():
    lesson, world, _, _ = make()
    world.step = lambda action: world.steps.append(np.array(action))  # a wall
    ahead = np.zeros(6)
    type(world).target = property(lambda self: self.robot_obs[:6] + ahead)
    try:
        lesson.drive(np.array([0.5, 0, 0, 0.5]))
        assert play(lesson, 1)["steps"] == 1 and world.steps[-1][0] == 0.5 and world.steps[-1][5] == 0.5
        ahead[0], ahead[5] = lessons.LEAD_M + 0.01, lessons.LEAD_RAD - 0.01
        play(lesson, 1)
        assert world.steps[-1][0] == 0 and world.steps[-1][5] == 0.5
        lesson.drive(np.array([-0.5, 0, 0, 0]))  # back is always possible
        play(lesson, 1)
        assert world.steps[-1][0] == -0.5
    finally:
        type(world).target = property(lambda self: self.robot_obs[:6])


def test_a_trial_that_a_person_helped_to_its_end_is_kept_with_who_acted_and_others_are_not():
    lesson, _, _, shelf = make(count=3)
    lesson.begin()
    play(lesson, 4)
    lesson.drive(DOWN)
    facts = play(lesson, 9)
    assert facts["phase"] == "over" and facts["said"][-1]["kind"] == "done"
    ((number, steps),) = shelf.trials
    assert number == 0 and [step.by_person for step in steps] == [False] * 4 + [True] * (len(steps) - 4)
    assert [step.done for step in steps[-4:]] == [False, True, True, True]  # and a little longer, as demonstrations
    assert not any(steps[-1].action[:6]) and np.isclose(steps[0].robot_obs[2], INITIAL_ROBOT_OBS[2])
    lesson.drive(UP)  # nothing moves between trials
    assert play(lesson, 3)["phase"] == "over"
    lesson.begin()
    assert play(lesson, 1)["phase"] == "paused" and lesson.exercise.number == 1 and not lesson.steps
    lesson.begin()
    assert play(lesson, 20)["phase"] == "over"
    assert "did it alone" in lesson.tick().facts["said"][-1]["text"]
    lesson.begin()
    lesson.drive(UP)
    play(lesson, 3)
    lesson.skip()
    assert play(lesson, 1)["phase"] == "finished"
    lesson.begin()
    assert play(lesson, 1)["phase"] == "finished" and [len(kept) for _, kept in shelf.trials[1:]] == [0, 0]


def test_a_policy_whose_time_is_up_waits_and_a_trial_that_is_done_again_begins_where_it_began():
    lesson, world, _, shelf = make(max_steps=3)
    lesson.begin()
    facts = play(lesson, 8)
    assert (facts["phase"], facts["steps"]) == ("paused", 3) and "had its 3 steps" in facts["said"][-1]["text"]
    lesson.again()
    assert play(lesson, 1)["steps"] == 0 and np.isclose(world.robot_obs[2], INITIAL_ROBOT_OBS[2])
    lesson.drive(UP)
    play(lesson, 2)
    lesson.hold("Stopped by visitor 2.")
    assert play(lesson, 5)["steps"] == 2 and not shelf.trials


@pytest.mark.parametrize("what", ["world", "policy"])
def test_a_step_that_fails_is_said_and_the_trial_can_be_done_again(what):
    lesson, world, policy, _ = make()
    lesson.begin()
    play(lesson, 1)
    broken = world if what == "world" else policy
    broken.bad = ValueError("the arm is nowhere")
    facts = play(lesson, 4)
    assert facts["phase"] == "paused" and "the arm is nowhere" in facts["said"][-1]["text"]
    broken.bad = None
    lesson.again()
    lesson.begin()
    assert play(lesson, 2)["steps"] == 2


def test_a_trial_that_finds_no_room_is_not_counted_and_may_be_done_again():
    lesson, _, _, shelf = make()
    shelf.full = True
    lesson.drive(DOWN)
    facts = play(lesson, 13)
    assert facts["phase"] == "paused" and "No space left" in facts["said"][-1]["text"]
    assert facts["kept"]["trials"] == 0
    shelf.full = False
    lesson.again()
    lesson.drive(DOWN)
    assert play(lesson, 13)["phase"] == "over" and len(shelf.trials) == 1


def test_a_trial_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(lessons, "LONGEST_STEPS", 6)
    lesson, world, _, shelf = make()
    for _ in range(10):
        lesson.drive(UP)
        facts = play(lesson, 1)
    assert (facts["phase"], len(world.steps)) == ("paused", 6)
    assert facts["said"][-1]["text"].startswith("The trial has had 6 steps")
    lesson.again()
    lesson.drive(UP)
    assert play(lesson, 1)["steps"] == 1 and not shelf.trials
