"""RLDS datasets that other people wrote: what numbers and images are taken for, what is said, what is refused."""

from __future__ import annotations

import io
import itertools
import json
import logging

import numpy as np
import pytest
from PIL import Image

from robovlms_jax.actions import statistics as linter
from robovlms_jax.data import frame_index, opening, rlds
from robovlms_jax.data.config import DataConfig
from robovlms_jax.data.features import Field
from robovlms_jax.data.registry import entry as entries
from robovlms_jax.data.registry import expressions, libero, mixtures
from tests.data import toy_rlds
from tests.data.written_rlds import T, numbers, open_written, picture, text

# Grippers.


@pytest.mark.parametrize(
    ("low", "high", "remedy"),
    [
        (-1, 1, r"gripper: invert\(clip\(action\[6\]\)\) if \+1 closes it"),
        (0, 100, r"gripper: from_range\(action\[6\], 0, 100\) if 100 is open"),
        (3, 848, r"from_range\(action\[6\], 850, 0\) if it is closed"),
        (0, 255, r"from_range\(action\[6\], 0, 255\)"),
        (-40, 40, r"from_range\(action\[6\], -40, 100\)"),
    ],
)
def test_a_gripper_outside_0_to_1_is_refused_with_its_range_and_what_to_write(tmp_path, low, high, remedy):
    values = lambda e: np.c_[np.zeros((T, 6)), np.where(np.arange(T) > 3, high, low)]  # noqa: E731
    with pytest.raises(ValueError, match=rf"'action\[6\]' runs from {low} to {high}, 100.0%|runs from {low}") as caught:
        open_written(tmp_path, {"steps/action": numbers(7, values)})
    with pytest.raises(ValueError, match=remedy):
        raise caught.value


def test_a_gripper_that_means_the_opposite_of_the_measured_fingers_is_found(tmp_path):
    # Breaks when the opening is the command itself, or is not there for RLDS.
    state = lambda e: np.c_[np.zeros((T, 6)), np.where(np.arange(T) > 3, 0.0, 0.08)]  # noqa: E731
    given = {"gripper": "action[6]"}
    dataset = open_written(tmp_path / "a", {"steps/observation/state": numbers(7, state)}, given=given)
    ids = np.arange(T)
    findings = linter.lint(
        dataset.statistics.action, commands=dataset.actions(ids)[:, 6], widths=dataset.gripper_opening(ids)
    )
    assert any("means the opposite" in finding.message and finding.refused for finding in findings)
    given = {
        **given,
        "state": ["observation/state[:6]", "zeros(1)", "observation/state[6]"],
        "state_encoding": "POS_EULER",
    }
    closes = open_written(tmp_path / "b", {"steps/observation/state": numbers(7, state)},
                          given={**given, "state_gripper": "closes"})  # fmt: skip
    np.testing.assert_allclose(closes.gripper_opening(ids), 1 - dataset.gripper_opening(ids))
    unknown = open_written(tmp_path / "c", {"steps/observation/state": numbers(7, state)},
                           given={**given, "state_gripper": ""})  # fmt: skip
    assert unknown.gripper_opening(ids) is None


def test_the_linter_names_impossible_steps_and_grippers_beyond_one():
    actions = np.random.default_rng(0).uniform(-1, 1, (100, 7))
    values = linter.summarize(actions * [1000, 0.01, 0.01, 90, 0.1, 0.1, 1])
    found = {
        finding.dimension: finding for finding in linter.lint(values, units=(1.0,) * 6) if "moves by" in finding.message
    }
    assert set(found) == {"x", "roll"} and not any(finding.refused for finding in found.values())
    assert "m within one step, more than 0.5 m" in found["x"].message and "rad" in found["roll"].message
    assert not any(
        "moves by" in f.message for f in linter.lint(linter.summarize(actions), units=(0.02,) * 3 + (0.05,) * 3)
    )
    beyond = linter.lint(linter.summarize(actions * [1, 1, 1, 1, 1, 1, 3]))
    assert any("leaves -1 (closed) to 1 (open)" in finding.message and finding.refused for finding in beyond)


