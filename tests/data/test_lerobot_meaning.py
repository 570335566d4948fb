"""What a LeRobotDataset's numbers and cameras mean: read, assumed and said, or refused by name."""

from __future__ import annotations

import json
import logging
import re

import numpy as np
import pytest

from experiments import convert_data
from robovlms_jax.actions import statistics
from robovlms_jax.control import robot
from robovlms_jax.data import calvin, excerpts, lerobot, opening
from robovlms_jax.data.config import DataConfig
from robovlms_jax.data.lerobot import names
from tests.data import toy_lerobot as toy

POSE = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


# Actions and state.


@pytest.mark.parametrize(
    "listed",
    [
        POSE,
        {"motors": POSE},
        {"axes": POSE},
        [POSE],
        {name: place for place, name in enumerate(POSE)},
        ["delta_x", "delta_y", "delta_z", "delta_roll", "delta_pitch", "delta_yaw", "gripper_open"],
        {"position": POSE[:3], "rotation": POSE[3:6], "gripper": ["gripper"]},
        {"motors": {"arm": POSE[:6], "gripper": ["position"]}},
        ["deltaX", "deltaY", "deltaZ", "Roll", "Pitch", "Yaw", "Gripper"],
        ["ee.x", "ee.y", "ee.z", "ee.roll", "ee.pitch", "ee.yaw", "ee.gripper_pos"],
    ],
)
def test_names_that_say_a_pose_are_read(tmp_path, caplog, listed):
    caplog.set_level(logging.INFO)
    dataset = lerobot.open_dataset(toy.write(tmp_path / "d", names=listed), "training")
    np.testing.assert_allclose(dataset.actions([1])[0], [0, 0.005, *[0.001] * 4, 1], atol=1e-7)
    assert "by its names" in caplog.text
    assert [d.unit for d in dataset.robot.action] == ["m"] * 3 + ["rad"] * 3 + ["1"]


def test_named_numbers_are_found_in_any_order(tmp_path):
    listed = ["gripper_closed", "yaw", "pitch", "roll", "z", "y", "x"]
    root = toy.write(tmp_path / "d", names=listed)
    stored = [0.25, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    toy.edit(toy.data_file(root), lambda rows: rows.update(action=[stored] * 20))
    found = lerobot.open_dataset(root, "training").actions([0])[0]
    np.testing.assert_allclose(found, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.5], atol=1e-6)


@pytest.mark.parametrize(
    "listed", [None, ["actions"], ["0", "1", "2", "3", "4", "5", "6"], [f"dim_{i}" for i in range(7)]]
)
def test_seven_numbers_without_names_are_assumed_to_be_a_pose_and_that_is_said_once(tmp_path, caplog, listed):
    caplog.set_level(logging.INFO)
    config = DataConfig(dataset="lerobot", root=str(toy.write(tmp_path / "d", names=listed)))
    for split in ("training", "validation"):
        opening.open_split(config, split)
    assert caplog.text.count("have no names; taken as metres and radians") == 1


@pytest.mark.parametrize(
    "listed",
    [
        [*(f"joint_{i}" for i in range(7)), "gripper"],
        {"motors": ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]},
        {"left": [*(f"j{i}" for i in range(6)), "gripper"], "right": [*(f"j{i}" for i in range(6)), "gripper"]},
        ["x", "y", "z", "rx", "ry", "rz", "gripper"],
        ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper"],
        ["vx", "vy", "vz", "wx", "wy", "wz", "gripper"],
        ["abs_x", "abs_y", "abs_z", "abs_roll", "abs_pitch", "abs_yaw", "gripper"],
        [*POSE[:6], "terminate"],
        POSE[:6],
    ],
)
def test_names_that_say_something_else_are_refused_with_the_file_to_write(tmp_path, listed):
    flat = names.of({"names": listed, "shape": [9]})
    root = toy.write(tmp_path / "d", names=listed, width=max(len(flat), 7))
    with pytest.raises(ValueError, match=r"expected seven numbers: .* meta/robovlms\.json|robovlms") as error:
        lerobot.open_dataset(root, "training")
    assert repr(flat) in str(error.value) and "--data.conventions" in str(error.value)
    # Said what they are, they are read.
    toy.write_json(root / lerobot.CONVENTIONS, {"arm": ["action[:6]"], "gripper": "action[-1]"})
    assert len(lerobot.open_dataset(root, "training").actions([0])[0]) == 7


