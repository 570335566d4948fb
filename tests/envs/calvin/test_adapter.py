"""The CALVIN adapter, driven with a fake checkout that answers with what the real simulator said.

`recorded_calvin_info.json` holds the real `get_info()` before and after three demonstrated tasks; its contact points
end with the last field that is read.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest

from robovlms_jax.envs.calvin import adapter as calvin
from robovlms_jax.envs.calvin import initial_states, task_chains, tasks
from robovlms_jax.envs.calvin import version as calvin_version
from robovlms_jax.envs.vector import EnvError, EnvPool

RECORDED = pathlib.Path(__file__).with_name("recorded_calvin_info.json")
INFOS = json.loads(RECORDED.read_text())
STAY = np.array([0, 0, 0, 0, 0, 0, 1.0])

# The surface of calvin_env that the adapter relies on. The simulator renders in reset and step, as the real one does.
SIMULATOR = """
    import json, os, time, types
    import cv2, git, gym, gym.utils.seeding, quaternion  # all of which the adapter replaces
    from rich.traceback import install  # old versions do, and it may be missing
    import numpy as np

    STEPS_TO_SUCCESS = 3
    BUTTON_IS_SOUND = {sound}

    class Button:
        def __init__(self):
            self.light = types.SimpleNamespace(get_state=lambda: 0)
            self.reset()

        def reset(self, state=None):
            on = self.light.get_state() if BUTTON_IS_SOUND else 0
            self.state = types.SimpleNamespace(value=on)

    class PlayTableSimEnv(gym.Env):
        def __init__(self, cameras, scene_cfg, robot_cfg, use_egl, show_gui, use_vr, use_scene_info):
            assert use_scene_info and not show_gui and not use_vr
            assert os.path.isabs(scene_cfg["data_path"]) and os.path.isdir(scene_cfg["data_path"])
            assert robot_cfg["gripper_joint_ids"] == [9, 11]
            self.np_random, _ = gym.utils.seeding.np_random(0)
            self.cameras = list(cameras)
            self.scene = types.SimpleNamespace(buttons=[Button()])
            self.frames = self.steps = 0
            self.recordings = json.load(open({recorded!r}))
            print("fake bullet, egl", use_egl)

        def reset(self, robot_obs=None, scene_obs=None):
            task = "open_drawer" if robot_obs is None else list(self.recordings)[int(robot_obs[0])]
            self.steps, self.recorded = 0, self.recordings[task]
            self.scene_obs = self.np_random.uniform(size=24) if scene_obs is None else scene_obs
            return self.get_obs()

        def step(self, action):
            if len(action) == 3:  # an absolute pose
                self.pose, action = action, np.concatenate(action)
            assert action[6] in (-1, 1)
            if action[0] == 9:
                os._exit(139)
            if action[0] == 8:
                time.sleep(60)
            self.steps += 1
            return self.get_obs(), 0, False, self.get_info()

        def get_obs(self):
            images = {{"static": np.zeros((200, 200, 3), np.uint8), "gripper": np.zeros((84, 84, 3), np.uint8)}}
            self.frames += len(self.cameras)
            return {{"rgb_obs": {{"rgb_" + name: images[name] for name in self.cameras}}, **self.get_state_obs()}}

        def get_state_obs(self):
            robot_obs = np.zeros(15)
            robot_obs[0] = self.frames  # for the test to see
            if hasattr(self, "pose"):
                robot_obs[1:8] = np.concatenate(self.pose)
            return {{"robot_obs": robot_obs, "scene_obs": self.scene_obs}}

        def get_info(self):
            return self.recorded["end" if self.steps >= STEPS_TO_SUCCESS else "start"]
"""

# Just enough of the two configuration packages to read the fake checkout's files.
OMEGACONF = """
    import yaml

    class Config(dict):
        # a dictionary with attributes; "${name}" stands for an entry of the outermost one
        __getattr__ = lambda self, key: self[key]
        __setattr__ = dict.__setitem__

        def __getitem__(self, key):
            value = dict.__getitem__(self, key)
            refers = isinstance(value, str) and value.startswith("${")
            return self.__dict__["root"][value[2:-1]] if refers else value

    def wrap(value, root=None):
        if not isinstance(value, dict):
            return value
        config = Config()
        config.__dict__["root"] = root = config if root is None else root
        for key in value:
            config[key] = wrap(dict.__getitem__(value, key), root)
        return config

    class OmegaConf:
        load = staticmethod(lambda path: wrap(yaml.safe_load(open(path))))
        create = staticmethod(wrap)
        merge = staticmethod(lambda *parts: wrap({key: part[key] for part in parts for key in part}))