def test_numbers_that_nobody_described_are_refused_where_no_arm_moves_like_that(tmp_path):
    rng = np.random.default_rng(0)
    joints = lambda e: np.c_[rng.uniform(-2.8, 2.8, (T, 6)), np.arange(T) > 3]  # noqa: E731
    with pytest.raises(ValueError, match=r"'x', 'y', 'z'.*run from -2.*joints"):
        open_written(tmp_path / "a", {"steps/action": numbers(7, joints)})
    described = {"arm": ["action[:6]"], "units": [0.05] * 3 + [0.5] * 3}
    assert open_written(tmp_path / "b", {"steps/action": numbers(7, joints)}, given=described).episodes


# Actions and states.


@pytest.mark.parametrize("size", [6, 8, 14])
def test_an_action_that_has_not_seven_numbers_is_asked_for(tmp_path, size):
    with pytest.raises(ValueError, match=rf"steps/action has {size} numbers .*seven are expected"):
        open_written(tmp_path, {"steps/action": numbers(size)})


def test_descriptions_of_the_wrong_type_are_named(tmp_path):
    open_written(tmp_path)
    with pytest.raises(ValueError, match="dataset 'mine': a field of its description is of the wrong type"):
        rlds.open_dataset(tmp_path, {"control_hz": "ten"}, "training", name="mine")
    with pytest.raises(ValueError, match=r"arm must be a list, found 'action\[:6\]'"):
        entries.Entry("mine", arm="action[:6]")


def test_an_action_of_other_size_is_read_as_described(tmp_path):
    values = lambda e: np.c_[np.zeros((T, 3)), np.tile([0, 0, 0, 1], (T, 1)), np.arange(T) > 3]  # noqa: E731
    given = {"arm": ["action[:3]", "euler(action[3:7])"], "gripper": "action[7]"}
    dataset = open_written(tmp_path, {"steps/action": numbers(8, values)}, given=given)
    np.testing.assert_array_equal(dataset.actions([0, 5]), [[0] * 6 + [-1], [0] * 6 + [1]])


def test_an_entry_with_the_usual_arm_wants_seven_numbers():
    action, image = Field("steps/action", "tensor", "float32", (8,)), Field("steps/observation/image", "image", "uint8")
    words = Field("steps/language_instruction", "text", "string")
    fields = {field.path: field for field in (action, image, words)}
    with pytest.raises(ValueError, match=r"steps/action: found float32\[8\], expected seven numbers"):
        entries.Entry("mine").check(fields, "here")
    entries.Entry("mine", shapes={"action": (8,)}).check(fields, "here")


def test_a_state_of_eight_numbers_is_not_guessed_and_one_word_describes_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    state = {"steps/observation/state": numbers(8)}
    dataset = open_written(tmp_path / "a", state)
    assert "no state, as steps/observation/state (float32[8]) may be a pose" in caplog.text
    with pytest.raises(ValueError, match="describe it with state and state_encoding"):
        dataset.proprio([0])
    named = open_written(tmp_path / "b", state, given={"state_encoding": "POS_QUAT"})
    assert named.array("state", [0]).shape == (1, 8) and len(named.proprio([0])[0]) == 7


def test_a_state_in_degrees_is_named_with_its_range(tmp_path, caplog):
    state = lambda e: np.tile([0.3, 0, 0.2, -170, 0, 90, 0.5], (T, 1))  # noqa: E731
    open_written(tmp_path, {"steps/observation/state": numbers(7, state)})
    assert "numbers 3 to 5 run from -170 to 90: too much for angles in radians" in caplog.text


def test_guesses_are_logged_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    open_written(tmp_path, name="guessed_once")
    rlds.open_dataset(tmp_path, {}, "validation", name="guessed_once")
    assert caplog.text.count("dataset 'guessed_once' has no description; guessed: static: image") == 1


def test_rotation_vectors_become_scipys_euler_angles():
    from scipy.spatial.transform import Rotation

    vectors = np.random.default_rng(0).normal(size=(50, 3)) * 2
    vectors[:2] = [[0, 0, 0], [np.pi, 0, 0]]
    expected = Rotation.from_rotvec(vectors).as_euler("xyz")
    found = expressions.Expression("axis_angle(s[3:6])")({"s": np.c_[np.zeros((50, 3)), vectors]}, 50)
    np.testing.assert_allclose(np.cos(found), np.cos(expected), atol=1e-6)
    np.testing.assert_allclose(np.sin(found), np.sin(expected), atol=1e-6)
    with pytest.raises(ValueError, match="needs 3 columns, it has 4"):
        expressions.Expression("axis_angle(s[:4])").width(8)


