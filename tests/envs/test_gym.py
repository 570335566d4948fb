"""The Gymnasium adapter, on a stand-in for gymnasium that has what the adapter uses of it."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest

from robovlms_jax.control.robot import Camera, Dimension, RobotSpec
from robovlms_jax.envs import gym, vector
from tests.envs import line_world
from tests.envs.line_world import LAYOUT, LINE


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", line_world.gymnasium())


def test_an_environment_is_driven_by_names_and_its_own_verdict():
    env = gym.GymEnv(LAYOUT, LINE)
    env.reset(seed=4)
    first = env.observe()
    assert first.images["top"].shape == (6, 8, 3) and first.proprio.dtype == np.float32
    assert first.proprio.tolist() == pytest.approx([np.random.default_rng(4).uniform(), 3.0])
    env.reset(seed=4)
    np.testing.assert_array_equal(env.observe().proprio, first.proprio)
    assert gym.completed_in_each([env.info], [env.info]) == [set()]
    while env.observe().proprio[0] < 2.6:
        env.step(np.array([9.0]))  # clipped to the environment's bounds
    env.step(np.array([2.9 - env.observe().proprio[0]]))
    assert env.info["success"] and gym.completed_in_each([env.info], [env.info]) == [{"Line-v0"}]
    assert env.about == {"gymnasium": "1.0"}
    with pytest.raises(ValueError, match="must be 1 finite numbers"):
        env.step(np.array([np.nan]))
    with pytest.raises(ValueError, match="starts from seeds"):
        env.reset(np.zeros(15))


def test_an_episode_that_the_environment_ended_stands_still():
    env = gym.GymEnv(LAYOUT, LINE)
    for _ in range(9):
        env.step(np.ones(1))
    assert env.info["terminated"] and env.observe().images["top"].max() == env._env.steps < 9
    env.reset(seed=0)
    assert not env.info["terminated"]


def test_sentences_and_verdicts_may_come_from_the_environment():
    layout = gym.Layout(**vars(LAYOUT) | {"instruction_key": "sentence", "success": "terminated"})
    env = gym.GymEnv(layout, LINE)
    env.reset(seed=7)
    assert env.info["instruction"] == "begin at 7"
    env.step(np.ones(1))
    assert env.info["instruction"] == "go on" and not env.info["success"]
    with pytest.raises(ValueError, match=r"info has no 'words', which instruction_key names; it has \['sentence'\]"):
        gym.GymEnv(gym.Layout(**vars(LAYOUT) | {"instruction_key": "words"}), LINE)


def test_a_box_of_pixels_is_a_camera_and_rendering_is_another():
    blind = RobotSpec("line", 10.0, LINE.cameras, LINE.action)
    env = gym.GymEnv(gym.Layout("Line-v0", {"top": "."}, options='{"plain": true}'), blind)
    assert env.observe().proprio is None and env.observe().images["top"].max() == 0
    rendered = gym.GymEnv(gym.Layout("Line-v0", {"top": "render"}), blind)
    assert rendered.observe().images["top"].max() == 200
    assert rendered._env.render_mode == "rgb_array"
    with pytest.raises(ValueError, match="camera 'top' is render:head, which MuJoCo environments alone have"):
        gym.GymEnv(gym.Layout("Line-v0", {"top": "render:head"}), blind)


class Watched(line_world.Line):
    """The point with MuJoCo's renderer: its picture says through which camera, at which azimuth, at which height."""

    def __init__(self, **options):
        super().__init__(**options)
        self.mujoco_renderer = types.SimpleNamespace(viewer=None, camera_id=-1)
        self.model = types.SimpleNamespace(ncam=1, camera=lambda number: types.SimpleNamespace(name="head"))

    def render(self):
        if self.mujoco_renderer.viewer is None:
            free = types.SimpleNamespace(azimuth=10.0, lookat=np.array([0.0, 0.0, 5.0]))
            self.mujoco_renderer.viewer = types.SimpleNamespace(cam=free)
        seen = self.mujoco_renderer.viewer.cam
        told = self.mujoco_renderer.camera_id + 1, seen.azimuth, seen.lookat[2]
        return np.broadcast_to(np.array(told, np.uint8), (6, 8, 3))