"""
HYDRA = """
    import importlib, types

    def instantiate(config, **kwargs):
        module, name = config["_target_"].rsplit(".", 1)
        arguments = {key: config[key] for key in config if key != "_target_"} | kwargs
        return getattr(importlib.import_module(module), name)(**arguments)

    utils = types.SimpleNamespace(instantiate=instantiate)
"""
ENV_YAML = """
    _target_: calvin_env.envs.play_table_env.PlayTableSimEnv
    cameras: ${cameras}
    scene_cfg: ${scene}
    robot_cfg: ${robot}
"""


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Iterator[pathlib.Path]:
    """A fake calvin_env checkout, and fakes of the packages it needs in the child's path."""
    folder = tmp_path_factory.mktemp("calvin")
    root = folder / "checkout"
    write(root / "calvin_env" / "__init__.py", "")
    write(root / "calvin_env" / "envs" / "__init__.py", "")
    write(root / "calvin_env" / "envs" / "play_table_env.py", SIMULATOR.format(recorded=str(RECORDED), sound=True))
    (root / "data").mkdir()
    write(root / "conf" / "env" / "play_table_env.yaml", ENV_YAML)
    write(root / "conf" / "robot" / "panda.yaml", "gripper_joint_ids: [9, 10]")
    write(root / "conf" / "robot" / "panda_longer_finger.yaml", "defaults: [panda]\ngripper_joint_ids: [9, 11]")
    write(root / "conf" / "scene" / "calvin_scene_D.yaml", "data_path: data")
    for camera in ("static", "gripper"):
        write(root / "conf" / "cameras" / "cameras" / f"{camera}.yaml", f"name: {camera}")
    packages = folder / "packages"
    write(packages / "omegaconf.py", OMEGACONF)
    write(packages / "hydra.py", HYDRA)
    write(packages / "pybullet.py", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(packages))
        yield root


@pytest.fixture(scope="module")
def env(checkout):
    """One process for all tests; those that kill it restart it."""
    env = calvin.calvin_env(str(checkout), timeout_s=1.0)
    yield env
    env.close()


def test_the_adapter_delivers_observations_and_renders_only_then(env):
    assert env.name == "CALVIN (scene D)"
    robot_obs, scene_obs = initial_states.initial_state(task_chains.official_chains()[0].condition)
    env.reset(robot_obs, scene_obs)
    frames = env.info["robot_obs"][0]
    for _ in range(5):
        env.step(STAY)
    assert env.info["robot_obs"][0] == frames
    seen = env.observe()
    assert {name: image.shape for name, image in seen.images.items()} == {"static": (200, 200, 3), "wrist": (84, 84, 3)}
    assert all(image.dtype == np.uint8 for image in seen.images.values())
    assert seen.proprio.shape == (15,)
    env.step(STAY)
    assert env.info["robot_obs"][0] == frames + 2  # one per camera


def test_states_reach_the_simulator_and_the_neutral_reset_too(env):
    _, scene_obs = initial_states.initial_state(task_chains.official_chains()[0].condition)
    env.reset(np.zeros(15), scene_obs)
    np.testing.assert_array_equal(env.info["scene_obs"], scene_obs)
    env.reset()
    assert env.info["scene_obs"].shape == (24,)


@pytest.mark.parametrize("task", INFOS)
def test_what_the_real_simulator_said_is_recognised(env, task):
    env.reset(np.full(15, list(INFOS).index(task)), np.zeros(24))
    start = env.info
    for step in range(3):
        assert calvin.completed_in_each([start], [env.info]) == [set()], step
        env.step(STAY)
    assert calvin.completed_in_each([start], [env.info]) == [{task}]