@pytest.mark.parametrize("name", libero.NAMES)
def test_libero_is_read_as_openvla_publishes_it(tmp_path, name, caplog):
    action = lambda e: np.c_[np.full((T, 6), 0.9), np.where(np.arange(T) > 3, 1.0, -1.0)]  # noqa: E731
    state = lambda e: np.tile([0.1, 0.2, 0.3, 3.0, 0, 0, 0.04, -0.04], (T, 1))  # noqa: E731
    wrist = Field("", "image", "uint8", (16, 16, 3)), lambda e: [picture(e)] * T
    changes = {"steps/action": numbers(7, action), "steps/observation/state": numbers(8, state),
               "steps/observation/wrist_image": wrist}  # fmt: skip
    open_written(tmp_path, changes, name=name, given={"arm": ["action[:6]"], "gripper": "clip(action[6])"})
    dataset = opening.open_split(DataConfig(dataset=name, root=str(tmp_path), index_workers=1), "training")
    np.testing.assert_array_equal(dataset.actions([0, 6])[:, 6], [1, -1])  # -1 opens, +1 closes
    np.testing.assert_allclose(dataset.array("state", [0])[0], [0.1, 0.2, 0.3, 3.0, 0, 0, 0, 0.04], atol=1e-6)
    np.testing.assert_allclose(dataset.gripper_opening([0]), [0.04])
    robot = dataset.robot
    assert [d.unit for d in robot.action] == ["0.05 m"] * 3 + ["0.5 rad"] * 3 + ["1"]
    assert (robot.rate_hz, robot.action[3].quantity, robot.action[0].frame) == (20, "axis_angle", "base")
    assert [(c.name, c.height) for c in robot.cameras] == [("static", 16), ("wrist", 16)]
    assert dataset.action_units == (0.05,) * 3 + (0.5,) * 3


def test_every_entry_describes_its_robot():
    for entry in mixtures.ENTRIES.values():
        robot = entry.robot
        assert robot.rate_hz == entry.control_hz and len(robot.action) == 7 and robot.grippers == (6,)
        assert robot.camera_names == tuple(entry.cameras)


# Images.


