"""Sentence, stop, release, way home and what is told of them, on a table without physics."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robovlms_jax.demo import homing
from robovlms_jax.demo.stage import SPEEDS_M_S
from tests.demo.fakes import Down, make_stage, play


def texts(facts):
    return [line["text"] for line in facts["said"]]


def test_a_sentence_is_obeyed_judged_and_the_hand_goes_home():
    stage, world, policy = make_stage()
    assert play(stage, 5)["phase"] == "waiting" and not world.observed
    assert stage.instruct("please switch on the green led!")
    facts = play(stage, 1)
    assert facts["phase"] == "acting" and facts["instruction"] == policy.told[0] == "switch on the green light"
    assert facts["typed"] == "please switch on the green led!"
    assert len(facts["chunk"]) == 5 and all(len(point) == 3 for point in facts["chunk"])  # where it is, and 4 actions
    assert facts["uncertainty"] == 0.1  # in the policy's own measure: no distance is claimed
    facts = play(stage, 11)
    assert facts["phase"] == "returning" and facts["score"] == [1, 1] and texts(facts)[-1].startswith("Done in 0.4 s")
    assert policy.asked == 6  # two actions of each chunk
    facts = play(stage, 80)
    assert facts["phase"] == "waiting" and homing.is_home(world.robot_obs)
    json.dumps(facts)


def test_a_task_that_takes_too_long_is_given_up():
    stage, _, _ = make_stage(Down(0.01), max_steps=20)
    stage.instruct("turn on the green light")
    facts = play(stage, 25)
    assert facts["score"] == [0, 1] and "gave up" in texts(facts)[-1]


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("", "That was empty"),
        (None, "That was empty"),
        ("make me a coffee", "the robot knows nothing like that; try one of the buttons below. Nothing moves."),
        ("what can you do?", "that is a question, which the robot cannot answer; say what it should do: the buttons"),
        ("do not turn on the green light", "that says what not to do, and the robot only knows what to do. Nothing"),
        ("open the drawer", "“open the drawer”: that is so already. Nothing moves."),
        ("opn the drawr", "“opn the drawr”, understood as “open the drawer”: that is so already"),
        ("the light", "“the light”: which of these is meant? Nothing moves."),
        ("open it", "“open it”: that is so already. Nothing moves."),  # all that it can mean
    ],
)
def test_what_is_not_known_or_not_possible_moves_nothing(typed, answer):
    stage, world, _ = make_stage()
    assert not stage.instruct(typed)
    facts = play(stage, 40)
    assert answer in texts(facts)[-1] and facts["phase"] == "waiting" and not world.observed
    assert all(np.array_equal(step[:6], np.zeros(6)) for step in world.steps)


@pytest.mark.parametrize("typed", ["make me a coffee", "", "the light", "open the drawer"])
def test_what_is_not_obeyed_while_the_robot_moves_is_answered_with_what_it_goes_on_with(typed):
    stage, _, _ = make_stage()
    stage.instruct("turn on the green light")
    play(stage, 3)
    assert not stage.instruct(typed)
    facts = play(stage, 1)
    assert facts["phase"] == "acting" and "Nothing moves" not in texts(facts)[-1]
    assert texts(facts)[-1].endswith("It goes on with “turn on the green light”.")
    play(stage, 9)
    stage.instruct("make me a coffee")
    facts = play(stage, 1)
    assert facts["phase"] == "returning" and texts(facts)[-1].endswith("It goes on back to where tasks begin.")


def test_who_forbids_something_while_the_robot_moves_makes_it_stand_still():
    stage, _, _ = make_stage()
    stage.instruct("turn on the green light")
    play(stage, 3)
    assert not stage.instruct("do not turn on the green light")
    facts = play(stage, 1)
    assert facts["phase"] == "waiting" and facts["latch"] == "run"
    assert texts(facts)[-1].endswith("The robot stands still; “turn on the green light” has ended.")


@pytest.mark.parametrize("typed", ["stop", "Halt!", "please freeze", "멈춰", "wait"])
def test_a_stop_that_is_typed_latches_as_the_button_does(typed):
    stage, _, policy = make_stage()
    stage.instruct("turn on the green light")
    play(stage, 3)
    assert not stage.instruct(typed, "Ann")
    facts = play(stage, 10)
    assert facts["phase"] == "stopped" and facts["latch"] == "hold" and "Ann" in facts["reason"]
    assert not stage.instruct("turn on the green light") and policy.told == ["turn on the green light"]
    stage.instruct(typed)
    assert texts(play(stage, 1))[-1].endswith("the robot is stopped already.")


def test_what_may_mean_several_things_comes_with_the_choices_until_something_else_is_said():
    stage, _, _ = make_stage()
    stage.instruct("the green light")
    facts = play(stage, 1)
    assert facts["choices"] == ["turn on the green light", "turn off the green light"]
    assert facts["said"][-1]["kind"] == "question"
    assert stage.instruct(facts["choices"][0])
    assert play(stage, 1)["choices"] == []


def test_a_stop_stays_until_it_is_released_and_release_moves_nothing():
    stage, world, policy = make_stage()
    stage.instruct("turn on the green light")
    play(stage, 3)
    stage.stop("Ann")
    facts = play(stage, 10)
    assert facts["phase"] == "stopped" and facts["latch"] == "hold" and "Ann" in facts["reason"]
    here = world.robot_obs[:6].copy()
    assert not stage.instruct("turn on the green light")
    stage.reset()
    stage.next_scene()
    stage.limit_speed(SPEEDS_M_S[1])
    assert play(stage, 1)["phase"] == "stopped"  # nothing of that lifts it
    play(stage, 5)
    here = world.robot_obs[:6].copy()
    stage.release("Ann")
    facts = play(stage, 40)
    assert facts["phase"] == "waiting" and np.array_equal(world.robot_obs[:6], here) and len(policy.told) == 1
    assert stage.instruct("turn on the green light") and play(stage, 2)["phase"] == "acting"


def test_a_stop_on_the_way_home_ends_that_way():
    stage, world, _ = make_stage()
    stage.instruct("turn on the green light")
    while play(stage, 1)["phase"] != "returning":
        assert stage.tick_number < 60
    play(stage, 12)
    stage._layer.stop("the layer's own reason")
    assert "the layer's own reason" in texts(play(stage, 10))[-1]
    stage.release("Ann")
    here = world.robot_obs[:6].copy()
    assert play(stage, 30)["phase"] == "waiting" and np.array_equal(world.robot_obs[:6], here)


def test_a_new_sentence_ends_the_old_one_and_begins_at_home():
    stage, world, policy = make_stage()
    stage.instruct("turn on the green light")
    play(stage, 8)
    stage.instruct("switch on the green light")
    facts = play(stage, 1)
    assert facts["phase"] == "returning" and policy.told == ["turn on the green light"]
    assert texts(facts)[-1].endswith("the robot first goes back to where tasks begin, then begins.")
    assert facts["instruction"] == "switch on the green light"  # what waits is shown
    while play(stage, 1)["phase"] == "returning":
        assert stage.tick_number < 200
    assert policy.told[-1] == "switch on the green light" and world.robot_obs[2] > 0.5


def test_the_safety_layer_slows_what_is_above_the_speed_limit_and_says_so():
    stage, world, _ = make_stage(Down(1.0))
    stage.limit_speed(0.1)
    stage.instruct("turn on the green light")
    facts = play(stage, 12)
    assert facts["interventions"] >= 10 and facts["intervention"]["stage"] == "speed" and facts["speed_limit"] == 0.1
    assert max(np.abs(step[2]) for step in world.steps) <= 0.1 / 30 / 0.02 + 1e-9
    with pytest.raises(ValueError, match=r"none of \[0.8, 0.25, 0.1\]"):
        stage.limit_speed(3.0)


def test_at_the_usual_limit_the_layer_changes_nothing_of_an_ordinary_motion():
    stage, _, _ = make_stage(Down(0.5))
    stage.instruct("turn on the green light")
    assert play(stage, 12)["interventions"] == 0


def test_a_policy_that_fails_stops_the_robot_and_is_named():
    stage, _, policy = make_stage()
    policy.bad = RuntimeError("out of memory")
    stage.instruct("turn on the green light")
    facts = play(stage, 3)
    assert facts["phase"] == "stopped" and "out of memory" in facts["reason"]
    assert any("out of memory" in text for text in texts(facts))


def test_hold_ends_the_task_without_a_latched_stop():
    stage, _, _ = make_stage()
    stage.instruct("turn on the green light")
    play(stage, 3)
    stage.hold("left")
    facts = play(stage, 3)
    assert facts["phase"] == "waiting" and facts["latch"] == "run" and facts["said"][-1]["text"] == "left"


def test_a_robot_at_rest_is_not_simulated():
    stage, world, _ = make_stage()
    play(stage, 100)
    assert len(world.steps) < 50
    stage.instruct("turn on the green light")
    before = len(world.steps)
    play(stage, 3)
    assert len(world.steps) == before + 3


@pytest.mark.parametrize("way_out", ["reset", "next_scene"])
def test_a_control_step_that_fails_stops_the_robot_says_so_and_ends_when_the_scene_begins_again(way_out):
    stage, world, _ = make_stage()
    stage.instruct("turn on the green light")
    before = play(stage, 3)
    world.bad = ValueError("the arm is nowhere")
    facts = play(stage, 1)
    made = len(world.steps)
    assert facts["phase"] == "stopped" and facts["broken"] == "ValueError: the arm is nowhere"
    assert facts["task"] == "" and facts["chunk"] == [] and facts.keys() == before.keys()
    assert "Begin the scene again, then release the stop" in texts(facts)[-1]
    world.bad = None
    stage.release("Ann")
    assert not stage.instruct("turn on the green light")
    facts = play(stage, 30)  # nobody can make it move, and it is said once
    assert len(world.steps) == made and facts["broken"] and facts["tick"] == 34
    assert sum("a control step failed (" in text for text in texts(facts)) == 1
    assert "Begin the scene again first" in texts(facts)[-1]
    getattr(stage, way_out)()
    facts = play(stage, 10)
    assert facts["broken"] == "" and facts["latch"] == "hold"  # the stop stays until a person releases it
    stage.release("Ann")
    assert stage.instruct("turn on the green light")
    assert play(stage, 1)["phase"] == "acting" and world.steps


def test_a_step_that_fails_again_after_the_scene_began_again_stops_again():
    stage, world, _ = make_stage()
    world.bad = RuntimeError("broken for good")
    for _ in range(2):
        assert play(stage, 2)["broken"] == "RuntimeError: broken for good"
        stage.reset()
