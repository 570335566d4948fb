"""The simulator as evaluation sees it, and with the safety layer in between."""

from __future__ import annotations

import pathlib
import re

import numpy as np
import pytest

from robovlms_jax.control import interface, robot
from robovlms_jax.driving import env, expert, scenarios, world

NAMES = list(scenarios.SCENARIOS)


def expert_drive(rooms, starts, steps=150):
    """Last info of every room."""
    slots = list(range(rooms.size))
    infos = rooms.reset(slots, starts)
    for _ in range(steps):
        going = [slot for slot in slots if not infos[slot]["succeeded"]]
        if not going:
            break
        actions = np.concatenate([expert.act(rooms.layouts[slot], rooms._states[slot]) for slot in going])
        for slot, info in zip(going, rooms.step(going, actions)):
            infos[slot] = info
    return infos


def test_it_is_an_env_with_a_front_camera_and_odometry():
    room = env.Driving(views=("view", "map"))
    assert isinstance(room, interface.Env) and room.robot == world.ROBOT
    assert robot.from_json(room.robot.to_json()) == room.robot
    room.reset("2box_hori_left", seed=3)
    room.step(np.array([0.3, 0.0, 0.2]))
    seen = room.observe()
    assert list(seen.images) == ["view", "map", "front"] and seen.images["front"].shape == (60, 96, 3)
    assert seen.proprio.shape == (3,) and seen.proprio[0] > 0
    assert room.info["scenario"] == "2box_hori_left" and not room.info["succeeded"]


def test_many_rooms_are_what_each_is_alone():
    together = env.Drives(3)
    starts = [{"scenario": NAMES[i], "seed": i} for i in range(3)]
    together.reset([0, 1, 2], starts)
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (8, 3, 3))
    for row in actions:
        infos = together.step([0, 1, 2], row)
    for i in range(3):
        alone = env.Driving()
        alone.reset(**starts[i])
        for row in actions:
            alone.step(row[i])
        np.testing.assert_array_equal(alone.info["pose"], infos[i]["pose"])


@pytest.mark.parametrize("action", [[0.1, 0.2], [0.1, np.nan, 0.0], np.zeros((1, 3))])
def test_an_unusable_command_is_refused(action):
    with pytest.raises(ValueError, match="must be 3 finite numbers"):
        env.Driving().step(action)
    with pytest.raises(ValueError, match=r"views has unknown \['sky'\]"):
        env.Drives(1, views=("sky",))
    with pytest.raises(ValueError, match="size=0"):
        env.Drives(0)


def test_the_expert_drives_through_the_safety_layer_with_hardly_a_change():
    rooms = env.Drives(16, safety="slow")
    infos = expert_drive(rooms, [{"scenario": NAMES[i % 8], "seed": 50 + i} for i in range(16)])
    assert all(info["succeeded"] for info in infos)
    assert np.mean([info["partial"]["changed by safety"] for info in infos]) < 0.01
    assert env.completed_in_each(infos, infos) == [{NAMES[i % 8]} for i in range(16)]


@pytest.mark.parametrize("risk", ["stop", "slow"])
def test_full_speed_at_a_box_ends_in_a_collision_without_the_layer_and_before_it_with_it(risk):
    start = {"scenario": "1box_hori_left", "seed": 0}
    bare, safe = env.Drives(1), env.Drives(1, safety=risk)
    for rooms in (bare, safe):
        rooms.reset([0], [start])
        for _ in range(80):
            (info,) = rooms.step([0], np.array([[0.5, 0.0, 0.0]]))
        assert info["collided"] == (rooms is bare)
    assert info["clearance_m"] > 0.09
    assert info["partial"]["stopped by safety"] == (risk == "stop")
    assert safe.name == f"driving-safe-{risk}"


def test_the_example_of_the_navigation_page_runs_as_it_stands_there():
    page = (pathlib.Path(__file__).resolve().parents[2] / "docs/navigation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(code, "docs/navigation.md", "exec"), names := {})
    assert names["decision"].events  # driven straight at the box, the layer had to do something
