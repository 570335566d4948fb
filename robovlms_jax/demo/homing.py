"""The way back to where tasks begin: let go, away from what was touched, up, and home. Scripted, no policy."""

from __future__ import annotations

import numpy as np

from robovlms_jax.control.robot import CALVIN
from robovlms_jax.envs.calvin.initial_states import INITIAL_ROBOT_OBS

HOME = INITIAL_ROBOT_OBS[:6]
"""float64[6]: xyz (m) and Euler angles (rad) of the tool."""
_NEAR_M, _NEAR_RAD = 0.02, 0.15
_LET_GO_TICKS = 8
_AWAY_M = np.array([0.0, -0.07, 0.05])
"""Out of the cabinet's leaning front and up: no handle holds the open hand back that way."""
_MAX_TICKS = 150


def is_home(robot_obs: np.ndarray) -> bool:
    position, turn = _errors(robot_obs[:6], HOME)
    return bool(np.linalg.norm(position) < _NEAR_M and np.abs(turn).max() < _NEAR_RAD)


class Homing:
    """One way back; robot_obs: float[15] where it begins."""

    def __init__(self, robot_obs: np.ndarray):
        here = np.asarray(robot_obs[:6], np.float64)
        away = np.concatenate([here[:3] + _AWAY_M, here[3:]])
        above = np.concatenate([away[:2], [max(away[2], HOME[2])], HOME[3:]])
        self._goals, self._ticks = [away, above, HOME], 0

    def action(self, robot_obs: np.ndarray, target: np.ndarray) -> np.ndarray | None:
        """The action float64[7] of this tick; None: it is there, or there is no getting there.

        Args:
          robot_obs: float[15], where the robot is.
          target: float[6], where it was sent.
        """
        self._ticks += 1
        if self._ticks <= _LET_GO_TICKS:
            return np.array([0, 0, 0, 0, 0, 0, 1.0])
        while self._goals and self._reached(robot_obs, self._goals[0], last=len(self._goals) == 1):
            self._goals.pop(0)
        if not self._goals or self._ticks > _MAX_TICKS:
            return None
        move, turn = _errors(target, self._goals[0])
        metre, radian = CALVIN.action[0].measure[0], CALVIN.action[3].measure[0]
        # Slowed together, so that the hand keeps to the straight line.
        move, turn = (part / max(np.abs(part).max(), 1.0) for part in (move / metre, turn / radian))
        return np.array([*move, *turn, 1.0])

    @staticmethod
    def _reached(robot_obs: np.ndarray, goal: np.ndarray, *, last: bool) -> bool:
        if last:
            return is_home(robot_obs)
        return bool(np.linalg.norm(_errors(robot_obs[:6], goal)[0]) < _NEAR_M)


def _errors(here: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is missing: float64[3], m, and float64[3], rad, the short way round."""
    difference = np.asarray(goal, np.float64) - np.asarray(here, np.float64)
    return difference[:3], (difference[3:] + np.pi) % (2 * np.pi) - np.pi
