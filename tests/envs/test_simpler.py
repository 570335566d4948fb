"""The SimplerEnv adapter, driven with a fake package of the real one's surface and shapes."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from robovlms_jax.control.interface import ActionChunk
from robovlms_jax.envs import simpler
from robovlms_jax.envs.vector import EnvPool
from robovlms_jax.evaluation import chains
from robovlms_jax.evaluation.rollout import run

LOW = np.array([-0.03, -0.04, -0.03, -0.08, -0.09, -0.2])
HIGH = np.array([0.03, 0.04, 0.04, 0.08, 0.09, 0.2])


class World:
    """What `simpler_env.make` returns, gymnasium's wrappers included: methods of the task only on `unwrapped`."""

    def __init__(self, task: str, obs_mode: str):
        assert obs_mode == "rgbd"
        self.task, self.actions, self.resets, self.stage = task, [], [], 0
        self.unwrapped = types.SimpleNamespace(
            get_language_instruction=lambda: ["open top drawer", "place apple into top drawer"][self.stage],
            is_final_subtask=lambda: self.stage == 1 or not task.endswith("closed_top_drawer"),
            advance_to_next_subtask=lambda: setattr(self, "stage", 1),
        )

    def reset(self, seed, options):
        self.resets.append((seed, options))
        self.actions, self.stage = [], 0
        return self._obs(), {}

    def step(self, action):
        assert action.shape == (7,)
        self.actions.append(action)
        count = len(self.actions)
        stats = {"is_src_obj_grasped": np.bool_(count >= 2), "is_drawer_open": count >= 3, "qpos": 0.05 * count}
        return self._obs(), 0.0, count in (4, 60), False, {"episode_stats": stats, "success": False}

    def _obs(self):
        shape = (480, 640, 3) if self.task.startswith("widowx") else (512, 640, 3)
        camera = "3rd_view_camera" if self.task.startswith("widowx") else "overhead_camera"
        return {"image": {camera: {"rgb": np.full(shape, len(self.actions), np.uint8)}}}


@pytest.fixture
def make(monkeypatch):
    """Builds adapters around fake worlds; `env.world` is the fake."""
    monkeypatch.setattr(simpler, "_import_simpler", lambda: types.SimpleNamespace(make=World))

    def build(task: str, **kwargs) -> simpler.SimplerEnv:
        env = simpler.SimplerEnv(task, low=LOW, high=HIGH, **kwargs)
        env.world = env._env
        return env

    return build


def test_a_missing_table_is_named_since_sapien_only_logs_it(monkeypatch, tmp_path):
    class Scanned(World):
        stage_name = None

        def __init__(self, task, obs_mode):
            super().__init__(task, obs_mode)
            self.unwrapped.scene_root, self.unwrapped.scene_name = tmp_path, self.stage_name

    monkeypatch.setattr(simpler, "_import_simpler", lambda: types.SimpleNamespace(make=Scanned))
    bounds = {"low": LOW, "high": HIGH}
    with pytest.raises(FileNotFoundError, match=r"bridge_table_1_v1.glb is missing, and without it there is no table"):
        simpler.SimplerEnv("widowx_stack_cube", **bounds)
    with pytest.raises(FileNotFoundError, match=r"google_pick_coke_can_1_v4.glb is missing"):
        simpler.SimplerEnv("google_robot_pick_coke_can", **bounds)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "bridge_table_1_v1.glb").touch()
    assert "numpy" in simpler.SimplerEnv("widowx_stack_cube", **bounds).about
    Scanned.stage_name = "dummy_tabletop"  # drawn by the package itself
    simpler.SimplerEnv("google_robot_pick_coke_can", **bounds)


def act(*arm: float, gripper: float = 1.0) -> np.ndarray:
    return np.array([*arm, *[0.0] * (6 - len(arm)), gripper])


def test_actions_are_unnormalised_and_rotations_become_axis_angle(make):
    env = make("widowx_stack_cube")
    env.reset(layout=0)
    env.step(act(-1, 1, 0, 0.5, -1, 1))
    sent = env.world.actions[0]
    np.testing.assert_allclose(sent[:3], [-0.03, 0.04, 0.005])  # 0 is the middle of low and high, not zero
    euler = [0.04, -0.09, 0.2]
    np.testing.assert_allclose(sent[3:6], Rotation.from_euler("xyz", euler).as_rotvec(), atol=1e-12)
    assert sent[6] == 1.0  # the gripper is not un-normalised