def test_a_mujoco_world_is_seen_through_its_cameras_and_from_anywhere(monkeypatch):
    monkeypatch.setattr(line_world, "Line", Watched)
    robot = RobotSpec("line", 10.0, tuple(Camera(name, 6, 8) for name in ("a", "b", "c")), LINE.action)
    cameras = {"a": "render:azimuth=90,lookat=0 1 7", "b": "render", "c": "render:head"}
    env = gym.GymEnv(gym.Layout("Line-v0", cameras), robot)
    for _ in range(2):  # the free camera is put back each time
        assert {name: image[0, 0].tolist() for name, image in env.observe().images.items()} == {
            "a": [0, 90, 7],
            "b": [0, 10, 5],
            "c": [1, 10, 5],
        }
    for wrong in ("azimuth=left", "azimuth=1 2", "roll=3", "lookat=1 2"):
        cameras = {"a": f"render:{wrong}", "b": "render", "c": "render"}
        with pytest.raises(ValueError, match=rf"camera 'a' is render:{wrong}, where '{wrong}' is none of distance=M"):
            gym.GymEnv(gym.Layout("Line-v0", cameras), robot)


@pytest.mark.parametrize(
    ("layout", "robot", "message"),
    [
        ({"state": ("place",)}, {}, r"state of Line-v0 \(keys \['place'\]\) has 1 numbers, robot 'line' has 2"),
        ({"state": ("speed",)}, {}, r"the observation has no 'speed'; it has \['goal', 'pixels', 'place'\]"),
        ({"cameras": {"side": "pixels"}}, {}, r"has cameras \['side'\], robot 'line' has \['top'\]"),
        ({}, {"cameras": (Camera("top", 6, 9),)}, "camera 'top' of Line-v0 has width 8, the robot's has 9"),
        ({}, {"action": LINE.action * 2}, "names twice"),
        ({}, {"action": (Dimension("push", "m/s", "velocity", "base", "", -2.0, 2.0),)}, r"lies in \[-2, 2\], that of"),
        ({}, {"action": (*LINE.action, Dimension("turn"))}, r"has 1 action numbers, robot 'line' has 2"),
        ({"cameras": {"top": "goal"}}, {}, r"camera 'top' of Line-v0 gives float64\[\], expected uint8"),
        ({"options": "goal=3"}, {}, "options of Line-v0 are not JSON"),
        ({"id": "Point-v0"}, {}, "Gymnasium cannot make 'Point-v0'.*Name the module that registers it"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(layout, robot, message):
    with pytest.raises(ValueError, match=message):
        gym.GymEnv(gym.Layout(**{**vars(LAYOUT), **layout}), RobotSpec(**{**vars(LINE), **robot}))


def test_missing_modules_are_named(monkeypatch):
    with pytest.raises(ImportError, match="Line-v0 needs the module not_there"):
        gym.GymEnv(gym.Layout(**{**vars(LAYOUT), "imports": ("not_there",)}), LINE)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install .*\[gym\]"):
        gym.GymEnv(LAYOUT, LINE)


def test_a_layout_is_read_from_a_file_and_wrong_fields_are_named():
    content = LAYOUT.to_json()
    assert gym.Layout.from_json(json.loads(json.dumps(content))) == LAYOUT
    for change, message in (
        ({"camera": {}}, r"mine.json has unknown fields \['camera'\]"),
        ({"state": "place"}, "mine.json: state='place'; expected a list of names"),
        ({"cameras": ["top"]}, r"mine.json: cameras=\['top'\]"),
        ({"id": 3}, "mine.json: id=3 is a int; expected text"),
    ):
        with pytest.raises(ValueError, match=message):
            gym.Layout.from_json(content | change, "mine.json")
    with pytest.raises(ValueError, match="expected an object with 'id' and 'cameras'"):
        gym.Layout.from_json({"id": "x"})


def test_several_make_a_pool():
    pool = vector.EnvPool([gym.GymEnv(LAYOUT, LINE) for _ in range(2)])
    infos = pool.reset([0, 1], [{"seed": 1}, {"seed": 2}])
    assert not any(info["success"] for info in infos) and pool.name == "Gymnasium (Line-v0)"
    assert len(pool.step([0, 1], np.zeros((2, 1)))) == 2
