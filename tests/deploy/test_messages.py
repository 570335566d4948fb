"""Observations as clients send them, and as they should not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from robovlms_jax.control.interface import Observation
from robovlms_jax.control.robot import CALVIN
from robovlms_jax.deploy import codec, conversation, messages

READER = messages.Reader(("static", "wrist"), max_pixels=10_000, state=True)
PICTURE = np.full((6, 8, 3), 7, np.uint8)
WHOLE = {
    "observation/image": PICTURE,
    "observation/wrist_image": PICTURE,
    "observation/state": np.zeros(7),
    "prompt": "open the drawer",
}


def test_names_of_several_kinds_of_clients_are_understood():
    droid = {"observation/exterior_image_1_left": PICTURE, "observation/wrist_image_left": PICTURE}
    nested = {"images": {"static": PICTURE, "wrist": PICTURE.transpose(2, 0, 1)}}
    harness = {"images": {"rgb_static": PICTURE, "rgb_gripper": PICTURE}, "states": [0.0] * 7}
    for pictures in (droid, nested, harness):
        step = READER.read({"state": np.zeros(7, np.float32), "prompt": np.array("open"), **pictures})
        for camera in ("static", "wrist"):
            np.testing.assert_array_equal(step.observation.images[camera], PICTURE)
        assert step.instruction == "open" and not step.restart
        assert step.observation.proprio.dtype == np.float32


def test_pictures_of_floats_are_rounded():
    step = READER.read(WHOLE | {"observation/image": np.full((6, 8, 3), 0.999, np.float32)})
    assert step.observation.images["static"].dtype == np.uint8
    assert (step.observation.images["static"] == 255).all()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"prompt": None}, "'prompt' is 'None'"),
        ({"prompt": "  "}, "say what the robot should do"),
        ({"prompt": 3}, "'prompt' is '3'"),
        ({"reset": "yes"}, "'reset' is 'yes'"),
        ({"observation/image": None}, r"picture 'observation/image' is NoneType"),
        ({"observation/image": PICTURE[0]}, r"picture 'observation/image' is uint8\[8, 3\]"),
        ({"observation/image": PICTURE.astype(int)}, "is int64"),
        ({"observation/image": PICTURE.astype(np.uint16)}, "is uint16"),
        ({"observation/image": PICTURE[..., :1]}, r"\[6, 8, 1\]"),
        ({"observation/image": PICTURE[:0]}, r"\[0, 8, 3\]"),
        ({"observation/image": np.zeros((101, 100, 3), np.uint8)}, "at most 10000 pixels"),
        ({"observation/image": np.full((6, 8, 3), np.nan)}, "not finite"),
        ({"observation/image": np.full((6, 8, 3), 1.5)}, "outside 0 ... 1"),
        ({"observation/state": np.array([np.nan] * 7)}, "'observation/state' has numbers that are not finite"),
        ({"observation/state": np.array([3e38] * 7)}, "above 1e"),
        ({"observation/state": np.zeros((1, 7))}, "with 1 axes"),
        ({"observation/state": "home"}, "'observation/state' is str"),
        ({"observation/state": np.zeros(1000)}, "at most 256"),
        ({"observation/state": None}, "this policy needs the robot's state"),
        ({"executed": np.full((2, 7), np.inf)}, "'executed' has numbers"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(change, what):
    with pytest.raises(ValueError, match=what):
        READER.read(WHOLE | change)


def test_a_missing_picture_is_named_with_what_was_found():
    with pytest.raises(
        ValueError, match=r"no 'wrist' picture: expected 'observation/wrist_image'.*found \['observation/image'"
    ):
        READER.read({key: value for key, value in WHOLE.items() if "wrist" not in key})


def test_actions_out_of_the_robots_bounds_are_clipped_and_named_and_others_never_leave():
    actions = np.zeros((4, 7), np.float32)
    actions[2, 1] = 1.5
    clipped, names = messages.within_bounds(actions, CALVIN, 4)
    assert names == ["y"] and clipped[2, 1] == 1.0
    for bad in (np.full((4, 7), np.nan), np.zeros((3, 7)), np.zeros(7)):
        with pytest.raises(ValueError, match="They are not sent"):
            messages.within_bounds(bad, CALVIN, 4)


def test_actions_for_vla_eval_are_metres_and_radians():
    np.testing.assert_allclose(messages.in_si_units(np.ones(7), CALVIN), [0.02] * 3 + [0.05] * 3 + [1.0])


def test_readings_of_sensors_come_over_the_line_and_silent_ones_do_not():
    reader = dataclasses.replace(READER, sensors={"torque": (2,), "cloud": (None, 3), "imu": (4, 6)})
    assert "observation/sensors/torque" in set(reader.keys())
    talk = conversation.Conversation()
    talk.instruction = "open"
    cloud = np.full((5, 3), np.nan)
    seen = Observation(
        {"static": PICTURE, "wrist": PICTURE}, np.zeros(7), sensors={"torque": [1, 2], "cloud": cloud, "imu": None}
    )
    step = reader.read(codec.unpack(talk.request(seen), codec.Bounds()))
    assert set(step.observation.sensors) == {"torque", "cloud"}
    np.testing.assert_array_equal(step.observation.sensors["torque"], np.float32([1, 2]))
    np.testing.assert_array_equal(step.observation.sensors["cloud"], cloud)
    for wrong, what in (
        ({"torque": np.zeros(3)}, r"'observation/sensors/torque' is float64\[3\]; expected numbers \[2\]"),
        ({"cloud": np.zeros((5, 2))}, r"expected numbers \[any, 3\]"),
        ({"imu": "still"}, r"is str; expected numbers \[4, 6\]"),
        ({"torque": np.array([0, 3e38])}, "has finite numbers above"),
    ):
        with pytest.raises(ValueError, match=what):
            reader.read(WHOLE | {f"observation/sensors/{name}": x for name, x in wrong.items()})


def test_a_sensor_that_nobody_reads_is_said_once_however_many_a_client_sends(caplog):
    reader = messages.Reader(("static", "wrist"), sensors={"torque": (5,)})
    for _ in range(2):
        step = reader.read(WHOLE | {"observation/sensors/torqe": np.zeros(5), "observation/sensors/torque": np.ones(5)})
    assert set(step.observation.sensors) == {"torque"}
    assert [record.getMessage() for record in caplog.records] == [
        "a client sends 'observation/sensors/torqe', which this policy does not read; it reads "
        "['observation/sensors/torque']"
    ]
    reader.read(WHOLE | {f"observation/sensors/{i}": np.zeros(1) for i in range(100)})
    assert len(caplog.records) == messages.MAX_UNKNOWN
