"""A table without physics and a policy without parameters: what a stage and a page need of them, at once."""

from __future__ import annotations

import itertools

import numpy as np

from robovlms_jax.control.execution import Execution
from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.demo.sentences import Sentences
from robovlms_jax.demo.stage import Stage
from robovlms_jax.demo.world import Frozen, Start
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.envs.calvin.initial_states import INITIAL_ROBOT_OBS

TASKS = ("open_drawer", "turn_on_led", "turn_off_led")


class FakeWorld:
    """The hand goes where it is sent. The LED changes when the hand has come 10 cm down; the drawer is open already."""

    table = "D"
    bad = None
    """What `step` raises, once set."""

    def reset(self, start):
        self.put(start.table, INITIAL_ROBOT_OBS, np.zeros(24))

    def put(self, table, robot_obs, scene_obs):
        self.robot_obs, self.scene_obs = robot_obs.astype(np.float32), scene_obs.astype(np.float32)
        self.led, self.steps, self.observed = 0, [], 0

    def step(self, action):
        if self.bad:
            raise self.bad
        self.robot_obs = self.robot_obs.copy()
        self.robot_obs[:3] += 0.02 * action[:3]
        self.robot_obs[3:6] += 0.05 * action[3:6]
        self.robot_obs[14] = action[6]
        self.steps.append(np.array(action))
        if self.robot_obs[2] < INITIAL_ROBOT_OBS[2] - 0.1:
            self.led = 1

    def observe(self):
        self.observed += 1
        return Observation({"static": np.zeros((8, 8, 3), np.uint8)}, self.robot_obs)

    @property
    def info(self):
        return {
            "slider": np.float32(0),
            "drawer": np.float32(0.22),
            "lightbulb": np.int32(0),
            "led": np.int32(self.led),
            "block_position": np.zeros((3, 3), np.float32),
            "block_rotation": np.tile(np.array([0, 0, 0, 1], np.float32), (3, 1)),
            "block_velocity": np.zeros((3, 6), np.float32),
            "contacts": np.zeros((4, 13), bool),
            "robot_obs": self.robot_obs,
            "scene_obs": self.scene_obs,
        }

    @property
    def target(self):
        return self.robot_obs[:6]

    @property
    def frozen(self):
        return Frozen("D", len(self.steps))

    def possible(self, names):
        return [name for name in names if name == ("turn_off_led" if self.led else "turn_on_led")]


class Down:
    """Goes down, `speed` of the largest step each tick, in chunks of four. bad: what `act` raises, once set."""

    def __init__(self, speed=0.5):
        self.speed, self.bad, self.told, self.asked = speed, None, [], 0

    def reset(self, instruction):
        self.told.append(instruction)

    def act(self, observation):
        self.asked += 1
        if self.bad:
            raise self.bad
        actions = np.zeros((4, 7), np.float32)
        actions[:, 2], actions[:, 6] = -self.speed, -1
        interval = np.full((4, 7), 0.1, np.float32)
        return ActionChunk(actions, np.linspace(0.1, 0.4, 4), interval, 0.9)


def make_stage(policy=None, max_steps=60):
    """(stage, world, policy)"""
    world, policy = FakeWorld(), policy or Down()
    known = Sentences({name: tasks.TASKS[name].phrasings for name in TASKS})
    scenes = (Start(table, {}) for table in itertools.cycle("DA"))
    stage = Stage(world, policy, known, scenes, execution=Execution("receding", horizon=2), max_steps=max_steps)
    return stage, world, policy


def play(stage, ticks):
    """The facts of the last of so many ticks."""
    for _ in range(ticks):
        snapshot = stage.tick()
    return snapshot.facts