@pytest.mark.parametrize(
    ("task", "shape"), [("widowx_spoon_on_towel", (480, 640, 3)), ("google_robot_pick_coke_can", (512, 640, 3))]
)
def test_each_robots_own_camera_is_the_static_one(make, task, shape):
    env = make(task)
    with pytest.raises(RuntimeError, match="before reset"):
        env.observe()
    env.reset()
    assert env.name == f"SimplerEnv ({task})"
    seen = env.observe()
    assert seen.images["static"].shape == shape
    assert set(seen.images) == {"static"}
    env.step(act())
    assert env.observe().images["static"][0, 0, 0] == 1


def test_layouts_are_named_as_each_task_wants_them(make):
    bridge, can, drawer = (
        make(f"{name}") for name in ("widowx_stack_cube", "google_robot_pick_coke_can", "google_robot_open_top_drawer")
    )
    for env in (bridge, can, drawer):
        env.reset(layout=26)
    assert bridge.world.resets == [(26, {"obj_init_options": {"episode_id": 2}})]
    ((seed, options),) = can.world.resets
    assert seed == 26
    np.testing.assert_allclose(options["obj_init_options"]["init_xy"], [-0.35, 0.09])  # second of the 5 x 5 grid
    assert drawer.world.resets == [(26, {})]
    with pytest.raises(ValueError, match=r"numbered layouts: reset\(layout=\.\.\.\)"):
        bridge.reset(np.zeros(15), np.zeros(24))


def commands(gripper: simpler.Gripper, wishes: str) -> list[float]:
    """Commands for a string of wishes, "o" open, "c" closed."""
    gripper.reset()
    return [gripper(wish == "o") for wish in wishes]


def test_widowx_gripper_follows_at_once_and_upstreams_opens_late():
    assert commands(simpler.WidowXGripper(), "oocoo") == [1, 1, -1, 1, 1]
    assert commands(simpler.UpstreamWidowXGripper(), "oocoo") == [-1, 1, -1, -1, 1]


def test_google_gripper_repeats_a_change_for_15_steps():
    assert commands(simpler.GoogleGripper(), "oo" + "c" * 20) == [0, 0] + [1] * 15 + [0] * 5
    # closed from the very first step: the episode begins open, so that is a change
    assert commands(simpler.GoogleGripper(), "c" * 17) == [1] * 15 + [0] * 2


def test_google_gripper_does_not_lose_a_change_of_mind():
    got = commands(simpler.GoogleGripper(), "o" + "c" * 5 + "o" * 30)
    assert got == [0] + [1] * 15 + [-1] * 15 + [0] * 5
    # one flicker within a running change is over before it could act
    assert commands(simpler.GoogleGripper(), "ccoc" + "c" * 20) == [1] * 15 + [0] * 9


def test_upstreams_google_gripper_keeps_its_defects():
    gripper = simpler.UpstreamGoogleGripper()
    assert commands(gripper, "cccc") == [0, 0, 0, 0]  # what the first step wants is ignored
    assert commands(gripper, "occcc") == [0, 1, 1, 0, 0]
    assert commands(gripper, "ocoooo") == [0, 1, 1, 0, 0, 0]  # opening was asked for meanwhile and is lost
    assert commands(gripper, "oocco") == [0, 0, 1, 1, -1]


def test_the_gripper_starts_each_episode_anew(make):
    env = make("google_robot_move_near", gripper="upstream")
    for _ in range(2):
        env.reset()
        for wish in (1, -1):
            env.step(act(gripper=wish))
        assert [action[6] for action in env.world.actions] == [0, 1]


