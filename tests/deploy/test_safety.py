"""The safety layer of one robot: what it stops and what it changes. test_stops.py: what a stop is."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from robovlms_jax.control.robot import CALVIN, GRIPPER, Dimension, RobotSpec
from robovlms_jax.deploy import geometry
from robovlms_jax.deploy.limits import MOBILE, Limits
from robovlms_jax.deploy.mobile import base_path
from robovlms_jax.deploy.safety import Measured, SafetyLayer

REST = Measured(np.zeros(3))
OPEN = dataclasses.replace(Limits(), workspace_m=None)
JOINTS = RobotSpec(
    "two joints",
    50.0,
    action=(
        Dimension("shoulder", "rad", "absolute", "joint", low=-1.0, high=1.0),
        Dimension("elbow", "deg", "absolute", "joint"),
        dataclasses.replace(GRIPPER, kind="continuous"),
    ),
)


def drive(layer, actions, start=(0.0, 0.0, 0.0), **measured):
    """A perfect base under the layer; the decisions, and where it went."""
    place, decisions, places = np.array(start), [], []
    for action in actions:
        decisions.append(layer.check(action, Measured(place, **measured)))
        place = base_path(decisions[-1].action[None, None], place[None], layer.period_s)[0, 0]
        places.append(place)
    return decisions, np.array(places)


def test_what_is_safe_passes_bit_for_bit_and_without_events():
    actions = np.linspace(0, 0.1, 60)[:, None] * [0.1, 0.07, 0.3]
    decisions, _ = drive(SafetyLayer(MOBILE, Limits()), actions)
    np.testing.assert_array_equal([d.action for d in decisions], actions)
    assert not any(d.events or d.stop for d in decisions)


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (np.array([np.nan, 0, 0]), "not_finite"),
        (np.array([0, np.inf, 0]), "not_finite"),
        (np.zeros(7), r"wrong_shape: the action is float64\[7\], expected 3"),
        (np.zeros((1, 3)), "wrong_shape"),
        ([0.0, [1.0], 2.0], "wrong_shape"),
        (np.array(["a", "b", "c"]), "wrong_shape"),
        (None, "wrong_shape: the action is a NoneType"),
        (np.array([0, 1j, 0]), "wrong_shape"),
    ],
)
def test_an_action_that_is_none_latches_a_stop(action, reason):
    layer = SafetyLayer(MOBILE, Limits())
    decision = layer.check(action, REST)
    assert decision.stop["action"] == "STOP"
    assert decision.events and re.match(reason, decision.stop["reason"])
    np.testing.assert_array_equal(decision.stop["safe_action"], np.zeros(3))
    np.testing.assert_array_equal(decision.action, np.zeros(3))
    assert layer.check(np.zeros(3), REST).stop["reason"] == decision.stop["reason"]  # a good action lifts nothing


def test_a_request_towards_an_obstacle_stops_or_slows_down_as_chosen():
    wall = geometry.Box("wall", (0.4, 0, 0), (0.05, 0.5, 0.5))
    forward = [np.array([0.5, 0, 0])] * 150
    for choice in ("stop", "slow"):
        layer = SafetyLayer(MOBILE, dataclasses.replace(Limits(), on_collision_risk=choice))
        decisions, places = drive(layer, forward, obstacles=(wall,))
        assert places[:, 0].max() <= 0.25 + 1e-9
        stopped = [d.stop["reason"] for d in decisions if d.stop]
        assert all(reason.startswith("collision_risk: the request") for reason in stopped)
        assert bool(stopped) == (choice == "stop")
    assert places[-1, 0] > 0.245  # slowed down, it comes as near as it may


def test_obstacles_in_a_list_that_is_changed_in_place_are_those_of_now():
    layer = SafetyLayer(MOBILE, Limits())
    obstacles = [geometry.ball("cup", (3.0, 0, 0), 0.05)]
    measured = Measured(np.zeros(3), obstacles=obstacles)
    assert layer.check(np.zeros(3), measured).state == "run"
    obstacles[0] = geometry.ball("cup", (0.1, 0, 0), 0.05)
    assert "collision_risk" in layer.check(np.zeros(3), measured).stop["reason"]


def test_an_obstacle_that_may_be_touched_is_passed_through():
    block = geometry.ball("block", (0.2, 0, 0), 0.05, touchable=True)
    _, places = drive(SafetyLayer(MOBILE, Limits()), [np.array([0.3, 0, 0])] * 100, obstacles=(block,))
    assert places[-1, 0] > 0.3


def test_late_and_missing_actions_brake_and_then_latch():
    layer = SafetyLayer(MOBILE, dataclasses.replace(OPEN, missing_ticks=3, action_age_s=0.5))
    drive(layer, [np.array([0.2, 0, 0])] * 60)
    first = layer.check(np.array([0.2, 0, 0]), REST, action_age_s=0.6)
    assert first.stop is None and first.events[0].reason.startswith("stale_action")
    assert first.action[0] < 0.2
    assert layer.check(np.array([0.2, 0, 0]), REST).stop is None  # one came: counted anew
    decisions = [layer.missing(REST) for _ in range(3)]
    assert [d.stop is None for d in decisions] == [True, True, False]
    assert "3 ticks in a row" in decisions[-1].stop["reason"]


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (Measured(np.array([np.nan, 0, 0])), "not_finite"),
        (Measured(np.zeros(2)), "wrong_measurement"),
        (Measured("here"), "wrong_measurement"),
        (Measured(np.zeros(3), age_s=0.4), "stale_observation"),
        (Measured(np.zeros(3), age_s=-1.0), "stale_observation"),
        (Measured(np.zeros(3), age_s=np.nan), "stale_observation"),
        (Measured(np.zeros(3), gripper_force_n=np.nan), "not_finite"),
    ],
)
def test_a_measurement_that_cannot_be_used_stops_the_robot(measured, reason):
    decision = SafetyLayer(MOBILE, Limits()).check(np.zeros(3), measured)
    assert decision.stop["reason"].startswith(reason)


def test_a_stopped_arm_holds_its_gripper_and_sends_deltas_of_zero():
    layer = SafetyLayer(CALVIN, Limits(), 1 / 30)
    tool = Measured(np.array([0, 0, 0.2, 0, 0, 0]))
    layer.check(np.array([0, 0, 0, 0, 0, 0, -1.0]), tool)
    decision = layer.check(np.full(7, np.nan), tool)
    np.testing.assert_array_equal(decision.stop["safe_action"], [0, 0, 0, 0, 0, 0, -1])


def test_an_arm_is_kept_in_its_box_in_metres_whatever_its_unit():
    layer = SafetyLayer(CALVIN, Limits(), 1 / 30)
    place = np.array([0, 0, 0.25, 0, 0, 0])
    for _ in range(60):
        decision = layer.check(np.array([0, 0, 1, 0, 0, 0, 1.0]), Measured(place))
        place = place + np.array([*decision.action[:3] * 0.02, *decision.action[3:6] * 0.05])
    assert 0.2995 < place[2] <= 0.3 + 1e-9


def test_joints_commanded_to_positions_hold_their_last_target():
    layer = SafetyLayer(JOINTS, OPEN)
    place = np.array([0.2, 0.1])
    for _ in range(30):
        decision = layer.check(np.array([3.0, 20.0, 0.5]), Measured(place))
        place = np.array([decision.action[0], np.deg2rad(decision.action[1])])
    sagging = place - 0.02  # the weight of the arm: measured below what was commanded
    stopped = [layer.check(None, Measured(sagging)) for _ in range(60)]
    np.testing.assert_array_equal(stopped[-1].action, stopped[-2].action)
    assert stopped[-1].action[0] >= place[0]
    assert place[0] < 1.0 and stopped[-1].stop["safe_action"][2] == 0.5


def test_joints_stay_within_their_limits():
    layer = SafetyLayer(JOINTS, dataclasses.replace(OPEN, joint_bounds_rad=((-2.0, 0.9), (-0.5, 0.5))))
    place = np.zeros(2)
    for _ in range(150):
        action = layer.check(np.array([3.0, 90.0, 0.0]), Measured(place)).action
        place = np.array([action[0], np.deg2rad(action[1])])
    np.testing.assert_allclose(place, [0.9, 0.5], atol=1e-3)
    assert (place <= np.array([0.9, 0.5]) + 1e-9).all()


def test_a_blocked_arm_is_stopped_and_does_not_leap_when_it_comes_free():
    layer = SafetyLayer(CALVIN, Limits(), 1 / 30)
    stuck = Measured(np.array([0, 0, 0.2, 0, 0, 0]))
    decisions = [layer.check(np.array([1, 0, 0, 0, 0, 0, 1.0]), stuck) for _ in range(40)]
    assert any(d.stop and d.stop["reason"].startswith("following_error") for d in decisions)
    assert not decisions[-1].action[:6].any()
    layer.reset("Kim")


def test_the_gripper_closes_no_further_on_too_much_force():
    layer = SafetyLayer(CALVIN, dataclasses.replace(Limits(), gripper_force_n=20.0), 1 / 30)
    pressed = Measured(np.array([0, 0, 0.2, 0, 0, 0]), gripper_force_n=30.0)
    layer.check(np.array([0, 0, 0, 0, 0, 0, 0.5]), dataclasses.replace(pressed, gripper_force_n=0.0))
    decision = layer.check(np.array([0, 0, 0, 0, 0, 0, -1.0]), pressed)
    assert decision.action[6] == 0.5 and decision.events[0].stage == "gripper"
    assert layer.check(np.array([0, 0, 0, 0, 0, 0, 1.0]), pressed).action[6] == 1.0


def test_a_tool_keeps_away_from_the_robots_own_body():
    layer = SafetyLayer(CALVIN, dataclasses.replace(Limits(), on_collision_risk="slow"), 1 / 30)
    body = (geometry.Capsule("column", (0.2, 0, 0), (0.2, 0, 0.5), 0.05),)
    place = np.array([0, 0, 0.2, 0, 0, 0])
    for _ in range(80):
        decision = layer.check(np.array([1, 0, 0, 0, 0, 0, 1.0]), Measured(place, body=body))
        place = place + np.array([*decision.action[:3] * 0.02, *decision.action[3:6] * 0.05])
    assert 0.12 < place[0] <= 0.13 + 1e-9


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        (Dimension("x", "", "delta", "position"), "'x' has unit ''"),
        (Dimension("q", "1", "absolute", "quaternion_xyzw"), "is quaternion_xyzw"),
        (Dimension("speed", "m/s", "velocity", "other"), "is other, velocity"),
    ],
)
def test_a_robot_that_cannot_be_limited_is_refused_by_the_name_of_its_dimension(dimension, message):
    size = {"position": 3, "quaternion_xyzw": 4}.get(dimension.quantity, 1)
    action = tuple(dataclasses.replace(dimension, name=dimension.name + "'" * i) for i in range(size))
    with pytest.raises(ValueError, match=message):
        SafetyLayer(RobotSpec("odd", 10.0, action=action), Limits())


def test_obstacles_for_a_robot_whose_tool_the_layer_cannot_place_stop_it():
    measured = Measured(np.zeros(2), obstacles=(geometry.ball("cup", (1, 0, 0), 0.05),))
    decision = SafetyLayer(JOINTS, OPEN).check(np.zeros(3), measured)
    assert "commanded by joints" in decision.stop["reason"]


@pytest.mark.parametrize(
    "change", [{"speed_m_s": -1.0}, {"speed_m_s": float("nan")}, {"category": 3}, {"workspace_m": ((0, 1),)}]
)
def test_limits_that_are_none_are_refused_by_name(change):
    with pytest.raises(ValueError, match=f"limits: {next(iter(change))}"):
        Limits(**change)


def test_at_a_wall_only_what_goes_into_it_is_taken_away():
    layer = SafetyLayer(CALVIN, Limits(), 1 / 30)
    place, start = np.array([0, 0, 0.001, 0, 0, 0]), -0.4
    place[0] = start
    for _ in range(60):
        decision = layer.check(np.array([0.5, 0, -0.8, 0, 0, 0, 1.0]), Measured(place))
        place = place + np.array([*decision.action[:3] * 0.02, *decision.action[3:6] * 0.05])
    assert -1e-9 <= place[2] < 0.001
    assert place[0] - start > 0.4


def hostile(rng, kind, size):
    """Anything a policy could say."""
    sizes = 10.0 ** rng.integers(-4, 12)
    options = [
        lambda: rng.normal(size=size) * sizes,
        lambda: np.where(rng.random(size) < 0.5, -1.0, 1.0) * 3,
        lambda: np.zeros(size),
        lambda: np.full(size, 1.0),
        lambda: rng.normal(size=size).astype(np.float32),
        lambda: rng.choice([np.finfo(float).max, -np.finfo(float).max, 5e-324, -0.0], size),
    ]
    return options[kind]()


@pytest.mark.parametrize("spec", [MOBILE, CALVIN, JOINTS], ids=lambda spec: spec.name)
def test_what_the_layer_sends_keeps_every_limit_whatever_the_policy_says(spec):
    limits = dataclasses.replace(Limits(), joint_bounds_rad=((-0.9, 0.9), (-0.5, 0.5)) if spec is JOINTS else None)
    layer, rng = SafetyLayer(spec, limits, 0.05), np.random.default_rng(5)
    place = {MOBILE: np.zeros(3), CALVIN: np.array([0, 0, 0.1, 0, 0, 0]), JOINTS: np.zeros(2)}[spec]
    before, change, kind = np.zeros_like(place), np.zeros_like(place), 0
    scale = {MOBILE: np.ones(3), CALVIN: np.array([0.02] * 3 + [0.05] * 3), JOINTS: np.array([1, np.pi / 180])}[spec]
    for _ in range(800):
        kind = rng.integers(6) if rng.random() < 0.1 else kind
        decision = layer.check(hostile(rng, kind, len(spec.action)), Measured(place))
        sent = decision.action[: len(place)] * scale
        if spec is MOBILE:
            velocity, after = sent, base_path(sent[None, None], place[None], 0.05)[0, 0]
        else:
            after = sent if spec is JOINTS else place + sent
            velocity = (after - place) / 0.05
        for group in layer._layout.groups:
            columns = list(group.columns)
            acceleration, jerk = (velocity - before) / 0.05, (velocity - before - change) / 0.05**2
            for value, limit in ((velocity, group.speed), (acceleration, group.acceleration), (jerk, group.jerk)):
                assert np.linalg.norm(value[columns]) <= limit * (1 + 1e-6) + 1e-9
        place, before, change = after, velocity, velocity - before
        assert (place >= layer._layout.low - 1e-9).all() and (place <= layer._layout.high + 1e-9).all()
    assert decision.stop is None


def test_joints_that_do_not_go_where_they_are_sent_stop():
    layer = SafetyLayer(JOINTS, Limits())
    for _ in range(200):
        decision = layer.check(np.array([0.9, 0, 0]), Measured(np.zeros(2)))
    assert decision.state == "hold" and "following_error: shoulder" in decision.stop["reason"]


@pytest.mark.parametrize(
    "change",
    [
        *({"speed_m_s": "fast"}, {"missing_ticks": 0.5}, {"missing_ticks": 0}, {"clearance_m": np.inf}),
        *({"workspace_m": (1, 2, 3)}, {"workspace_m": "abc"}, {"joint_bounds_rad": ((0, "a"),)}, {"jerk_m_s3": None}),
    ],
)
def test_limits_of_the_wrong_kind_are_refused_by_name(change):
    with pytest.raises(ValueError, match=rf"limits: {next(iter(change))}="):
        Limits(**change)


@pytest.mark.parametrize(
    ("at", "reason"), [(np.inf, "not_finite"), (200.0, "wrong_measurement: gripper 'gripper' is at 200")]
)
def test_a_gripper_measured_in_another_unit_is_not_sent_on(at, reason):
    layer = SafetyLayer(CALVIN, Limits(workspace_m=None), 1 / 30)
    decision = layer.brake(Measured(np.zeros(6), grippers=[at]))
    assert decision.stop["reason"].startswith(reason) and np.isnan(decision.action[6])
    layer = SafetyLayer(CALVIN, Limits(workspace_m=None), 1 / 30)
    assert layer.brake(Measured(np.zeros(6), grippers=[1.001])).action[6] == 1.0
    assert layer.check(np.zeros(7), Measured(np.zeros(6), grippers=[200.0])).stop is None  # it was told one since
