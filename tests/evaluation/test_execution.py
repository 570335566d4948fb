"""Execution modes: what is executed of each chunk."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from robovlms_jax.control import execution, robot
from robovlms_jax.control.execution import Execution, select
from robovlms_jax.control.interface import ActionChunk, Observation

LOOK = Observation({})


def chunk(first: float, length: int = 4, gripper: float = 1.0) -> np.ndarray:
    """Rows first, first + 1, ... in every arm column."""
    rows = np.repeat(first + np.arange(length, dtype=np.float32)[:, None], 7, axis=1)
    rows[:, 6] = gripper
    return rows


@pytest.mark.parametrize(
    ("mode", "count"), [(Execution("first"), 1), (Execution("chunk"), 4), (Execution("receding", 3), 3)]
)
def test_a_prefix_of_the_chunk_is_executed(mode, count):
    actions, past = select(mode, (), chunk(5))
    np.testing.assert_array_equal(actions, chunk(5)[:count])
    assert past == ()


def test_a_horizon_beyond_the_chunk_means_the_whole_chunk():
    assert len(select(Execution("receding", 9), (), chunk(0))[0]) == 4


@pytest.mark.parametrize(("mode", "count"), [("chunk", 4), ("receding", 3)])
def test_every_frame_is_seen_while_the_plan_is_followed(mode, count):
    # The policy is asked at every step, but only every `count`-th answer is executed, one action per call.
    execution_mode = Execution(mode, 3, every_frame=True)
    policy = execution.Executed(Script(), execution_mode)
    policy.reset("go")
    done = [policy.act(LOOK).actions for _ in range(2 * count)]
    assert all(actions.shape == (1, 7) for actions in done)
    expected = [100 * (1 + count * cycle) + i for cycle in range(2) for i in range(count)]
    np.testing.assert_array_equal(np.concatenate(done)[:, 0], expected)
    assert execution_mode.label.endswith("every frame")


def test_the_ensemble_averages_what_all_chunks_say_for_the_step():
    mode = Execution("ensemble", decay=0.5)
    past = ()
    for step in range(4):
        actions, past = select(mode, past, chunk(10.0 * step))
        # the chunk of step i says 10 i + (step - i) for now, and counts by age
        predictions = [10 * i + step - i for i in range(step + 1)]
        weights = np.exp(-0.5 * np.arange(step + 1))
        assert actions.shape == (1, 7)
        assert actions.dtype == np.float32
        np.testing.assert_allclose(actions[0, :6], np.sum(weights * predictions) / weights.sum(), rtol=1e-6)
    assert [len(rest) for rest in past] == [1, 2, 3]  # the first chunk is used up


def test_the_ensemble_of_equal_predictions_is_the_prediction():
    past = ()
    plan = chunk(0, length=8)
    for step in range(5):
        actions, past = select(Execution("ensemble"), past, plan[step : step + 4])
        np.testing.assert_allclose(actions, plan[step : step + 1], rtol=1e-6)


def test_the_ensembles_gripper_is_a_vote():
    mode = Execution("ensemble", decay=0.0)
    _, past = select(mode, (), chunk(0, gripper=1.0))
    actions, past = select(mode, past, chunk(0, gripper=-1.0))
    assert actions[0, 6] == -1.0  # a tie: the newest decides
    actions, past = select(mode, past, chunk(0, gripper=1.0))
    assert actions[0, 6] == 1.0


@pytest.mark.parametrize("arguments", [("sometimes",), ("receding", 0)])
def test_a_mode_that_means_nothing_is_refused(arguments):
    with pytest.raises(ValueError, match=r"execution (mode 'sometimes'|horizon=0)"):
        Execution(*arguments)


class Script:
    """A policy that predicts `chunk(n)` at its n-th request of an episode."""

    def reset(self, instruction: str) -> None:
        self.count = 0

    def act(self, observation: Observation) -> ActionChunk:
        self.count += 1
        return ActionChunk(chunk(100.0 * self.count))


def test_one_episode_and_many_are_executed_alike():
    mode = Execution("ensemble", decay=0.1)
    alone = execution.Executed(Script(), mode)
    batch = execution.ExecutedBatch(execution.Separate([Script(), Script()]), mode)
    alone.reset("go")
    batch.reset([0, 1], ["go", "go"])
    expected = [alone.act(LOOK).actions for _ in range(3)]
    got = [batch.act([LOOK], [1])[0].actions for _ in range(3)]
    np.testing.assert_array_equal(got, expected)
    # slot 0 stood still meanwhile, and a reset forgets earlier chunks
    np.testing.assert_array_equal(batch.act([LOOK], [0])[0].actions, expected[0])
    batch.reset([1], ["go"])
    np.testing.assert_array_equal(batch.act([LOOK], [1])[0].actions, expected[0])
    alone.reset("go")
    np.testing.assert_array_equal(alone.act(LOOK).actions, expected[0])


class Listener(Script):
    """Keeps what it is told about executed actions."""

    def reset(self, instruction: str) -> None:
        super().reset(instruction)
        self.told = []

    def act(self, observation: Observation) -> ActionChunk:
        self.told.append(observation.executed)
        return super().act(observation)


@pytest.mark.parametrize("batched", [False, True])
def test_policies_are_told_what_was_executed(batched):
    # Nothing at first, then exactly the actions that were handed out, whatever else the chunk held.
    listener = Listener()
    if batched:
        policy = execution.ExecutedBatch(execution.Separate([Script(), listener]), Execution("receding", 2))
        for _ in range(2):  # a reset forgets what was executed before it
            policy.reset([1], ["go"])
            done = [policy.act([LOOK], [1])[0].actions for _ in range(3)]
    else:
        policy = execution.Executed(listener, Execution("receding", 2))
        for _ in range(2):
            policy.reset("go")
            done = [policy.act(LOOK).actions for _ in range(3)]
    assert listener.told[0].shape == (0, 7)
    np.testing.assert_array_equal(listener.told[1:], done[:2])


class Picky(Script):
    """Refuses one instruction, and stays in the episode before it."""

    def reset(self, instruction: str) -> None:
        if instruction == "dance":
            raise ValueError("the policy cannot dance.")
        super().reset(instruction)


def test_nothing_acts_after_a_reset_that_failed():
    alone = execution.Executed(Picky(), Execution("first"))
    batch = execution.ExecutedBatch(execution.Separate([Picky(), Picky(), Picky()]), Execution("first"))
    alone.reset("go")
    batch.reset([0, 1, 2], ["go"] * 3)
    for reset in (lambda: alone.reset("dance"), lambda: batch.reset([0, 1], ["dance", "go"])):
        with pytest.raises(ValueError, match="cannot dance"):
            reset()
    with pytest.raises(RuntimeError, match="no episode"):
        alone.act(LOOK)
    for slot in (0, 1):
        with pytest.raises(RuntimeError, match=f"slot {slot} has no episode"):
            batch.act([LOOK], [slot])
    batch.act([LOOK], [2])


@pytest.mark.parametrize("slots", [[-1], [2], [0, 0], [0.0], [True]])
def test_separate_policies_have_slots_from_0_on(slots):
    policy = execution.Separate([Script(), Script()])
    policy.reset([0, 1], ["go", "go"])
    for call in (lambda: policy.reset(slots, ["go"] * len(slots)), lambda: policy.act([LOOK] * len(slots), slots)):
        with pytest.raises(ValueError, match="slot"):
            call()


def test_every_binary_gripper_of_a_robot_votes_and_nothing_else_does():
    gripper = dataclasses.replace(robot.GRIPPER, name="other")
    spec = robot.RobotSpec("two", action=(robot.GRIPPER, robot.Dimension("elbow", "rad", quantity="joint"), gripper))
    mode, past = Execution("ensemble", decay=0.0), ()
    for values in ([1, 0.1, -1], [1, 0.2, 1], [-1, 0.6, 1]):
        actions, past = select(mode, past, np.repeat(np.float32([values]), 4, axis=0), spec)
    np.testing.assert_allclose(actions[0], [1, 0.3, 1], rtol=1e-6)
