"""Plans played on the real simulator's stage; a made-up simulator stands in for it, one tool and one drawer."""

from __future__ import annotations

import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.envs.calvin import stage, walking
from robovlms_jax.playtable.experts import waypoints
from tests.envs.calvin import fake_stage

NOWHERE = np.zeros((1, 7))


def plan_to(*points: tuple[float, float, float]) -> walking.Plan:
    count = len(points)
    return walking.Plan(
        np.array(points), np.zeros((count, 3)), -np.ones(count), np.zeros(count, int), np.full(count, 0.8)
    )


@pytest.fixture
def table() -> stage.Stage:
    return fake_stage.FakeStage()


def test_a_task_is_played_until_the_checker_calls_it_done_and_a_few_steps_more(table):
    table.begin(fake_stage.ROBOT_OBS, fake_stage.SCENE_OBS, np.zeros(3))
    played, after = table.play("open_drawer", plan_to((0.0, -0.2, 0.5), (0.0, -0.4, 0.5)), NOWHERE, 60, 2)
    drawer = [*played.scene_obs[:, 1], after["drawer"]]
    assert played.done and np.flatnonzero(np.array(drawer) > 0.12)[0] == played.steps - 2
    assert len(played.wanted) == len(played.bodies) == played.steps < 40
    # no action is larger than asked for, and the poses are those that the actions add up to
    assert np.abs(played.wanted[:, :6]).max() == pytest.approx(0.8)
    start = fake_stage.ROBOT_OBS[:3]
    np.testing.assert_allclose(played.targets[:, :3], start + 0.02 * np.cumsum(played.wanted[:, :3], 0), atol=1e-9)


def test_a_task_that_does_not_succeed_ends_soon_after_the_last_waypoint(table):
    table.begin(fake_stage.ROBOT_OBS, fake_stage.SCENE_OBS, np.zeros(3))
    played, _ = table.play("turn_on_led", plan_to((0.05, 0.0, 0.5)), NOWHERE, 200, 2)
    assert not played.done and played.steps < 30
    played, _ = table.play("turn_on_led", plan_to((9.0, 0.0, 0.5), (0.0, 0.0, 0.5)), NOWHERE, 50, 2)
    assert not played.done and played.steps == 50


def test_a_kick_moves_the_hand_and_what_is_kept_is_the_experts_wish(table):
    table.begin(fake_stage.ROBOT_OBS, fake_stage.SCENE_OBS, np.zeros(3))
    kick = np.array([[0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0]])
    played, _ = table.play("open_drawer", plan_to((0.3, 0.0, 0.5)), kick, 12, 0)
    assert played.robot_obs[1, 2] > 0.505  # kicked upwards
    assert played.wanted[0, 2] == 0.0 and played.wanted[1, 2] < 0  # and back is where it wants to go


def test_the_hand_begins_where_it_was_moved_to(table):
    offset = np.array([0.05, -0.02, 0.0])
    situation = table.begin(fake_stage.ROBOT_OBS, fake_stage.SCENE_OBS, offset)
    np.testing.assert_allclose(situation["robot_obs"][:3], fake_stage.ROBOT_OBS[:3] + offset, atol=1e-6)
    np.testing.assert_allclose(situation["target_position"], situation["robot_obs"][:3], atol=1e-6)
    unmoved = table.begin(fake_stage.ROBOT_OBS, fake_stage.SCENE_OBS, np.zeros(3))
    np.testing.assert_array_equal(unmoved["robot_obs"][:3], fake_stage.ROBOT_OBS[:3])


def test_what_was_played_is_shown_again_from_the_states_that_were_kept(table):
    table.begin(fake_stage.ROBOT_OBS, fake_stage.SCENE_OBS, np.zeros(3))
    played, _ = table.play("open_drawer", plan_to((0.0, -0.2, 0.5), (0.0, -0.4, 0.5)), NOWHERE, 60, 2)
    rendered = table._env.rendered
    images = table.render(played.bodies)
    assert rendered == 0 and table._env.rendered == len(played.bodies)  # nothing before it is asked for
    seen = images["static"][:, 0, 0, 0]  # the fake paints its drawer, in millimetres
    np.testing.assert_array_equal(seen, np.round(1000 * played.scene_obs[:, 1]))
    assert images["wrist"].shape == (played.steps, 84, 84, 3)


class LaggingLink:
    """calvin_env's wrist camera and its PyBullet, which tells where the link was before the last step."""

    robot_uid, gripper_cam_link = 0, 9

    def __init__(self, table):
        self.asked, sim = types.ModuleType("made_up_camera"), table._env
        self.where, self.before, self.step, self.get_obs = sim.tool.copy(), sim.tool.copy(), sim.step, sim.get_obs
        sim.step, sim.get_obs, sim.getLinkState = self.moved, self.seen, self.getLinkState
        self.sim, self.asked.p = sim, sim

    def moved(self, action):
        self.before = self.sim.tool.copy()
        self.step(action)
        self.where = self.sim.tool.copy()

    def getLinkState(self, bodyUniqueId, linkIndex, physicsClientId):
        shown_again = not np.array_equal(self.where, self.sim.tool)  # joints were set, which brings links with them
        return (self.sim.tool if shown_again else self.before)[:3].tolist(), [0.0, 0.0, 0.0, 1.0]

    def seen(self):
        position, _ = self.asked.p.getLinkState(bodyUniqueId=0, linkIndex=9, physicsClientId=0)
        obs = self.get_obs()
        obs["rgb_obs"]["rgb_gripper"] = np.full((84, 84, 3), round(-500 * position[1]), np.uint8)
        return obs


def test_the_wrist_camera_shows_again_what_it_showed_then(table, monkeypatch):
    """Its link was told from before the simulator's last step; recordings had it where the joints are."""
    table.begin(fake_stage.ROBOT_OBS, fake_stage.SCENE_OBS, np.zeros(3))
    camera = LaggingLink(table)
    monkeypatch.setitem(sys.modules, LaggingLink.__module__, camera.asked)
    table._cameras, kept, seen = [camera], [], []
    for _ in range(6):
        kept.append(table._bodies())
        seen.append(table.observe().images["wrist"][0, 0, 0])
        table.step(np.array([0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0]))
    shown = table.render(np.array(kept))["wrist"][:, 0, 0, 0]
    assert shown.tolist() == [0, 0, 10, 20, 30, 40] == seen
    assert camera.asked.p is camera.sim  # and nothing else is told so later


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), waypoint=st.integers(0, 2), waited=st.integers(0, 14))
def test_the_real_simulator_is_walked_on_by_the_rule_of_playtable(seed, waypoint, waited):
    rng = np.random.default_rng(seed)
    near = rng.choice([0.0, 0.001, 0.1])
    position, euler = rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    route = walking.Plan(position, euler, np.array([1.0, -1.0, 1.0]), np.array([0, 2, 9]), rng.uniform(0.5, 1, 3))
    target = position[waypoint] + near * rng.normal(size=3), euler[waypoint] + near * rng.normal(size=3)
    hand = target[0] + rng.choice([0.0, 0.02]) * rng.normal(size=3)
    action, then, spent = walking.act(route, waypoint, waited, target, hand)
    state = types.SimpleNamespace(target_position=target[0], target_euler=target[1], position=hand)
    in_jax, progress = waypoints.act(
        walking.Plan(*(jnp.asarray(field) for field in route)),
        waypoints.Progress(jnp.int32(waypoint), jnp.int32(waited)),
        state,
    )
    np.testing.assert_allclose(action, in_jax, atol=1e-5)
    assert (then, spent) == (progress.waypoint, progress.waited)
