"""The real simulator as a stage: plans of waypoints are played on it without pictures, and what was played is rendered
afterwards, from states that were kept.

It runs in the simulator's own process, so that a step costs no message: NumPy and PyBullet, no jax.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from robovlms_jax.actions import frames
from robovlms_jax.envs.calvin import adapter, tasks, walking

_SCALE = np.array([*[frames.TRANSLATION_M] * 3, *[frames.ROTATION_RAD] * 3, 1.0])
KICK_STEPS, KICK_EVERY = 4, 10
"""Steps that a disturbance lasts, and from one to the next."""
_IDLE = 15  # steps at the last waypoint after which nothing more will happen
_POSE = 7  # numbers of a position and a quaternion
_SETTLE = 12  # steps to reach a start that is moved away from the resting pose


class Played(NamedTuple):
    """One task as an expert played it; leading axis T.

    done: the checker called it done. wanted: float64[T, 7], what the expert wanted. targets: float64[T, 7], the pose
    that the wanted action asks for, and the gripper. robot_obs: float64[T, 15] and scene_obs: float64[T, 24] before
    each step. bodies: float64[T, N], what `Stage.render` needs to show the same. steps: until it was done or given up.
    """

    done: bool
    wanted: np.ndarray
    targets: np.ndarray
    robot_obs: np.ndarray
    scene_obs: np.ndarray
    bodies: np.ndarray
    steps: int

    @classmethod
    def join(cls, parts: Sequence[Played]) -> Played:
        """One task that took several plans."""
        columns = ("wanted", "targets", "robot_obs", "scene_obs", "bodies")
        joined = (np.concatenate([getattr(part, column) for part in parts]) for column in columns)
        return cls(parts[-1].done, *joined, sum(part.steps for part in parts))


class _Told:
    """PyBullet, but for one link's pose."""

    def __init__(self, pybullet: Any, link: int, pose: tuple[Sequence[float], Sequence[float]]):
        self._pybullet, self._link, self._pose = pybullet, link, pose

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pybullet, name)

    def getLinkState(self, bodyUniqueId: int, linkIndex: int, **options: Any) -> Any:
        if linkIndex == self._link:
            return self._pose
        return self._pybullet.getLinkState(bodyUniqueId, linkIndex, **options)