@pytest.mark.parametrize("width", [6, 8, 14, 3])
def test_another_width_without_names_is_refused(tmp_path, width):
    with pytest.raises(ValueError, match=f"action holds {width} numbers without names"):
        lerobot.open_dataset(toy.write(tmp_path / "d", width=width), "training")


def test_other_field_names_are_read_or_answered_with_the_file_to_write(tmp_path):
    root = toy.write(tmp_path / "d", cameras=("image", "wrist_image"))
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["actions"], features["state"] = features.pop("action"), features.pop("observation.state")
    toy.edit_info(root, features=features)
    toy.edit(
        toy.data_file(root),
        lambda rows: rows.update(actions=rows.pop("action"), state=rows.pop("observation.state")),
    )
    dataset = lerobot.open_dataset(root, "training")
    assert dataset._cameras == {"static": "image", "wrist": "wrist_image"} and dataset.actions([1])[0, 1] > 0
    features["command"] = features.pop("actions")
    toy.edit_info(root, features=features)
    with pytest.raises(ValueError, match=r"there is no feature 'action'; .*'command'.*robovlms\.json"):
        lerobot.open_dataset(root, "training")


@pytest.mark.parametrize(
    ("values", "message", "remedy"),
    [
        ((0.0, 100.0), "from 0 to 100", "from_range(action[6], 0, 100)"),
        ((3.0, 850.0), "from 3 to 850", "from_range(action[6], 0, 850)"),
        ((-1.0, 1.0), "from -1 to 1", "clip(action[6])"),
        ((1.0, -3.0), "from -3 to 1", "from_range(action[6], 1, -3)"),
        ((-0.2, 1.3), "from -0.2 to 1.3", "clip(action[6])"),
    ],
)
def test_a_gripper_of_another_range_is_refused_with_its_remedy(tmp_path, values, message, remedy):
    root = toy.write(tmp_path / "d")
    toy.edit(
        toy.data_file(root),
        lambda rows: rows.update(action=[[*a[:6], values[int(a[6])]] for a in rows["action"]]),
    )
    with pytest.raises(ValueError, match=f"runs {message}, expected 0") as error:
        lerobot.open_dataset(root, "training")
    assert remedy in str(error.value)
    elsewhere = tmp_path / "mine.json"
    toy.write_json(elsewhere, {"gripper": remedy})
    config = DataConfig(dataset="lerobot", root=str(root), conventions=str(elsewhere))
    found = opening.open_split(config, "training").statistics.action
    assert found["min"][6] >= -1 and found["max"][6] <= 1 and found["max"][6] > 0.9


@pytest.mark.parametrize(("scale", "message"), [(40.0, r"'x', 'y'.*at most 0.5 m and 3.2 rad")])
def test_seven_numbers_without_names_that_are_no_motion_are_refused_with_their_range(tmp_path, scale, message):
    # Seven joints of a Franka, say: as metres and radians per step they are impossible.
    root = toy.write(tmp_path / "d")
    toy.edit(
        toy.data_file(root),
        lambda rows: rows.update(action=[[*(scale * x for x in a[:6]), a[6]] for a in rows["action"]]),
    )
    with pytest.raises(ValueError, match=message):
        lerobot.open_dataset(root, "training")
    described = tmp_path / "mine.json"
    toy.write_json(described, {"arm": [f"action[{column}]" for column in range(6)]})
    assert lerobot.open_dataset(root, "training", conventions=str(described)).episodes


def test_a_gripper_that_means_the_opposite_is_told_by_the_recorded_opening(tmp_path):
    root = toy.write(tmp_path / "d")
    toy.write_json(root / lerobot.CONVENTIONS, {"state": ["observation.state"], "state_encoding": "POS_EULER"})

    def findings(dataset):
        actions, openings = excerpts.action_sample(dataset, 100)
        found = statistics.lint(statistics.summarize(actions), commands=actions[:, 6], widths=openings)
        return [finding.message for finding in found if finding.dimension == "gripper"]

    dataset = lerobot.open_dataset(root, "training")
    np.testing.assert_array_equal(dataset.gripper_opening([0, 4]), [1, 0])
    assert findings(dataset) == []
    convert_data.main(convert_data.Args("lerobot", root, tmp_path / "packed", workers=1))
    packed = calvin.open_dataset(tmp_path / "packed", "training")
    np.testing.assert_array_equal(packed.gripper_opening([0, 4]), [1, 0])
    toy.write_json(
        root / lerobot.CONVENTIONS,
        {"state": ["observation.state"], "state_encoding": "POS_EULER", "gripper": "invert(action[6])"},
    )
    assert "means the opposite" in findings(lerobot.open_dataset(root, "training"))[0]
    (root / lerobot.CONVENTIONS).unlink()
    assert lerobot.open_dataset(root, "training").gripper_opening([0]) is None


