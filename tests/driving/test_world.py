"""Rooms, the base that drives in them, and the expert."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.driving import expert, scenarios, world

NAMES = list(scenarios.SCENARIOS)


def drive(layout, steps=150, drive="holonomic", act=expert.act):
    """(state at the end, step of success or 0 for each room)."""
    state, done = world.reset(layout), np.zeros(len(layout.start), int)
    for step in range(steps):
        command = np.where(done[:, None] > 0, 0.0, act(layout, state, drive))
        state = world.step(layout, state, command, drive)
        done = np.where((done == 0) & world.succeeded(layout, state), step + 1, done)
    return state, done


@pytest.mark.parametrize("kind", ["holonomic", "differential"])
def test_the_expert_solves_every_scenario_without_touching_anything(kind):
    layout = scenarios.stack([scenarios.draw(name, seed) for name in NAMES for seed in range(25)])
    state, done = drive(layout, drive=kind)
    assert (done > 0).all() and not state.collided.any()
    assert state.clearance.min() > 0.05


def test_left_and_right_of_a_kind_are_the_same_room():
    for left, right in zip(NAMES[::2], NAMES[1::2]):
        one, other = scenarios.draw(left, 5), scenarios.draw(right, 5)
        for field in ("boxes", "cup", "start", "look"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        assert (one.signs != other.signs)[one.present].all()
    with pytest.raises(ValueError, match=r"no scenario '3box'.* There are 1box_vert_left"):
        scenarios.draw("3box", 0)


def test_passing_on_the_other_side_is_no_success_although_the_cup_is_reached():
    asked = scenarios.stack([scenarios.draw(name, seed) for name in NAMES for seed in range(3)])
    told_otherwise = asked._replace(signs=-asked.signs)
    state, done = drive(asked, act=lambda layout, state, drive: expert.act(told_otherwise, state, drive))
    assert world.arrived(asked, state).all() and not done.any() and not world.as_told(asked, state).any()
    assert world.as_told(told_otherwise, state).all()


def test_the_path_between_two_boxes_passes_them_on_different_sides():
    layout = scenarios.draw("2box_vert_left", 1)
    state, _ = drive(layout)
    assert state.winding[0, 0] < -np.pi / 2 and state.winding[0, 1] > np.pi / 2


def test_a_base_that_touches_a_box_stays_there_and_has_collided():
    layout = scenarios.draw("1box_hori_left", 0)
    state = world.reset(layout)
    for _ in range(60):
        state = world.step(layout, state, np.array([[0.5, 0.0, 0.0]]))
    assert state.collided[0] and world.box_gaps(layout, state.pose)[0, 0] < 0.06
    stuck = world.step(layout, state, np.array([[-0.5, 0.0, 0.0]]))
    np.testing.assert_array_equal(stuck.pose, state.pose)


def test_it_drives_backwards_and_a_differential_base_not_to_the_side():
    layout = scenarios.draw("1box_vert_left", 0)._replace(start=np.array([[0.5, 0.0, 0.0]]))
    state = other = world.reset(layout)
    for _ in range(5):
        state = world.step(layout, state, np.array([[-0.4, 0.0, 0.0]]))
        other = world.step(layout, other, np.array([[0.0, 0.4, 0.0]]), "differential")
    assert state.pose[0, 0] < 0.4
    np.testing.assert_array_equal(other.pose[0], [0.5, 0, 0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(NAMES))
def test_whatever_it_is_sent_it_stays_in_the_room_within_its_acceleration(seed, name):
    layout, rng = scenarios.draw(name, seed), np.random.default_rng(seed)
    state = world.reset(layout)
    assert state.clearance[0] > 0.2 and world.cup_gap(layout, state.pose)[0] > 1
    for _ in range(40):
        before = state
        state = world.step(layout, state, rng.normal(0, 3, (1, 3)))
        change = state.velocity - before.velocity
        if not state.collided[0]:
            assert np.linalg.norm(change[0, :2]) <= 0.1 + 1e-9 and abs(change[0, 2]) <= 0.4 + 1e-9
        assert world.wall_gap(state.pose)[0] > 0 and world.box_gaps(layout, state.pose).min() > 0


def test_odometry_begins_at_zero_and_measures_in_the_frame_of_the_start():
    layout = scenarios.draw("1box_vert_left", 4)._replace(start=np.array([[0.2, 0.1, 1.0]]))
    state = world.reset(layout)
    np.testing.assert_array_equal(world.odometry(layout, state), np.zeros((1, 3), np.float32))
    moved = state._replace(pose=state.pose + np.array([0.3 * np.cos(1.0), 0.3 * np.sin(1.0), 0.5]))
    np.testing.assert_allclose(world.odometry(layout, moved), [[0.3, 0.0, 0.5]], atol=1e-6)
