"""A policy that gets nowhere tries again from another place."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from robovlms_jax.control import execution, robot
from robovlms_jax.control.execution import Execution
from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.control.retrying import Attempts, Retry
from robovlms_jax.rl import tables


class Stubborn:
    """Says `chunk` whatever it sees, and keeps what it was told."""

    def __init__(self, motion: float = 0.0):
        self.chunk = np.float32([[motion] * 6 + [-1.0]] * 5)
        self.heard: list[str] = []
        self.seen: list[Observation] = []

    def reset(self, instruction: str) -> None:
        self.heard.append(instruction)

    def act(self, observation: Observation) -> ActionChunk:
        self.seen.append(observation)
        return ActionChunk(self.chunk)


def at(place: float, proprio: bool = True) -> Observation:
    return Observation({}, np.float32([place, 0, 0, 0, 0, 0, 0.08]) if proprio else None)


def episode(policy: execution.Executed, requests: int, path=lambda step: 0.0) -> list[np.ndarray]:
    """What is executed at each request; the hand is at x = path(steps so far)."""
    done: list[np.ndarray] = []
    for _ in range(requests):
        done.append(policy.act(at(path(sum(map(len, done))))).actions)
    return done


def moves(done: list[np.ndarray]) -> list[int]:
    """Control steps at which the hand was moved at random."""
    begins = np.cumsum([0, *map(len, done)])
    return [int(begin) for begin, rows in zip(begins, done) if np.ptp(rows[0, :3]) > 0]


def test_nothing_is_tried_again_unless_it_is_asked_for():
    assert not moves(episode_of(Execution("chunk")))
    assert Execution("receding", 5).label == "receding 5"  # results of earlier versions keep their name


def episode_of(mode: Execution, requests: int = 40) -> list[np.ndarray]:
    policy = execution.Executed(Stubborn(), mode)
    policy.reset("open the drawer")
    return episode(policy, requests)


def test_a_move_follows_every_so_many_steps():
    # 4 requests of 5 actions, a move of 12, again 4 requests, ...
    mode = Execution("chunk", retry=Retry(after=20, steps=12))
    assert moves(episode_of(mode, 15)) == [20, 52, 84]
    # asked at other times: the first request at or after the time
    assert moves(episode_of(Execution("receding", 3, retry=Retry(after=20, steps=2)), 18)) == [21, 44]


def test_a_new_instruction_begins_the_count_anew():
    policy = execution.Executed(Stubborn(), Execution("chunk", retry=Retry(after=20)))
    policy.reset("open the drawer")
    assert not moves(episode(policy, 4))
    policy.reset("close the drawer")
    assert not moves(episode(policy, 4))
    assert moves(episode(policy, 1)) == [0]


def test_a_move_goes_one_way_within_bounds_and_keeps_the_gripper():
    mode = Execution("chunk", retry=Retry(after=5, steps=12, distance_m=0.1))
    for rows in episode_of(mode)[1::2]:
        assert rows.shape == (12, 7) and rows.dtype == np.float32
        np.testing.assert_array_equal(rows, rows[:1].repeat(12, 0))
        np.testing.assert_array_equal(rows[0, 3:], [0, 0, 0, -1])  # closed, as the policy left it
        assert rows[0, 2] > 0  # upwards
        # 1.0 is 0.02 m
        np.testing.assert_allclose(np.linalg.norm(rows[:, :3].sum(0)) * 0.02, 0.1, rtol=1e-5)
    far = np.concatenate([rows[:1, :3] for rows in episode_of(Execution("chunk", retry=Retry(after=5, distance_m=9)))])
    np.testing.assert_allclose(np.abs(far[1::2]).max(1), 1.0, rtol=1e-6)  # no faster than the robot may


def test_moves_differ_and_are_the_same_again_wherever_the_episode_runs():
    mode = Execution("chunk", retry=Retry(after=20))
    alone = episode_of(mode)
    ways = [tuple(rows[0, :3]) for rows in alone if len(rows) == 12]
    assert len(set(ways)) == len(ways) > 3
    batch = execution.ExecutedBatch(execution.Separate([Stubborn(), Stubborn(), Stubborn()]), mode)
    batch.reset([1, 2], ["open the drawer", "close the drawer"])
    both = [batch.act([at(0.0), at(0.0)], [2, 1]) for _ in range(40)]
    for expected, (other, same) in zip(alone, both, strict=True):
        np.testing.assert_array_equal(same.actions, expected)
        assert other.actions.shape == same.actions.shape
    assert not np.array_equal(both[4][0].actions, both[4][1].actions)  # another instruction, another way
    seeded = episode_of(dataclasses.replace(mode, retry=Retry(after=20, seed=1)))
    assert not np.array_equal(seeded[4], alone[4])


def test_slots_that_move_do_not_hold_up_the_others():
    batch = execution.ExecutedBatch(execution.Separate([Stubborn(), Stubborn(0.5)]), Execution("chunk", retry=Retry(5)))
    batch.reset([0], ["wait"])
    batch.act([at(0.0)], [0])
    batch.reset([1], ["go"])
    late, early = batch.act([at(0.0), at(0.0)], [0, 1])
    assert len(late.actions) == 12
    np.testing.assert_array_equal(early.actions, Stubborn(0.5).chunk)


def test_the_policy_begins_anew_after_a_move():
    inner = Stubborn()
    policy = execution.Executed(inner, Execution("ensemble", retry=Retry(after=3)))
    policy.reset("open the drawer")
    episode(policy, 5)
    assert inner.heard == ["open the drawer"] * 2
    assert [len(look.executed) for look in inner.seen] == [0, 1, 1, 0]  # and looks back at nothing
    assert len(policy._past) == 1  # nor does the ensemble


def test_standing_still_is_noticed_and_moving_is_not():
    mode = Execution("chunk", retry=Retry(still=30, within_m=0.01))
    policy = execution.Executed(Stubborn(), mode)
    policy.reset("open the drawer")
    # on its way until step 40, then it trembles by less than a centimetre: 30 steps later it is moved
    done = episode(policy, 20, lambda step: 0.02 * step if step < 40 else 0.8 + 0.004 * (step % 2))
    assert moves(done)[:1] == [70]
    policy.reset("open the drawer")
    assert not moves(episode(policy, 20, lambda step: 0.002 * step))  # 6 cm in 30 steps
    # counted anew after a move, which ends where it ends
    policy.reset("open the drawer")
    assert moves(episode(policy, 14)) == [30, 72]


def test_still_watches_all_three_axes_in_metres():
    spec = dataclasses.replace(robot.CALVIN, state=tuple(dataclasses.replace(d, unit="cm") for d in robot.CALVIN.state))
    for axis in range(3):
        for size, expected in ((0.9, True), (1.1, False)):  # cm
            attempts = Attempts(Retry(still=10, within_m=0.01), spec)
            attempts.begin("go")
            moved = []
            for step in range(3):
                place = np.zeros(7)
                place[axis] = size * (step % 2)
                moved.append(attempts.move(Observation({}, place)) is not None)
                attempts.did(Stubborn().chunk)
            assert moved == [False, False, expected], (axis, size)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"after": -1}, "retry.after=-1 must not be negative"),
        ({"still": -5}, "retry.still=-5 must not be negative"),
        ({"after": 9, "steps": 0}, "retry.steps=0 must be at least 1"),
        ({"after": 9, "distance_m": float("nan")}, "retry.distance_m=nan must be a finite length"),
        ({"still": 9, "within_m": 0.0}, "retry.within_m=0.0 must be a finite length"),
        ({"after": 9, "within_m": 0.02}, "retry.within_m=0.02 says what standing still is, which is not watched"),
        ({"distance_m": 0.2, "seed": 3}, "retry has distance_m, seed but no time"),
    ],
)
def test_a_retry_that_means_nothing_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Retry(**fields)


def test_robots_whose_hand_cannot_be_moved_so_are_refused_before_anything_moves():
    joints = robot.RobotSpec(
        "six joints", action=tuple(robot.Dimension(f"j{i}", "rad", "delta", "joint") for i in "123")
    )
    poses = robot.RobotSpec("poses", action=robot.CALVIN.state)
    steps = robot.end_effector("steps", "ticks")
    for spec, said in ((joints, "no delta position"), (poses, "no delta position"), (steps, "unit 'ticks'")):
        policy = Stubborn()
        policy.robot = spec
        for wrapped in (execution.Executed, execution.ExecutedBatch):
            with pytest.raises(ValueError, match=said):
                wrapped(policy, Execution("chunk", retry=Retry(after=20)))
            wrapped(policy, Execution("chunk"))
    blind = robot.end_effector("blind")
    with pytest.raises(ValueError, match=r"no absolute position.*retry.after alone"):
        Attempts(Retry(still=20), blind)
    Attempts(Retry(after=20), blind)


def test_which_of_two_hands_is_moved_is_not_guessed():
    hand, state = robot.CALVIN.action, robot.CALVIN.state
    both = tuple(dataclasses.replace(x, name=f"{side} {x.name}") for side in ("left", "right") for x in hand)
    with pytest.raises(ValueError, match=r"moves one hand.*6 numbers that are delta positions: \['left x'"):
        Attempts(Retry(after=20), robot.RobotSpec("two arms", action=both, state=state))
    places = (*state, *(dataclasses.replace(x, name=f"box {x.name}") for x in state[:3]))
    seen = dataclasses.replace(robot.CALVIN, state=places)
    with pytest.raises(ValueError, match=r"6 numbers that are absolute positions.*retry.after alone needs no states"):
        Attempts(Retry(still=20), seen)
    Attempts(Retry(after=20), seen)


def test_a_hand_that_may_go_one_way_only_is_refused():
    upwards = tuple(dataclasses.replace(x, low=0.0) if x.name == "z" else x for x in robot.CALVIN.action)
    with pytest.raises(ValueError, match="the action 'z' of robot 'calvin' lies in 0 to 1"):
        Attempts(Retry(after=20), dataclasses.replace(robot.CALVIN, action=upwards))


def test_other_numbers_of_the_robot_rest_while_its_hand_moves():
    base = tuple(robot.Dimension(x, "m/s", "velocity", "base", "base", -1.0, 1.0) for x in ("forwards", "sideways"))
    lift = robot.Dimension("lift", "m", "absolute", "other", "", 0.0, 1.0)
    spec = robot.RobotSpec(
        "base and arm", action=(*base, lift, *robot.CALVIN.action), state=(lift, *robot.CALVIN.state)
    )
    attempts = Attempts(Retry(after=5, still=5), spec)
    attempts.begin("go")
    attempts.did(np.float32([[0.5, 0.5, 0.3, *[0.1] * 6, 1.0]] * 5))
    rows = attempts.move(Observation({}, np.zeros(8)))
    np.testing.assert_allclose(rows[:, [0, 1, 2, 6, 7, 8, 9]], [[0, 0, 0.3, 0, 0, 0, 1.0]] * 12, atol=1e-7)
    assert np.ptp(rows[0, 3:6]) > 0


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_where_the_hands_place_is_not_known_it_does_not_count_as_still(lost):
    policy = execution.Executed(Stubborn(), Execution("chunk", retry=Retry(still=20)))
    policy.reset("go")
    done = episode(policy, 12, lambda step: lost if step == 15 else 0.0)
    assert moves(done) == [40]  # 20 steps after the first place that counts again, not 20 after the beginning


def test_a_move_that_nobody_heard_of_is_made_at_the_next_request():
    class Fails(Stubborn):
        def act(self, observation):
            raise ValueError("its actions are not finite")

    alone = execution.Executed(Stubborn(), Execution("chunk", retry=Retry(5)))
    alone.reset("wait")
    expected = [alone.act(at(0.0)).actions for _ in range(4)]
    waiting = Stubborn()
    batch = execution.ExecutedBatch(execution.Separate([waiting, Fails()]), Execution("chunk", retry=Retry(5)))
    batch.reset([0], ["wait"])
    found = [batch.act([at(0.0)], [0])[0].actions]
    batch.reset([1], ["go"])
    with pytest.raises(ValueError, match="not finite"):
        batch.act([at(0.0), at(0.0)], [0, 1])
    assert waiting.heard == ["wait"]  # it has not begun anew, either
    found += [batch.act([at(0.0)], [0])[0].actions for _ in range(3)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_still_needs_the_hands_position():
    policy = execution.Executed(Stubborn(), Execution("chunk", retry=Retry(still=20)))
    policy.reset("go")
    with pytest.raises(ValueError, match=r"proprio is missing; use execution.retry.after alone"):
        policy.act(at(0.0, proprio=False))
    after = execution.Executed(Stubborn(), Execution("chunk", retry=Retry(after=5)))
    after.reset("go")
    assert len([after.act(at(0.0, proprio=False)) for _ in range(2)][1].actions) == 12


def test_labels_say_what_is_tried_again():
    assert Execution("receding", 5, retry=Retry(90, 30)).label == "receding 5, retry after 90 or 30 still"
    assert Execution("first", retry=Retry(still=30, seed=2)).label == "first, retry after 30 still, seed 2"
    labels = {Retry(9, seed=seed, distance_m=d).label for seed in (1234567, 1234568) for d in (0.2, 0.2000001)}
    assert len(labels) == 4  # results are kept by them


def test_results_that_were_stored_before_there_was_such_a_thing_are_found_again():
    assert Execution("receding", 5).conditions() == {
        "mode": "receding",
        "horizon": 5,
        "every_frame": False,
        "decay": 0.01,
    }
    assert Execution(retry=Retry(9)).conditions()["retry"]["after"] == 9


def test_tables_on_the_device_refuse_it():
    with pytest.raises(ValueError, match="moves hands that get nowhere"):
        tables.executed(Execution("chunk", retry=Retry(after=20)), 10)
