"""LeRobotDatasets of any robot: read by the names in info.json, or as a description says."""

from __future__ import annotations

import dataclasses
import json
import logging
import re

import numpy as np
import pytest

from robovlms_jax.control import robot
from robovlms_jax.data import lerobot
from tests.data import toy_lerobot as toy

SO100 = [f"{joint}.pos" for joint in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll")]
SO100 = [*SO100, "gripper.pos"]
JOINTS = ("waist", "shoulder", "elbow", "forearm", "wrist", "gripper")
ALOHA = [f"{side}_{joint}" for side in ("left", "right") for joint in JOINTS]

GRIPPER = {"name": "g", "quantity": "gripper"}


def rows(root):
    return np.array(toy.parquet.read_table(toy.data_file(root)).to_pydict()["action"], np.float32)


def rename(root, **named):
    features = json.loads((root / "meta/info.json").read_text())["features"]
    for key, listed in named.items():
        features[key.replace("__", ".")]["names"] = listed
    toy.edit_info(root, features=features)


def test_joints_called_positions_are_places_to_go_to_as_they_are_stored(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = toy.write(
        tmp_path / "d", names=SO100, width=6, cameras=("observation.images.top", "observation.images.side")
    )
    dataset = lerobot.open_dataset(root, "training")
    assert dataset.robot.action_names == tuple(SO100) and dataset.robot.rate_hz == toy.FPS
    assert {d.kind for d in dataset.robot.action[:5]} == {"absolute"} and dataset.robot.action[5].kind == "continuous"
    assert dataset.cameras == ("top", "side") == dataset.robot.camera_names and dataset.robot.binary == ()
    np.testing.assert_allclose(dataset.actions([0, 1, 2]), rows(root)[:3])
    np.testing.assert_allclose(dataset.actions([5]), rows(root)[4:5])  # after the end: where the robot was told to be
    assert "places to go to of 5 joints" in caplog.text
    assert len(dataset.statistics.action["q99"]) == 6 and dataset.statistics.mask == (True,) * 6
    assert dataset.proprio([0]).shape == (1, 8)  # the state's own numbers, whatever they are called


def test_joints_that_the_state_has_as_well_are_places_to_go_to(tmp_path):
    names = ALOHA[:8]
    root = toy.write(tmp_path / "d", names=names, width=8)
    with pytest.raises(ValueError, match=r"joints, .*or describe the robot as it is, \{\"robot\""):
        lerobot.open_dataset(root, "training")
    rename(root, observation__state=names)
    spec = lerobot.open_dataset(root, "training").robot
    assert spec.grippers == (5,) and [d.name for d in spec.state] == names


def test_a_described_robot_is_read_by_name_with_its_binary_grippers_decided(tmp_path):
    names = ["vx", "claw", "vy", "wz"]
    root = toy.write(tmp_path / "d", names=names, width=4, cameras=("observation.images.a", "observation.images.b"))
    values = np.random.default_rng(0).uniform(0, 100, (20, 4)).astype(np.float32)
    toy.edit(toy.data_file(root), lambda columns: columns.update(action=values.tolist()))
    action = [
        {"name": "wz", "kind": "velocity", "quantity": "base", "unit": "rad/s"},
        {"name": "claw", "kind": "binary", "quantity": "gripper", "low": 0, "high": 100, "open_at": "low"},
        {"name": "vx", "kind": "velocity", "quantity": "base", "unit": "m/s"},
    ]
    toy.write_json(root / lerobot.CONVENTIONS, {"robot": {"action": action, "cameras": [{"name": "b"}]}})
    dataset = lerobot.open_dataset(root, "training")
    assert dataset.robot.binary == (1,) and dataset.cameras == ("b",) and not dataset.robot.state
    stored = values[:3]
    expected = np.stack([stored[:, 3], np.where(stored[:, 1] > 50, -1, 1), stored[:, 0]], axis=1)
    np.testing.assert_allclose(dataset.actions([0, 1, 2]), expected, rtol=1e-6)
    # after the end nothing moves, and the gripper stays
    np.testing.assert_allclose(dataset.actions([5])[0], [0, dataset.actions([4])[0, 1], 0])
    assert dataset.robot.action[1] == dataclasses.replace(robot.GRIPPER, name="claw")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"action": []}, "no action dimension"),
        ({"action": [{"name": "a"}, {"name": "b"}]}, "List all of them, or names that are there"),
        ({"action": [{"name": f"j{i}"} for i in range(7)], "rate_hz": 50}, "says fps 10"),
        ({"action": [{"name": f"j{i}"} for i in range(7)], "cameras": [{"name": "back"}]}, "names ['back']"),
        ({"action": [{"name": "j", "kind": "sideways"}]}, "kind='sideways'"),
        (
            {
                "action": [{"name": f"j{i}"} for i in range(6)]
                + [{"name": "g", "kind": "binary", "quantity": "gripper"}]
            },
            "needs low, high and open_at",
        ),
    ],
)
def test_a_description_that_does_not_fit_is_answered_by_field(tmp_path, content, message):
    root = toy.write(tmp_path / "d")
    toy.write_json(root / lerobot.CONVENTIONS, {"robot": content})
    with pytest.raises(ValueError, match=re.escape(message)):
        lerobot.open_dataset(root, "training")


def test_a_robot_and_an_end_effector_are_not_described_together(tmp_path):
    root = toy.write(tmp_path / "d")
    toy.write_json(root / lerobot.CONVENTIONS, {"robot": {"action": []}, "arm": ["action[:6]"]})
    with pytest.raises(ValueError, match=r"also has \['arm'\], which describe an end effector"):
        lerobot.open_dataset(root, "training")
