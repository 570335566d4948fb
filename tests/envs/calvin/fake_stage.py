"""A made-up calvin_env for `stage.Stage`: a tool that goes where it is told, and a drawer that it pulls out.

It has the surface that the stage relies on: robot, scene, cameras, and PyBullet's calls for joints and poses.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np

from robovlms_jax.envs import vector
from robovlms_jax.envs.calvin import initial_states, stage, tasks

ROBOT_OBS = initial_states.INITIAL_ROBOT_OBS.copy()
ROBOT_OBS[:6] = 0.0, 0.0, 0.5, 0.0, 0.0, 0.0
SCENE_OBS = np.zeros(24)
_HANDLE_Y = -0.2


class Simulator:
    """calvin_env's PlayTableSimEnv, as far as it is used."""

    cid = 0

    def __init__(self):
        self.p, self.rendered = self, 0
        self.tool, self.drawer, self.cameras = ROBOT_OBS[:6].copy(), 0.0, []
        self.robot = types.SimpleNamespace(robot_uid=0, target_pos=self.tool[:3], target_orn=self.tool[3:])
        light = types.SimpleNamespace(get_state=lambda: 0, reset=lambda state: None)
        blocks = [types.SimpleNamespace(uid=2 + i) for i in range(3)]
        self.scene = types.SimpleNamespace(
            fixed_objects=[types.SimpleNamespace(uid=1)], movable_objects=blocks, lights=[light, light]
        )

    def reset(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> None:
        self.tool, self.drawer = robot_obs[:6].copy(), float(scene_obs[1])
        self.robot.target_pos, self.robot.target_orn = self.tool[:3].copy(), self.tool[3:].copy()

    def step(self, action: np.ndarray) -> None:
        self.robot.target_pos = self.robot.target_pos + 0.02 * action[:3]
        self.robot.target_orn = self.robot.target_orn + 0.05 * action[3:6]
        self.tool = np.concatenate([self.robot.target_pos, self.robot.target_orn])
        self.drawer = float(np.clip(max(self.drawer, _HANDLE_Y - self.tool[1]), 0.0, 0.22))

    def get_state_obs(self) -> dict[str, np.ndarray]:
        scene_obs = SCENE_OBS.copy()
        scene_obs[1] = self.drawer
        return {"robot_obs": np.concatenate([self.tool, ROBOT_OBS[6:]]), "scene_obs": scene_obs}

    def get_obs(self) -> dict[str, Any]:
        self.rendered += 1
        static = np.full((200, 200, 3), round(1000 * self.drawer), np.uint8)
        return self.get_state_obs() | {"rgb_obs": {"rgb_static": static, "rgb_gripper": static[:84, :84]}}

    # PyBullet: body 0 is the robot (its pose stands in for joints), 1 the table (its one joint is the drawer)
    def getNumJoints(self, body: int, physicsClientId: int) -> int:
        return 6 if body == 0 else 1

    def getJointStates(self, body: int, joints: range, physicsClientId: int) -> list[tuple[float]]:
        return [(float(x),) for x in (self.tool if body == 0 else [self.drawer])]

    def resetJointState(self, body: int, joint: int, value: float, physicsClientId: int) -> None:
        if body == 0:
            self.tool[joint] = value
        else:
            self.drawer = value

    def getBasePositionAndOrientation(self, body: int, physicsClientId: int) -> tuple:
        return (0.1 * body, 0.0, 0.46), (0.0, 0.0, 0.0, 1.0)

    def resetBasePositionAndOrientation(self, *pose: Any, physicsClientId: int) -> None:
        pass


class FakeStage(stage.Stage):
    """A `stage.Stage` on it."""

    def __init__(self):
        self._env, self._absolute, self._dressing = Simulator(), False, None
        self._cameras = ["both"]
        self.name, self.about = "CALVIN (made up)", {}

    @property
    def info(self) -> dict[str, Any]:
        contacts = np.zeros((4, len(tasks.BODIES)), bool)
        contacts[1:, tasks.BODIES.index("base")] = True
        state = self._env.get_state_obs()
        return state | {
            "slider": np.float64(0.0),
            "drawer": np.float64(self._env.drawer),
            "lightbulb": np.int64(0),
            "led": np.int64(0),
            "block_position": np.array([[0.1 * i, 0.0, 0.46] for i in range(3)]),
            "block_rotation": np.tile([0.0, 0.0, 0.0, 1.0], (3, 1)),
            "block_velocity": np.zeros((3, 6)),
            "contacts": contacts,
        }


class FakeProcess:
    """What `process.ProcessEnv` is to its caller, without a process."""

    def __init__(self):
        self.stage, self.answers, self.closed = FakeStage(), [], False

    def send(self, method: str, *args: Any) -> None:
        self.answers.append(vector.perform(self.stage, method, *args))

    def receive(self) -> Any:
        return self.answers.pop(0)

    def close(self) -> None:
        self.closed = True
