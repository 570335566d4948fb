"""A stop of the safety layer: how the robot is braked, who may lift it, and where the robot goes on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from robovlms_jax.control.robot import Dimension, RobotSpec
from robovlms_jax.deploy import geometry
from robovlms_jax.deploy.limits import MOBILE, Limits
from robovlms_jax.deploy.safety import Measured, SafetyLayer
from tests.deploy.test_safety import JOINTS, OPEN, REST, drive


def test_a_stop_brakes_within_the_limits_and_holds():
    layer = SafetyLayer(MOBILE, Limits())
    decisions, places = drive(layer, [np.array([0.5, 0, 0])] * 25 + [np.full(3, np.nan)] + [np.ones(3)] * 60)
    speeds = np.array([d.action[0] for d in decisions])
    assert speeds[24] > 0.35
    assert np.abs(np.diff(speeds, prepend=0)).max() <= 1.0 * 0.02 * (1 + 1e-6)
    assert [d.state for d in decisions[24:27]] == ["run", "stopping", "stopping"]
    assert decisions[-1].state == "hold" and speeds[-1] == 0
    assert np.abs(places).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("category", [0, 1, 2])
def test_stop_categories_differ_in_braking_and_in_asking_for_power_to_be_removed(category):
    layer = SafetyLayer(MOBILE, dataclasses.replace(OPEN, category=category))
    decisions, _ = drive(layer, [np.array([0.5, 0, 0])] * 25 + [np.full(3, np.nan)] + [np.zeros(3)] * 60)
    assert (decisions[25].action[0] == 0) == (category == 0)
    assert decisions[25].remove_power == (category == 0)
    assert decisions[-1].remove_power == (category != 2)


def test_only_a_person_lifts_a_stop_in_two_steps_and_not_while_its_cause_is_there(tmp_path):
    file = tmp_path / "robot" / "stop.json"
    near = Measured(np.zeros(3), obstacles=(geometry.ball("cup", (0.15, 0, 0), 0.06),))
    layer = SafetyLayer(MOBILE, Limits(), latch_file=file)
    assert layer.check(np.zeros(3), near).stop["reason"] == (
        "collision_risk: 0.090 m from 'cup', at least 0.1 m are kept"
    )
    layer = SafetyLayer(MOBILE, Limits(), latch_file=file)  # the process was started again
    assert layer.check(np.zeros(3), near).state == "hold"
    with pytest.raises(RuntimeError, match="refused, for the cause is still there: collision_risk"):
        layer.reset("Kim")
    layer.check(np.zeros(3), REST)
    with pytest.raises(ValueError, match="expected the name of the person"):
        layer.reset("")
    with pytest.raises(RuntimeError, match="reset the stop first"):
        layer.start("Kim")
    layer.reset("Kim")
    decision = layer.check(np.full(3, 0.1), REST)
    assert decision.state == "ready" and not decision.action.any()  # a reset itself moves nothing
    layer.start("Kim")
    assert layer.check(np.full(3, 0.001), REST).action.any()
    assert not file.exists()


def test_a_file_of_a_stop_that_cannot_be_read_counts_as_a_stop(tmp_path):
    (tmp_path / "stop.json").write_text("{")
    layer = SafetyLayer(MOBILE, Limits(), latch_file=tmp_path / "stop.json")
    assert "cannot be read" in layer.check(np.zeros(3), REST).stop["reason"]


def test_after_a_stop_the_robot_begins_where_it_is_and_not_where_it_was_sent():
    # Power was off, the arm sank: a leap back to the old target would follow without the measurement at start.
    yaw = [Dimension(name, "rad", "absolute", "euler_xyz") for name in ("roll", "pitch", "yaw")]
    tool = RobotSpec("tool", 50.0, (), (*(Dimension(name, "m", "absolute", "position") for name in "xyz"), *yaw))
    for spec, begin, sunk in (
        (JOINTS, np.zeros(2), np.array([0.5, 0.4])),
        (tool, np.array([0, 0, 0.1, 0, 0, 0]), np.array([0, 0, 0.1, 0, 0, 2.0])),
    ):
        layer, scale = SafetyLayer(spec, Limits(category=0)), np.ones(len(spec.action))
        if spec is JOINTS:
            scale[1] = np.pi / 180

        def ask(place, spec=spec, layer=layer, scale=scale):
            action = np.zeros(len(spec.action))
            action[: len(place)] = place / scale[: len(place)]
            return layer.check(action, Measured(place))

        for _ in range(3):
            ask(begin)
        layer.stop("test")
        ask(begin), ask(begin), ask(sunk)
        layer.reset("anna")
        layer.start("anna")
        decision = ask(sunk)
        assert decision.state == "run"
        np.testing.assert_allclose(decision.action[: len(sunk)] * scale[: len(sunk)], sunk, atol=1e-9)


def test_who_has_reset_a_stop_has_time_to_start_the_robot():
    layer = SafetyLayer(MOBILE, Limits())
    layer.stop("test")
    for _ in range(3):
        layer.missing(REST)
    layer.reset("anna")
    for _ in range(100):
        layer.missing(REST)
    layer.start("anna")
    assert layer.check(np.zeros(3), REST).state == "run"


def test_a_start_in_the_very_tick_of_standing_keeps_the_limit_of_jerk():
    layer, speeds = SafetyLayer(MOBILE, OPEN), []

    def tick():
        speeds.append(layer.check(np.array([0.5, 0, 0]), REST).action[0])
        return layer.latch.state

    [tick() for _ in range(60)]
    layer.stop("test")
    while tick() != "hold":
        pass
    layer.reset("anna")
    layer.start("anna")
    [tick() for _ in range(5)]
    assert np.abs(np.diff(speeds, n=2)).max() / 0.02**2 <= 10.0 * (1 + 1e-6)