def test_an_absolute_action_reaches_the_simulator_as_a_pose(checkout):
    env = calvin.calvin_env(str(checkout), actions="absolute")
    assert env.about["actions"] == "absolute"
    env.reset()
    pose = np.array([0.1, -0.2, 0.5, 3.0, 0.0, 1.5, -1.0])
    env.step(pose)
    np.testing.assert_array_equal(env.info["robot_obs"][1:8], pose)
    env.close()
    with pytest.raises(ValueError, match="actions='joint' must be 'relative' or 'absolute'"):
        calvin.calvin_env(str(checkout), actions="joint")


@pytest.mark.parametrize("absolute", [False, True])
def test_the_callers_action_is_left_alone(absolute):
    """calvin_env before November 2022 scales what it is given in place."""
    env = object.__new__(calvin.CalvinEnv)
    env._absolute = absolute
    env._env = mock.Mock(step=lambda action: action[0].fill(0) if absolute else action.__imul__(0.02))
    action = np.arange(7) / 6
    env.step(action)
    np.testing.assert_array_equal(action, np.arange(7) / 6)


def git(root: pathlib.Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", *identity, "-C", str(root), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_version_with_the_broken_button_is_told_apart_and_warned_of_once(checkout, env, tmp_path, caplog):
    assert env.about["button"] == calvin_version.SOUND_BUTTON
    assert env.about["calvin_env"] == "unknown"  # not a git checkout
    old = tmp_path / "old"
    shutil.copytree(checkout, old)
    write(old / "calvin_env" / "envs" / "play_table_env.py", SIMULATOR.format(recorded=str(RECORDED), sound=False))
    git(old, "init", "-q")
    git(old, "add", ".")
    git(old, "commit", "-qm", "old")
    commit = git(old, "rev-parse", "HEAD")
    pool = EnvPool([calvin.calvin_env(str(old)), calvin.calvin_env(str(old))])
    assert pool.about["button"] == calvin_version.BROKEN_BUTTON
    assert pool.about["calvin_env"] == commit
    pool.close()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert commit in warning and f"git -C {old} checkout main" in warning and "turn_off_led" in warning
    write(old / "conf" / "robot" / "panda.yaml", "gripper_joint_ids: [1, 2]")
    assert calvin_version.commit(old) == f"{commit} with local changes"
    assert calvin_version.commit(old / "conf") == "unknown"  # a folder of another project's checkout


def test_contacts_are_sorted_into_columns():
    raw = INFOS["lift_pink_block_table"]["end"]
    info = calvin.scene_info(raw, calvin._contact_columns(raw))
    touched = {(row, tasks.BODIES[column]) for row, column in np.argwhere(info["contacts"])}
    # the pink block hangs in the gripper, red and blue stand on the table
    assert touched == {(0, "pink_block"), (1, "base"), (2, "base"), (3, "robot")}
    assert info["block_position"][2, 2] > 0.5


def test_a_scene_with_an_unknown_table_part_is_refused():
    raw = json.loads(json.dumps(INFOS["open_drawer"]["start"]))
    raw["scene_info"]["fixed_objects"]["table"]["links"]["lid_link"] = 7
    with pytest.raises(ValueError, match="unknown link 'lid_link'"):
        calvin._contact_columns(raw)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.full(7, np.nan), "must be 7 finite numbers"),
        (np.zeros(6), "must be 7 finite numbers"),
        (np.array([0, 0, 0, 0, 0, 0, 0.4]), r"action\[6\]=0.4 must be exactly"),
    ],
)
def test_a_wrong_action_is_refused_before_it_reaches_the_simulator(env, action, message):
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step(action)
    env.step(STAY)


def test_a_wrong_state_is_refused(env):
    with pytest.raises(ValueError, match=r"scene_obs has shape \(23,\), expected \(24,\)"):
        env.reset(np.zeros(15), np.zeros(23))


@pytest.mark.parametrize(("x", "message"), [(9, "exit code 139"), (8, "step took longer than 1 s")])
def test_a_simulator_that_dies_or_hangs_comes_back(env, x, message):
    env.reset()
    with pytest.raises(EnvError, match=rf"(?s){message}.*fake bullet, egl False"):
        env.step(np.array([x, 0, 0, 0, 0, 0, 1.0]))
    env.restart()
    env.reset()
    assert env.observe().images["static"].shape == (200, 200, 3)