def test_success_counts_at_the_last_step_or_latched(make):
    class Still:
        def reset(self, slots, instructions):
            self.instructions = instructions

        def act(self, observations, slots):
            return [ActionChunk(act()[None])] * len(slots)

    def outcome(latched):
        (trial,) = chains.simpler_trials("widowx_carrot_on_plate", 1)
        criterion = chains.simpler_criterion("widowx_carrot_on_plate", latched=latched)
        (result,) = run(policy, EnvPool([make("widowx_carrot_on_plate")]), [trial], criterion)
        return result

    policy = Still()
    assert (outcome(True).success, outcome(True).steps) == ((True,), (4,))
    last = outcome(False)  # the fake reports success at steps 4 and 60
    assert (last.success, last.steps) == ((True,), (60,))
    assert last.partial == {"is_src_obj_grasped": 1.0, "is_drawer_open": 1.0, "qpos": 3.0}
    assert policy.instructions == ["open top drawer"]  # the environment's own words count


def test_a_passing_success_does_not_count_at_the_last_step(make):
    env = make("widowx_carrot_on_plate")
    env.reset()
    verdicts = []
    for _ in range(5):
        env.step(act())
        verdicts.append(simpler.completed_in_each([{}], [env.info]) == [{"widowx_carrot_on_plate"}])
    assert verdicts == [False, False, False, True, False]


def test_an_open_drawer_leads_to_the_second_stage(make):
    env = make("google_robot_place_apple_in_closed_top_drawer")
    env.reset()
    instructions = []
    for _ in range(4):
        env.step(act())
        instructions.append(env.info["instruction"])
    assert instructions == ["open top drawer"] * 2 + ["place apple into top drawer"] * 2


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.full(7, np.inf), "must be 7 finite numbers"),
        (np.zeros(8), "must be 7 finite numbers"),
        (act(gripper=0.0), r"action\[6\]=0.0 must be exactly"),
    ],
)
def test_wrong_actions_are_refused(make, action, message):
    env = make("widowx_stack_cube")
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step(action)
    assert env.world.actions == []


def test_wrong_settings_are_refused(make):
    with pytest.raises(ValueError, match="unknown SimplerEnv task 'widowx_juggle'; known tasks: widowx_spoon"):
        make("widowx_juggle")
    with pytest.raises(ValueError, match=r"low=.* must be 6 finite numbers"):
        simpler.SimplerEnv("widowx_stack_cube", low=[0.0] * 7, high=HIGH)


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "simpler_env", None)
    with pytest.raises(ImportError, match=r"recurse-submodules https://github\.com/simpler-env/SimplerEnv"):
        simpler.SimplerEnv("widowx_stack_cube", low=LOW, high=HIGH)


def test_it_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "simpler_env.py").write_text(
        "import types\nimport numpy as np\n"
        "def make(task, obs_mode):\n"
        "    obs = {'image': {'3rd_view_camera': {'rgb': np.zeros((480, 640, 3), np.uint8)}}}\n"
        "    world = types.SimpleNamespace(get_language_instruction=lambda: 'stack', is_final_subtask=lambda: True)\n"
        "    step = lambda action: (obs, 0, True, False, {'episode_stats': {}})\n"
        "    return types.SimpleNamespace(unwrapped=world, reset=lambda seed, options: (obs, {}), step=step)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    env = simpler.simpler_env("widowx_stack_cube", low=LOW, high=HIGH)
    env.reset(layout=3)
    env.step(act())
    assert env.info["success"]
    assert env.observe().images["static"].shape == (480, 640, 3)
    env.close()


def test_quantiles_are_read_from_upstreams_statistics(shared_data, tmp_path):
    low, high = simpler.read_quantiles(shared_data / "upstream" / "dataset_statistics_bridge.json")
    assert low.shape == high.shape == (6,)
    np.testing.assert_allclose(low[0], -0.02872725307941437)
    assert (low < high).all()
    broken = tmp_path / "statistics.json"
    broken.write_text(json.dumps({"action": {"q01": [0.0] * 7}}))
    with pytest.raises(ValueError, match=r"lacks action\.q99"):
        simpler.read_quantiles(broken)
    for content, message in (("[1]", "holds a list"), ('{"action": 3}', r"action\.q01"), ("{", "is not JSON")):
        broken.write_text(content)
        with pytest.raises(ValueError, match=f"statistics.json .*{message}"):
            simpler.read_quantiles(broken)
    broken.write_bytes(b"\xef\xbb\xbf" + json.dumps({"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}).encode())
    assert simpler.read_quantiles(broken)[1].tolist() == [1.0] * 6
