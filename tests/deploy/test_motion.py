"""The filter behind the safety layer: its limits hold whatever is asked, and it is in no one's way below them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.deploy import geometry, motion
from robovlms_jax.deploy.mobile import base_path

ARM = (
    motion.Group("translation", (0, 1, 2), 0.5, 1.0, 10.0),
    motion.Group("rotation", (3, 4, 5), 1.5, 4.0, 40.0),
)
LOW, HIGH = np.array([-0.5, -0.5, 0.0, *[-np.inf] * 3]), np.array([0.5, 0.5, 0.3, *[np.inf] * 3])


def drive(groups, period_s, requests, positions, *, slack=1e-6, **options):
    """Runs requests [T, B, D] through a filter with a perfect robot; returns what was sent, positions and the filter.
    Asserts speed, acceleration and jerk at every step."""
    robot = motion.MotionFilter(groups, period_s, robots=requests.shape[1], **options)
    sent, places = [], [positions]
    path = options.get("path") or (lambda v, x: x[:, None] + np.cumsum(v, axis=1) * period_s)
    for wanted in requests:
        before, change = robot.velocity, robot.change
        velocity = robot.step(places[-1], wanted).velocity
        for group in groups:
            columns = list(group.columns)
            for value, limit in (
                (velocity, group.speed),
                ((velocity - before) / period_s, group.acceleration),
                ((velocity - before - change) / period_s**2, group.jerk),
            ):
                assert np.linalg.norm(value[:, columns], axis=1).max() <= limit * (1 + slack), group.name
        sent.append(velocity)
        places.append(path(velocity[:, None], places[-1])[:, 0])
    return np.array(sent), np.array(places), robot


def adversarial(rng, steps, robots, columns):
    """Requests that change their mind: noise of all sizes, full speed one way and back, into corners, spikes, rest."""
    size = 10.0 ** rng.uniform(-3, 6, (steps, robots, 1))
    noise = rng.normal(size=(steps, robots, columns)) * size
    flips = np.sign(rng.normal(size=(1, robots, columns))) * np.where(np.arange(steps) % 2, 1, -1)[:, None, None]
    push = np.broadcast_to(rng.normal(size=(1, robots, columns)) * 10, noise.shape)
    spikes = np.where(rng.random((steps, robots, 1)) < 0.05, 1e12, 0.01) * rng.choice([-1.0, 1.0], noise.shape)
    kinds = rng.integers(0, 5, (1, robots, 1))
    kinds = np.where(rng.random((steps, robots, 1)) < 0.02, rng.integers(0, 5, (steps, robots, 1)), kinds)
    return np.select([kinds == k for k in range(4)], [noise, flips * 3.0, push, spikes], 0.0)


def assert_no_limit_is_exceeded(groups, steps, robots, seed):
    rng = np.random.default_rng(seed)
    columns = 3 * len(groups)
    low, high = LOW[:columns], HIGH[:columns]
    start = np.zeros((robots, columns))
    start[:, :3] = rng.uniform(low[:3], high[:3], (robots, 3))
    requests = adversarial(rng, steps, robots, columns)
    _, places, _ = drive(groups, 0.1, requests, start, low=low, high=high)
    assert (places >= low - 1e-9).all() and (places <= high + 1e-9).all()


def test_no_limit_is_exceeded_in_a_million_adversarial_steps():
    for seed in range(5):
        assert_no_limit_is_exceeded((motion.Group("translation", (0, 1, 2), 0.5, 2.0, 20.0),), 100, 2000, seed)


@pytest.mark.slow
def test_no_limit_is_exceeded_in_ten_million_adversarial_steps_of_arms_that_also_turn():
    for seed in range(100, 120):
        assert_no_limit_is_exceeded(ARM, 200, 2500, seed)


@settings(max_examples=20, deadline=None)
@given(
    st.floats(0.05, 1.0),
    st.floats(0.7, 5.0),
    st.floats(5.0, 100.0),
    st.sampled_from([0.05, 0.1]),
    st.integers(0, 2**32 - 1),
)
def test_limits_of_any_size_hold(speed, acceleration, jerk, period_s, seed):
    groups = (motion.Group("translation", (0, 1), speed, acceleration, jerk),)
    rng = np.random.default_rng(seed)
    low, high = np.array([-0.3, -np.inf]), np.array([0.2, 1.0])
    requests = adversarial(rng, 40, 8, 2)
    _, places, _ = drive(groups, period_s, requests, np.zeros((8, 2)), low=low, high=high)
    assert (places >= low - 1e-9).all() and (places <= high + 1e-9).all()


def test_a_base_that_turns_stays_in_its_fence_and_clear_of_a_box():
    rng = np.random.default_rng(3)
    groups = (
        motion.Group("translation", (0, 1), 0.5, 1.0, 10.0),
        motion.Group("rotation", (2,), 1.5, 4.0, 40.0),
    )
    scene = geometry.Scene((geometry.Box("box", (0.3, 0.0, 0.1), (0.05, 0.1, 0.1)),))
    disc = (geometry.ball("robot", (0.0, 0.0, 0.0), 0.05),)

    def clearance(path):
        flat = np.concatenate([path[..., :2], np.zeros_like(path[..., :1])], axis=-1)
        return scene.clearance(flat, disc)[..., 0]

    def outside(path, plans, rows):
        return (clearance(path) < 0.05).any(axis=1)

    def path(velocities, positions):
        return base_path(velocities, positions, 0.05)

    low, high = np.array([-0.5, -0.5, -np.inf]), np.array([0.5, 0.5, np.inf])
    requests = adversarial(rng, 150, 20, 3)
    options = {"low": low, "high": high, "outside": outside, "path": path}
    _, places, _ = drive(groups, 0.05, requests, np.zeros((20, 3)), **options)
    assert (places >= low - 1e-9).all() and (places <= high + 1e-9).all()
    assert clearance(places).min() >= 0.05 - 1e-9
    assert clearance(places).min() < 0.1  # some did try


def test_what_is_within_the_limits_passes_bit_for_bit():
    time = np.arange(400)[:, None, None] * 0.02
    requests = 0.2 * np.sin(time + np.arange(6) / 3) * np.minimum(1, time / 2)
    sent, _, _ = drive(ARM, 0.02, requests, np.zeros((1, 6)))
    np.testing.assert_array_equal(sent, requests)


@pytest.mark.parametrize("period_s", [0.02, 0.05, 0.1])
def test_full_speed_is_reached_in_little_more_than_the_shortest_time_and_left_again(period_s):
    steps = int(1.2 / period_s)
    requests = np.zeros((2 * steps, 1, 6))
    requests[:steps, 0, 0] = 0.5
    sent, _, robot = drive(ARM, period_s, requests, np.zeros((1, 6)))
    assert np.argmax(sent[:, 0, 0] > 0.47) * period_s < 0.7  # 0.6 s at the limits of acceleration and jerk
    assert abs(sent[-1]).max() == 0
    assert robot.at_rest.all()


def test_a_wall_is_approached_to_the_millimetre_and_left_again():
    requests = np.full((120, 1, 6), 0.0)
    requests[:80, 0, 0], requests[80:, 0, 0] = 0.5, -0.5
    _, places, _ = drive(ARM, 0.05, requests, np.zeros((1, 6)), low=LOW, high=HIGH)
    assert 0.499 < places[:, 0, 0].max() <= 0.5
    assert places[-1, 0, 0] < 0.1


def test_who_begins_outside_can_come_back_and_goes_no_further_out():
    start = np.array([[0.7, 0, 0.1, 0, 0, 0]])
    out, back = np.zeros((2, 60, 1, 6))
    out[..., 0], back[..., 0] = 0.5, -0.5
    _, places, _ = drive(ARM, 0.05, np.concatenate([out, back]), start, low=LOW, high=HIGH)
    assert places[..., 0].max() == 0.7
    assert places[-1, 0, 0] < 0.5


def test_limits_that_cannot_be_planned_for_are_refused():
    with pytest.raises(ValueError, match=r"at most 200 are planned.*Allow less speed"):
        motion.MotionFilter((motion.Group("translation", (0,), 10.0, 0.1, 10.0),), 0.02)
    with pytest.raises(ValueError, match="limits of translation: jerk=0"):
        motion.Group("translation", (0,), 1.0, 1.0, 0.0)