def test_a_state_whose_names_say_a_pose_is_read(tmp_path):
    root = toy.write(tmp_path / "d")
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["observation.state"]["names"] = ["gripper", "x", "y", "z", "qx", "qy", "qz", "qw"]
    toy.edit_info(root, features=features)
    state = [1.0, 0.1, 0.2, 0.3, 0, 0, 0, 1]
    toy.edit(toy.data_file(root), lambda rows: rows.update({"observation.state": [state] * 20}))
    np.testing.assert_allclose(
        lerobot.open_dataset(root, "training").proprio([1])[0, :6], [0.1, 0.2, 0.3, 0, 0, 0], atol=1e-6
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arms": ["action[:6]"]}, "'arms' is no field; did you mean 'arm'?"),
        ({"arm": "action[:6]"}, '\'arm\' must be a list of texts, found "action[:6]"; write ["action[:6]"]'),
        ({"gripper": ["action[6]"]}, "'gripper' must be a text"),
        ({"state_encoding": "EULER"}, "'state_encoding' must be one of POS_EULER"),
        ({"skip_first": 1.5}, "'skip_first' must be a whole number"),
        ({"drop_still": "yes"}, "'drop_still' must be true or false"),
        ({"instruction": "task"}, "'instruction' is no field"),
        ({"control_hz": 50}, "control_hz is 50"),
        ({"static": "observation.images.frnt"}, "static names 'observation.images.frnt', which is no camera"),
        ({"arm": ["velocity[:6]"]}, "info.json has no feature 'velocity'"),
        (["arm"], "is no JSON object, found list"),
    ],
)
def test_a_conventions_file_is_answered_by_field(tmp_path, given, message):
    root = toy.write(tmp_path / "d")
    toy.write_json(tmp_path / "mine.json", given)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        lerobot.open_dataset(root, "training", conventions=tmp_path / "mine.json")
    assert "mine.json" in str(error.value)


def test_a_conventions_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.conventions: .*nowhere\.json cannot be read"):
        lerobot.open_dataset(toy.write(tmp_path / "d"), "training", conventions=tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"data\.conventions describes a LeRobotDataset"):
        DataConfig(conventions="mine.json")


# Cameras and robot.


def test_depth_is_never_taken_for_rgb_and_the_choice_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = toy.write(tmp_path / "d", cameras=("a_depth", "b", "c", "front", "wrist_depth", "wrist", "side"))
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["b"] = {**features["b"], "info": {"video.is_depth_map": True}}
    features["c"] = {**features["c"], "shape": [32, 48, 1]}
    toy.edit_info(root, features=features)
    dataset = lerobot.open_dataset(root, "training")
    assert dataset._cameras == {"static": "front", "wrist": "wrist"}
    assert "['a_depth', 'b', 'c', 'wrist_depth'] record depth or one channel" in caplog.text
    assert "static camera 'front', wrist camera 'wrist'; ['side'] are not used" in caplog.text
    toy.write_json(root / lerobot.CONVENTIONS, {"static": "b"})
    with pytest.raises(ValueError, match="static names 'b', which records depth"):
        lerobot.open_dataset(root, "training")
    toy.edit_info(root, features={k: v for k, v in features.items() if k in ("a_depth", "action", "observation.state")})
    (root / lerobot.CONVENTIONS).unlink()
    with pytest.raises(ValueError, match="describes no RGB camera"):
        lerobot.open_dataset(root, "training")


def test_the_robot_is_what_info_says(tmp_path):
    listed = ["shoulder_pan.pos", "elbow_flex.pos", "wrist_roll.pos", "a.pos", "b.pos", "c.pos", "gripper.pos"]
    root = toy.write(tmp_path / "d", names={"motors": listed})
    toy.write_json(root / lerobot.CONVENTIONS, {"arm": ["action[:6]"], "gripper": "action[6]"})
    spec = lerobot.open_dataset(root, "training").robot
    assert (spec.name, spec.rate_hz, spec.cameras) == ("toy", 10.0, (robot.Camera("static", 32, 48),))
    # What the description makes of them: an end effector's motion, whatever they are called.
    assert [d.name for d in spec.action] == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    assert {d.unit for d in spec.action[:6]} == {"m", "rad"} and spec.binary == (6,)