def test_a_published_splits_stored_configuration_wins(checkout, tmp_path):
    stored = """
        data_path: /somewhere/else
        env:
          _target_: calvin_env.envs.play_table_env.PlayTableSimEnv
          cameras: ${cameras}
          scene_cfg: ${scene}
          robot_cfg: ${robot}
        cameras: {static: {name: static}, gripper: {name: gripper}, tactile: {name: tactile}}
        scene: {data_path: /somewhere/else}
        robot: {gripper_joint_ids: [9, 11]}
    """
    write(tmp_path / "task_ABC_D" / "validation" / ".hydra" / "merged_config.yaml", stored)
    env = calvin.calvin_env(str(checkout), split=str(tmp_path / "task_ABC_D"))
    assert env.name == "CALVIN (task_ABC_D)"
    env.reset()
    assert set(env.observe().images) == {"static", "wrist"}  # and no tactile camera
    env.close()
    with pytest.raises(FileNotFoundError, match=r"no stored configuration.*merged_config\.yaml"):
        calvin.calvin_env(str(checkout), split=str(tmp_path))


def test_what_is_missing_is_named(checkout, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="calvin_root is empty"):
        calvin.calvin_env("")
    with pytest.raises(FileNotFoundError, match="no calvin_env checkout at"):
        calvin.calvin_env(str(tmp_path / "nowhere"))
    (tmp_path / "calvin" / "calvin_models").mkdir(parents=True)
    (tmp_path / "calvin" / "calvin_env").mkdir()
    with pytest.raises(FileNotFoundError, match="git submodule update --init calvin_env"):
        calvin.calvin_env(str(tmp_path / "calvin"))
    with pytest.raises(ValueError, match="unknown scene 'E'"):
        calvin.calvin_env(str(checkout), scene="E")
    monkeypatch.setattr(calvin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lacks: pybullet, hydra-core, omegaconf, scipy.*docs/calvin\.md"):
        calvin.CalvinEnv(str(checkout))
    shutil.copytree(checkout / "calvin_env", tmp_path / "installed" / "calvin_env")
    with pytest.raises(FileNotFoundError, match="lacks `data` or `conf`"):
        calvin.find_checkout(str(tmp_path / "installed"))


def test_the_checkout_is_found_inside_the_calvin_repository(checkout):
    assert calvin.find_checkout(str(checkout)) == checkout.resolve()
    outer = checkout.parent / "calvin"
    shutil.copytree(checkout, outer / "calvin_env")
    assert calvin.find_checkout(str(outer)) == outer / "calvin_env"


def test_validation_sentences_come_from_the_checkout(tmp_path):
    path = tmp_path / "calvin_models" / "conf" / "annotations" / "new_playtable_validation.yaml"
    with pytest.raises(FileNotFoundError, match=r"github\.com/mees/calvin, not with calvin_env"):
        calvin.validation_instructions(str(tmp_path))
    write(path, "\n".join(f"{task}: ['please {task}', other]" for task in tasks.TASKS))
    assert calvin.validation_instructions(str(tmp_path))["stack_block"] == "please stack_block"
    write(path, "\ufeff" + "\n".join(f"{task}: {task} now" for task in tasks.TASKS))  # no lists, byte order mark
    assert calvin.validation_instructions(str(tmp_path))["stack_block"] == "stack_block now"
    for cell in ("[]", "[3]", "null", '[""]', "{a: b}"):
        write(path, "\n".join(f"{task}: {cell if task == 'stack_block' else '[x]'}" for task in tasks.TASKS))
        with pytest.raises(ValueError, match=r"stack_block has .*, expected a list of sentences"):
            calvin.validation_instructions(str(tmp_path))
    write(path, "- stack")
    with pytest.raises(ValueError, match="holds list, expected `task"):
        calvin.validation_instructions(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"new_playtable\.yaml not found"):
        calvin.training_instructions(str(tmp_path))
    write(path.with_name("new_playtable.yaml"), "\n".join(f"{task}: ['{task} a', '{task} b ']" for task in tasks.TASKS))
    assert calvin.training_instructions(str(tmp_path))["stack_block"] == ("stack_block a", "stack_block b")
    write(path, "stack_block: [stack]")
    with pytest.raises(ValueError, match=r"lacks a sentence for 33 of the 34 tasks, e\.g\. close_drawer"):
        calvin.validation_instructions(str(tmp_path))
