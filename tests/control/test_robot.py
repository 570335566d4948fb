"""Robots as data: what they hold, how they are kept, and what differs between two."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robovlms_jax.control import robot


def joints(*names: str, **changes) -> tuple[robot.Dimension, ...]:
    return tuple(robot.Dimension(name, **{"unit": "deg", "quantity": "joint", **changes}) for name in names)


DIMENSIONS = st.builds(
    robot.Dimension,
    st.text(min_size=1, max_size=8),
    st.sampled_from(["", "m", "rad"]),
    st.sampled_from(["absolute", "delta", "velocity"]),
    st.sampled_from(["joint", "base", "other"]),
    st.sampled_from(["", "world", "tcp"]),
    st.one_of(st.just(-math.inf), st.floats(-10, -1)),
    st.one_of(st.just(math.inf), st.floats(1, 10)),
)


@given(
    st.lists(DIMENSIONS, max_size=5, unique_by=lambda dimension: dimension.name),
    st.floats(0, 1000),
    st.lists(
        st.builds(robot.Camera, st.text(min_size=1), st.integers(0, 9), st.integers(0, 9)), unique_by=lambda c: c.name
    ),
)
def test_a_robot_comes_back_from_json_as_it_was(action, rate, cameras):
    spec = robot.RobotSpec("mine", rate, tuple(cameras), tuple(action), tuple(action))
    assert robot.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert robot.differences(spec, spec) == []


def test_calvin_is_described_with_its_units():
    assert robot.CALVIN.grippers == (6,) and len(robot.CALVIN.action) == 7
    assert robot.CALVIN.action[0].unit == "0.02 m" and robot.CALVIN.action[5].unit == "0.05 rad"
    assert robot.from_json(robot.CALVIN.to_json()) == robot.CALVIN


def test_every_difference_that_changes_a_meaning_is_listed():
    so100 = robot.RobotSpec("so100", 30.0, (robot.Camera("front"),), joints("pan", "lift"))
    other = robot.RobotSpec("other", 10.0, (robot.Camera("top"),), joints("pan", "lift", unit="rad"))
    listed = robot.differences(so100, other)
    assert [part for part in ("front", "10 Hz", "'rad'") if any(part in line for line in listed)] == [
        "front",
        "10 Hz",
        "'rad'",
    ]
    assert "2 dimensions" in robot.differences(robot.CALVIN, so100)[-2]

    # Bounds and units by what they measure: a gripper of 0 to 100 is not one of 0 to 1, "1 m" is "m".
    def ends(low, high, unit):
        return dataclasses.replace(so100, action=joints("pan", "lift", low=low, high=high, unit=unit))

    assert len(robot.differences(ends(0, 1, "1"), ends(0, 100, "1"))) == 2
    assert robot.differences(ends(0, 1, "m"), ends(0, 1, "1 m")) == []
    assert robot.differences(ends(0, 1, "m"), ends(0, math.inf, "m")) == []
    # What is unknown contradicts nothing.
    unknown = dataclasses.replace(so100, rate_hz=0.0, action=joints("pan", "lift", unit=""))
    assert robot.differences(so100, unknown) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: robot.Dimension("g", kind="binary"), "gripper"),
        (lambda: robot.Dimension("j", low=1.0, high=1.0), "below"),
        (lambda: robot.Dimension("j", low=math.nan), "below"),
        (lambda: robot.RobotSpec("r", action=joints("a", "a")), "twice"),
        (lambda: robot.RobotSpec("r", action=joints("x", "y", quantity="position")), "takes 3"),
        (lambda: robot.RobotSpec("r", rate_hz=math.inf), "rate_hz"),
        (lambda: robot.from_json({"name": "r", "joints": []}, "robot.json"), "robot.json.*joints"),
        (lambda: robot.from_json({"action": []}, "robot.json"), "robot.json.*name"),
        (lambda: robot.from_json({"name": "r", "action": [{"nam": "x"}]}, "robot.json"), "robot.json.*nam"),
        (lambda: robot.from_json({"name": "r", "action": 3}, "robot.json"), "robot.json.*action=3.*list"),
        (lambda: robot.from_json([1, 2], "robot.json"), "robot.json holds a list.*expected an object"),
        (lambda: robot.from_json("robot", "robot.json"), "robot.json holds a str.*expected an object"),
        (lambda: robot.from_json({"name": 3}, "robot.json"), "robot.json.*name=3 is a int; expected text"),
        (lambda: robot.from_json({"name": "r", "rate_hz": "fast"}, "robot.json"), "robot.json.*rate_hz='fast'"),
        (lambda: robot.from_json({"name": "r", "action": {"name": "x"}}, "robot.json"), "action=.*expected a list"),
        (lambda: robot.from_json({"name": "r", "cameras": ["front"]}, "robot.json"), r"cameras\[0\] holds a str"),
        (lambda: robot.from_json({"name": "r", "action": [{"name": "x", "low": "a"}]}), r"action\[0\].*low='a'"),
        (lambda: robot.from_json({"name": "r", "state": [{"name": "x", "unit": 3}]}), r"state\[0\].*unit=3"),
        (lambda: robot.Camera("front", height=-1), "height=-1; expected pixels"),
        (lambda: robot.Camera("front", width="64"), "width='64'; expected pixels"),
        (lambda: robot.Camera("front", width=math.inf), "width=inf; expected pixels"),
        (lambda: robot.Camera(""), "camera: name is empty"),
        (lambda: robot.RobotSpec(""), "robot: name is empty"),
        (lambda: robot.from_json({"name": "r", "action": [{"name": ""}]}), r"action\[0\].*name is empty"),
    ],
)
def test_what_is_no_robot_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