class Stage(adapter.CalvinEnv):
    """`adapter.CalvinEnv`, and plans played on it."""

    def begin(self, robot_obs: np.ndarray, scene_obs: np.ndarray, offset: np.ndarray) -> Mapping[str, Any]:
        """Reset, and move the hand by `offset` float[3] (m), which is not recorded; returns `situation`."""
        self.reset(robot_obs, scene_obs)
        scaled = np.asarray(offset, np.float64) / frames.TRANSLATION_M
        parts = max(int(np.ceil(np.abs(scaled).max())), 0)
        for step in range(parts + _SETTLE if parts else 0):
            share = 1.0 / parts if step < parts else 0.0
            self.step(np.array([*(share * scaled), 0.0, 0.0, 0.0, robot_obs[14]]))
        return self.situation()

    def situation(self) -> Mapping[str, Any]:
        """`info`, and the pose that relative actions are added to: target_position and target_euler, float64[3]."""
        robot = self._env.robot
        target = {"target_position": np.array(robot.target_pos), "target_euler": np.array(robot.target_orn)}
        return {**self.info, **target}

    def play(
        self,
        task: str,
        plan: Sequence[np.ndarray],
        kicks: np.ndarray,
        max_steps: int,
        hold: int,
        start: tasks.SceneInfo | None = None,
    ) -> tuple[Played, Mapping[str, Any]]:
        """Play a task's plan until the checker calls it done, and `hold` steps more.

        Args:
          plan: the fields of `walking.Plan`. kicks: float[M, 7], added to the actions of the first KICK_STEPS of every
            KICK_EVERY steps; the expert's wish, without it, is what is kept.
          max_steps: until the task is done. hold: to go on after that.
          start: `info` when the task began, if that was before this plan.
        Returns:
          what was played, and the `situation` after it.
        """
        route = walking.Plan(*(np.asarray(field) for field in plan))
        number, start = list(tasks.TASKS).index(task), start or self.info
        waypoint = waited = idle = 0
        done_at, rows = None, []
        for step in range(max_steps + hold):
            robot, before = self._env.robot, self._env.get_state_obs()
            target = np.array(robot.target_pos), np.array(robot.target_orn)
            wanted, waypoint, waited = walking.act(route, waypoint, waited, target, before["robot_obs"][:3])
            scaled = np.concatenate([*target, [0.0]]) + wanted * _SCALE
            scaled[3:6] = np.mod(scaled[3:6] + np.pi, 2 * np.pi) - np.pi
            rows.append((wanted, scaled, before["robot_obs"], before["scene_obs"], self._bodies()))
            kick = kicks[step // KICK_EVERY % len(kicks)] if step % KICK_EVERY < KICK_STEPS else 0.0
            self.step(np.append(np.clip(wanted + kick, -1.0, 1.0)[:6], wanted[6]))
            if done_at is None and tasks.conditions(start, self.info, as_released=True)[number]:
                done_at = step
            if done_at is not None and step >= done_at + hold:
                break
            idle = idle + 1 if waypoint == len(route.speed) - 1 else 0
            if done_at is None and (idle > _IDLE or step + 1 >= max_steps):
                break
        played = Played(done_at is not None, *(np.array(column) for column in zip(*rows)), len(rows))
        return played, self.situation()

    def render(self, bodies: np.ndarray) -> dict[str, np.ndarray]:
        """Pictures of kept states float[T, N], as `observe` showed them then: static uint8[T, 200, 200, 3] and wrist
        uint8[T, 84, 84, 3]."""
        images: dict[str, list[np.ndarray]] = {}
        for row in bodies:
            self._show(row)
            with self._wrist_camera_at(row[len(row) - _POSE :]):
                for camera, image in self.observe().images.items():
                    images.setdefault(camera, []).append(image)
        return {camera: np.stack(each) for camera, each in images.items()}

    def _bodies(self) -> np.ndarray:
        """float64[N]: every joint of arm and table, position and quaternion of the blocks, the two lights, and from
        where the wrist camera looks. That is not where the joints have it: PyBullet tells a link's pose as it was
        before the last 1/240 s of its physics, some 1.5 mm and 0.4 degrees away while the hand moves."""
        p, client = self._env.p, self._env.cid
        parts = []
        for body in (self._env.robot.robot_uid, self._table.uid):
            states = p.getJointStates(body, range(p.getNumJoints(body, physicsClientId=client)), physicsClientId=client)
            parts += [state[0] for state in states]
        for block in self._env.scene.movable_objects:
            for numbers in p.getBasePositionAndOrientation(block.uid, physicsClientId=client):
                parts += numbers
        parts += [light.get_state() for light in self._env.scene.lights]
        for camera in self._wrist_cameras():
            state = p.getLinkState(camera.robot_uid, camera.gripper_cam_link, physicsClientId=client)
            parts += [*state[0], *state[1]]
        return np.array(parts)

    def _show(self, row: np.ndarray) -> None:
        """Put everything where `_bodies` saw it, without a step of physics."""
        p, client, numbers = self._env.p, self._env.cid, iter(np.asarray(row, np.float64).tolist())
        for body in (self._env.robot.robot_uid, self._table.uid):
            for joint in range(p.getNumJoints(body, physicsClientId=client)):
                p.resetJointState(body, joint, next(numbers), physicsClientId=client)
        for block in self._env.scene.movable_objects:
            pose = [next(numbers) for _ in range(7)]
            p.resetBasePositionAndOrientation(block.uid, pose[:3], pose[3:], physicsClientId=client)
        for light in self._env.scene.lights:
            light.reset(int(next(numbers)))

    def _wrist_cameras(self) -> list[Any]:
        return [camera for camera in self._cameras if hasattr(camera, "gripper_cam_link")]

    @contextlib.contextmanager
    def _wrist_camera_at(self, pose: np.ndarray) -> Iterator[None]:
        """The wrist camera asks for its link's pose; inside it is told this one: position and quaternion, float[7]."""
        numbers = pose.tolist()
        with contextlib.ExitStack() as stack:
            for camera in self._wrist_cameras():
                module = sys.modules[type(camera).__module__]
                told = _Told(module.p, camera.gripper_cam_link, (numbers[:3], numbers[3:]))
                stack.callback(setattr, module, "p", module.p)
                module.p = told
            yield

    @property
    def _table(self) -> Any:
        return self._env.scene.fixed_objects[0]