@pytest.mark.parametrize(
    ("form", "mode"), [("PNG", "L"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("BMP", "RGB"), ("JPEG", "L")]
)
def test_grey_transparent_and_other_encodings_are_read(tmp_path, form, mode):
    channels = len(mode) if mode != "L" else 1
    image = Field("", "image", "uint8", (16, 16, channels)), lambda e: [picture(e, form=form, mode=mode)] * T
    dataset = open_written(tmp_path, {"steps/observation/image": image})
    with Image.open(io.BytesIO(picture(0, form=form, mode=mode))) as expected:
        np.testing.assert_allclose(
            dataset.images([3], ["static"])["static"][0], np.asarray(expected.convert("RGB")), atol=3
        )


def test_depth_is_never_taken_for_colour(tmp_path):
    distances = picture(0, mode="I;16")
    uint16 = Field("", "image", "uint16", (16, 16, 1)), lambda e: [distances] * T
    named = Field("", "image", "uint8", (16, 16, 3)), lambda e: [picture(0)] * T
    changes = {"steps/observation/image": None, "steps/observation/rgb": uint16, "steps/observation/depth_image": named,
               "steps/observation/front": named}  # fmt: skip
    dataset = open_written(tmp_path / "a", changes)
    assert dataset._meta["cameras"] == ["static"] and dataset._prepared.arrays["length"].shape[1] == 1
    with pytest.raises(ValueError, match=r"uint16 image\[16, 16, 1\], a depth image"):
        rlds.open_dataset(tmp_path / "a", {"static": "rgb"}, "training", name="mine")
    with pytest.raises(ValueError, match=r"no camera was found.*uint16 image\[16, 16, 1\], a depth image"):
        open_written(tmp_path / "b", {"steps/observation/image": uint16})
    disguised = Field("", "image", "uint8", (16, 16, 1)), lambda e: [distances] * T
    with pytest.raises(ValueError, match=r"none of the first images of steps/observation/image.*a depth image\?"):
        open_written(tmp_path / "c", {"steps/observation/image": disguised})


def test_pixels_that_are_not_encoded_are_named(tmp_path):
    pixels = Field("", "tensor", "uint8", (4, 4, 3)), lambda e: np.zeros((T, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"uint8\[4, 4, 3\], pixels that are not encoded"):
        open_written(tmp_path, {"steps/observation/image": pixels})


def test_encoded_pictures_in_a_text_field_are_images_once_named(tmp_path):
    forms = itertools.cycle(["PNG", "JPEG", "WEBP", "BMP"])
    cells = text(values=lambda e: [picture(t, form=next(forms)) for t in range(T)])
    changes = {"steps/observation/image": None, "steps/observation/image/cam_0": cells}
    given = {"static": "image/cam_0"}
    dataset = open_written(tmp_path, changes, given=given)
    np.testing.assert_array_equal(dataset.images([4], ["static"])["static"][0], toy_rlds.image(4, 16))
    # Where nobody names it, the index holds no copy of the pictures.
    with pytest.raises(ValueError, match=r"which may hold encoded pictures: .*cam_0"):
        rlds.open_dataset(tmp_path, {}, "training", name="mine")


def test_images_outside_observation_can_be_named(tmp_path):
    image = Field("", "image", "uint8", (16, 16, 3)), lambda e: [picture(e)] * T
    changes = {"steps/observation/image": None, "steps/obs/rgb": image}
    with pytest.raises(ValueError, match=r"below steps/observation, which does not exist.*steps/obs/rgb"):
        open_written(tmp_path, changes)
    for name in ("../obs/rgb", "obs/rgb", "steps/obs/rgb"):
        assert rlds.open_dataset(tmp_path, {"static": name}, "training", name="mine").cameras == ("static",)


def test_images_of_several_sizes_are_refused_with_the_setting_that_helps(tmp_path):
    image = Field("", "image", "uint8", (None, None, 3)), lambda e: [picture(e, size=16 + 8 * (e == 3))] * T
    with pytest.raises(ValueError, match=r"several sizes.*\(16, 16\), \(24, 24\).*--data.image_size 224"):
        open_written(tmp_path, {"steps/observation/image": image})
    dataset = rlds.open_dataset(tmp_path, {}, "training", name="mine", options=rlds.Options(image_size=(20, 20)))
    assert dataset.images(range(3 * T, 4 * T), ["static"])["static"].shape == (T, 20, 20, 3)
    with pytest.raises(ValueError, match=r"the image is \(24, 24, 3\), expected \(16, 16, 3\).*--data.image_size"):
        frame_index.decode_image(picture(size=24, form="JPEG"), np.empty((16, 16, 3), np.uint8))


def test_a_dataset_of_any_robot_is_read_number_by_number(tmp_path):
    cameras = {
        "steps/observation/top": (Field("", "image", "uint8", (16, 16, 3)), lambda e: [picture(e)] * 8),
        "steps/observation/image": None,
        "steps/action": numbers(3, lambda e: np.c_[np.full(8, 0.2), np.arange(8) > 3, np.full(8, -1.0)]),
        "steps/observation/joints": numbers(2),
    }
    action = [
        {"name": "forward", "kind": "velocity", "quantity": "base", "unit": "m/s"},
        {"name": "claw", "kind": "binary", "quantity": "gripper", "low": 0, "high": 1, "open_at": "low"},
        {"name": "elbow", "quantity": "joint", "unit": "rad"},
    ]
    robot = {"action": action, "state": [{"name": "a"}, {"name": "b"}], "rate_hz": 10}
    described = {"robot": robot, "state": ["observation/joints"], "cameras": {"top": "top"}}
    (tmp_path / "mine.json").write_text(json.dumps({"mixture": {"mine": 1}, "datasets": {"mine": described}}))
    entry = mixtures.resolve(str(tmp_path / "mine.json")).datasets["mine"]
    dataset = open_written(tmp_path / "mine" / "1.0.0", cameras, given=entry)
    assert dataset.cameras == ("top",) and dataset.robot.binary == (1,) and dataset.robot.rate_hz == 10
    np.testing.assert_allclose(dataset.actions([0, 5])[:, 1], [1, -1])  # open where it is low
    np.testing.assert_allclose(dataset.actions([8])[0], [0, -1, -1])  # after the end: stopped, the rest as it was
    np.testing.assert_allclose(dataset.proprio([0]), [[0.01, 0.01]])
    assert dataset.statistics.mask == (True, False, True)
    described["robot"] = {"action": action[:2]}
    (tmp_path / "mine.json").write_text(json.dumps({"mixture": {"mine": 1}, "datasets": {"mine": described}}))
    with pytest.raises(ValueError, match="the expressions of its numbers must both be given"):
        mixtures.resolve(str(tmp_path / "mine.json"))
